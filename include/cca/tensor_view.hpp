#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <type_traits>

#include "detail/base/numbers.hpp"
#include "detail/base/refuse.hpp"
#include "detail/base/target.hpp"

namespace cca { inline namespace CCA_TARGET {

/// A non-owning view of a tensor: a pointer, the extents, and the strides in elements. For attention operands the
/// extents are `[batch, heads, length, dim]` whatever the order in memory. Outer strides are free (0 broadcasts,
/// negative ones run backwards); the stride of the last dimension is 1. A view is trivially copyable; its constness is
/// that of `T`.
///
/// Sequences may have lengths of their own: sequence b is then the tokens `[begins[b], ends[b])` of its entry of the batch,
/// and the extent `length` bounds all lengths. `packed` and `with_lengths` make such views. In a call every sequence is as
/// if called alone, to the bit: its first token has position 0, and what lies between the sequences is neither read nor
/// written. The arrays are the caller's, as the elements are: they stay as they are until the call has returned.
template <class T, std::size_t Rank = 4>
struct tensor_view {
  using element_type = T;                    ///< constant where the view only reads
  static constexpr std::size_t rank = Rank;  ///< 4, or 3 for one number per row

  T* data = nullptr;                        ///< the element whose indices are all 0
  std::array<std::int64_t, Rank> extent{};  ///< none below 0
  std::array<std::int64_t, Rank> stride{};  ///< elements from one index to the next
  const std::int64_t* begins = nullptr;     ///< `[batch]`, with `ends`; null: every sequence begins with token 0
  const std::int64_t* ends = nullptr;       ///< `[batch]`; null: the sequences are all as long as the extent says

  /// A view of mutable elements serves where constant ones are asked for.
  constexpr operator tensor_view<const T, Rank>() const requires(!std::is_const_v<T>) {
    return {data, extent, stride, begins, ends};
  }

  /// @{
  /// An extent by its name.
  [[nodiscard]] constexpr std::int64_t batch() const { return extent[0]; }
  [[nodiscard]] constexpr std::int64_t heads() const { return extent[1]; }
  [[nodiscard]] constexpr std::int64_t length() const { return extent[2]; }
  [[nodiscard]] constexpr std::int64_t dim() const requires(Rank == 4) { return extent[3]; }
  /// @}

  /// Whether sequences have lengths of their own.
  [[nodiscard]] constexpr bool has_lengths() const { return ends != nullptr; }
  /// Tokens of sequence `b`; `length()` is the most that one has.
  [[nodiscard]] constexpr std::int64_t length(std::int64_t b) const {
    return has_lengths() ? ends[b] - first_token(b) : extent[2];
  }

  /// Whether there is no element.
  [[nodiscard]] constexpr bool empty() const {
    for (const std::int64_t e : extent)
      if (e == 0) return true;
    return false;
  }

  /// The first element of the row of token `i` of sequence `b`: `dim` contiguous elements (in a rank-3 view, one).
  [[nodiscard]] constexpr T* row(std::int64_t b, std::int64_t h, std::int64_t i) const requires(Rank >= 3) {
    return data + b * stride[0] + h * stride[1] + (first_token(b) + i) * stride[2];
  }

  /// The same elements, of which sequence `b` has the first `lengths[b]` tokens: a batch that is padded behind.
  /// @throws std::invalid_argument  where there is not one length for each sequence
  [[nodiscard]] constexpr tensor_view with_lengths(std::span<const std::int64_t> lengths) const {
    if (static_cast<std::int64_t>(lengths.size()) != extent[0])
      detail::refuse("lengths", {lengths.size(), " lengths"}, {"one for each of ", extent[0], " sequences"});
    return {data, extent, stride, nullptr, lengths.data()};
  }

  /// Sequence `b` alone, a batch of one.
  [[nodiscard]] constexpr tensor_view sequence(std::int64_t b) const requires(Rank >= 3) {
    tensor_view view{data != nullptr ? row(b, 0, 0) : nullptr, extent, stride};
    view.extent[0] = 1;
    view.extent[2] = length(b);
    return view;
  }

  /// The tokens `[first, first + count)` of every head: what is filled of a buffer, the newest token, a chunk of a prompt.
  /// @throws std::invalid_argument  where they do not lie in `[0, length)`, or sequences have lengths of their own
  [[nodiscard]] constexpr tensor_view slice(std::int64_t first, std::int64_t count) const requires(Rank >= 3) {
    if (has_lengths())
      detail::refuse("slice of tokens", {"a view with lengths per sequence"}, {"one without, such as `sequence(b)`"});
    return part<2>("slice of tokens", first, count);
  }

