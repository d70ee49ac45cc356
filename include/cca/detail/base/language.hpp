#pragma once

// What a translation unit has to be compiled as. This is the first header that every other one includes: where something
// is missing, the compiler says so once and stops.

// cca_stops_here does not exist: a header that is not found ends the compilation, which #error alone does not.
#if !defined(__cplusplus) || __cplusplus < 202002L
#error "cca: needs C++20: compile with -std=c++20 or newer"
#include "cca_stops_here"
#endif

#if !defined(__cpp_exceptions)
#error "cca: needs exceptions, by which it refuses wrong arguments: compile without -fno-exceptions"
#include "cca_stops_here"
#endif

// A query that sees nothing and a NaN that must show both rest on IEEE infinities and NaNs.
#if defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__
#error \
    "cca: -ffinite-math-only (part of -ffast-math) removes the infinities and NaNs that attention masks rest on: add -fno-finite-math-only"
#include "cca_stops_here"
#endif
