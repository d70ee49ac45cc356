#pragma once

#include <cstdint>

#if (defined(__x86_64__) && defined(__GNUC__))
#define CCA_MATRIX_UNITS 1
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

#include "target.hpp"

namespace cca { inline namespace CCA_TARGET { namespace detail {

/// What this processor multiplies pairs of 16-bit numbers with, and the operating system lets us use.
struct matrix_units {
  bool avx512_bf16 = false;
  bool amx_bf16 = false;
  bool amx_fp16 = false;
  bool avx512_vnni = false;  ///< four products of bytes
  bool avx_vnni = false;     ///< the same in registers of 256 bits
};

#if defined(CCA_MATRIX_UNITS)

struct cpuid_registers {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
};

/// All zero where the processor has no such leaf.
inline cpuid_registers cpuid(unsigned leaf, unsigned subleaf) {
  cpuid_registers r;
  __get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx);
  return r;
}

/// The register states that the operating system saves: those of the others must not be touched.
inline std::uint32_t saved_states() {
  constexpr unsigned os_uses_xsave = 1u << 27;
  if ((cpuid(1, 0).ecx & os_uses_xsave) == 0) return 0;
  std::uint32_t low = 0, high = 0;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return low;
}

/// Linux gives tiles to processes that ask; to ask again does no harm. Other systems are not known to give any.
inline bool request_tiles() {
#if defined(__linux__) && defined(SYS_arch_prctl)
  constexpr long request_permission = 0x1023, tile_data = 18;
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return false;
#endif
}

inline matrix_units find_matrix_units() {
  constexpr std::uint32_t vectors = 0xe6,
                          tiles = 0x60000;  // SSE, AVX, masks, upper halves, upper registers; both of AMX
  const std::uint32_t saved = saved_states();
  const cpuid_registers features = cpuid(7, 0);
  const cpuid_registers more = features.eax >= 1 ? cpuid(7, 1) : cpuid_registers{};
  const auto has = [](unsigned bits, unsigned bit) { return (bits >> bit & 1u) != 0; };
  matrix_units found;
  found.avx512_bf16 = (saved & vectors) == vectors && has(features.ebx, 16) && has(more.eax, 5);
  // All that the kernels use: AVX-512 F, BW and VNNI.
  found.avx512_vnni =
      (saved & vectors) == vectors && has(features.ebx, 16) && has(features.ebx, 30) && has(features.ecx, 11);
  // AVX2, FMA and AVX-VNNI.
  found.avx_vnni = (saved & 0x6) == 0x6 && has(features.ebx, 5) && has(cpuid(1, 0).ecx, 12) && has(more.eax, 4);
  if ((saved & tiles) == tiles && has(features.edx, 24) && request_tiles()) {
    found.amx_bf16 = has(features.edx, 22);
    found.amx_fp16 = has(more.eax, 21);
  }
  return found;
}

#else

inline matrix_units find_matrix_units() { return {}; }

#endif

/// Found once, when first asked for; the process has the permission to use them from then on. Not constant for the sake of
/// tests, which emulate units that are not there.
inline matrix_units& present_units() {
  static matrix_units units = find_matrix_units();
  return units;
}

}}}  // namespace cca::CCA_TARGET::detail
