#pragma once

// What saved calls want of the library and of its reference, in their present names: when those change, this changes, and
// the calls stay the same.

#include "gradient_entry_points.hpp"
#include "kv_cache_life.hpp"
#include "saved_calls.hpp"
#include "textbooks.hpp"
#include "unit_entry_points.hpp"

namespace cca::test {

inline options options_of(const saved_call& c) {
  options o;
  if (c.entry != entry::dense) o.group_size = c.group_size;
  if (c.window != 0) o.window = c.window;
  o.pool = std::array{pooling::last_query, pooling::mean, pooling::max}[static_cast<std::size_t>(c.pooling)];
  o.core_heads = c.shared_cores ? core_heads::per_kv_head : core_heads::per_query_head;
  o.softmax_scale = c.scale;
  o.first_position = c.first;
  o.unit = std::array{matrix_unit::none, matrix_unit::avx512_bf16, matrix_unit::amx}[static_cast<std::size_t>(c.unit)];
  return o;
}

inline problem problem_of(const saved_call& c) {
  return {.entry = c.entry,
          .sizes = c.sizes,
          .far_heads = c.far_heads,
          .far_length = c.far_length,
          .options = options_of(c)};
}

inline cache_setup setup_of(const saved_life& l) {
  return {.shape = {.batch = l.batch,
                    .heads = l.heads,
                    .kv_heads = l.kv_heads,
                    .dim = l.dim,
                    .value_dim = l.value_dim,
                    .capacity = l.capacity,
                    .rewind = l.rewind},
          .options = options_of(l.options)};
}

/// Whether this processor multiplies such elements by the unit of a saved call.
template <class Element>
bool has_saved_unit(int unit) {
  if constexpr (sizeof(Element) == 2)
    return unit == 0 || detail::has_unit<Element>(unit == 1 ? matrix_unit::avx512_bf16 : matrix_unit::amx);
  else
    return unit == 0;
}

/// Operands and results of an entry point, and what comes and goes in its gradient. Log-sum-exps are of dim 1.
template <class T>
struct saved_arguments {
  using result_type = compute_type<T>;

  std::vector<tensor_view<const T>> operands;  // of the entry point, in its order
  lse_view<const std::int64_t> seen;
  std::vector<tensor_view<result_type>> results;   // out and lse, or cores
  std::vector<tensor_view<const T>> grad_results;  // of out, or of cores
  tensor_view<const result_type> grad_lse;
  std::vector<tensor_view<result_type>> grad_operands;
};

template <class T>
void forward(const saved_call& c, const saved_arguments<T>& a) {
  if constexpr (sizeof(T) == 2)
    call(problem_of(c), unit_arguments<T>{.operands = a.operands, .seen = a.seen, .results = a.results});
  else
    call(problem_of(c), arguments<T>{.operands = a.operands, .results = a.results, .seen = a.seen});
}

template <class T>
void backward(const saved_call& c, const saved_arguments<T>& a) {
  if constexpr (sizeof(T) == 2) {
    call_gradient(problem_of(c), unit_arguments<T>{.operands = a.operands,
                                                   .seen = a.seen,
                                                   .results = a.grad_operands,
                                                   .out = a.results[0],
                                                   .lse = without_dim(a.results[1]),
                                                   .grad_out = a.grad_results[0],
                                                   .grad_lse = without_dim(a.grad_lse)});
  } else {
    arguments<T> all{.operands = a.operands, .results = a.grad_operands, .seen = a.seen};
    if (c.entry != entry::pool) all.operands.insert(all.operands.end(), a.results.begin(), a.results.end());
    all.operands.insert(all.operands.end(), a.grad_results.begin(), a.grad_results.end());
    if (c.entry != entry::pool) all.operands.push_back(a.grad_lse);
    call_gradient(problem_of(c), all);
  }
}

template <class Scalar, class T>
std::vector<reference::tensor<Scalar>> exact_forward(const saved_call& c, const saved_arguments<T>& a) {
  return textbook_forward<Scalar>(problem_of(c), a.operands, a.seen);
}

template <class Scalar, class T>
std::vector<reference::tensor<Scalar>> exact_backward(const saved_call& c, const saved_arguments<T>& a) {
  const auto& in = a.operands;
  const options o = options_of(c);
  const auto gradient = [&] {
    if (c.entry == entry::pool)
      return reference::pool_gradient<Scalar>(in[0], in[1], in[2], a.grad_results[0], a.grad_results[1], o);
    const inputs<T> operands{in[0], in[1], in[2]};
    const incoming from{a.grad_results[0], without_dim(a.grad_lse)};
    if (c.entry == entry::attention) return reference::attention_gradient<Scalar>(operands, from, o);
    if (c.entry == entry::attend)
      return reference::attend_gradient<Scalar>(operands, far_context{in[3], in[4], a.seen}, from, o);
    return reference::local_attention_gradient<Scalar>(operands, from, o);
  };
  auto grad = gradient();
  std::vector<reference::tensor<Scalar>> all{std::move(grad.query), std::move(grad.key), std::move(grad.value)};
  if (c.entry == entry::attend) {
    all.push_back(std::move(grad.far_key));
    all.push_back(std::move(grad.far_value));
  }
  return all;
}

/// A step of all sequences of a cache, or of sequence `b`; 16-bit tokens are answered in floats.
template <class Cache, class T>
void step(Cache& cache, std::optional<std::int64_t> b, const token_views<T>& tokens,
          tensor_view<compute_type<T>> out, lse_view<compute_type<T>> lse) {
  if constexpr (sizeof(T) == 2)
    b ? cache.attend(*b, inputs{tokens.query, tokens.key, tokens.value}, cca::results{out, lse})
      : cache.attend(inputs{tokens.query, tokens.key, tokens.value}, cca::results{out, lse});
  else
    b ? attend(cache, *b, tokens, out, lse) : attend(cache, tokens, out, lse);
}

/// The last `count` answers to a whole sequence.
template <class Scalar, class T>
reference::result<Scalar> exact_step(const token_views<T>& whole, std::int64_t count, const options& options) {
  return textbook_of<Scalar, Scalar>(whole, count, options).template operator()<Scalar>();
}

}  // namespace cca::test
