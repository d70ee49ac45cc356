#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <type_traits>
#include <vector>

#include "call.hpp"
#include "tensor_view.hpp"

/// What the textbook takes and gives. It computes with numbers of one type, `Scalar`, whatever the elements of a
/// caller's operands are: they are converted before it begins, so that each formula is compiled once for a Scalar.
namespace cca { inline namespace CCA_TARGET { namespace reference {

/// A tensor that owns its elements, `[batch][heads][length][dim]` in memory.
template <class Scalar>
struct tensor {
  std::array<std::int64_t, 4> extent{};  ///< `[batch, heads, length, dim]`
  std::vector<Scalar> data;              ///< in this order

  /// @{
  /// Of zeros.
  tensor() = default;
  tensor(std::int64_t b, std::int64_t h, std::int64_t s, std::int64_t d)
      : extent{b, h, s, d}, data(static_cast<std::size_t>(b * h * s * d)) {}
  explicit tensor(const std::array<std::int64_t, 4>& e) : tensor(e[0], e[1], e[2], e[3]) {}
  /// @}

  /// @{
  /// All of it.
  [[nodiscard]] auto view() { return bhsd(data.data(), extent[0], extent[1], extent[2], extent[3]); }
  [[nodiscard]] auto view() const { return bhsd(data.data(), extent[0], extent[1], extent[2], extent[3]); }
  /// @}
};

/// `cca::inputs` in numbers of `Scalar`.
template <class Scalar>
struct operands {
  /// @{
  /// As there.
  tensor_view<const Scalar> query, key, value;
  lse_view<const Scalar> sink_logits{}, alibi_slopes{}, key_bias{};
  /// @}
};

/// `cca::far_context` in numbers of `Scalar`.
template <class Scalar>
struct far_operands {
  /// @{
  /// As there.
  tensor_view<const Scalar> key, value;
  lse_view<const std::int64_t> seen;
  lse_view<const Scalar> bias{};
  lse_view<const std::int64_t> positions{}, visible_from{}, visible_until{};
  far_selection selected{};
  /// @}
};

/// `cca::incoming` in numbers of `Scalar`.
template <class Scalar>
struct incoming_numbers {
  /// @{
  /// As there.
  tensor_view<const Scalar> grad_out;
  lse_view<const Scalar> grad_lse{};
  /// @}
};

/// Makes numbers of `Scalar` of elements of any type, and holds them: what it returns lives as long as it does.
template <class Scalar>
class converter {
 public:
  /// The elements of a view, of the same extents and lengths. Where they are of `Scalar` it is the view itself.
  template <class T, std::size_t Rank>
  [[nodiscard]] tensor_view<const Scalar, Rank> operator()(tensor_view<T, Rank> view) {
    if constexpr (std::is_same_v<std::remove_const_t<T>, Scalar>) {
      return view;
    } else {
      if (view.data == nullptr) return {nullptr, view.extent, view.stride};
      return converted(view);
    }
  }

  /// @{
  /// All views of an aggregate.
  template <class Query, class Key, class Value, class Sink>
  [[nodiscard]] operands<Scalar> operator()(const inputs<Query, Key, Value, Sink>& in) {
    return {(*this)(in.query),       rows(in.key, in.key_scales), rows(in.value, in.value_scales),
            (*this)(in.sink_logits), (*this)(in.alibi_slopes),    (*this)(in.key_bias)};
  }
  template <class Key, class Value, class Bias>
  [[nodiscard]] far_operands<Scalar> operator()(const far_context<Key, Value, Bias>& context) {
    return {rows(context.key, context.key_scales),
            rows(context.value, context.value_scales),
            context.seen,
            (*this)(context.bias),
            context.positions,
            context.visible_from,
            context.visible_until,
            context.selected};
  }
  template <class GradOut, class GradLse>
  [[nodiscard]] incoming_numbers<Scalar> operator()(const incoming<GradOut, GradLse>& from) {
    return {(*this)(from.grad_out), (*this)(from.grad_lse)};
  }
  /// @}

