// The kernels of the tests that include unit_entry_points.hpp.

#include "unit_entry_points.hpp"

#include <cca/gradient.hpp>

namespace cca::test {

template <class Element>
void call(const problem& p, const unit_arguments<Element>& a, const any_executor& run) {
  const auto& in = a.operands;
  const tensor_view<float> out = a.results[0];
  const lse_view<float> lse = without_dim(a.results[1]);
  if (p.entry == entry::attend)
    attend(in[0], in[1], in[2], far_context{in[3], in[4], a.seen}, out, lse, p.options, run);
  else if (p.entry == entry::attention)
    attention(in[0], in[1], in[2], out, lse, p.options, run);
  else
    local_attention(in[0], in[1], in[2], out, lse, p.options, run);
}

template <class Element>
void call_gradient(const problem& p, const unit_arguments<Element>& a, const any_executor& run) {
  const auto& in = a.operands;
  const auto& grad = a.results;
  if (p.entry == entry::attend)
    attend_gradient(in[0], in[1], in[2], far_context{in[3], in[4], a.seen}, a.out, a.lse, a.grad_out, a.grad_lse, grad[0],
                    grad[1], grad[2], grad[3], grad[4], p.options, run);
  else if (p.entry == entry::attention)
    attention_gradient(in[0], in[1], in[2], a.out, a.lse, a.grad_out, a.grad_lse, grad[0], grad[1], grad[2], p.options,
                       run);
  else
    local_attention_gradient(in[0], in[1], in[2], a.out, a.lse, a.grad_out, a.grad_lse, grad[0], grad[1], grad[2],
                             p.options, run);
}

template void call(const problem&, const unit_arguments<Eigen::bfloat16>&, const any_executor&);
template void call(const problem&, const unit_arguments<Eigen::half>&, const any_executor&);
template void call_gradient(const problem&, const unit_arguments<Eigen::bfloat16>&, const any_executor&);
template void call_gradient(const problem&, const unit_arguments<Eigen::half>&, const any_executor&);

}  // namespace cca::test
