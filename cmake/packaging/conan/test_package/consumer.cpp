#include <cca/cca.hpp>
#include <cca/version.hpp>
#include <cstdio>
#include <vector>

int main() {
  std::vector<float> tokens(20 * 3, 1.0f), out(tokens.size());
  const auto view = cca::bhsd(tokens.data(), 1, 1, 20, 3);
  cca::attention(view, view, view, cca::bhsd(out.data(), 1, 1, 20, 3), {.group_size = 2, .window = 4});
  std::printf("cca %d.%d.%d: the mean of ones is %g\n", cca::version[0], cca::version[1], cca::version[2],
              static_cast<double>(out.back()));
  return !(out.back() > 0.999f && out.back() < 1.001f);
}
