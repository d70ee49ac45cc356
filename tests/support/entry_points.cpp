// The calls of the tests that include entry_points.hpp.

#include "entry_points.hpp"

namespace cca::test {

#if defined(CCA_TEST_THROUGH_DISPATCH)
namespace through {

// Deprecated, the table has them not: what they are in `cca`.
template <class T>
void dense_attention(const inputs<T>& in, const cca::results<T>& to, const options& options, const execution& run) {
  detail::require_dense(options);
  attention(in, to, options, run);
}
template <class T>
void local_attention(const inputs<T>& in, const cca::results<T>& to, const options& options, const execution& run) {
  attend(in, detail::no_far_context(in), to, options, run);
}

}  // namespace through
#endif

template <class T>
void call(const problem& p, const arguments<T>& a, const any_executor& run, std::span<std::byte> workspace) {
  const auto& in = a.operands;
  const tensor_view<T> first = a.results[0], second = a.results[1];
  const cca::results<T, T> to{first, without_dim(second)};
  switch (p.entry) {
    case entry::dense:
      return through::dense_attention(inputs_of(a), to, p.options, {run, workspace});
    case entry::local:
      return through::local_attention(inputs_of(a), to, p.options, {run, workspace});
    case entry::attention:
      return through::attention(inputs_of(a), to, p.options, {run, workspace});
    case entry::attend:
      return through::attend(inputs_of(a), far_of(a), to, p.options, {run, workspace});
    case entry::pool:
      return through::pool(inputs_of(a), cores{first, second}, p.options, {run, workspace});
    case entry::merge:
      return through::merge(cca::results{in[0], without_dim(in[1])}, cca::results{in[2], without_dim(in[3])}, to, run);
  }
}

template <class T>
std::size_t workspace_size(const problem& p, const arguments<T>& a, const any_executor& run) {
  if (p.entry == entry::merge) return 0;
  if (p.entry == entry::attend) return through::workspace_size(inputs_of(a), far_of(a), p.options, run);
  return through::workspace_size(inputs_of(a), p.options, run);
}

template void call(const problem&, const arguments<float>&, const any_executor&, std::span<std::byte>);
template void call(const problem&, const arguments<double>&, const any_executor&, std::span<std::byte>);
template std::size_t workspace_size(const problem&, const arguments<float>&, const any_executor&);
template std::size_t workspace_size(const problem&, const arguments<double>&, const any_executor&);

}  // namespace cca::test
