#!/usr/bin/env bash
# compilers.sh [xsimd include folder...]: has every compiler of this machine check a translation unit that calls the whole
# library, and one with all headers, in each C++ standard and for each instruction set, with the xsimd that is installed
# and with those in the folders named; EIGEN_INCLUDE names another Eigen. Installs the compilers that the distribution has
# (g++ 12 is the newest of Debian 12), except with CCA_INSTALL=no. It takes minutes; ends with what failed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

if [[ ${CCA_INSTALL:-yes} == yes ]]; then
  cmake/install_packages.sh clang-14 clang-16 clang-19 libc++-19-dev libc++abi-19-dev
fi

compilers=()
for compiler in g++-{12,13,14,15,16} clang++-{14,15,16,17,18,19,20,21}; do
  command -v "$compiler" >/dev/null && compilers+=("$compiler")
done
[[ " ${compilers[*]}" == *" g++-"* ]] || compilers+=(g++)

warnings=(-Wall -Wextra -Wpedantic -Wconversion -Wshadow -Werror)

scratch=$(mktemp -d)
trap 'rm -r "$scratch"' EXIT
declare -A flags  # those of cca::dispatch, which refuses any others
cat >"$scratch/flags.cmake" <<END
include(cmake/dispatch.cmake)
foreach(architecture sse2 sse4_2 avx2_fma avx512)
  list(JOIN cca_dispatch_flags_\${architecture} " " flags)
  message("\${architecture} \${flags}")
endforeach()
END
while read -r architecture options; do flags[$architecture]=$options; done < <(cmake -P "$scratch/flags.cmake" 2>&1)
# Those across ranks where Open MPI is installed.
mpi=() names=(-name "*.hpp")
if folders=$(mpicxx --showme:incdirs 2>/dev/null); then
  mpi=(-DOMPI_SKIP_MPICXX)
  for folder in $folders; do mpi+=(-isystem "$folder"); done
else
  names+=(! -path "cca/mpi*")
fi
{
  (cd include && find cca "${names[@]}" | sort | sed 's/.*/#include <&>/')
  echo 'int main() {}'
} >"$scratch/headers.cpp"

passed=0 failed=0
# check WHAT COMMAND...
check() {
  local what=$1
  shift
  if "$@" >"$scratch/log" 2>&1; then
    passed=$((passed + 1))
    echo "ok      $what"
  else
    failed=$((failed + 1))
    echo "FAILED  $what"
    { grep -m 3 -E 'error|warning' "$scratch/log" || head -n 3 "$scratch/log"; } | cut -c 1-300 | sed 's/^/        /'
  fi
}

# check_all COMPILER OPTION...
check_all() {
  local compiler=$1 quiet=()
  shift
  # The first release of it finds fault with its own AVX-512 intrinsics, see cmake/development.cmake.
  [[ $compiler == g++* ]] && quiet=(-Wno-uninitialized -Wno-maybe-uninitialized)
  for standard in c++20 c++23; do
    # clang 14 and 16 know it by its working title.
    "$compiler" -std=$standard -fsyntax-only -x c++ /dev/null 2>/dev/null || standard=c++2b
    for architecture in "${!flags[@]}"; do
      # shellcheck disable=SC2086
      check "$compiler $standard $architecture $*" \
        "$compiler" -std=$standard -fsyntax-only "${warnings[@]}" "${quiet[@]}" ${flags[$architecture]} "$@" \
        -isystem "${EIGEN_INCLUDE:-/usr/include/eigen3}" -Iinclude "-DCCA_DISPATCH_TARGET=\"$architecture\"" \
        include/cca/dispatch/kernels.cpp
    done
    check "$compiler $standard headers $*" "$compiler" -std=$standard -fsyntax-only "${warnings[@]}" "${quiet[@]}" "${mpi[@]}" \
      "$@" -isystem "${EIGEN_INCLUDE:-/usr/include/eigen3}" -Iinclude "$scratch/headers.cpp"
  done
}

for compiler in "${compilers[@]}"; do
  check_all "$compiler"
  for folder in "$@"; do check_all "$compiler" -isystem "$folder"; done
  # Only where the library is installed, and of an age with the compiler: of one that is too old it warns.
  if [[ $compiler == clang* ]] && echo '#include <version>' |
    "$compiler" -std=c++20 -stdlib=libc++ -Werror -fsyntax-only -x c++ - 2>/dev/null; then
    check_all "$compiler" -stdlib=libc++
  fi
done

echo "$passed passed, $failed failed"
((failed == 0 && passed > 0))
