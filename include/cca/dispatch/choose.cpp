// Chooses the kernels that run here. Compiled like the program itself, for the oldest processor that it is for.

#include <algorithm>
#include <atomic>
#include <cca/dispatch/plain.hpp>
#include <stdexcept>
#include <string>
#include <string_view>

extern "C" {
#if defined(__x86_64__)
extern const cca::plain::architecture CCA_DISPATCH_TABLE(avx512), CCA_DISPATCH_TABLE(avx2_fma),
    CCA_DISPATCH_TABLE(sse4_2), CCA_DISPATCH_TABLE(sse2);
#else
extern const cca::plain::architecture CCA_DISPATCH_TABLE(neon64);
#endif
}

namespace cca { namespace plain { inline namespace CCA_VERSION_NAME {
namespace {

std::atomic<const architecture*> current{nullptr};

/// Whether the kernels of an instruction set were compiled. No name is a part of another.
constexpr std::string_view compiled = CCA_DISPATCH_ARCHITECTURES;
constexpr bool has(std::string_view name) { return compiled.find(name) != std::string_view::npos; }

}  // namespace

// The questions are for every feature that cmake/dispatch.cmake lets the compiler use, and go to the compiler's run-time
// library: its answer for AVX and AVX-512 includes whether the operating system keeps the wide registers (XCR0).
// xsimd 8.1 does not ask that, and takes AVX from the wrong leaf of CPUID; and `xsimd::dispatch` is noexcept to this
// day, so that a refusal would end the program.
std::vector<const architecture*> available() {
  std::vector<const architecture*> all;  // a table that was not compiled must not be named
#if defined(__x86_64__)
  __builtin_cpu_init();  // constructors may call before the library's own has run
  const bool sse4_2 = __builtin_cpu_supports("sse4.2") && __builtin_cpu_supports("popcnt");
  const bool avx2_fma = sse4_2 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2_fma && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512cd") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl");
  if constexpr (has("avx512"))
    if (avx512) all.push_back(&CCA_DISPATCH_TABLE(avx512));
  if constexpr (has("avx2_fma"))
    if (avx2_fma) all.push_back(&CCA_DISPATCH_TABLE(avx2_fma));
  if constexpr (has("sse4_2"))
    if (sse4_2) all.push_back(&CCA_DISPATCH_TABLE(sse4_2));
  if constexpr (has("sse2")) all.push_back(&CCA_DISPATCH_TABLE(sse2));
#else
  if constexpr (has("neon64")) all.push_back(&CCA_DISPATCH_TABLE(neon64));
#endif
  return all;
}

const architecture& chosen() {
  const architecture* architecture = current.load(std::memory_order_relaxed);
  if (architecture != nullptr) return *architecture;
  const std::vector<const plain::architecture*> all = available();
  if (all.empty())
    throw std::runtime_error(
        "cca: processor: it runs none of the instruction sets that cca::dispatch was compiled for: " +
        std::string(compiled));
  // Threads that come here at once find the same; what `choose` says meanwhile stays.
  const plain::architecture* best = all.front();
  return current.compare_exchange_strong(architecture, best) ? *best : *architecture;
}

void choose(std::string_view name) {
  const std::vector<const architecture*> all = available();
  const auto found = std::find_if(all.begin(), all.end(), [&](const architecture* a) { return a->name == name; });
  if (found != all.end()) return current.store(*found, std::memory_order_relaxed);
  std::string names;
  for (const architecture* a : all) names += (names.empty() ? "" : ", ") + std::string(a->name);
  if (names.empty()) names = "none: the processor runs none of those that were compiled: " + std::string(compiled);
  throw std::invalid_argument("cca: architecture: got " + std::string(name) + ", wants one of " + names);
}

}}}  // namespace cca::plain::CCA_VERSION_NAME
