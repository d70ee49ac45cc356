#!/usr/bin/env bash
# coverage.sh: builds the tests so that they count, runs them, and reports the lines and branches of include/ that they
# reach; what they do not reach is listed. Wants gcovr (pip install gcovr).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

cmake/install_packages.sh
command -v gcovr >/dev/null || python3 -m pip install --quiet gcovr
find build/coverage -name '*.gcda' -delete 2>/dev/null || true
cmake --preset coverage
cmake --build --preset coverage
ctest --preset coverage
# Kernels are templates: a line counts as reached when any of their instances reaches it.
gcovr --root . --filter include/ --merge-mode-functions=merge-use-line-0 --exclude-throw-branches \
  --txt - --txt-metric line --json build/coverage/coverage.json build/coverage
