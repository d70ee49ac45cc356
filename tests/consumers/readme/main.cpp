// What the README's lines of CMake have to be enough for: the headers, and OpenMP's threads.
#include <cca/cca.hpp>

#include <cstdio>
#include <vector>

int main() {
  constexpr int length = 20, dim = 3;
  const std::vector<float> tokens(length * dim, 1.0f);
  std::vector<float> out(tokens.size());
  const auto view = cca::bshd(tokens.data(), 1, length, 1, dim);
  const auto result = cca::bshd(out.data(), 1, length, 1, dim);
  cca::attention(view, view, view, result, {.group_size = 2, .window = 4}, cca::openmp_executor{.threads = 2});
  std::printf("the mean of ones is %g\n", static_cast<double>(out.back()));
  return !(out.back() > 0.999f && out.back() < 1.001f);
}
