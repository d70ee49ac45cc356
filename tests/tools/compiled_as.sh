#!/usr/bin/env bash
# compiled_as.sh quick|all <c++>..: the headers, compiled as users might. Behind <complex.h> and behind names that are macros
# elsewhere; without warnings that users may ask for; with parts of -ffast-math, where results are right or the unit is
# refused; and what is refused is refused in one error. `quick` takes the instruction sets and flags that once failed.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
amount=$1
shift
work=$(mktemp -d)
trap 'rm -r "$work"' EXIT
faults=0
fault() {
  echo "FAULT: $*"
  head -n 5 "$work/said"
  faults=$((faults + 1))
}

cat > "$work/behind.cpp" <<'CODE'
#include <Eigen/Core>
#include <complex.h>  // which makes I a macro
#include <immintrin.h>
#include <algorithm>
#include <atomic>
#include <chrono>
#include <fstream>
#include <functional>
#include <memory>
#include <optional>
#include <random>
#include <stdexcept>
#include <span>
#include <string>
#include <thread>
#include <vector>
#define far
#define near
#define small char
#define ERROR 0
#define IN
#define OUT
#define interface struct
#define nothing 0
#define min(a, b) ((a) < (b) ? (a) : (b))
#define max(a, b) ((a) > (b) ? (a) : (b))
#include <cca/cca.hpp>
#include <cca/dispatch.hpp>
#include <cca/gradient.hpp>
#include <cca/kv_cache_file.hpp>
CODE

# Attention by the library beside the textbook; both ways through the rows, of many queries and of few.
cat > "$work/right.cpp" <<'CODE'
#include <cca/cca.hpp>
#include <cca/gradient.hpp>
#include <cmath>
#include <cstdio>
#include <vector>
template <class T>
double largest_error(std::int64_t queries) {
  const std::int64_t length = 60, dim = 9;
  std::vector<T> x(3 * length * dim), out(length * dim);
  unsigned state = 1;
  for (T& number : x) {
    state = state * 1664525u + 1013904223u;
    number = static_cast<T>(state >> 8) / T(4194304) - 2;
  }
  const auto part = [&](int i) { return cca::bhsd<const T>(x.data() + i * length * dim, 1, 1, length, dim); };
  const auto some = part(0).slice(length - queries, queries);
  cca::attention(some, part(1), part(2), cca::bhsd(out.data(), 1, 1, queries, dim));
  double worst = 0;
  for (std::int64_t i = 0; i < queries; ++i) {
    std::vector<double> weight(static_cast<std::size_t>(length - queries + i + 1));
    double sum = 0;
    for (std::size_t j = 0; j < weight.size(); ++j) {
      double score = 0;
      for (std::int64_t d = 0; d < dim; ++d)
        score += double(some.row(0, 0, i)[d]) * double(part(1).row(0, 0, static_cast<std::int64_t>(j))[d]);
      sum += weight[j] = std::exp(score / 3);
    }
    for (std::int64_t d = 0; d < dim; ++d) {
      double mean = 0;
      for (std::size_t j = 0; j < weight.size(); ++j)
        mean += weight[j] / sum * double(part(2).row(0, 0, static_cast<std::int64_t>(j))[d]);
      worst = std::fmax(worst, std::fabs(mean - double(out[static_cast<std::size_t>(i * dim + d)])));
    }
  }
  return worst;
}
int main() {
  const double of_float = std::fmax(largest_error<float>(60), largest_error<float>(2));
  const double of_double = std::fmax(largest_error<double>(60), largest_error<double>(2));
  std::printf("%g %g\n", of_float, of_double);
  return !(of_float < 3e-6 && of_double < 1e-14);
}
CODE
echo '#include <cca/gradient.hpp>' > "$work/header.cpp"

sets=('')
parts=('-ffast-math -fno-finite-math-only' -funsafe-math-optimizations)
if [[ $amount == all ]]; then
  [[ $(uname -m) == x86_64 ]] && sets=('' -msse4.2 '-mavx2 -mfma' -march=native)
  parts+=(-fno-math-errno -fno-signed-zeros -fno-trapping-math -freciprocal-math -frounding-math -ffp-contract=off
          '-fassociative-math -fno-signed-zeros -fno-trapping-math' -fcx-limited-range -fsingle-precision-constant)
fi
for compiler in "$@"; do
  with=("$compiler" -isystem /usr/include/eigen3 -isystem /usr/local/include/eigen3 -I"$here/../../include")
  "${with[@]}" -std=gnu++20 -fsyntax-only "$work/behind.cpp" 2> "$work/said" || fault "$compiler, behind macros"
  asked=(-Wall -Wextra -Wpedantic -Wconversion -Wsign-conversion -Wshadow -Wold-style-cast)
  "$compiler" --version | grep -q clang || asked+=(-Wuseless-cast)
  "${with[@]}" -std=c++20 -O1 "${asked[@]}" -c -o "$work/o" "$work/right.cpp" 2> "$work/said" || fault "$compiler, warnings"
  if grep -q 'include/cca.*warning' "$work/said"; then fault "$compiler, warnings"; fi
  for set in "${sets[@]}"; do
    for part in "${parts[@]}"; do
      # shellcheck disable=SC2086  # several flags
      if "${with[@]}" -std=c++20 -O2 $set $part -o "$work/right" "$work/right.cpp" 2> "$work/said"; then
        "$work/right" > "$work/said" || fault "$compiler $set $part: wrong"
      else
        grep -q 'unknown argument\|unrecognized\|not supported' "$work/said" || fault "$compiler $set $part: does not compile"
      fi
    done
  done
  for refused in -std=c++17 '-std=c++20 -fno-exceptions' '-std=c++20 -ffast-math' '-std=c++20 -ffinite-math-only'; do
    # shellcheck disable=SC2086
    if "${with[@]}" $refused -fsyntax-only "$work/header.cpp" 2> "$work/said"; then
      fault "$compiler $refused: is not refused"
    else
      (($(grep -c ' error: ' "$work/said") <= 3 && $(wc -l < "$work/said") <= 30)) || fault "$compiler $refused: says too much"
    fi
  done
done
echo "$faults faults"
((faults == 0))
