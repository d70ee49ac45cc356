#pragma once

// Names the instruction set of this translation unit. Every symbol of the library lives in an inline namespace of that
// name, so that two translation units built with different -m flags never share an inline function: the linker would
// keep either copy, and an older processor might then run the newer one's instructions.

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512CD__)
#define CCA_TARGET avx512
#elif defined(__AVX2__) && defined(__FMA__)
#define CCA_TARGET avx2_fma
#elif defined(__AVX2__)
#define CCA_TARGET avx2
#elif defined(__AVX__)
#define CCA_TARGET avx
#elif defined(__SSE4_2__)
#define CCA_TARGET sse4_2
#elif defined(__SSE2__)
#define CCA_TARGET sse2
#elif defined(__aarch64__)
#define CCA_TARGET neon64
#else
#error "cca: no SIMD instruction set that it knows (x86-64 from SSE2 on, or aarch64)"
#endif

// A query that sees nothing and a NaN that must show both rest on IEEE infinities and NaNs.
#if defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__
#error "cca: -ffinite-math-only (part of -ffast-math) removes the infinities and NaNs that attention masks rest on"
#endif
