#pragma once

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <span>
#include <type_traits>

#include "detail/base/function_ref.hpp"
#include "detail/base/target.hpp"
#include "element.hpp"
#include "executor.hpp"
#include "tensor_view.hpp"

/// What calls take. In braces their elements are float unless the function's template argument says otherwise:
/// `attention({query, key, value}, {out, lse}, options)`, `attention<double>({query, key, value}, {out, lse}, options)`.
/// Spelled out they may be of any mixture: `attention(cca::inputs{query, key, value}, cca::results{out, lse}, options)`.
namespace cca { inline namespace CCA_TARGET {

/// Who runs the tasks of a call, and the memory that it works in. A parameter: it refers to the executor, which is
/// often a temporary, and is not for keeping.
class execution {
 public:
  /// On the calling thread, in memory that is allocated.
  execution() : execution(serial) {}

  /// @param run  an executor; the results are bitwise the same for any
  /// @param workspace  at least as many bytes as the `workspace_size` of the call says, or empty: then memory is
  ///   allocated
  template <executor E>
  requires(!std::same_as<E, execution>) execution(const E& run, std::span<std::byte> workspace = {})
      : concurrency_(detail::concurrency(run)),
        self_(&run),
        call_([](const void* self, std::int64_t n, detail::function_ref<void(std::int64_t)> f) {
          (*static_cast<const E*>(self))(n, f);
        }),
        workspace_(workspace) {}

  /// How many tasks run at once.
  [[nodiscard]] std::int64_t concurrency() const { return concurrency_; }
  /// The caller's memory, or nothing.
  [[nodiscard]] std::span<std::byte> workspace() const { return workspace_; }

  /// Runs `f(i)` for i in `[0, n)`.
  void operator()(std::int64_t n, detail::function_ref<void(std::int64_t)> f) const { call_(self_, n, f); }

 private:
  static constexpr serial_executor serial{};

