#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "detail/base/refuse.hpp"
#include "detail/base/target.hpp"

namespace cca { inline namespace CCA_TARGET {

/// A non-owning view of a tensor: a pointer, the extents, and the strides in elements. For attention operands the
/// extents are `[batch, heads, length, dim]` whatever the order in memory. Outer strides are free (0 broadcasts,
/// negative ones run backwards); the stride of the last dimension is 1. A view is trivially copyable; its constness is
/// that of `T`.
template <class T, std::size_t Rank = 4>
struct tensor_view {
  using element_type = T;                    ///< constant where the view only reads
  static constexpr std::size_t rank = Rank;  ///< 4, or 3 for one number per row

  T* data = nullptr;                        ///< the element whose indices are all 0
  std::array<std::int64_t, Rank> extent{};  ///< none below 0
  std::array<std::int64_t, Rank> stride{};  ///< elements from one index to the next

  /// A view of mutable elements serves where constant ones are asked for.
  constexpr operator tensor_view<const T, Rank>() const requires(!std::is_const_v<T>) { return {data, extent, stride}; }

  /// @{
  /// An extent by its name.
  [[nodiscard]] constexpr std::int64_t batch() const { return extent[0]; }
  [[nodiscard]] constexpr std::int64_t heads() const { return extent[1]; }
  [[nodiscard]] constexpr std::int64_t length() const { return extent[2]; }
  [[nodiscard]] constexpr std::int64_t dim() const requires(Rank == 4) { return extent[3]; }
  /// @}

  /// Whether there is no element.
  [[nodiscard]] constexpr bool empty() const {
    for (const std::int64_t e : extent)
      if (e == 0) return true;
    return false;
  }

  /// The first element of the row of token `i`: `dim` contiguous elements (in a rank-3 view, one).
  [[nodiscard]] constexpr T* row(std::int64_t b, std::int64_t h, std::int64_t i) const requires(Rank >= 3) {
    return data + b * stride[0] + h * stride[1] + i * stride[2];
  }

  /// The tokens `[first, first + count)` of every head: what is filled of a buffer, the newest token, a chunk of a prompt.
  /// @throws std::invalid_argument  where they do not lie in `[0, length)`
  [[nodiscard]] constexpr tensor_view slice(std::int64_t first, std::int64_t count) const requires(Rank >= 3) {
    return part<2>("slice of tokens", first, count);
  }

  /// The heads `[first, first + count)`: queries, keys or values among the heads of a buffer that holds all three.
  /// @throws std::invalid_argument  where they do not lie in `[0, heads)`
  [[nodiscard]] constexpr tensor_view slice_heads(std::int64_t first, std::int64_t count) const requires(Rank >= 3) {
    return part<1>("slice of heads", first, count);
  }

 private:
  template <std::size_t Dimension>
  [[nodiscard]] constexpr tensor_view part(const char* what, std::int64_t first, std::int64_t count) const {
    const std::int64_t all = extent[Dimension];
    if (!(0 <= first && first <= all && 0 <= count && count <= all - first))
      detail::refuse(what, detail::to_string(count) + " from " + detail::to_string(first) + " on",
                     "a part of [0, " + detail::to_string(all) + ")");
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

/// `[batch][heads][length]` in memory: log-sum-exps, or the counts of `far::seen`.
template <class T>
[[nodiscard]] constexpr lse_view<T> bhs(T* data, std::int64_t batch, std::int64_t heads, std::int64_t length) {
  return {data, {batch, heads, length}, {heads * length, length, 1}};
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
