# xsimd and Eigen: the installed ones, else fetched. Of a fetched one only the headers are used: SOURCE_SUBDIR names a
# folder that does not exist, so that none of its CMake code runs. To install the headers takes neither.

if(PROJECT_IS_TOP_LEVEL AND NOT cca_builds)
  find_package(xsimd 8.1 MODULE QUIET)
  find_package(Eigen3 CONFIG QUIET)
  if(NOT xsimd_FOUND OR NOT Eigen3_FOUND)
    return()
  endif()
endif()

include(FetchContent)

if(NOT TARGET cca::xsimd)
  FetchContent_Declare(
    xsimd
    GIT_REPOSITORY https://github.com/xtensor-stack/xsimd.git
    GIT_TAG 14.3.0
    GIT_SHALLOW ON
    SOURCE_SUBDIR headers-only
    FIND_PACKAGE_ARGS 8.1 MODULE)
  FetchContent_MakeAvailable(xsimd)
  if(NOT TARGET cca::xsimd)
    set(xsimd_INCLUDE_DIR ${xsimd_SOURCE_DIR}/include)
    find_package(xsimd 8.1 MODULE REQUIRED)
  endif()
endif()

if(NOT TARGET Eigen3::Eigen)
  # No version in the request: Eigen 5 refuses 3.4, and Eigen 3.4.0 refuses any range that reaches to 5.
  FetchContent_Declare(
    Eigen3
    GIT_REPOSITORY https://gitlab.com/libeigen/eigen.git
    GIT_TAG 3.4.0
    GIT_SHALLOW ON
    SOURCE_SUBDIR headers-only
    FIND_PACKAGE_ARGS CONFIG GLOBAL)
  FetchContent_MakeAvailable(Eigen3)
  if(NOT TARGET Eigen3::Eigen)
    add_library(Eigen3::Eigen INTERFACE IMPORTED GLOBAL)
    target_include_directories(Eigen3::Eigen INTERFACE ${eigen3_SOURCE_DIR})
  endif()
endif()
if(DEFINED Eigen3_VERSION AND Eigen3_VERSION VERSION_LESS 3.4)
  message(FATAL_ERROR "cca needs Eigen 3.4 or newer, and found ${Eigen3_VERSION} in ${Eigen3_DIR}")
endif()