  std::int64_t concurrency_;
  const void* self_;
  void (*call_)(const void*, std::int64_t, detail::function_ref<void(std::int64_t)>);
  std::span<std::byte> workspace_;
};

namespace detail {

/// Whether views may hold these elements; if not, the compiler's message says which they may.
template <class... Elements>
constexpr bool check_elements() {
  static_assert((is_element<std::remove_const_t<Elements>> && ...),
                "cca: elements are float, double, Eigen::bfloat16 or Eigen::half. View the bits of bf16 numbers in "
                "std::uint16_t as reinterpret_cast<const Eigen::bfloat16*>(bits)");
  return true;
}

/// The same of rows of keys and values, which may have scales.
template <class... Elements>
constexpr bool check_rows() {
  static_assert(
      ((is_q8<Elements> || is_element<std::remove_const_t<Elements>>)&&...),
      "cca: elements are float, double, Eigen::bfloat16 or Eigen::half. View the bits of bf16 numbers in "
      "std::uint16_t as reinterpret_cast<const Eigen::bfloat16*>(bits). Those of keys and values may be cca::q8, "
      "too, with a scale per row");
  return true;
}

/// Whether gradients of rows of these elements can be asked for; if not, the compiler's message says why.
template <class... Elements>
constexpr bool check_differentiable() {
  constexpr bool numbers = !(is_q8<Elements> || ...);
  static_assert(numbers, "cca: rows of 8 bits have no gradients: what they were rounded from has");
  return numbers;
}

/// An output's elements are mutable.
template <class T>
concept written = !std::is_const_v<T>;

template <class View>
inline constexpr bool is_view = false;
template <class T, std::size_t Rank>
inline constexpr bool is_view<tensor_view<T, Rank>> = Rank == 4;

/// Whether arguments of a call are views; if not, the compiler's message says what makes them so.
template <class... Arguments>
constexpr bool check_views() {
  constexpr bool views = (is_view<Arguments> && ...);
  static_assert(views,
                "cca: an operand or output is not a view. Use cca::bhsd(pointer, batch, heads, length, dim), "
                "cca::bshd(pointer, batch, length, heads, dim), cca::packed(pointer, offsets, heads, dim) or "
                "cca::matrix(row_major_eigen_matrix)");
  return views;
}

}  // namespace detail

/// What attention reads. Where sequences have lengths of their own (see `tensor_view`), values have those of the keys, and
/// what belongs to a query has those of the queries: sink logits per query, results, the counts of a far context.
template <class Query = float, class Key = Query, class Value = Key, class Sink = compute_type<Query, Key, Value>>
struct inputs {
  static_assert(detail::check_elements<Query, Sink>() && detail::check_rows<Key, Value>());
  tensor_view<const Query> query;  ///< `[batch, query heads, query length, dim]`
  tensor_view<const Key> key;      ///< `[batch, heads, key length, dim]`, `heads` a divisor of the query's
  tensor_view<const Value> value;  ///< `[batch, heads, key length, value dim]`
  /// A score that joins each query's softmax with a value of zero: `[1 or batch, query heads, 1]`, or one for each query,
  /// `[batch, query heads, query length]`, of the type that is computed in; without data there is none.
  lse_view<const Sink> sink_logits{};
  /// @{
  /// What is added to scores behind the softcap, of the type that is computed in; without data nothing is.
  /// `-slope |t - position of the row|` (ALiBi), `[1 or batch, query heads, 1]`; a core's position is that of its last token.
  lse_view<const Sink> alibi_slopes{};
  /// A bias per key, `[1 or batch, a divisor of the query heads, key length]`; -inf masks the key, whose value is finite all
  /// the same: it is multiplied by 0. Raw tokens have them: a core stands for several keys, so there are none where groups
  /// are pooled, and none in a cache.
  lse_view<const Sink> key_bias{};
  /// @}
  /// @{
  /// Of keys and values of `q8`, and of no others: a scale per row, `[batch, heads, key length]`, with strides of its own.
  lse_view<const float> key_scales{}, value_scales{};
  /// @}
};
template <class Q, class K, class V>
inputs(tensor_view<Q>, tensor_view<K>, tensor_view<V>)
    -> inputs<std::remove_const_t<Q>, std::remove_const_t<K>, std::remove_const_t<V>>;
template <class Q, class K, class V, class S, class... Rest>
inputs(tensor_view<Q>, tensor_view<K>, tensor_view<V>, lse_view<S>, Rest...)
    -> inputs<std::remove_const_t<Q>, std::remove_const_t<K>, std::remove_const_t<V>, std::remove_const_t<S>>;

namespace detail {
template <class T>
inline constexpr bool is_inputs = false;
template <class Q, class K, class V, class S>
inline constexpr bool is_inputs<inputs<Q, K, V, S>> = true;

/// The first argument of a call that takes its operands one by one.
template <class T>
concept not_inputs = !is_inputs<T>;

/// The same of a cache's methods, whose first argument may be a sequence.
template <class T>
concept view_or_mistaken = !is_inputs<T> && !std::integral<T>;
}  // namespace detail

/// What attention writes, and its gradient reads.
template <class Out = float, class Lse = compute_type<Out>>
struct results {
  static_assert(detail::check_elements<Out>());
  static_assert(std::is_floating_point_v<Lse>, "cca: lse is float or double");
  tensor_view<Out> out;  ///< `[batch, query heads, query length, value dim]`
  /// Natural log-sum-exp of each query's scores, `[batch, query heads, query length]`; without data it is not wanted.
  lse_view<Lse> lse{};
};
template <class O>
results(tensor_view<O>) -> results<O>;
template <class O, class L>
results(tensor_view<O>, lse_view<L>) -> results<O, L>;

/// The gradients of results.
template <class GradOut = float, class GradLse = compute_type<GradOut>>
struct incoming {
  static_assert(detail::check_elements<GradOut>());
  static_assert(std::is_floating_point_v<GradLse>, "cca: grad_lse is float or double");
  tensor_view<const GradOut> grad_out;  ///< of the extents of `out`; any outer strides, 0 included
  lse_view<const GradLse> grad_lse{};   ///< of the extents of `lse`; without data it is zero
};
template <class O>
incoming(tensor_view<O>) -> incoming<std::remove_const_t<O>>;
template <class O, class L>
incoming(tensor_view<O>, lse_view<L>) -> incoming<std::remove_const_t<O>, std::remove_const_t<L>>;

/// The gradients of operands, each of the extents of its operand and written whole. They are of the type that is
/// computed in: double if an operand is, otherwise float.
template <class T = float>
struct gradients {
  static_assert(std::is_floating_point_v<T>, "cca: gradients are of the type that is computed in: float or double");
  /// @{
  /// The gradient of the operand of this name. The far ones are for far context alone. Those of three extents are for
  /// operands that are given, and without data are not wanted.
  tensor_view<T> query, key, value;
  tensor_view<T> far_key{}, far_value{};
  lse_view<T> sink_logits{}, alibi_slopes{}, key_bias{}, far_bias{};
  /// @}
};
template <class T, class... Rest>
gradients(tensor_view<T>, Rest...) -> gradients<T>;

/// Core keys and values: `[batch, core heads, groups, dim]` and the same with the value's dim.
template <class Key = float, class Value = Key>
struct cores {
  static_assert(detail::check_elements<Key, Value>());
  tensor_view<Key> key;      ///< core keys
  tensor_view<Value> value;  ///< core values
};
template <class K, class V>
cores(tensor_view<K>, tensor_view<V>) -> cores<K, V>;

/// Which far rows queries see, as lists of blocks of rows: index-selected attention (DeepSeek-V3.2, MInference, MoBA,
/// Quest). The far rows are then mostly raw keys and values. A call costs what is selected.
struct far_selection {
  /// `[1 or batch, a divisor of the query heads, blocks of queries, most]`: the numbers of the blocks of rows that a
  /// block of queries sees, ascending, and -1 in the places behind them. The last extent is adjacent in memory. Where
  /// sequences have lengths of their own, so have the blocks of their queries. Without data there is no selection.
  tensor_view<const std::int64_t> blocks{};
  std::int64_t block_rows = 1;     ///< block c is the far rows `[c block_rows, (c + 1) block_rows)`, up to the last one
  std::int64_t block_queries = 1;  ///< list q is for the queries `[q block_queries, (q + 1) block_queries)` of the call
};

/// Far context that any compressor made: `attend` puts it before the window in one softmax. A query sees the rows that
/// all of `seen`, `visible_from` and `visible_until`, or `selected` let it see: what is not given leaves them all.
template <class Key = float, class Value = Key, class Bias = compute_type<Key, Value>>
struct far_context {
  static_assert(detail::check_rows<Key, Value>() && detail::check_elements<Bias>());
  tensor_view<const Key> key;         ///< `[batch, far heads, far length, dim]`, heads a divisor of the query's
  tensor_view<const Value> value;     ///< `[batch, far heads, far length, value dim]`
  /// `[batch, query heads, query length]`: the query sees far rows `[0, seen)`. May be missing where others say who
  /// sees what.
  lse_view<const std::int64_t> seen{};
  /// A bias per far row, `[1 or batch, a divisor of the query heads, far length]`, of the type that is computed in; without
  /// data there is none. -inf masks the row.
  lse_view<const Bias> bias{};
  /// Positions of the far rows, for `alibi_slopes`: of the same extents, in `[-2^61, 2^61]`; without data there are none.
  lse_view<const std::int64_t> positions{};
  /// @{
  /// Far row j is seen by the queries at the positions `[visible_from(j), visible_until(j))`: of the same extents as
  /// `bias`, each with or without the other, in any order. (It costs least where both never decrease, for then every
  /// query sees neighbouring rows; otherwise rows are gone through in runs in which they do not.)
  lse_view<const std::int64_t> visible_from{}, visible_until{};
  /// @}
  /// Which rows are seen; not beside `visible_from` and `visible_until`.
  far_selection selected{};
  /// @{
  /// Of far rows of `q8`, and of no others: a scale per row, `[batch, far heads, far length]`, with strides of its own.
  lse_view<const float> key_scales{}, value_scales{};
  /// @}
};
template <class K, class V, class Count>
far_context(tensor_view<K>, tensor_view<V>, lse_view<Count>)
    -> far_context<std::remove_const_t<K>, std::remove_const_t<V>>;
template <class K, class V, class Count, class B, class... Rest>
far_context(tensor_view<K>, tensor_view<V>, lse_view<Count>, lse_view<B>, Rest...)
    -> far_context<std::remove_const_t<K>, std::remove_const_t<V>, std::remove_const_t<B>>;

}}  // namespace cca::CCA_TARGET
