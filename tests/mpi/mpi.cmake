# Tests across ranks: programs that mpirun runs with several numbers of them. mpi_plan_test needs no ranks.

cca_add_program(${cca_newest_arch}.mpi_plan_test ${cca_newest_arch} mpi/mpi_plan_test.cpp)
target_link_libraries(${cca_newest_arch}.mpi_plan_test PRIVATE GTest::gtest_main)
add_test(NAME ${cca_newest_arch}.mpi_plan_test COMMAND ${cca_newest_arch}.mpi_plan_test)

# Ranks share the cores of one machine, and may be those of root in a container.
set(cca_mpi_environment OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMPI_MCA_btl_vader_single_copy_mechanism=none
                        OMP_NUM_THREADS=1)
execute_process(COMMAND ${MPIEXEC_EXECUTABLE} --version OUTPUT_VARIABLE version ERROR_QUIET)
set(cca_mpirun ${MPIEXEC_EXECUTABLE})
if(version MATCHES "Open MPI|OpenRTE")
  list(APPEND cca_mpirun --oversubscribe)
endif()

# ThreadSanitizer does not see into MPI, and what MPI keeps is no leak of ours.
list(APPEND cca_mpi_environment ASAN_OPTIONS=detect_leaks=0 TSAN_OPTIONS=ignore_noninstrumented_modules=1)

set(CCA_TEST_RANKS 1 3 CACHE STRING "Numbers of ranks that the tests of MPI run with; 1;2;3;4;8 for all that are meant")
foreach(test IN ITEMS mpi_attention_test mpi_decoding_test mpi_elements_test)
  set(name ${cca_newest_arch}.${test})
  cca_add_program(${name} ${cca_newest_arch} mpi/${test}.cpp mpi/mpi_main.cpp)
  target_link_libraries(${name} PRIVATE cca::mpi ${cca_newest_arch}.textbook GTest::gtest)
  foreach(ranks IN LISTS CCA_TEST_RANKS)
    add_test(NAME ${test}.${ranks} COMMAND ${cca_mpirun} ${MPIEXEC_NUMPROC_FLAG} ${ranks} $<TARGET_FILE:${name}>)
    set_tests_properties(${test}.${ranks} PROPERTIES ENVIRONMENT "${cca_mpi_environment}" TIMEOUT 600 PROCESSORS 2)
  endforeach()
endforeach()

# The same for C and from Python. Whatever else a rank does that fails, mpi4py ends the others.
if(TARGET cca::c_mpi)
  target_compile_options(cca_c_mpi PRIVATE $<TARGET_PROPERTY:cca_development,INTERFACE_COMPILE_OPTIONS>)
  execute_process(COMMAND ${CCA_TEST_PYTHON} -c "import numpy, pytest; from mpi4py import MPI; from typing import Unpack"
                  RESULT_VARIABLE no_mpi4py OUTPUT_QUIET ERROR_QUIET)
  if(no_mpi4py EQUAL 0)
    add_custom_target(cca_test_c_mpi ALL DEPENDS cca_c_mpi cca_c)
    add_test(NAME c_mpi.symbols COMMAND ${CMAKE_NM} --dynamic --defined-only $<TARGET_FILE:cca_c_mpi>)
    set_tests_properties(c_mpi.symbols PROPERTIES PASS_REGULAR_EXPRESSION "^([0-9a-f]+ T cca_mpi_[a-z_]+\n)+$")
    set(environment ${cca_mpi_environment} "CCA_LIBRARY=$<TARGET_FILE:cca_c>" "CCA_MPI_LIBRARY=$<TARGET_FILE:cca_c_mpi>"
                    PYTHONPATH=${PROJECT_SOURCE_DIR}/examples/python PYTHONDONTWRITEBYTECODE=1)
    set(tests ${PROJECT_SOURCE_DIR}/examples/python/tests)
    foreach(ranks IN LISTS CCA_TEST_RANKS)
      add_test(NAME python_mpi.${ranks}
               COMMAND ${cca_mpirun} ${MPIEXEC_NUMPROC_FLAG} ${ranks} ${CCA_TEST_PYTHON} -m mpi4py -m pytest -q -x
                       -p no:cacheprovider ${tests}/test_mpi.py ${tests}/test_hf_mpi.py)
      set_tests_properties(python_mpi.${ranks} PROPERTIES ENVIRONMENT "${environment}" TIMEOUT 600 PROCESSORS 2)
    endforeach()
  else()
    message(STATUS "cca: no tests of Python across ranks, which need mpi4py in CCA_TEST_PYTHON")
  endif()
endif()
