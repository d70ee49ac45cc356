// The kernels of the tests that include unit_entry_points.hpp.

#include "unit_entry_points.hpp"

#include <cca/gradient.hpp>

namespace cca::test {

template <class Element>
far_context<Element> far_of(const unit_arguments<Element>& a) {
  return {a.operands[3], a.operands[4],  a.seen,          a.far_bias,
          a.positions,   a.visible_from, a.visible_until, a.selected};
}

template <class Inputs, class Context>
void call_unit_entry(const problem& p, const Inputs& in, const Context& context, const cca::results<float>& to,
                     const any_executor& run) {
  if (p.entry == entry::attend)
    attend(in, context, to, p.options, run);
  else if (p.entry == entry::attention)
    attention(in, to, p.options, run);
  else
    local_attention(in, to, p.options, run);
}

template <class Element>
void call(const problem& p, const unit_arguments<Element>& a, const any_executor& run) {
  const auto& in = a.operands;
  const inputs<Element> operands{in[0], in[1], in[2], a.sinks, a.slopes, a.key_bias};
  far_context<Element> context;
  if (p.entry == entry::attend) context = far_of(a);
  call_unit_entry(p, operands, context, {a.results[0], without_dim(a.results[1])}, run);
}

template <class Row>
void call_rows(const problem& p, const inputs<float, Row>& in, const far_context<q8>& context,
               const cca::results<float>& to) {
  call_unit_entry(p, in, context, to, {});
}

template <class Element>
void call_gradient(const problem& p, const unit_arguments<Element>& a, const any_executor& run) {
  const auto& in = a.operands;
  const auto& grad = a.results;
  const inputs<Element> operands{in[0], in[1], in[2], a.sinks, a.slopes, a.key_bias};
  const cca::results of{a.out, a.lse};
  const incoming from{a.grad_out, a.grad_lse};
  gradients<float> to{grad[0], grad[1], grad[2], {}, {}, a.grad_sinks, a.grad_slopes, a.grad_key_bias, a.grad_far_bias};
  if (p.entry == entry::attend) to.far_key = grad[3], to.far_value = grad[4];
  if (p.entry == entry::attend)
    attend_gradient(operands, far_of(a), of, from, to, p.options, run);
  else if (p.entry == entry::attention)
    attention_gradient(operands, of, from, to, p.options, run);
  else
    local_attention_gradient(operands, of, from, to, p.options, run);
}

template void call(const problem&, const unit_arguments<float>&, const any_executor&);
template void call(const problem&, const unit_arguments<Eigen::bfloat16>&, const any_executor&);
template void call(const problem&, const unit_arguments<Eigen::half>&, const any_executor&);
template void call_rows(const problem&, const inputs<float, q8>&, const far_context<q8>&, const cca::results<float>&);
template void call_rows(const problem&, const inputs<float>&, const far_context<q8>&, const cca::results<float>&);
template void call_gradient(const problem&, const unit_arguments<Eigen::bfloat16>&, const any_executor&);
template void call_gradient(const problem&, const unit_arguments<Eigen::half>&, const any_executor&);

}  // namespace cca::test
