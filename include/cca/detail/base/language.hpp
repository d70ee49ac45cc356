#pragma once

// What a translation unit has to be compiled as. This is the first header that every other one includes: where something
// is missing, the compiler says so once and stops.

// cca_stops_here does not exist: a header that is not found ends the compilation, which #error alone does not.
#if !defined(__cplusplus) || __cplusplus < 202002L
#error "cca: needs C++20: compile with -std=c++20 or newer"
#include "cca_stops_here"
#endif
