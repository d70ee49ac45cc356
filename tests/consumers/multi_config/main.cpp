// A program whose kernels have to be of its own configuration.
#include "configuration.hpp"

#include <cstdio>

int main() {
  const int kernels = kernels_of_a(of_a_release);
  std::printf("%s: kernels of %d instruction sets\n", of_a_release ? "release" : "debug", kernels);
  return kernels == 0;
}
