#!/usr/bin/env bash
# ranks.sh [preset...]: the tests across ranks, of the presets tests, tsan and clang-asan-ubsan, where none is named. Those of C++
# with 2 ranks under sanitizers, else with 1, 2, 3, 4 and 8, and then those of C and Python as well, models of transformers among
# them. Ends with the number of presets that passed and failed. What is not compiled here, Open MPI and OpenMP, the sanitizers
# do not look into: see mpi.cmake.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

presets=("$@")
((${#presets[@]})) || presets=(tests tsan clang-asan-ubsan)
packages=(libopenmpi-dev openmpi-bin python3-venv)
[[ ${presets[*]} == *clang* ]] && packages+=(clang libclang-rt-dev libomp-dev)
cmake/install_packages.sh "${packages[@]}"

passed=0 failed=0
for preset in "${presets[@]}"; do
  echo "== $preset"
  build=build/ranks.$preset
  targets=(native.mpi_attention_test native.mpi_decoding_test native.mpi_elements_test)
  options=(-D CCA_MPI=ON -D CCA_TEST_ARCHS=native -D CCA_TEST_DISPATCH=OFF -D CCA_BUILD_BENCHMARKS=OFF)
  tests='^(mpi_.*_test|python_mpi)\.[0-9]+$'
  if [[ $preset == *san* ]]; then
    options+=(-D CCA_TEST_RANKS=2)
  else
    environment=$PWD/build/python
    cmake/python_environment.sh "$environment" examples/python/requirements-test.txt
    # Of cca::dispatch the tests of Python want one process to compare with.
    options+=(-D "CCA_TEST_RANKS=1;2;3;4;8" -D CCA_DISPATCH_ARCHITECTURES=sse2 -D "CCA_TEST_PYTHON=$environment/bin/python3")
    targets+=(cca_test_c_mpi)
  fi
  if cmake --preset "$preset" -B "$build" "${options[@]}" &&
    cmake --build "$build" --target "${targets[@]}" &&
    ctest --test-dir "$build" --output-on-failure --no-tests=error --tests-regex "$tests"; then
    passed=$((passed + 1))
  else
    failed=$((failed + 1))
  fi
done

echo "$passed passed, $failed failed"
((failed == 0))
