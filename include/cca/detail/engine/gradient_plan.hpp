#pragma once

#include <cstddef>
#include <cstdint>

#include "../../call.hpp"
#include "../../element.hpp"
#include "../../options.hpp"
#include "../../tensor_view.hpp"
#include "../base/numbers.hpp"
#include "../base/scratch.hpp"
#include "../base/validate.hpp"
#include "../context/source.hpp"
#include "../context/tasks.hpp"
#include "../product/choose_unit.hpp"
#include "backward.hpp"
#include "bias_sums.hpp"
#include "plan.hpp"

namespace cca { inline namespace CCA_TARGET { namespace detail {

// The counterpart of plan.hpp for gradients.

/// The engine of the gradients for these queries and sources of whose heads `head_groups` is the greatest common divisor.
/// `Element` is the operands' `product_type`.
template <class Element, class Query>
backward<Element> backward_plan(const tensor_view<Query>& query, std::int64_t value_dim, std::int64_t head_groups,
                                const piece_form& pieces, bool staged, matrix_unit unit, const execution& run) {
  const tile_form form{query.dim(), value_dim, chosen_unit<Element>(unit)};
  return {sequences_of(query), query.heads(), form, head_groups, pieces, staged, run.concurrency(), lengths_of(query)};
}

/// Sums of the gradients of biases that may be given.
template <class T, class Bias>
bias_sums<T> sums_of(const Bias& bias, std::int64_t batch, std::int64_t head_groups) {
  if (bias.data == nullptr) return {};
  return {batch, head_groups, bias.heads(), bias.length()};
}

/// Memory for them, if their gradient is wanted.
template <class T>
tensor_view<T, 3> wanted_sums(const bias_sums<T>& sums, const tensor_view<T, 3>& grad, scratch& memory) {
  return given(grad) ? sums.take(memory) : tensor_view<T, 3>{};
}

/// Scratch of the gradient of `attend`.
template <class Element>
struct attend_gradient_plan {
  using T = compute_type<Element>;
  detail::backward<Element> backward;
  bias_sums<T> key_bias, far_bias;

  template <class Inputs, class Far>
  attend_gradient_plan(const Inputs& in, const Far& context, bool staged, matrix_unit unit, const execution& run)
      : attend_gradient_plan(in, context, gcd(in.key.heads(), context.key.heads()), staged, unit, run) {}

  [[nodiscard]] std::size_t bytes() const { return backward.bytes() + key_bias.bytes() + far_bias.bytes(); }

 private:
  template <class Inputs, class Far>
  attend_gradient_plan(const Inputs& in, const Far& context, std::int64_t head_groups, bool staged, matrix_unit unit,
                       const execution& run)
      : backward(backward_plan<Element>(in.query, in.value.dim(), head_groups, pieces_of(in, context), staged, unit, run)),
        key_bias(sums_of<T>(in.key_bias, in.query.batch(), head_groups)),
        far_bias(sums_of<T>(context.bias, in.query.batch(), head_groups)) {}
};

template <class Query, class Key, class Value, class Sink, class FarKey, class FarValue, class FarBias>
auto attend_backward(const inputs<Query, Key, Value, Sink>& in, const far_context<FarKey, FarValue, FarBias>& context,
                     matrix_unit unit, const execution& run) {
  using T = compute_type<Query, Key, Value, FarKey, FarValue>;
  return attend_gradient_plan<product_type<Query, Key, Value, FarKey, FarValue>>(
      in, context, staged<T>(in.key, in.value, context.key, context.value), unit, run);
}

/// Scratch of the gradient of CCA attention: cores and their gradients, what pools them, and the engine.
template <class Element, class Core>
struct cca_gradient_plan {
  using T = compute_type<Element>;
  core_plan<Core> cores;
  pool_plan<T> pooler;
  detail::backward<Element> backward;
  bias_sums<T> core_bias, key_bias;

  template <class Query, class Key, class Value, class Sink>
  cca_gradient_plan(const inputs<Query, Key, Value, Sink>& in, const options& options, const execution& run)
      : cores(in, options),
        pooler(plan_pooling<T>(in, options, run)),
        backward(backward_plan<Element>(in.query, cores.value_dim, in.key.heads(), {},
                                        !in_place<T, Core> || staged<T>(in.key, in.value), options.unit, run)),
        key_bias(sums_of<T>(in.key_bias, in.query.batch(), in.key.heads())) {
    if (cores.biased) core_bias = {cores.all.batch, in.key.heads(), cores.heads, cores.longest};
  }

  [[nodiscard]] std::size_t bytes() const {
    return cores.bytes() + cores.template bytes<T>() + cores.template bias_bytes<T>() + cores.offset_bytes() +
           pooler.bytes() + backward.bytes() + core_bias.bytes() + key_bias.bytes();
  }
};

}}}  // namespace cca::CCA_TARGET::detail
