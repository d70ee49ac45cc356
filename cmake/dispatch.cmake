# cca::dispatch: the kernels for several instruction sets, and what chooses among them at run time; cca::c: a shared library
# of it for C. Built only where a target links them. For the project and for its installed package alike: the sources lie beside the headers and are
# compiled as the user's program is, so that the package depends on no processor, compiler or standard library.
# CCA_DISPATCH_ARCHITECTURES says which of the instruction sets; all where it is empty.

# What an object may use: choose.cpp asks the processor for each of these features.
set(cca_dispatch_flags_sse2 -march=x86-64)
set(cca_dispatch_flags_sse4_2 ${cca_dispatch_flags_sse2} -msse4.2 -mpopcnt)
set(cca_dispatch_flags_avx2_fma ${cca_dispatch_flags_sse4_2} -mavx2 -mfma)
set(cca_dispatch_flags_avx512 ${cca_dispatch_flags_avx2_fma} -mavx512f -mavx512cd -mavx512dq -mavx512bw -mavx512vl)

# cca_add_dispatch(folder of the headers): defines cca::dispatch, or says why not.
function(cca_add_dispatch include_dir)
  if(TARGET cca::dispatch)
    return()
  endif()
  if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64)$" AND CMAKE_SIZEOF_VOID_P EQUAL 8)
    set(architectures sse2 sse4_2 avx2_fma avx512)
  elseif(CMAKE_SYSTEM_PROCESSOR STREQUAL aarch64)
    set(architectures neon64)
  endif()
  set(wanted ${architectures})
  if(CCA_DISPATCH_ARCHITECTURES)
    set(wanted ${CCA_DISPATCH_ARCHITECTURES})
  endif()
  if(CMAKE_LINKER)
    execute_process(COMMAND ${CMAKE_LINKER} --help OUTPUT_VARIABLE linker_help ERROR_QUIET)
  endif()
  if(NOT architectures OR NOT linker_help MATCHES force-group-allocation OR NOT CMAKE_OBJCOPY)
    message(STATUS "cca: no cca::dispatch, which needs x86-64 or aarch64, and GNU binutils")
    return()
  endif()
  foreach(architecture IN LISTS wanted)
    if(NOT architecture IN_LIST architectures)
      list(JOIN architectures " " known)
      message(FATAL_ERROR "CCA_DISPATCH_ARCHITECTURES: got ${architecture}, wants some of: ${known}")
    endif()
  endforeach()
  list(REMOVE_DUPLICATES wanted)
  list(JOIN wanted ", " names)

  set(source_dir ${include_dir}/cca/dispatch)
  add_library(cca_dispatch STATIC EXCLUDE_FROM_ALL ${source_dir}/choose.cpp)
  add_library(cca::dispatch ALIAS cca_dispatch)
  target_link_libraries(cca_dispatch PUBLIC cca::cca)
  target_compile_definitions(cca_dispatch PRIVATE CCA_DISPATCH_ARCHITECTURES="${names}")
  set_target_properties(cca_dispatch PROPERTIES POSITION_INDEPENDENT_CODE ON)
  foreach(architecture IN LISTS wanted)
    set(name cca_dispatch_${architecture})
    add_library(${name} OBJECT EXCLUDE_FROM_ALL ${source_dir}/kernels.cpp)
    target_link_libraries(${name} PRIVATE cca::cca)
    target_compile_definitions(${name} PRIVATE CCA_DISPATCH_TARGET="${architecture}")
    # What is hidden below has to be machine code, and may end in a shared library.
    target_compile_options(${name} PRIVATE ${cca_dispatch_flags_${architecture}} -fno-lto)
    if(CMAKE_CXX_COMPILER_ID STREQUAL GNU)
      target_compile_options(${name} PRIVATE -fno-gnu-unique)  # such symbols cannot be hidden
    endif()
    set_target_properties(${name} PROPERTIES POSITION_INDEPENDENT_CODE ON)

    # Functions that the objects share by name with each other and with the program, those of the standard library above
    # all, would be kept once by the linker, perhaps the newest processor's: only the table stays visible.
    set(hidden ${CMAKE_CURRENT_BINARY_DIR}/${name}.$<CONFIG>${CMAKE_CXX_OUTPUT_EXTENSION})
    add_custom_command(
      OUTPUT ${hidden}
      COMMAND ${CMAKE_LINKER} -r --force-group-allocation -o ${hidden} $<TARGET_OBJECTS:${name}>
      COMMAND ${CMAKE_OBJCOPY} --wildcard "--keep-global-symbol=cca_dispatch_*_${architecture}" ${hidden}
      DEPENDS ${name} $<TARGET_OBJECTS:${name}>
      VERBATIM)
    target_sources(cca_dispatch PRIVATE ${hidden})
  endforeach()
endfunction()

# cca_add_c(folder of the headers): defines cca::c, libcca with the functions of cca/dispatch/cca.h and no other symbol, or
# says why not.
function(cca_add_c include_dir)
  if(TARGET cca::c OR NOT TARGET cca::dispatch)
    return()
  endif()
  find_path(dlpack_INCLUDE_DIR dlpack/dlpack.h)
  mark_as_advanced(dlpack_INCLUDE_DIR)
  if(NOT dlpack_INCLUDE_DIR)
    message(STATUS "cca: no cca::c, which needs the header of DLPack (libdlpack-dev)")
    return()
  endif()

  set(source_dir ${include_dir}/cca/dispatch)
  file(STRINGS ${include_dir}/cca/version.hpp version REGEX "^#define CCA_VERSION_(MAJOR|MINOR|PATCH) [0-9]+$")
  list(TRANSFORM version REPLACE "[^0-9]" "")
  list(JOIN version . version)
  string(REGEX MATCH "^[0-9]+\\.[0-9]+" minor_version ${version})

  add_library(cca_c SHARED EXCLUDE_FROM_ALL ${source_dir}/cca.cpp)
  add_library(cca::c ALIAS cca_c)
  # Before 1.0 a new minor version may break its users.
  set_target_properties(cca_c PROPERTIES OUTPUT_NAME cca VERSION ${version} SOVERSION ${minor_version})
  target_include_directories(cca_c SYSTEM PUBLIC ${dlpack_INCLUDE_DIR})
  target_include_directories(cca_c INTERFACE ${include_dir})
  find_package(Threads REQUIRED)
  target_link_libraries(cca_c PRIVATE cca::dispatch Threads::Threads)
  # The script leaves what the C++ compiler makes hidden, and the other option the tables of kernels.
  target_link_options(cca_c PRIVATE -Wl,--exclude-libs,ALL -Wl,--no-undefined
                                    -Wl,--version-script=${source_dir}/cca.map)
  set_target_properties(cca_c PROPERTIES LINK_DEPENDS ${source_dir}/cca.map)
endfunction()
