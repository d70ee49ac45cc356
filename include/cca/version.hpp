#pragma once

#include "detail/base/language.hpp"

/// @file
/// The version of the library, stated here alone: CMake, Conan and the package files read these three numbers.
///
/// Semantic versioning (semver.org). What counts is that users' code compiles and computes the same: the documented names
/// outside of `detail`, their meaning, and the CMake targets. Before 1.0 a new minor version may break it, a new patch
/// may not. There is no binary interface: every symbol is compiled into its user.

#include <array>

/// Raised by what may break users, after 1.0.
#define CCA_VERSION_MAJOR 0
/// Raised by what users may want; before 1.0 also by what may break them.
#define CCA_VERSION_MINOR 1
/// Raised by repairs alone.
#define CCA_VERSION_PATCH 0

/// For the preprocessor: `#if CCA_VERSION >= CCA_MAKE_VERSION(0, 1, 0)`. A minor version or patch is below 1000.
#define CCA_MAKE_VERSION(major, minor, patch) ((major)*1000000 + (minor)*1000 + (patch))
/// This version, as of `CCA_MAKE_VERSION`.
#define CCA_VERSION CCA_MAKE_VERSION(CCA_VERSION_MAJOR, CCA_VERSION_MINOR, CCA_VERSION_PATCH)
/// This version as text, "0.1.0" for example.
#define CCA_VERSION_STRING CCA_VERSION_STRING_OF(CCA_VERSION_MAJOR, CCA_VERSION_MINOR, CCA_VERSION_PATCH)
/// @cond
#define CCA_VERSION_STRING_OF(major, minor, patch) CCA_VERSION_TEXT(major, minor, patch)
#define CCA_VERSION_TEXT(major, minor, patch) #major "." #minor "." #patch
/// @endcond
/// The part of the library's inline namespace that tells versions apart: v0_1_0.
#define CCA_VERSION_NAME CCA_VERSION_NAME_OF(CCA_VERSION_MAJOR, CCA_VERSION_MINOR, CCA_VERSION_PATCH)
/// @cond
#define CCA_VERSION_NAME_OF(major, minor, patch) CCA_VERSION_NAMED(major, minor, patch)
#define CCA_VERSION_NAMED(major, minor, patch) v##major##_##minor##_##patch
/// @endcond

namespace cca {

/// For constant expressions: `static_assert(cca::version >= std::array{0, 1, 0})`. Every translation unit has its own.
constexpr std::array<int, 3> version{CCA_VERSION_MAJOR, CCA_VERSION_MINOR, CCA_VERSION_PATCH};
/// The same as text, ended by a zero.
constexpr char version_string[] = CCA_VERSION_STRING;

}  // namespace cca