 private:
  /// Rows of 8 bits are their elements times their scales.
  template <class T>
  tensor_view<const Scalar> rows(const tensor_view<const T>& elements,
                                 [[maybe_unused]] const lse_view<const float>& scales) {
    const tensor_view<const Scalar> all = (*this)(elements);
    if constexpr (cca::detail::is_q8<T>) {
      if (elements.data == nullptr) return all;
      auto& numbers = numbers_.back();
      for (std::int64_t b = 0; b < all.batch(); ++b)
        for (std::int64_t h = 0; h < all.heads(); ++h)
          for (std::int64_t i = 0; i < all.length(b); ++i) {
            Scalar* row = numbers.data() + (all.row(b, h, i) - all.data);
            for (std::int64_t d = 0; d < all.dim(); ++d) row[d] *= static_cast<Scalar>(*scales.row(b, h, i));
          }
    }
    return all;
  }

  template <class T, std::size_t Rank>
  tensor_view<const Scalar, Rank> converted(const tensor_view<T, Rank>& view) {
    const auto [batch, heads, length] = std::array{view.batch(), view.heads(), view.length()};
    std::int64_t dim = 1;
    if constexpr (Rank == 4) dim = view.dim();
    auto& numbers = numbers_.emplace_back(static_cast<std::size_t>(batch * heads * length * dim + 1));  // never null
    const tensor_view<Scalar> rows = bhsd(numbers.data(), batch, heads, length, dim);
    for (std::int64_t b = 0; b < batch; ++b)
      for (std::int64_t h = 0; h < heads; ++h)
        for (std::int64_t i = 0; i < view.length(b); ++i)
          for (std::int64_t d = 0; d < dim; ++d) rows.row(b, h, i)[d] = static_cast<Scalar>(view.row(b, h, i)[d]);
    tensor_view<const Scalar, Rank> all{numbers.data(), view.extent};
    for (std::size_t d = 0; d < Rank; ++d) all.stride[d] = rows.stride[d];
    if (view.has_lengths()) {
      auto& lengths = lengths_.emplace_back();
      for (std::int64_t b = 0; b < batch; ++b) lengths.push_back(view.length(b));
      all.ends = lengths.data();
    }
    return all;
  }

  std::deque<std::vector<Scalar>> numbers_;
  std::deque<std::vector<std::int64_t>> lengths_;
};

namespace detail {

/// Whether some of these views have lengths per sequence.
template <class... View>
bool have_lengths(const View&... views) {
  return (views.has_lengths() || ...);
}

/// @{
/// Sequence `b` alone. Numbers may be given, for each sequence or for all.
template <class T>
lse_view<T> sequence_of(const lse_view<T>& numbers, std::int64_t b) {
  return numbers.data == nullptr ? numbers : numbers.sequence(b % numbers.batch());
}
template <class Scalar>
operands<Scalar> sequence_of(const operands<Scalar>& in, std::int64_t b) {
  return {in.query.sequence(b),
          in.key.sequence(b),
          in.value.sequence(b),
          sequence_of(in.sink_logits, b),
          sequence_of(in.alibi_slopes, b),
          sequence_of(in.key_bias, b)};
}
inline far_selection sequence_of(far_selection selected, std::int64_t b) {
  if (selected.blocks.data != nullptr) selected.blocks = selected.blocks.sequence(b % selected.blocks.batch());
  return selected;
}
template <class Scalar>
far_operands<Scalar> sequence_of(const far_operands<Scalar>& context, std::int64_t b) {
  return {context.key.sequence(b),
          context.value.sequence(b),
          sequence_of(context.seen, b),
          sequence_of(context.bias, b),
          sequence_of(context.positions, b),
          sequence_of(context.visible_from, b),
          sequence_of(context.visible_until, b),
          sequence_of(context.selected, b)};
}
template <class Scalar>
incoming_numbers<Scalar> sequence_of(const incoming_numbers<Scalar>& from, std::int64_t b) {
  return {from.grad_out.sequence(b), from.grad_lse.data == nullptr ? from.grad_lse : from.grad_lse.sequence(b)};
}
/// @}

/// Adds what was computed of sequence `b` alone to the rows of that sequence.
template <class Scalar>
void add_sequence(const tensor<Scalar>& one, std::int64_t b, tensor<Scalar>& all) {
  for (std::int64_t h = 0; h < one.extent[1]; ++h)
    for (std::int64_t i = 0; i < one.extent[2]; ++i)
      for (std::int64_t d = 0; d < one.extent[3]; ++d)
        all.view().row(b % all.extent[0], h, i)[d] += one.view().row(0, h, i)[d];
}

}  // namespace detail

}}}  // namespace cca::CCA_TARGET::reference
