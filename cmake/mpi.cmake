# cca::mpi: cca::cca with MPI, for cca/mpi.hpp. Headers alone, as cca::cca: what it adds is where MPI is; and cca::c_mpi, a
# shared library of it for C, built only where a target links it. For the project and for its installed package alike.

# cca_add_mpi(): defines cca::mpi where find_package(MPI) has found MPI. Its target says nothing: CMake makes an empty one
# where there is no MPI.
function(cca_add_mpi)
  if(TARGET cca::mpi OR NOT MPI_CXX_FOUND)
    return()
  endif()
  add_library(cca_mpi INTERFACE)
  add_library(cca::mpi ALIAS cca_mpi)
  target_link_libraries(cca_mpi INTERFACE cca::cca MPI::MPI_CXX)
  # Of MPI's interfaces the one of C is used: those of C++ left the standard in 2012, and only cost warnings.
  target_compile_definitions(cca_mpi INTERFACE OMPI_SKIP_MPICXX MPICH_SKIP_MPICXX)
endfunction()

# cca_add_c_mpi(folder of the headers): defines cca::c_mpi, libcca_mpi with the functions of cca/mpi/cca_mpi.h and no other
# symbol, where cca::mpi and the header of DLPack are.
function(cca_add_c_mpi include_dir)
  if(TARGET cca::c_mpi OR NOT TARGET cca::mpi OR NOT TARGET cca::c)
    return()
  endif()
  set(source_dir ${include_dir}/cca/mpi)
  add_library(cca_c_mpi SHARED EXCLUDE_FROM_ALL ${source_dir}/cca_mpi.cpp)
  add_library(cca::c_mpi ALIAS cca_c_mpi)
  get_target_property(version cca_c VERSION)
  get_target_property(minor_version cca_c SOVERSION)
  set_target_properties(cca_c_mpi PROPERTIES OUTPUT_NAME cca_mpi VERSION ${version} SOVERSION ${minor_version})
  target_include_directories(cca_c_mpi SYSTEM PUBLIC ${dlpack_INCLUDE_DIR})
  target_include_directories(cca_c_mpi INTERFACE ${include_dir})
  find_package(Threads REQUIRED)
  target_link_libraries(cca_c_mpi PRIVATE cca::mpi Threads::Threads)
  # MPI is the machine's own, so that the kernels may be as well.
  set(CCA_MPI_FLAGS -march=native CACHE STRING "The instruction set that libcca_mpi is compiled for")
  separate_arguments(flags UNIX_COMMAND "${CCA_MPI_FLAGS}")
  target_compile_options(cca_c_mpi PRIVATE ${flags})
  target_link_options(cca_c_mpi PRIVATE -Wl,--exclude-libs,ALL -Wl,--no-undefined
                                        -Wl,--version-script=${source_dir}/cca_mpi.map)
  set_target_properties(cca_c_mpi PROPERTIES LINK_DEPENDS ${source_dir}/cca_mpi.map)
endfunction()