  /// The heads `[first, first + count)`: queries, keys or values among the heads of a buffer that holds all three.
  /// @throws std::invalid_argument  where they do not lie in `[0, heads)`
  [[nodiscard]] constexpr tensor_view slice_heads(std::int64_t first, std::int64_t count) const requires(Rank >= 3) {
    return part<1>("slice of heads", first, count);
  }

 private:
  [[nodiscard]] constexpr std::int64_t first_token(std::int64_t b) const { return begins != nullptr ? begins[b] : 0; }

  template <std::size_t Dimension>
  [[nodiscard]] constexpr tensor_view part(const char* what, std::int64_t first, std::int64_t count) const {
    const std::int64_t all = extent[Dimension];
    if (!(0 <= first && first <= all && 0 <= count && count <= all - first))
      detail::refuse(what, {count, " from ", first, " on"}, {"a part of [0, ", all, ")"});
    tensor_view view = *this;
    if (data != nullptr && count > 0) view.data += first * stride[Dimension];
    view.extent[Dimension] = count;
    return view;
  }
};

/// Log-sum-exp of each query's scores: `[batch, heads, length]`, natural logarithm. A default-constructed view means
/// that it is not wanted.
template <class T = float>
using lse_view = tensor_view<T, 3>;

static_assert(std::is_trivially_copyable_v<tensor_view<float>>, "views are passed by value, also to other threads");

/// `[batch][heads][length][dim]` in memory, as PyTorch's attention takes it.
template <class T>
[[nodiscard]] constexpr tensor_view<T> bhsd(T* data, std::int64_t batch, std::int64_t heads, std::int64_t length,
                                            std::int64_t dim) {
  return {data, {batch, heads, length, dim}, {heads * length * dim, length * dim, dim, 1}};
}

/// `[batch][length][heads][dim]` in memory, as FlashAttention takes it. Note the order of the arguments.
template <class T>
[[nodiscard]] constexpr tensor_view<T> bshd(T* data, std::int64_t batch, std::int64_t length, std::int64_t heads,
                                            std::int64_t dim) {
  return {data, {batch, heads, length, dim}, {length * heads * dim, dim, heads * dim, 1}};
}

/// `[batch][heads][length]` in memory: log-sum-exps, or the counts `seen` of a far context.
template <class T>
[[nodiscard]] constexpr lse_view<T> bhs(T* data, std::int64_t batch, std::int64_t heads, std::int64_t length) {
  return {data, {batch, heads, length}, {heads * length, length, 1}};
}

namespace detail {

/// The longest of the sequences that lie between neighbouring offsets.
constexpr std::int64_t longest_sequence(std::span<const std::int64_t> offsets) {
  if (offsets.empty()) refuse("offsets", {"none"}, {"batch + 1 of them, the first of which is 0 where nothing precedes"});
  std::int64_t longest = 0;
  for (std::size_t b = 0; b + 1 < offsets.size(); ++b) longest = larger(longest, offsets[b + 1] - offsets[b]);
  return longest;
}

}  // namespace detail

/// Sequences one after the other, `[tokens][heads][dim]` in memory: sequence b is the tokens
/// `[offsets[b], offsets[b + 1])`. Others call the `batch + 1` offsets `cu_seqlens`.
template <class T>
[[nodiscard]] constexpr tensor_view<T> packed(T* data, std::span<const std::int64_t> offsets, std::int64_t heads,
                                              std::int64_t dim) {
  const std::int64_t longest = detail::longest_sequence(offsets);
  return {data,
          {static_cast<std::int64_t>(offsets.size()) - 1, heads, longest, dim},
          {0, dim, heads * dim, 1},
          offsets.data(),
          offsets.data() + 1};
}

/// The same of one number per row, `[heads][tokens]` in memory, with as many tokens as the last offset says. For
/// `[tokens][heads]` the strides are `{0, 1, heads}`.
template <class T>
[[nodiscard]] constexpr lse_view<T> packed(T* data, std::span<const std::int64_t> offsets, std::int64_t heads) {
  const std::int64_t longest = detail::longest_sequence(offsets);
  return {data,
          {static_cast<std::int64_t>(offsets.size()) - 1, heads, longest},
          {0, offsets.back(), 1},
          offsets.data(),
          offsets.data() + 1};
}

/// A row-major Eigen matrix, map or block, one token per row, as one head of one sequence: `[1, 1, rows, cols]`.
template <class Matrix>
[[nodiscard]] constexpr auto matrix(Matrix&& m) {
  static_assert(std::remove_cvref_t<Matrix>::IsRowMajor,
                "a view's rows are contiguous: store the matrix in row-major order");
  const std::int64_t rows = m.rows(), columns = m.cols(), stride = m.outerStride();
  return tensor_view<std::remove_pointer_t<decltype(m.data())>>{
      m.data(), {1, 1, rows, columns}, {rows * stride, rows * stride, stride, m.innerStride()}};
}

}}  // namespace cca::CCA_TARGET
