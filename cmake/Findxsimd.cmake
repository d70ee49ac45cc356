# Defines cca::xsimd from xsimd's headers alone. The package that comes with xsimd 8.1 in Debian 12 wants the library
# xtl, which is not installed with it, and the name of its target has differed between releases.

include(FindPackageHandleStandardArgs)

find_path(xsimd_INCLUDE_DIR xsimd/xsimd.hpp DOC "Where xsimd/xsimd.hpp is")
mark_as_advanced(xsimd_INCLUDE_DIR)

if(xsimd_INCLUDE_DIR)
  file(STRINGS ${xsimd_INCLUDE_DIR}/xsimd/config/xsimd_config.hpp xsimd_VERSION
       REGEX "^#define XSIMD_VERSION_(MAJOR|MINOR|PATCH) [0-9]+$")
  list(TRANSFORM xsimd_VERSION REPLACE "[^0-9]" "")
  list(JOIN xsimd_VERSION . xsimd_VERSION)
endif()

find_package_handle_standard_args(xsimd REQUIRED_VARS xsimd_INCLUDE_DIR VERSION_VAR xsimd_VERSION)

if(xsimd_FOUND AND NOT TARGET cca::xsimd)
  add_library(cca::xsimd INTERFACE IMPORTED GLOBAL)
  target_include_directories(cca::xsimd INTERFACE ${xsimd_INCLUDE_DIR})
endif()
