#!/usr/bin/env bash
# coverage.sh: builds the tests so that they count, runs them, and reports the lines and branches of include/ that they
# reach; the lines that they do not reach are listed. Fails below 95 % of lines. cca::dispatch, which forwards to what is
# counted, is not in it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

cmake/install_packages.sh python3-venv
find build/coverage -name '*.gcda' -delete 2>/dev/null || true
cmake --preset coverage
cmake --build --preset coverage
ctest --preset coverage
# Kernels are templates: a line counts as reached when any of their instances reaches it. Version 8 counts instances apart,
# or loses lines of lambdas that are inlined.
gcovr=build/coverage/gcovr
[[ -x $gcovr/bin/gcovr ]] || { python3 -m venv $gcovr && $gcovr/bin/pip install --quiet 'gcovr==7.2'; }
$gcovr/bin/gcovr --root . --filter include/ --merge-mode-functions=merge-use-line-0 --exclude-throw-branches \
  --fail-under-line 95 --txt - --txt-summary --json build/coverage/coverage.json build/coverage
cat <<'END'
Lines that are not reached:
  reference.hpp     free what their statement holds when memory runs out there, which no test lets it
  matrix_units.hpp  ask the system for AMX, where the processor has it
  pairs.hpp         are reached (unit_test fails when elements_of is wrong), but gcov loses them, inlined
END
