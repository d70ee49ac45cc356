#pragma once

// What xsimd uses as names is a macro behind <complex.h> and <windows.h>.
#pragma push_macro("I")
#pragma push_macro("min")
#pragma push_macro("max")
#undef I
#undef min
#undef max
#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ < 13
// g++ 12 finds its own AVX-512 intrinsics uninitialised, thousands of lines of it, wherever they are inlined.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <xsimd/xsimd.hpp>
#pragma GCC diagnostic pop
#else
#include <xsimd/xsimd.hpp>
#endif
#pragma pop_macro("I")
#pragma pop_macro("min")
#pragma pop_macro("max")

#include "../base/target.hpp"

namespace cca { inline namespace CCA_TARGET { namespace detail {

/// An architecture of xsimd under a name of ours: of the functions that xsimd makes for it, up to release 12 not all inline,
/// each has a name of ours as well, see detail/base/target.hpp.
template <class Base>
struct arch : Base {};

#if defined(__aarch64__)
using vector_arch = xsimd::neon64;  // which every unit has
using quad_arch = vector_arch;
#else
/// The widest vectors. Whatever XSIMD_DEFAULT_ARCH says: the name of the namespace does not.
using vector_arch = arch<xsimd::x86_arch>;
/// Vectors of 128 bits.
using quad_arch = arch<xsimd::sse2>;
#endif

/// A register like one of xsimd's, for its batches to derive from.
template <class Like>
struct held_register {
  using register_type = typename Like::register_type;
  register_type data;

  held_register() = default;
  held_register(register_type r) noexcept : data(r) {}
  operator register_type() const noexcept { return data; }
};

}}}  // namespace cca::CCA_TARGET::detail

namespace xsimd::types {

template <class T, class Base>
struct has_simd_register<T, cca::detail::arch<Base>> : has_simd_register<T, Base> {};

template <class T, class Base>
struct simd_register<T, cca::detail::arch<Base>> : cca::detail::held_register<simd_register<T, Base>> {
  using cca::detail::held_register<simd_register<T, Base>>::held_register;
};

template <class T, class Base>
struct get_bool_simd_register<T, cca::detail::arch<Base>> {
  using type = cca::detail::held_register<get_bool_simd_register_t<T, Base>>;
};

}  // namespace xsimd::types
