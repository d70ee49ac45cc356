# What our own tests, benchmarks and examples are built with. None of it reaches users of cca::cca.

find_package(Threads REQUIRED)
find_package(OpenMP)

set(CMAKE_CXX_EXTENSIONS OFF)

add_library(cca_development INTERFACE)
target_link_libraries(cca_development INTERFACE cca::cca Threads::Threads $<TARGET_NAME_IF_EXISTS:OpenMP::OpenMP_CXX>)
target_compile_options(cca_development INTERFACE -Wall -Wextra -Wpedantic -Wconversion -Wshadow -Werror)
# g++ 12 finds fault with its own AVX-512 intrinsics, wherever they are inlined.
if(CMAKE_CXX_COMPILER_ID STREQUAL GNU AND CMAKE_CXX_COMPILER_VERSION VERSION_LESS 13)
  target_compile_options(cca_development INTERFACE -Wno-uninitialized -Wno-maybe-uninitialized)
endif()

# Instruction sets by name. On x86-64 they are the levels of its psABI: each defines every macro by which xsimd chooses
# sse2, sse4.2, fma3<avx2> or avx512bw.
set(cca_flags_baseline "")
set(cca_flags_sse4.2 -march=x86-64-v2)
set(cca_flags_avx2 -march=x86-64-v3)
set(cca_flags_avx512 -march=x86-64-v4)
set(cca_flags_native -march=native)

set(CCA_ARCH native CACHE STRING "Instruction set of the benchmarks and examples")
set_property(CACHE CCA_ARCH PROPERTY STRINGS baseline sse4.2 avx2 avx512 native)

# cca_add_program(name arch source...)
function(cca_add_program name arch)
  add_executable(${name} ${ARGN})
  cca_compile_for(${name} ${arch})
endfunction()

# cca_compile_for(target arch)
function(cca_compile_for name arch)
  if(NOT DEFINED cca_flags_${arch})
    message(FATAL_ERROR "unknown instruction set '${arch}': use baseline, sse4.2, avx2, avx512 or native")
  endif()
  target_link_libraries(${name} PRIVATE cca_development)
  target_compile_options(${name} PRIVATE ${cca_flags_${arch}})
endfunction()
