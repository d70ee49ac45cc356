# cca::dispatch: the kernels for several instruction sets, and what chooses among them at run time. Built only where a
# target links it. For the project and for its installed package alike: the sources lie beside the headers and are
# compiled as the user's program is, so that the package depends on no processor, compiler or standard library.

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
  if(CMAKE_LINKER)
    execute_process(COMMAND ${CMAKE_LINKER} --help OUTPUT_VARIABLE linker_help ERROR_QUIET)
  endif()
  if(NOT architectures OR NOT linker_help MATCHES force-group-allocation OR NOT CMAKE_OBJCOPY)
    message(STATUS "cca: no cca::dispatch, which needs x86-64 or aarch64, and GNU binutils")
    return()
  endif()

  set(source_dir ${include_dir}/cca/dispatch)
  add_library(cca_dispatch STATIC EXCLUDE_FROM_ALL ${source_dir}/choose.cpp)
  add_library(cca::dispatch ALIAS cca_dispatch)
  target_link_libraries(cca_dispatch PUBLIC cca::cca)
  foreach(architecture IN LISTS architectures)
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
