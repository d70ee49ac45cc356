// The calls of the tests that include gradient_entry_points.hpp.

#include "gradient_entry_points.hpp"

#include <cca/gradient.hpp>

namespace cca::test {

#if defined(CCA_TEST_THROUGH_DISPATCH)
namespace through {

// Deprecated, the table has them not: what they are in `cca`.
template <class T>
void dense_attention_gradient(const inputs<T>& in, const read<T>& of, const incoming<T>& from, const gradients<T>& to,
                              const options& options, const execution& run) {
  detail::require_dense(options);
  attention_gradient(in, of, from, to, options, run);
}
template <class T>
void local_attention_gradient(const inputs<T>& in, const read<T>& of, const incoming<T>& from, gradients<T> to,
                              const options& options, const execution& run) {
  const far_context<T> none = detail::no_far_context(in);
  to.far_key = {nullptr, none.key.extent, none.key.stride};
  to.far_value = {nullptr, none.value.extent, none.value.stride};
  attend_gradient(in, none, of, from, to, options, run);
}

}  // namespace through
#endif

template <class T>
void call_gradient(const problem& p, const arguments<T>& a, const any_executor& run, std::span<std::byte> workspace) {
  const auto& in = a.operands;
  gradients<T> to{a.results[0], a.results[1], a.results[2]};
  to.sink_logits = a.grad_sinks;
  to.alibi_slopes = a.grad_slopes;
  to.key_bias = a.grad_key_bias;
  to.far_bias = a.grad_far_bias;
  if (p.entry == entry::pool)
    return through::pool_gradient(inputs_of(a), cores<const T>{in[3], in[4]}, to, p.options, {run, workspace});
  if (p.entry == entry::attend) {
    to.far_key = a.results[3];
    to.far_value = a.results[4];
  }

  const std::size_t first = in.size() - 4;
  const cca::results of{in[first], without_dim(in[first + 1])};
  const incoming<T> from{in[first + 2], without_dim(in[first + 3])};
  switch (p.entry) {
    case entry::dense:
      return through::dense_attention_gradient(inputs_of(a), of, from, to, p.options, {run, workspace});
    case entry::local:
      return through::local_attention_gradient(inputs_of(a), of, from, to, p.options, {run, workspace});
    case entry::attention:
      return through::attention_gradient(inputs_of(a), of, from, to, p.options, {run, workspace});
    case entry::attend:
      return through::attend_gradient(inputs_of(a), far_of(a), of, from, to, p.options, {run, workspace});
    default:
      throw std::logic_error("no gradient");
  }
}

template <class T>
std::size_t gradient_workspace_size(const problem& p, const arguments<T>& a, const any_executor& run) {
  if (p.entry == entry::attend) return through::gradient_workspace_size(inputs_of(a), far_of(a), p.options, run);
  return through::gradient_workspace_size(inputs_of(a), p.options, run);
}

template void call_gradient(const problem&, const arguments<float>&, const any_executor&, std::span<std::byte>);
template void call_gradient(const problem&, const arguments<double>&, const any_executor&, std::span<std::byte>);
template std::size_t gradient_workspace_size(const problem&, const arguments<float>&, const any_executor&);
template std::size_t gradient_workspace_size(const problem&, const arguments<double>&, const any_executor&);

}  // namespace cca::test
