// The kernels of the tests that include entry_points.hpp.

#include "entry_points.hpp"

namespace cca::test {
template <class T>
void call(const problem& p, const arguments<T>& a, const any_executor& run, std::span<std::byte> workspace) {
  const auto& in = a.operands;
  const tensor_view<T> first = a.results[0], second = a.results[1];
  switch (p.entry) {
    case entry::dense:
      return dense_attention(in[0], in[1], in[2], first, without_dim(second), p.options, run, workspace);
    case entry::local:
      return local_attention(in[0], in[1], in[2], first, without_dim(second), p.options, run, workspace);
    case entry::attention:
      return attention(in[0], in[1], in[2], first, without_dim(second), p.options, run, workspace);
    case entry::attend:
      return attend(in[0], in[1], in[2], far_context{in[3], in[4], a.seen}, first, without_dim(second), p.options, run,
                    workspace);
    case entry::pool:
      return pool(in[0], in[1], in[2], first, second, p.options, run, workspace);
    case entry::merge:
      return merge(in[0], without_dim(in[1]), in[2], without_dim(in[3]), first, without_dim(second), run);
  }
}

template <class T>
std::size_t workspace_size(const problem& p, const arguments<T>& a, const any_executor& run) {
  const auto& in = a.operands;
  if (p.entry == entry::merge) return 0;
  if (p.entry == entry::attend) return cca::workspace_size(in[0], in[1], in[2], far_context{in[3], in[4], a.seen}, run);
  return cca::workspace_size(in[0], in[1], in[2], p.options, run);
}

template void call(const problem&, const arguments<float>&, const any_executor&, std::span<std::byte>);
template void call(const problem&, const arguments<double>&, const any_executor&, std::span<std::byte>);
template std::size_t workspace_size(const problem&, const arguments<float>&, const any_executor&);
template std::size_t workspace_size(const problem&, const arguments<double>&, const any_executor&);

}  // namespace cca::test
