# cmake -D VERSION=.. -P check_versions.cmake: those files that cannot read include/cca/version.hpp agree with it.

cmake_minimum_required(VERSION 3.25)

file(READ ../../cmake/packaging/vcpkg/cca/vcpkg.json manifest)
string(JSON port GET "${manifest}" version)
if(NOT port STREQUAL VERSION)
  message(FATAL_ERROR "the vcpkg port is of ${port}, the library of ${VERSION}")
endif()

file(STRINGS ../../cmake/docs/changelog.md releases REGEX "^## \\[[0-9]")
list(POP_FRONT releases latest)
if(NOT latest MATCHES "^## .${VERSION}. - (unreleased|[0-9-]+)$")
  message(FATAL_ERROR "changelog.md begins with '${latest}', the library is of ${VERSION}")
endif()
