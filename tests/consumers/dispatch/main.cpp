// A program for any processor: every set of kernels that it was compiled with is asked for the same, and the one in use is
// the newest; the others are refused.
#include <cca/dispatch.hpp>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <stdexcept>
#include <string_view>
#include <vector>

#if defined(__AVX__)
#error "of what the program itself is compiled for nothing must come from the library"
#endif

bool refused(std::string_view architecture) {
  try {
    cca::dispatch::use(architecture);
  } catch (const std::invalid_argument& e) {
    std::printf("%s\n", e.what());
    return true;
  }
  return false;
}

int main() {
  constexpr std::int64_t length = 20, dim = 3;
  std::vector<float> tokens(length * dim), first;
  for (std::size_t i = 0; i < tokens.size(); ++i) tokens[i] = static_cast<float>(i % 7);

  std::vector<std::string_view> compiled{CONSUMER_NEWEST};
  if (compiled[0] != CONSUMER_OLDEST) compiled.push_back(CONSUMER_OLDEST);
  bool right = cca::dispatch::architectures() == compiled && cca::dispatch::architecture() == compiled[0];
  for (const std::string_view other : {"avx512", "avx2_fma", "sse4_2", "sse2", "neon64"})
    if (std::find(compiled.begin(), compiled.end(), other) == compiled.end()) right = refused(other) && right;
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
