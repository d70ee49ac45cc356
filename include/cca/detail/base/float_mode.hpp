#pragma once

#include <cstdint>

#include "target.hpp"

#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

namespace cca { inline namespace CCA_TARGET { namespace detail {

/// How a thread computes: how it rounds, and whether it takes denormal numbers for zeros. These are bits of a register that
/// each thread sets for itself, MXCSR or FPCR, and they change results. Its other bits, exceptions raised and trapped, do not.
#if defined(__SSE2__)
using float_mode = unsigned;
inline constexpr float_mode float_mode_bits = 0xe040;  // FTZ, both of rounding, DAZ

inline float_mode get_float_register() { return _mm_getcsr(); }
inline void set_float_register(float_mode value) { _mm_setcsr(value); }
#else
using float_mode = std::uint64_t;
inline constexpr float_mode float_mode_bits = 0x3c80007;  // DN, FZ, both of RMode, FZ16; NEP, AH, FIZ

inline float_mode get_float_register() {
  float_mode value = 0;
  asm volatile("mrs %0, fpcr" : "=r"(value) : : "memory");
  return value;
}
inline void set_float_register(float_mode value) { asm volatile("msr fpcr, %0" : : "r"(value) : "memory"); }
#endif

inline float_mode current_float_mode() { return get_float_register() & float_mode_bits; }

/// Lets this thread compute in another's mode until the end of the scope. The register is written only where that changes
/// something: a write holds up the instructions after it.
class float_mode_scope {
 public:
  explicit float_mode_scope(float_mode mode) : own_(current_float_mode()), changed_(mode != own_) { set(mode); }
  ~float_mode_scope() { set(own_); }
  float_mode_scope(const float_mode_scope&) = delete;
  float_mode_scope& operator=(const float_mode_scope&) = delete;

 private:
  void set(float_mode mode) const {
    if (changed_) set_float_register((get_float_register() & ~float_mode_bits) | mode);
  }

  float_mode own_;
  bool changed_;
};

}}}  // namespace cca::CCA_TARGET::detail
