// A program of two units: both give the same numbers where the processor runs the newer one, otherwise the older one runs.
#include <cmath>
#include <cstdio>
#include <sstream>

#include "unit.hpp"

caller_pool the_pool;

int caller_pool::NumThreads() const { return 1; }

int main() {
  float tokens[length * dim];
  for (std::int64_t i = 0; i < length * dim; ++i) tokens[i] = static_cast<float>(i % 7) / 8;
  std::stringstream stream;

  const double older = older_unit(tokens, stream);
  if (!(NEWER_RUNS)) {
    std::printf("the older unit alone: %.9g\n", older);
    return !std::isfinite(older);
  }
  const double newer = newer_unit(tokens, stream);
  std::printf("older %.9g, newer %.9g\n", older, newer);
  return !(std::fabs(older - newer) <= 1e-5 * std::fabs(older));
}
