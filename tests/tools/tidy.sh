#!/usr/bin/env bash
# tidy.sh [flag...]: clang-tidy with the checks of .clang-tidy over every public header as one translation unit, and
# over what a caller of the whole library instantiates; flags are the compiler's. The checks are those of version 14, which
# is preferred. Fails when there is a finding.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

command -v clang-tidy-14 clang-tidy >/dev/null || cmake/install_packages.sh clang-tidy
tidy=$(command -v clang-tidy-14 clang-tidy | head -n 1)
flags=(-std=c++20 -Iinclude -Itests/flags -DUNIT=older_unit)
for folder in /usr/include/eigen3 /usr/local/include/eigen3; do [[ -d $folder ]] && flags+=(-isystem "$folder"); done
[[ $(uname -m) == x86_64 ]] && flags+=(-march=x86-64-v3)

# The header across ranks where MPI is installed: what comes behind a header that is not found would be misread.
left_out=
if folders=$(mpicxx --showme:incdirs 2>/dev/null); then
  for folder in $folders; do flags+=(-isystem "$folder"); done
else
  left_out=include/cca/mpi.hpp
  echo "without $left_out, which needs Open MPI (libopenmpi-dev)"
fi

unit=$(mktemp --suffix=.cpp)
trap 'rm -f "$unit"' EXIT
for header in include/cca/*.hpp; do
  [[ $header == "$left_out" ]] || echo "#include <cca/${header##*/}>"
done >"$unit"

"$tidy" --quiet --config-file=.clang-tidy "$unit" tests/flags/unit.cpp -- "${flags[@]}" "$@"
