// The kernels of the tests that include gradient_entry_points.hpp.

#include "gradient_entry_points.hpp"

#include <cca/gradient.hpp>

namespace cca::test {

template <class T>
void call_gradient(const problem& p, const arguments<T>& a, const any_executor& run, std::span<std::byte> workspace) {
  const auto& in = a.operands;
  const auto& grad = a.results;
  if (p.entry == entry::pool)
    return pool_gradient(in[0], in[1], in[2], in[3], in[4], grad[0], grad[1], grad[2], p.options, run, workspace);

  const auto gradient_of = [&](const auto& entry) {
    const std::size_t first = in.size() - 4;
    const tensor_view<const T> out = in[first], grad_out = in[first + 2];
    const lse_view<const T> lse = without_dim(in[first + 1]), grad_lse = without_dim(in[first + 3]);
    // The overload without is for `lse_view<>{}`, of float: called here, it compiles no kernel of its own.
    if constexpr (std::is_same_v<T, float>)
      if (grad_lse.data == nullptr && grad_lse.extent == std::array<std::int64_t, 3>{})
        return entry(out, lse, grad_out);
    return entry(out, lse, grad_out, grad_lse);
  };
  switch (p.entry) {
    case entry::dense:
      return gradient_of([&](const auto&... incoming) {
        dense_attention_gradient(in[0], in[1], in[2], incoming..., grad[0], grad[1], grad[2], p.options, run,
                                 workspace);
      });
    case entry::local:
      return gradient_of([&](const auto&... incoming) {
        local_attention_gradient(in[0], in[1], in[2], incoming..., grad[0], grad[1], grad[2], p.options, run,
                                 workspace);
      });
    case entry::attention:
      return gradient_of([&](const auto&... incoming) {
        attention_gradient(in[0], in[1], in[2], incoming..., grad[0], grad[1], grad[2], p.options, run, workspace);
      });
    case entry::attend:
      return gradient_of([&](const auto&... incoming) {
        attend_gradient(in[0], in[1], in[2], far_context{in[3], in[4], a.seen}, incoming..., grad[0], grad[1], grad[2], grad[3],
                        grad[4], p.options, run, workspace);
      });
    default:
      throw std::logic_error("no gradient");
  }
}

template <class T>
std::size_t gradient_workspace_size(const problem& p, const arguments<T>& a, const any_executor& run) {
  const auto& in = a.operands;
  if (p.entry == entry::attend)
    return cca::gradient_workspace_size(in[0], in[1], in[2], far_context{in[3], in[4], a.seen}, run);
  return cca::gradient_workspace_size(in[0], in[1], in[2], p.options, run);
}

template void call_gradient(const problem&, const arguments<float>&, const any_executor&, std::span<std::byte>);
template void call_gradient(const problem&, const arguments<double>&, const any_executor&, std::span<std::byte>);
template std::size_t gradient_workspace_size(const problem&, const arguments<float>&, const any_executor&);
template std::size_t gradient_workspace_size(const problem&, const arguments<double>&, const any_executor&);

}  // namespace cca::test
