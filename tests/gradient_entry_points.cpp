// The kernels of the tests that include gradient_entry_points.hpp.

#include "gradient_entry_points.hpp"

#include <cca/gradient.hpp>

namespace cca::test {

template <class T>
void call_gradient(const problem& p, const arguments<T>& a, const any_executor& run, std::span<std::byte> workspace) {
  const auto& in = a.operands;
  gradients<T> to{a.results[0], a.results[1], a.results[2]};
  to.sink_logits = a.grad_sinks;
  to.alibi_slopes = a.grad_slopes;
  to.key_bias = a.grad_key_bias;
  to.far_bias = a.grad_far_bias;
  if (p.entry == entry::pool) return pool_gradient(inputs_of(a), cores{in[3], in[4]}, to, p.options, {run, workspace});
  if (p.entry == entry::attend) {
    to.far_key = a.results[3];
    to.far_value = a.results[4];
  }

  const std::size_t first = in.size() - 4;
  const cca::results of{in[first], without_dim(in[first + 1])};
  const incoming from{in[first + 2], without_dim(in[first + 3])};
  switch (p.entry) {
    case entry::dense:
      return dense_attention_gradient(inputs_of(a), of, from, to, p.options, {run, workspace});
    case entry::local:
      return local_attention_gradient(inputs_of(a), of, from, to, p.options, {run, workspace});
    case entry::attention:
      return attention_gradient(inputs_of(a), of, from, to, p.options, {run, workspace});
    case entry::attend:
      return attend_gradient(inputs_of(a), far_of(a), of, from, to, p.options, {run, workspace});
    default:
      throw std::logic_error("no gradient");
  }
}

template <class T>
std::size_t gradient_workspace_size(const problem& p, const arguments<T>& a, const any_executor& run) {
  if (p.entry == entry::attend) return cca::gradient_workspace_size(inputs_of(a), far_of(a), p.options, run);
  return cca::gradient_workspace_size(inputs_of(a), p.options, run);
}

template void call_gradient(const problem&, const arguments<float>&, const any_executor&, std::span<std::byte>);
template void call_gradient(const problem&, const arguments<double>&, const any_executor&, std::span<std::byte>);
template std::size_t gradient_workspace_size(const problem&, const arguments<float>&, const any_executor&);
template std::size_t gradient_workspace_size(const problem&, const arguments<double>&, const any_executor&);

}  // namespace cca::test
