# Tells whose targets compile the attention kernels without optimisation, or for a plain x86-64, what they lose: at the end
# of the configuration, when every target has its flags, and once per build folder. -D CCA_HINTS=OFF silences it.

include_guard(GLOBAL)
include(CheckCXXSourceCompiles)

# cca_closure(target options links): the options that a target is compiled with, its own and those of what it links to, and
# the names of all that it links to.
function(cca_closure target options links)
  get_target_property(all_options ${target} COMPILE_OPTIONS)
  get_target_property(open ${target} LINK_LIBRARIES)
  set(seen "")
  while(NOT "${open}" STREQUAL "")  # its last element may be "..-NOTFOUND", which would be false
    list(POP_FRONT open next)
    if(next IN_LIST seen OR NOT TARGET ${next})
      continue()
    endif()
    list(APPEND seen ${next})
    get_target_property(more_options ${next} INTERFACE_COMPILE_OPTIONS)
    get_target_property(more_links ${next} INTERFACE_LINK_LIBRARIES)
    list(APPEND all_options ${more_options})
    list(APPEND open ${more_links})
  endwhile()
  set(${options} ${all_options} PARENT_SCOPE)
  set(${links} ${seen} PARENT_SCOPE)
endfunction()

# cca_compiled_targets(folder result): the compiled targets of a folder and those below, but for the parts of cca::dispatch,
# cca::c and cca::c_mpi.
function(cca_compiled_targets folder result)
  set(compiled "")
  get_property(targets DIRECTORY ${folder} PROPERTY BUILDSYSTEM_TARGETS)
  foreach(target IN LISTS targets)
    get_target_property(type ${target} TYPE)
    if(type MATCHES "^(EXECUTABLE|(STATIC|SHARED|MODULE|OBJECT)_LIBRARY)$" AND NOT target MATCHES "^cca_(dispatch|c$|c_mpi$)")
      list(APPEND compiled ${target})
    endif()
  endforeach()
  get_property(folders DIRECTORY ${folder} PROPERTY SUBDIRECTORIES)
  foreach(below IN LISTS folders)
    cca_compiled_targets(${below} more)
    list(APPEND compiled ${more})
  endforeach()
  set(${result} ${compiled} PARENT_SCOPE)
endfunction()

# cca_give_hint(what targets text): unless there are no targets, or the same ones have been named before.
function(cca_give_hint what targets text)
  if("${targets}" STREQUAL "" OR "${targets}" STREQUAL "${CCA_HINT_OF_${what}_GIVEN}")
    return()
  endif()
  set(CCA_HINT_OF_${what}_GIVEN "${targets}" CACHE INTERNAL "Targets of which this hint was given")
  list(JOIN targets ", " targets)
  string(REPLACE "<targets>" "${targets}" text "${text}")
  message(NOTICE "-- cca: ${text} -D CCA_HINTS=OFF silences this.")
endfunction()

function(cca_hints)
  if(DEFINED CCA_HINTS AND NOT CCA_HINTS)
    return()
  endif()
  string(TOUPPER "${CMAKE_BUILD_TYPE}" config)
  set(all_flags "${CMAKE_CXX_FLAGS} ${CMAKE_CXX_FLAGS_${config}}")
  # Who asks for a debug build knows; who builds by a generator of several configurations chooses later.
  set(may_be_slow TRUE)
  get_property(multi_config GLOBAL PROPERTY GENERATOR_IS_MULTI_CONFIG)
  if(multi_config OR config STREQUAL DEBUG)
    set(may_be_slow FALSE)
  endif()
  set(may_be_plain FALSE)
  if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
    set(may_be_plain TRUE)
  endif()

  set(slow "")
  set(plain "")
  cca_compiled_targets(${CMAKE_SOURCE_DIR} targets)
  foreach(target IN LISTS targets)
    cca_closure(${target} options links)
    if(NOT cca::cca IN_LIST links)
      continue()
    endif()
    string(JOIN " " flags ${all_flags} ${options})
    if(may_be_slow AND NOT flags MATCHES "(^|[ :,])-O")
      list(APPEND slow ${target})
    endif()
    # Who links cca::dispatch has its kernels for every processor.
    if(may_be_plain AND NOT flags MATCHES "-m(arch=|cpu=|avx)|[/-]arch:" AND NOT links MATCHES "(^|;)cca(::|_)dispatch")
      list(APPEND plain ${target})
    endif()
  endforeach()

  cca_give_hint(OPTIMISATION "${slow}"
    "without a build type the attention kernels in <targets> are not optimised, and hundreds of times slower.\n\
   To get them: -D CMAKE_BUILD_TYPE=Release, or target_compile_options(<target> PRIVATE -O3).\n  ")
  if(plain)
    # A compiler may have been built to use more than the baseline.
    check_cxx_source_compiles("#ifndef __AVX2__\n#error\n#endif\nint main() {}" CCA_COMPILER_DEFAULTS_TO_AVX2)
    if(CCA_COMPILER_DEFAULTS_TO_AVX2)
      return()
    endif()
  endif()
  cca_give_hint(INSTRUCTIONS "${plain}"
    "without an -m flag the attention kernels in <targets> are compiled for the oldest x86-64:\n\
   vectors of 4 floats and no fused multiply-add, where AVX2 has 8 with it, and AVX-512 16.\n\
   To get them: target_compile_options(<target> PRIVATE -march=native), or -march=x86-64-v3 for any\n\
   processor with AVX2 and FMA.")
endfunction()

cmake_language(DEFER DIRECTORY ${CMAKE_SOURCE_DIR} CALL cca_hints)
