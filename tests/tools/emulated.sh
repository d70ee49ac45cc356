#!/usr/bin/env bash
# emulated.sh [preset]: runs the tests of cca::dispatch, in programs for plain x86-64, on emulated processors that lack
# AVX, FMA or the operating system's support for them: it has to run there, and to choose the newest kernels that do.
# Emulators know no AVX-512. Takes minutes; ends with the number of runs that passed and failed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

cmake/install_packages.sh qemu-user

preset=${1:-release}
build=build/emulated
cmake --preset "$preset" -B "$build" -D "CCA_TEST_ARCHS=baseline;native"
cmake --build "$build" --target baseline.dispatch_test dispatch_element_test c_test

passed=0 failed=0
# on PROCESSOR ARCHITECTURE
on() {
  echo "== $1 runs $2"
  for test in baseline.dispatch_test dispatch_element_test; do
    # Warnings tell of features of the processor that the emulator lacks.
    if CCA_EXPECTED_ARCHITECTURE=$2 qemu-x86_64 -cpu "$1" "$build/tests/$test" --gtest_brief=1 \
      2> >(grep -v 'warning: TCG' >&2); then
      passed=$((passed + 1))
    else
      failed=$((failed + 1))
    fi
  done
  if qemu-x86_64 -cpu "$1" "$build/tests/c_test" 2> >(grep -v 'warning: TCG' >&2) | grep ", $2: 0 failures"; then
    passed=$((passed + 1))
  else
    failed=$((failed + 1))
  fi
}
on core2duo sse2
on Nehalem sse4_2
on SandyBridge sse4_2
on Haswell,-fma sse4_2
on Haswell,-xsave sse4_2
on Haswell avx2_fma
on max avx2_fma

echo "$passed passed, $failed failed"
((failed == 0))
