#pragma once

#include "../../version.hpp"
#include "language.hpp"

// Names the code of this translation unit: by the version of the headers and by the instructions that the compiler may
// use in it. Every symbol of the library lives in an inline namespace of that name. Units that differ in either then never
// share an inline function: the linker would keep any one of the copies, and an older processor might run the newer one's
// instructions, or a plugin another version's code.
//
// Instructions that no compiler makes of code like ours have no word here: encryption, tiles, hints about caches and the
// like. tests/tools/flags.sh goes through all that a compiler knows.

// The word where the macro is defined as 1, otherwise nothing.
#define CCA_WORD(macro, word) CCA_WORD_OF(macro, word)
#define CCA_WORD_OF(value, word) CCA_SECOND_OF(CCA_WORD_IF_##value word, , )
#define CCA_WORD_IF_1 ,
#define CCA_SECOND_OF(...) CCA_SECOND(__VA_ARGS__)
#define CCA_SECOND(first, second, ...) second

#define CCA_JOIN(a, b, c, d, e, f, g, h) CCA_JOINED(a, b, c, d, e, f, g, h)
#define CCA_JOINED(a, b, c, d, e, f, g, h) a##b##c##d##e##f##g##h

// CCA_VECTORS: what kernels are written for. CCA_BESIDE_VECTORS: what else the compiler may use.
#if defined(__aarch64__)

#define CCA_VECTORS neon64

#if defined(__ARM_FEATURE_SVE_BITS) && __ARM_FEATURE_SVE_BITS
#define CCA_SVE_BITS CCA_JOIN(_, __ARM_FEATURE_SVE_BITS, bits, , , , , )
#else
#define CCA_SVE_BITS
#endif
#if defined(__ARM_FEATURE_RCPC) && __ARM_FEATURE_RCPC
#define CCA_RCPC CCA_JOIN(_rcpc, __ARM_FEATURE_RCPC, , , , , , )
#else
#define CCA_RCPC
#endif
#define CCA_ARM_VECTORS                                                                                       \
  CCA_JOIN(CCA_WORD(__ARM_FEATURE_SVE, _sve), CCA_WORD(__ARM_FEATURE_SVE2, _sve2),                            \
           CCA_WORD(__ARM_FEATURE_SVE2p1, _sve2p1), CCA_SVE_BITS,                                             \
           CCA_WORD(__ARM_FEATURE_FP16_VECTOR_ARITHMETIC, _fp16), CCA_WORD(__ARM_FEATURE_FP16_FML, _fp16fml), \
           CCA_WORD(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC, _bf16), CCA_WORD(__ARM_FEATURE_FAMINMAX, _faminmax))
#define CCA_ARM_INTEGERS                                                                          \
  CCA_JOIN(CCA_WORD(__ARM_FEATURE_DOTPROD, _dotprod), CCA_WORD(__ARM_FEATURE_MATMUL_INT8, _i8mm), \
           CCA_WORD(__ARM_FEATURE_QRDMX, _rdm), CCA_WORD(__ARM_FEATURE_COMPLEX, _complex),        \
           CCA_WORD(__ARM_FEATURE_FRINT, _frint), CCA_WORD(__ARM_FEATURE_JCVT, _jcvt),            \
           CCA_WORD(__ARM_FEATURE_SHA3, _sha3), CCA_WORD(__ARM_FEATURE_CSSC, _cssc))
#define CCA_BESIDE_VECTORS                                                                     \
  CCA_JOIN(CCA_ARM_VECTORS, CCA_ARM_INTEGERS, CCA_WORD(__ARM_FEATURE_ATOMICS, _lse), CCA_RCPC, \
           CCA_WORD(__ARM_FEATURE_MOPS, _mops), CCA_WORD(__ARM_FEATURE_PAUTH, _pauth), , )

#elif defined(__SSE2__)

#if defined(__AVX512F__) && defined(__AVX512CD__) && defined(__AVX512DQ__) && defined(__AVX512BW__) && \
    defined(__AVX512VL__) && defined(__FMA__)
#define CCA_VECTORS avx512
#elif defined(__AVX512F__)
#define CCA_VECTORS                                                                                        \
  CCA_JOIN(avx512f, CCA_WORD(__AVX512CD__, _cd), CCA_WORD(__AVX512DQ__, _dq), CCA_WORD(__AVX512BW__, _bw), \
           CCA_WORD(__AVX512VL__, _vl), CCA_WORD(__FMA__, _fma), , )
