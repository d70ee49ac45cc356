# Tells whose targets compile the kernels for a plain x86-64 what they lose: at the end of the configuration, when every
# target has its flags, and once per build folder. Targets say -march=.., the like, or /arch:..; -D CCA_ARCH_HINT=OFF
# silences it.

include_guard(GLOBAL)
include(CheckCXXSourceCompiles)

# cca_compile_options(target result): the options that a target is compiled with, its own and those of what it links to,
# and "cca::cca" when its kernels are compiled with them.
function(cca_compile_options target result)
  get_target_property(options ${target} COMPILE_OPTIONS)
  get_target_property(open ${target} LINK_LIBRARIES)
  set(seen ${target})
  while(NOT "${open}" STREQUAL "")  # its last element may be "..-NOTFOUND", which would be false
    list(POP_FRONT open next)
    if(next IN_LIST seen OR NOT TARGET ${next})
      continue()
    endif()
    list(APPEND seen ${next})
    get_target_property(own ${next} INTERFACE_COMPILE_OPTIONS)
    get_target_property(links ${next} INTERFACE_LINK_LIBRARIES)
    list(APPEND options ${own})
    list(APPEND open ${links})
  endwhile()
  # Who links cca::dispatch has its kernels for every processor.
  if(cca::cca IN_LIST seen AND NOT cca::dispatch IN_LIST seen AND NOT cca_dispatch IN_LIST seen)
    list(APPEND options cca::cca)
  endif()
  set(${result} ${options} PARENT_SCOPE)
endfunction()

# cca_plain_targets(folder result): compiled targets of a folder and those below that use cca::cca without an instruction
# set of their own.
function(cca_plain_targets folder result)
  set(plain "")
  get_property(targets DIRECTORY ${folder} PROPERTY BUILDSYSTEM_TARGETS)
  foreach(target IN LISTS targets)
    get_target_property(type ${target} TYPE)
    if(type MATCHES "^(EXECUTABLE|(STATIC|SHARED|MODULE|OBJECT)_LIBRARY)$")
      cca_compile_options(${target} options)
      if(cca::cca IN_LIST options AND NOT options MATCHES "-m(arch=|cpu=|avx)|[/-]arch:")
        list(APPEND plain ${target})
      endif()
    endif()
  endforeach()
  get_property(folders DIRECTORY ${folder} PROPERTY SUBDIRECTORIES)
  foreach(below IN LISTS folders)
    cca_plain_targets(${below} more)
    list(APPEND plain ${more})
  endforeach()
  set(${result} ${plain} PARENT_SCOPE)
endfunction()

function(cca_instruction_set_hint)
  string(TOUPPER "${CMAKE_BUILD_TYPE}" config)
  if((DEFINED CCA_ARCH_HINT AND NOT CCA_ARCH_HINT)
     OR NOT CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64"
     OR "${CMAKE_CXX_FLAGS} ${CMAKE_CXX_FLAGS_${config}}" MATCHES "-m(arch=|cpu=|avx)|[/-]arch:")
    return()
  endif()
  cca_plain_targets(${CMAKE_SOURCE_DIR} targets)
  if(NOT targets OR "${targets}" STREQUAL "${CCA_ARCH_HINT_GIVEN}")
    return()
  endif()
  # A compiler may have been built to use more than the baseline.
  check_cxx_source_compiles("#ifndef __AVX2__\n#error\n#endif\nint main() {}" CCA_COMPILER_DEFAULTS_TO_AVX2)
  if(CCA_COMPILER_DEFAULTS_TO_AVX2)
    return()
  endif()
  set(CCA_ARCH_HINT_GIVEN "${targets}" CACHE INTERNAL "Targets of which the hint about instruction sets was given")
  list(JOIN targets ", " targets)
  message(NOTICE "-- cca: without an -m flag the attention kernels in ${targets} are compiled for the oldest x86-64:\n"
                 "   vectors of 4 floats and no fused multiply-add, where AVX2 has 8 with it, and AVX-512 16.\n"
                 "   To get them: target_compile_options(<target> PRIVATE -march=native), or -march=x86-64-v3 for any\n"
                 "   processor with AVX2 and FMA. -D CCA_ARCH_HINT=OFF silences this.")
endfunction()

cmake_language(DEFER DIRECTORY ${CMAKE_SOURCE_DIR} CALL cca_instruction_set_hint)
