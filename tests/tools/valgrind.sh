#!/usr/bin/env bash
# valgrind.sh: Valgrind's memcheck over a choice of tests that reaches every entry point, gradient and the cache: reads of
# what was never written, which sanitizers do not see. For AVX2, since Valgrind knows no AVX-512. Takes a quarter of an hour;
# ends with the number of programs that passed and failed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

cmake/install_packages.sh valgrind
build=build/valgrind
cmake -S . -B $build -G Ninja -DCMAKE_BUILD_TYPE=Debug "-DCMAKE_CXX_FLAGS_DEBUG=-O1 -g1" -DCCA_TEST_ARCHS=avx2 \
  -DCCA_TEST_DISPATCH=OFF -DCCA_TEST_HEADERS=OFF -DCCA_TEST_CONSUMERS=OFF \
  -DCCA_BUILD_TESTS=ON -DCCA_BUILD_BENCHMARKS=OFF -DCCA_BUILD_EXAMPLES=OFF

passed=0 failed=0
for test in fuzz merge pooling attend kv_cache kv_cache_file; do
  filter='*'
  [[ $test == fuzz ]] && filter='*.Corpus'  # the random calls would take an hour
  echo "== $test $filter"
  cmake --build $build --target "avx2.${test}_test"
  # Without the typed tests of double: their rule measures in long double, which Valgrind rounds to double. A program's own
  # operator new, which fails on demand, stays its own.
  if valgrind --quiet --error-exitcode=1 --soname-synonyms=somalloc=nouserintercepts \
    "$build/tests/avx2.${test}_test" --gtest_brief=1 --gtest_filter="$filter-*/1.*"; then
    passed=$((passed + 1))
  else
    failed=$((failed + 1))
  fi
done

# The library of C functions, whose kernels are chosen when it runs.
echo "== c_test"
cmake -S . -B $build.c -G Ninja -DCMAKE_BUILD_TYPE=Release "-DCMAKE_CXX_FLAGS_RELEASE=-O1 -g1" -DCCA_TEST_ARCHS=avx2 \
  -DCCA_BUILD_TESTS=ON -DCCA_BUILD_BENCHMARKS=OFF -DCCA_BUILD_EXAMPLES=OFF
cmake --build $build.c --target c_test
if valgrind --quiet --error-exitcode=1 --leak-check=full "$build.c/tests/c_test"; then
  passed=$((passed + 1))
else
  failed=$((failed + 1))
fi

echo "$passed passed, $failed failed"
((failed == 0))
