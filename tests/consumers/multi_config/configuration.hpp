#pragma once

#if defined(NDEBUG)
inline constexpr bool of_a_release = true;
#else
inline constexpr bool of_a_release = false;
#endif

/// How many instruction sets there are, all of whose kernels are of that configuration; 0 when one of them is not.
int kernels_of_a(bool release);
