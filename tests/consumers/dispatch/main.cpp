// A program for any processor: every set of kernels that runs here is asked for the same, and the one in use is the
// newest.
#include <cca/dispatch.hpp>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <vector>

#if defined(__AVX__)
#error "of what the program itself is compiled for nothing must come from the library"
#endif

int main() {
  constexpr std::int64_t length = 20, dim = 3;
  std::vector<float> tokens(length * dim), first;
  for (std::size_t i = 0; i < tokens.size(); ++i) tokens[i] = static_cast<float>(i % 7);

  bool right = cca::dispatch::architecture() == cca::dispatch::architectures().front();
  for (const auto architecture : cca::dispatch::architectures()) {
    cca::dispatch::use(architecture);
    std::vector<float> out(tokens.size());
    const auto view = cca::bhsd(tokens.data(), 1, 1, length, dim);
    cca::dispatch::attention(view, view, view, cca::bhsd(out.data(), 1, 1, length, dim),
                             {.group_size = 2, .window = 4});
    if (first.empty()) first = out;
    // The first token sees itself alone; the others differ by rounding.
    const bool same = std::equal(tokens.begin(), tokens.begin() + dim, out.begin()) &&
                      std::equal(out.begin(), out.end(), first.begin(),
                                 [](float a, float b) { return std::abs(a - b) <= 1e-5f * std::abs(b); });
    std::printf("%.*s: %s\n", static_cast<int>(architecture.size()), architecture.data(), same ? "right" : "wrong");
    right = right && same;
  }
  return right ? 0 : 1;
}
