# Sets cca_test_archs to the instruction sets that the tests are built for.

set(CCA_TEST_ARCHS "" CACHE STRING "Instruction sets that the tests are built for; empty: all that this machine runs")
set(cca_test_archs ${CCA_TEST_ARCHS})

if(NOT cca_test_archs)
  set(cca_test_archs baseline)
  if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64" AND NOT CMAKE_CROSSCOMPILING)
    include(CheckCXXSourceRuns)
    foreach(arch avx2 avx512)
      set(CMAKE_REQUIRED_FLAGS ${cca_flags_${arch}})
      check_cxx_source_runs(
        "int main() {
           bool runs = __builtin_cpu_supports(\"avx2\") && __builtin_cpu_supports(\"fma\");
         #ifdef __AVX512F__
           runs = runs && __builtin_cpu_supports(\"avx512f\") && __builtin_cpu_supports(\"avx512cd\")
                  && __builtin_cpu_supports(\"avx512dq\") && __builtin_cpu_supports(\"avx512bw\")
                  && __builtin_cpu_supports(\"avx512vl\");
         #endif
           return !runs;
         }" cca_machine_runs_${arch})
      if(cca_machine_runs_${arch})
        list(APPEND cca_test_archs ${arch})
      endif()
    endforeach()
  endif()
endif()
message(STATUS "cca: tests for ${cca_test_archs}")
