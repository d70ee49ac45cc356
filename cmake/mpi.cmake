# cca::mpi: cca::cca with MPI, for cca/mpi.hpp. Headers alone, as cca::cca: what it adds is where MPI is. For the project and
# for its installed package alike.

# cca_add_mpi(): defines cca::mpi where the target MPI::MPI_CXX is.
function(cca_add_mpi)
  if(TARGET cca::mpi OR NOT TARGET MPI::MPI_CXX)
    return()
  endif()
  add_library(cca_mpi INTERFACE)
  add_library(cca::mpi ALIAS cca_mpi)
  target_link_libraries(cca_mpi INTERFACE cca::cca MPI::MPI_CXX)
  # Of MPI's interfaces the one of C is used: those of C++ left the standard in 2012, and only cost warnings.
  target_compile_definitions(cca_mpi INTERFACE OMPI_SKIP_MPICXX MPICH_SKIP_MPICXX)
endfunction()
