#!/bin/bash
# slips.sh <include folder> <c++>..: usual slips do not compile, and what the compiler says of them fits a screen and tells
# what is wanted. Of cca/mpi.hpp as well, where MPI_INCLUDES has the include folders of MPI.
set -u
include=$1
shift
screen=45
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
faults=0

cat > "$work/headers.hpp" << END
#include <cca/cca.hpp>
#include <cca/gradient.hpp>
#include <cstdint>
#include <vector>
END
with_mpi=()
if [ -n "${MPI_INCLUDES:-}" ]; then
  for folder in $MPI_INCLUDES; do with_mpi+=(-isystem "$folder"); done
  echo '#include <cca/mpi.hpp>' >> "$work/headers.hpp"
fi

# The headers are compiled once for all slips.
precompile() {
  "$compiler" -std=c++20 -I"$include" "${with_mpi[@]}" -x c++-header "$work/headers.hpp" -o "$work/headers.hpp.gch"
  headers=(-include "$work/headers.hpp")
  "$compiler" --version | grep -q clang && headers=(-include-pch "$work/headers.hpp.gch")
}

compile() {
  cat > "$work/slip.cpp" << END
void f(std::vector<float>& numbers, std::vector<std::uint16_t>& bits, std::vector<std::int8_t>& bytes) {
  const auto q = cca::bhsd(numbers.data(), 1, 1, 4, 4), k = q, v = q, out = q;
  const cca::tensor_view<const float> constant = q;
  const auto lse = cca::bhs(numbers.data(), 1, 1, 4);
  const auto bf16 = cca::bhsd(bits.data(), 1, 1, 4, 4);
  const auto int8 = cca::bhsd(bytes.data(), 1, 1, 4, 4);
  const cca::tensor_view<double> d{};
  const cca::options options;
  cca::kv_cache<double> cache({}, options);
  $1;
}
END
  "$compiler" -std=c++20 -fsyntax-only -I"$include" "${with_mpi[@]}" "${headers[@]}" "$work/slip.cpp" 2> "$work/said"
}

fault() {
  echo "$compiler: $1"
  cat "$work/said"
  faults=$((faults + 1))
}

right() {
  compile "$1" || fault "$1 does not compile"
}

# What is written, and a pattern of what is said of it.
slip() {
  if compile "$1"; then
    fault "$1 compiles"
  elif [ "$(wc -l < "$work/said")" -gt $screen ]; then
    fault "$1: more than $screen lines"
  elif ! grep -Eq "$2" "$work/said"; then
    fault "$1: not a word of $2"
  fi
}

view='Use cca::bhsd\(pointer, batch, heads, length, dim\)'
elements='elements are float, double, Eigen::bfloat16 or Eigen::half. View .* reinterpret_cast<const Eigen::bfloat16'
cores='cores are computed in float unless keys and values are double'
options="to .*const cca::(\w+::)?options"

for compiler in "$@"; do
  precompile
  right 'cca::attention(q, k, v, out, options)'
  right 'cca::attention({q, k, v}, {out, lse}, options)'
  right 'cca::attention(cca::inputs<float, cca::q8>{.query = q, .key = int8, .value = int8, .key_scales = lse, .value_scales = lse}, {out, lse})'
  # No view.
  slip 'cca::attention(numbers, k, v, out, options)' "$view"
  slip 'cca::attention(q, numbers.data(), v, out, options)' "$view"
  slip 'cca::attention(q, k, v, numbers, options)' "$view"
  slip 'cca::attention(q, k, lse, out, options)' "$view"
  slip 'cca::attention({numbers, k, v}, {out}, options)' 'convert.*inputs<|convers.*inputs<'
  slip 'cca::pool(q, k, numbers, out, out, options)' "$view"
  slip 'cache.append(numbers, d, d)' "$view"
  # Out for lse, arguments in other places.
  slip 'cca::attention({q, k, v}, {out, out}, options)' 'convert.*results<|convers.*results<'
  slip 'cca::attention(q, k, v, out, lse, options)' "$options"
  slip 'cca::attention(q, k, v, out, cca::serial_executor{})' "serial_executor.*$options"
  slip 'cca::attention({q, k, v}, {out}, cca::serial_executor{})' "serial_executor.*$options"
  # Elements.
  slip 'cca::attention(bf16, k, v, out, options)' "$elements"
  slip 'cca::attention(q, k, v, int8, options)' "$elements"
  slip 'cca::attention(int8, k, v, out, options)' "$elements"
  slip 'cca::attention_gradient(cca::inputs{q, int8, v}, cca::results{out, lse}, cca::incoming{out}, cca::gradients{q, k, v})' \
    'rows of 8 bits have no gradients'
  slip 'cca::attend(cca::inputs{q, k, v}, cca::far_context{bf16, v, cca::lse_view<const std::int64_t>{}}, {out})' "$elements"
  slip 'cca::merge(cca::results{int8, lse}, {out, lse}, {out, lse})' "$elements"
  slip 'cca::kv_cache<std::uint16_t> c({}, options)' "$elements"
  slip 'cca::kv_cache<float, double> c({}, options)' "$cores"
  slip 'cca::attention({d, d, d}, {d}, options)' 'convert.*inputs<|convers.*inputs<'
  slip 'cca::attention(q, k, v, constant, options)' 'written'
  slip 'cca::attention(cca::inputs{d, k, v, lse}, {d}, options)' 'sink_logits, alibi_slopes and key_bias are of the type'
  slip 'cca::attention_gradient({q, k, v}, {out, lse}, {out}, cca::gradients{d, d, d})' 'gradients are of the type'
  slip 'cca::attention_gradient(cca::inputs{d, d, d}, cca::results{d, lse}, cca::incoming{d}, cca::gradients{d, d, d})' \
    'a float one would cost double gradients'
  slip 'cache.attend(q, k, v, out)' "keys and values have the cache's element type"
  [ ${#with_mpi[@]} -gt 0 ] || continue
  ranks='const cca::mpi::communicator ranks(MPI_COMM_WORLD); const std::int64_t length[] = {4}'
  ranks+='; const auto tokens = cca::mpi::layout::contiguous(1, length)'
  right "$ranks; cca::mpi::attention({ranks, tokens}, {q, k, v}, {out, lse}, options)"
  slip "$ranks; cca::mpi::attention({ranks, tokens}, {numbers, k, v}, {out}, options)" '(convert|convers|invalid initialization).*inputs<'
  slip "$ranks; cca::mpi::attention({ranks, tokens}, cca::inputs{int8, k, v}, {out}, options)" "$elements"
  slip "$ranks; cca::mpi::attention({ranks, tokens}, cca::inputs<float, cca::q8>{q, int8, int8}, {out}, options)" \
    'rows of 8 bits have scales, which this call does not take'
  slip "$ranks; cca::mpi::attention({ranks, tokens}, cca::inputs{d, k, v, lse}, {d}, options)" 'sink_logits, alibi_slopes and key_bias are'
  slip "$ranks; cca::mpi::kv_cache<float, double> c(ranks, {}, options)" "$cores"
  slip "$ranks; cca::mpi::kv_cache<std::uint16_t> c(ranks, {}, options)" "$elements"
done
exit $((faults > 0))
