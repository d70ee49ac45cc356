// gradient_run batch heads kv_heads length dim value_dim group_size window pooling core_heads: CCA attention and its
// gradients, for torch_gradient.py. Reads query, key, value and the gradients of the output and of the log-sum-exp, raw
// floats, from the standard input; writes the output, the log-sum-exp and the gradients of query, key and value.

#include <cstdio>
#include <cstdlib>

#include "gradient_entry_points.hpp"

namespace {

using namespace cca::test;

/// Moves the elements of a tensor from or to a file by `fread` or `fwrite`.
void transfer(tensor<float>& tensor, const auto& move) {
  const auto size = static_cast<std::size_t>(tensor.view().dim());
  for_each_row(tensor.view(), [&](std::int64_t b, std::int64_t h, std::int64_t i) {
    if (move(tensor.row(b, h, i), size) == size) return;
    std::fputs("gradient_run: not as many numbers as the sizes say\n", stderr);
    std::exit(1);
  });
}

}  // namespace

int main(int count, char** arguments) {
  std::array<std::int64_t, 10> n{};
  if (count != 1 + std::ssize(n)) {
    std::fputs("gradient_run: see the comment at the head of its source\n", stderr);
    return 2;
  }
  std::transform(arguments + 1, arguments + count, n.begin(), [](const char* text) { return std::atoll(text); });
  const auto [batch, heads, kv_heads, length, dim, value_dim, group_size, window, pool, cores] = n;
  gradient_memory<float> memory({.entry = entry::attention,
                                 .sizes = {batch, heads, kv_heads, length, length, dim, value_dim},
                                 .options = {.group_size = group_size,
                                             .window = window,
                                             .pool = static_cast<cca::pooling>(pool),
                                             .core_heads = static_cast<cca::core_heads>(cores)}});
  // In memory: query, key, value, out, lse, grad_out, grad_lse.
  for (const std::size_t given : {0u, 1u, 2u, 5u, 6u})
    transfer(memory.operands[given], [](float* row, std::size_t size) { return std::fread(row, 4, size, stdin); });
  memory.forward().gradient();
  const auto write = [](float* row, std::size_t size) { return std::fwrite(row, 4, size, stdout); };
  for (const std::size_t made : {3u, 4u}) transfer(memory.operands[made], write);
  for (tensor<float>& gradient : memory.results) transfer(gradient, write);
}
