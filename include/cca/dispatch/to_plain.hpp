#pragma once

#include <cstddef>
#include <cstdint>
#include <iterator>
#include <type_traits>

#include "../cache_shape.hpp"
#include "../call.hpp"
#include "../element.hpp"
#include "../options.hpp"
#include "../tensor_view.hpp"
#include "plain.hpp"

namespace cca { inline namespace CCA_TARGET { namespace detail {

template <class T, std::size_t Rank>
plain::view<T, Rank> to_plain(const tensor_view<T, Rank>& view) {
  return {view.data, view.extent, view.stride, view.begins, view.ends};
}

/// How many options there are.
constexpr std::size_t option_count() {
  std::size_t count = 0;
  const options options;
  for_each_option(options, [&](const char*, const auto&) { ++count; });
  return count;
}

inline plain::options to_plain(const options& options) {
  plain::options to{};
  static_assert(option_count() <= std::size(decltype(to.all){}), "an option more than plain::options has places");
  plain::option* place = to.all;
  for_each_option(options, [&](const char*, const auto& option) {
    const option_code code = encode_option(option);
    *place++ = {code.present, code.bits};
  });
  return to;
}

inline options from_plain(const plain::options& from) {
  options options;
  const plain::option* place = from.all;
  for_each_option(options, [&](const char*, auto& option) {
    decode_option({place->present, place->bits}, option);
    ++place;
  });
  return options;
}

inline plain::cache_shape to_plain(const cache_shape& s) {
  return {s.batch, s.heads, s.kv_heads, s.dim, s.value_dim, s.capacity, s.rewind};
}

inline plain::executor to_plain(const execution& run) {
  return {run.concurrency(), &run,
          [](const void* self, std::int64_t n, const void* task, void (*call)(const void*, std::int64_t)) {
            (*static_cast<const execution*>(self))(n, [=](std::int64_t i) { call(task, i); });
          }};
}

/// @{
/// Puts an argument into its place in a call.
template <class T, class Row, class Far>
void put(plain::call<T, Row, Far>& to, const inputs<T, Row>& in) {
  to.query = to_plain(in.query);
  to.key = to_plain(in.key);
  to.value = to_plain(in.value);
  to.sink_logits = to_plain(in.sink_logits);
  to.alibi_slopes = to_plain(in.alibi_slopes);
  to.key_bias = to_plain(in.key_bias);
  to.key_scales = to_plain(in.key_scales);
  to.value_scales = to_plain(in.value_scales);
}
template <class T, class Row, class Far>
void put(plain::call<T, Row, Far>& to, const far_context<Far>& context) {
  to.far_key = to_plain(context.key);
  to.far_value = to_plain(context.value);
  to.seen = to_plain(context.seen);
  to.far_bias = to_plain(context.bias);
  to.far_positions = to_plain(context.positions);
  to.visible_from = to_plain(context.visible_from);
  to.visible_until = to_plain(context.visible_until);
  to.selected = to_plain(context.selected.blocks);
  to.selected_rows = context.selected.block_rows;
  to.selected_queries = context.selected.block_queries;
  to.far_key_scales = to_plain(context.key_scales);
  to.far_value_scales = to_plain(context.value_scales);
}
template <class T, class Row, class Far>
void put(plain::call<T, Row, Far>& to, const results<T>& results) {
  to.out = to_plain(results.out);
  to.lse = to_plain(results.lse);
}
template <class T>
void put(plain::call<T>& to, const results<const T, const compute_type<T>>& read) {
  const bool first = to.out_a.data == nullptr && to.out_a.extent == decltype(to.out_a.extent){};
  (first ? to.out_a : to.out_b) = to_plain(read.out);
  (first ? to.lse_a : to.lse_b) = to_plain(read.lse);
}
template <class T>
void put(plain::call<T>& to, const incoming<T>& from) {
  to.grad_out = to_plain(from.grad_out);
  to.grad_lse = to_plain(from.grad_lse);
}
template <class T>
void put(plain::call<T>& to, const gradients<compute_type<T>>& grad) {
  to.grad_query = to_plain(grad.query);
  to.grad_key = to_plain(grad.key);
  to.grad_value = to_plain(grad.value);
  to.grad_far_key = to_plain(grad.far_key);
  to.grad_far_value = to_plain(grad.far_value);
  to.grad_sink_logits = to_plain(grad.sink_logits);
  to.grad_alibi_slopes = to_plain(grad.alibi_slopes);
  to.grad_key_bias = to_plain(grad.key_bias);
  to.grad_far_bias = to_plain(grad.far_bias);
}
template <class T>
void put(plain::call<T>& to, const cores<T>& cores) {
  to.core_key = to_plain(cores.key);
  to.core_value = to_plain(cores.value);
}
template <class T>
void put(plain::call<T>& to, const cores<const compute_type<T>>& grad) {
  to.grad_core_key = to_plain(grad.key);
  to.grad_core_value = to_plain(grad.value);
}
template <class T, class Row, class Far>
void put(plain::call<T, Row, Far>& to, const options& options) {
  to.options = to_plain(options);
}
template <class T, class Row, class Far>
void put(plain::call<T, Row, Far>& to, const execution& run) {
  to.run = to_plain(run);
  to.workspace = run.workspace();
}
/// @}

/// For operands of elements `T`.
template <class T>
const plain::kernels<T>& kernels() {
  const plain::architecture& chosen = plain::chosen();
  if constexpr (std::is_same_v<T, float>) return chosen.of_float;
  if constexpr (std::is_same_v<T, double>) return chosen.of_double;
  if constexpr (is_bfloat16<T>) return chosen.of_bfloat16;
  if constexpr (is_half<T>) return chosen.of_half;
}

/// For caches of elements `T`.
template <class T>
const plain::cache_functions<T>& cache_kernels() {
  if constexpr (is_q8<T>)
    return plain::chosen().cache_of_q8;
  else
    return kernels<T>().cache;
}

/// For attention to rows of these elements.
template <class T, class Row, class Far>
const plain::forward_functions<T, Row, Far>& forward_kernels() {
  constexpr bool alike = all_are<T, Row, Far>;
  constexpr bool known = alike || (all_are<float, T> && (all_are<float, Row> || is_q8<Row>)&&(all_are<float, Far> || is_q8<Far>));
  static_assert(known,
                "cca: operands of a call through cca::dispatch have elements of one type. Beside queries of float, keys and "
                "values may be of q8, and so may those of far context");
  if constexpr (alike)
    return kernels<T>().forward;
  else if constexpr (all_are<q8, Row, Far>)
    return plain::chosen().forward_of_q8;
  else if constexpr (is_q8<Row>)
    return plain::chosen().forward_of_q8_tokens;
  else
    return plain::chosen().forward_of_q8_far;
}

/// @{
/// Calls a function of the table.
template <class T, class Row, class Far, class Function, class... Arguments>
auto call(Function* plain::forward_functions<T, Row, Far>::*function, const Arguments&... arguments) {
  plain::call<T, Row, Far> all{};
  (put(all, arguments), ...);
  return (forward_kernels<T, Row, Far>().*function)(all);
}
template <class T, class Function, class... Arguments>
auto call(Function* plain::functions<T>::*function, const Arguments&... arguments) {
  plain::call<T> all{};
  (put(all, arguments), ...);
  return (kernels<T>().calls.*function)(all);
}
/// @}

}}}  // namespace cca::CCA_TARGET::detail