#elif defined(__AVX2__)
#define CCA_VECTORS CCA_JOIN(avx2, CCA_WORD(__FMA__, _fma), , , , , , )
#elif defined(__AVX__)
#define CCA_VECTORS CCA_JOIN(avx, CCA_WORD(__FMA__, _fma), , , , , , )
#elif defined(__SSE4_2__)
#define CCA_VECTORS sse4_2
#elif defined(__SSE4_1__)
#define CCA_VECTORS sse4_1
#elif defined(__SSSE3__)
#define CCA_VECTORS ssse3
#elif defined(__SSE3__)
#define CCA_VECTORS sse3
#else
#define CCA_VECTORS sse2
#endif

// What compilers take for a part of a larger set has a word only without it.
#if !defined(__SSE4_2__)
#define CCA_POPCNT CCA_WORD(__POPCNT__, _popcnt)
#elif defined(__POPCNT__)
#define CCA_POPCNT
#else
#define CCA_POPCNT _no_popcnt
#endif
#if defined(__AVX512VL__)
#define CCA_F16C
#else
#define CCA_F16C CCA_WORD(__F16C__, _f16c)
#endif
// What came in one generation has one word where it is whole: -march=x86-64-v3 is avx2_fma_haswell.
#if defined(__BMI__) && defined(__BMI2__) && defined(__F16C__) && defined(__LZCNT__) && defined(__MOVBE__)
#define CCA_HASWELL _haswell
#else
#define CCA_HASWELL                                                                                   \
  CCA_JOIN(CCA_WORD(__BMI__, _bmi), CCA_WORD(__BMI2__, _bmi2), CCA_F16C, CCA_WORD(__LZCNT__, _lzcnt), \
           CCA_WORD(__MOVBE__, _movbe), , , )
#endif
#if defined(__AVX512IFMA__) && defined(__AVX512VBMI__) && defined(__AVX512VBMI2__) && defined(__AVX512VNNI__) && \
    defined(__AVX512BITALG__) && defined(__AVX512VPOPCNTDQ__) && defined(__GFNI__)
#define CCA_ICELAKE _icelake
#else
#define CCA_ICELAKE                                                                                             \
  CCA_JOIN(CCA_WORD(__AVX512IFMA__, _ifma), CCA_WORD(__AVX512VBMI__, _vbmi), CCA_WORD(__AVX512VBMI2__, _vbmi2), \
           CCA_WORD(__AVX512VNNI__, _vnni), CCA_WORD(__AVX512BITALG__, _bitalg),                                \
           CCA_WORD(__AVX512VPOPCNTDQ__, _vpopcntdq), CCA_WORD(__GFNI__, _gfni), )
#endif
#define CCA_LATER_AVX                                                                                         \
  CCA_JOIN(CCA_WORD(__AVX512BF16__, _bf16), CCA_WORD(__AVX512FP16__, _fp16), CCA_WORD(__AVXVNNI__, _avxvnni), \
           CCA_WORD(__AVXVNNIINT8__, _avxvnniint8), CCA_WORD(__AVXVNNIINT16__, _avxvnniint16),                \
           CCA_WORD(__AVXIFMA__, _avxifma), CCA_WORD(__AVXNECONVERT__, _avxneconvert),                        \
           CCA_WORD(__AVX10_2__, _avx10_2))
#define CCA_OF_ONE_MAKER                                                                                             \
  CCA_JOIN(CCA_WORD(__SSE4A__, _sse4a), CCA_WORD(__FMA4__, _fma4), CCA_WORD(__XOP__, _xop), CCA_WORD(__TBM__, _tbm), \
           CCA_WORD(__AVX512ER__, _er), CCA_WORD(__AVX512PF__, _pf), , )
#define CCA_BESIDE_VECTORS                                                                                   \
  CCA_JOIN(CCA_POPCNT, CCA_OF_ONE_MAKER, CCA_HASWELL, CCA_ICELAKE, CCA_LATER_AVX, CCA_WORD(__APX_F__, _apx), \
           CCA_WORD(__CMPCCXADD__, _cmpccxadd), CCA_WORD(__RAOINT__, _raoint))

#else
#error "cca: no SIMD instruction set that it knows (x86-64 from SSE2 on, or aarch64)"
#include "cca_stops_here"
#endif

// The kernels of cca::dispatch are compiled for no more than CCA_VECTORS says.
#define CCA_INSTRUCTION_SET CCA_JOIN(CCA_VECTORS, CCA_BESIDE_VECTORS, , , , , , )
#define CCA_TARGET CCA_JOIN(CCA_VERSION_NAME, _, CCA_INSTRUCTION_SET, , , , , )
