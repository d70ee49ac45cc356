#!/usr/bin/env bash
# ranks.sh [preset...]: the tests across ranks with 2 of them under sanitizers: those of the presets tsan and asan-ubsan, where
# none is named. Ends with the number of presets that passed and failed. What is not compiled here, Open MPI and OpenMP, is not
# looked into: see mpi.cmake.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

presets=("$@")
((${#presets[@]})) || presets=(tsan asan-ubsan)
cmake/install_packages.sh libopenmpi-dev openmpi-bin

tests='mpi_attention_test mpi_decoding_test mpi_elements_test'
passed=0 failed=0
for preset in "${presets[@]}"; do
  echo "== $preset"
  build=build/ranks.$preset
  cmake --preset "$preset" -B "$build" -D CCA_MPI=ON -D CCA_TEST_RANKS=2
  # shellcheck disable=SC2086
  cmake --build "$build" --target $(printf 'native.%s ' $tests)
  if ctest --test-dir "$build" --output-on-failure --no-tests=error --tests-regex "^(${tests// /|})\.2$"; then
    passed=$((passed + 1))
  else
    failed=$((failed + 1))
  fi
done

echo "$passed passed, $failed failed"
((failed == 0))
