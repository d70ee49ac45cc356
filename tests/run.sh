#!/usr/bin/env bash
# run.sh [preset...]: installs what is missing, then configures, builds and tests each preset of CMakePresets.json
# (`tests` when none is named). Ends with the number of tests that passed and failed; a build that fails is one failed
# test.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

presets=("${@:-tests}")
packages=(ccache)
[[ ${presets[*]} == *clang* ]] && packages+=(clang libclang-rt-dev libomp-dev)
cmake/install_packages.sh "${packages[@]}"

cmake/python_environment.sh build/pytest examples/python/requirements-light.txt ||
  echo "without the tests of Python, which need Python 3.11 with its venv module, and NumPy and pytest from a package index"

export CMAKE_BUILD_PARALLEL_LEVEL=${CMAKE_BUILD_PARALLEL_LEVEL:-$(nproc)}
export CTEST_PARALLEL_LEVEL=${CTEST_PARALLEL_LEVEL:-$CMAKE_BUILD_PARALLEL_LEVEL}

# What this machine has compiled before is not compiled again, in a checkout of any name.
if command -v ccache >/dev/null; then
  export CMAKE_C_COMPILER_LAUNCHER=ccache CMAKE_CXX_COMPILER_LAUNCHER=ccache CCACHE_BASEDIR=$PWD CCACHE_NOHASHDIR=1
fi

# count NAME FILE: an attribute of the whole run in CTest's JUnit file
count() { sed -n "s/^[[:space:]]*$1=\"\([0-9]*\)\"\$/\1/p" "$2" | head -n 1; }

passed=0 failed=0
for preset in "${presets[@]}"; do
  echo "== $preset"
  results=build/$preset/tests.xml
  rm -f "$results"
  status=0
  cmake --workflow --preset "$preset" || status=$?
  if [[ -f $results ]]; then
    failures=$(count failures "$results")
    failed=$((failed + failures))
    passed=$((passed + $(count tests "$results") - failures - $(count disabled "$results") - $(count skipped "$results")))
  elif ((status)); then
    failed=$((failed + 1))
  fi
done

echo "$passed passed, $failed failed"
((failed == 0 && passed > 0))
