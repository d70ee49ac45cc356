#include "unit.hpp"

#include <cmath>
#include <cstdio>

int main() {
  float tokens[length * dim];
  for (std::int64_t i = 0; i < length * dim; ++i) tokens[i] = static_cast<float>(i % 7);

  const float older = older_unit(tokens);
  if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))) {
    std::printf("the older unit alone: %g\n", static_cast<double>(older));
    return !std::isfinite(older);
  }
  const float newer = newer_unit(tokens);
  std::printf("older %g, newer %g\n", static_cast<double>(older), static_cast<double>(newer));
  return !(std::fabs(older - newer) <= 1e-5f * std::fabs(older));
}
