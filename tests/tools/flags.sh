#!/usr/bin/env bash
# flags.sh [all|quick] [compiler [xsimd include folder]]: translation units that are compiled for different instruction sets
# share no function whose code depends on them.
#  1. Every feature that a flag of the compiler turns on is a part of the name in detail/base/target.hpp, or stands below
#     among those that no compiler uses unasked.
#  2. One unit that uses the whole library is compiled with many flags, optimised in many ways. Every symbol that a linker
#     would take for another unit's has the name of the flags in its own, or no instruction that is not on every processor.
#  3. Programs of two such units run, either one linked first, with and without -flto: here, and on an emulated processor
#     that has the older one's instructions alone, where qemu-user is installed.
# `quick`, the default, takes few flags and a minute; `all` takes an hour. Ends with the number of faults.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
amount=${1:-quick} compiler=${2:-g++}
common=(-std=c++20 -I"$here/../../include" -I"$here/../flags")
for folder in ${3:-} /usr/include/eigen3 /usr/local/include/eigen3; do common+=(-isystem "$folder"); done
target=$("$compiler" -dumpmachine)

scratch=$(mktemp -d)
trap 'rm -r "$scratch"' EXIT
faults=0
fault() {
  echo "FAULT: $*"
  faults=$((faults + 1))
}

# -- 1. Features

# What is reached by intrinsics and attributes alone: encryption, random numbers, clocks, saved states, hints about caches,
# tiles, transactions, control of threads and memory, fused loads of KNM. What has been given up: MMX, 3DNow!. What serves
# code unlike ours: sahf, crc32, atomics of 16 bytes. What is the sum of others: AVX10.1.
unasked='3dNOW|3dNOW_A|ABM|ADX|AES|AMX\w*|AVX10_1\w*|AVX5124FMAPS|AVX5124VNNIW|AVX512VP2INTERSECT|CLDEMOTE|CLFLUSHOPT|CLWB'
unasked+='|CLZERO|CRC32|ENQCMD|EVEX\d+|FSGSBASE|FXSR|HLE|HRESET|INVPCID|KL|LAHF_SAHF|LWP|MMX|MOVDIR64B|MOVDIRI|MOVRS|MWAITX'
unasked+='|PCLMUL|PCONFIG|PKU|PREFETCHI|PREFETCHWT1|PRFCHW|PTWRITE|RDPID|RDPRU|RDRND|RDSEED|RTM|SERIALIZE|SGX|SHA|SHA512'
unasked+='|SHSTK|SM3|SM4|TSXLDTRK|UINTR|USERMSR|VAES|VPCLMULQDQ|WAITPKG|WBNOINVD|WIDEKL|XSAVE|XSAVEC|XSAVEOPT|XSAVES'
unasked+='|ARM_FEATURE_(AES|BTI|CRC32|CRYPTO|GCS|LS64|MEMORY_TAGGING|RNG|SHA2|SHA512|SM3|SM4|TME|SME\w*|SVE2_\w+|SVE_\w+)'

features() {
  { "$compiler" -dM -E -x c++ "$@" /dev/null 2>/dev/null || true; } | sed -nE 's/^#define __([A-Z0-9_]+\w*) [1-9][0-9]*$/\1/p' | sort -u
}

# Both compilers list the processors that they know when they are asked for one that they do not; g++ lists its flags.
flags_of_compiler() {
  { "$compiler" "$processor=unheard-of" -x c++ -c /dev/null -o /dev/null 2>&1 || true; } |
    sed -nE "s/.*(valid arguments to .*$processor=. switch are:|valid target CPU values are:)//p" | sed 's/;.*//' |
    tr -d ",'" | tr ' ' '\n' | sed "/^\$/d; s/^/$processor=/"
  "$compiler" --help=target 2>/dev/null | sed -nE 's/^  (-m[a-z0-9.-]+) .*/\1/p' || true
}

processor=-march
[[ $target == aarch64* ]] && processor=-mcpu
features >"$scratch/plain"
for flag in $(flags_of_compiler); do
  features "$flag" | comm -13 "$scratch/plain" -
done | sort -u >"$scratch/features"
[[ -s $scratch/features ]] || fault "$compiler names no features: nothing is tested"
# Those of instruction sets have names in capitals; the rest tells of processors, sizes and floating point.
grep -vE '^(GCC_|FP_FAST|L?(FLT|DBL)[0-9]*_|SIZEOF|BIGGEST|LONG_DOUBLE|ILP32|ANDROID|.*[a-z]{3})' "$scratch/features" |
  grep -vP "^($unasked)_*\$" >"$scratch/asked" || true
while read -r feature; do
  grep -qw "__$feature" "$here/../../include/cca/detail/base/target.hpp" || fault "__$feature is unknown to target.hpp"
done <"$scratch/asked"
echo "$(wc -l <"$scratch/asked") features of $compiler"

# -- 2. Symbols

# What a large framework compiles its kernels with is no level of the architecture: it lacks AVX512CD.
framework='-mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma'
if [[ $target == aarch64* ]]; then
  sets=(-march=armv8-a -march=armv8.1-a -march=armv8.2-a+fp16+dotprod)
  [[ $amount == all ]] && sets+=(-march=armv8-a+lse -march=armv8-a+simd+sha3 -march=armv8.3-a -march=armv8.4-a -march=armv8.5-a
    -march=armv8.6-a -march=armv8.2-a+sve "-march=armv8.2-a+sve -msve-vector-bits=256" -march=armv9-a)
else
  sets=(-march=x86-64 -march=x86-64-v3 "$framework")
  [[ $amount == all ]] && sets+=(-msse3 -mssse3 -msse4.1 -march=x86-64-v2 -mavx -march=bdver2 -mavx2 "-mavx2 -mfma" "-mavx2 -mbmi2"
    -mavx512f -march=knl -march=x86-64-v4 -march=icelake-client -march=sapphirerapids)
fi
# Where nothing is inlined, every function is seen that -flto may leave out of line.
levels=(-O0 "-O2 -fno-inline")
[[ $amount == all ]] && levels=(-O0 -O1 -O2 -O3 "-O2 -fno-inline" "-O3 -fno-inline")
part=()
[[ $amount == all ]] || part=(-DFEW_TYPES)

compile() { nice "$compiler" "${common[@]}" "$@"; }

# beyond OBJECT NAME: definitions of which a linker keeps one and that do not carry the name of the unit, but have an
# instruction that not every processor of the architecture knows; with one of these.
beyond() {
  nm --defined-only "$1" | awk '$(NF - 1) ~ /^[WVui]$/ { print $NF }' >"$scratch/kept"
  objdump -dw --no-show-raw-insn "$1" | awk -v name="$2" -v beyond="$instructions" '
    FILENAME == ARGV[1] { if ($1 ~ name) own++; else kept[$1]; next }
    /^[0-9a-f]+ <.*>:$/ { symbol = substr($2, 2, length($2) - 3); next }
    (symbol in kept) && /^ *[0-9a-f]+:\t/ {
      split($0, field, "\t")
      if (field[2] ~ beyond) { print symbol "\t" field[2]; delete kept[symbol] }
    }
    END { if (!own) print name "\tnot a single symbol" }' "$scratch/kept" -
}
if [[ $target == aarch64* ]]; then
  # SVE; then by name: atomics, RCpc, memory operations, dot products, bfloat16, complex numbers, roundings, SHA3, CSSC.
  instructions='[^a-z0-9][zp][0-9]+[.\/]|^(cas|swp|ld(add|clr|eor|set|[su](min|max))|st(add|clr|eor|set|[su](min|max))|ldapu?r|cpyf?|set[gpme]'
  instructions+='|[su]?[su]dot|[su]?mmla|bf|fc(mla|add)|frint(32|64)|fjcvt|eor3|bcax|rax1|xar|sqrdml|ctz|cnt\t[wx]|abs\t[wx]|[su](min|max)\t[wx]'
  instructions+='|ret[ab]a|fam(in|ax))|\t(h|v)[0-9]+(\.[48]h)?, h[0-9]'
else
  # VEX and EVEX; BMI, TBM and their like; SSE3 to SSE4A.
  instructions='^(v[a-z]|k(mov|not|or|and|xor|unpck|shift|test|add)|(lz|tz|pop)cnt|andn|bextr|bl[sc]|tzm|t1m|bzhi|mulx|p(dep|ext) |(ro|sa|sh)[rl]x|movbe'
  instructions+='|(cmp[a-z]+x|a)add|haddp|hsubp|addsubp|mov(d|sh|sl)dup|lddqu|pshufb|ph(add|sub|min)|pabs|pmulhrs|palignr|psign|pmadd?ubs'
  instructions+='|p?blend|dpp|extract|insertp|pext?r[bdq] |pinsr[bdq]|p(max|min)(s[bd]|u[wd])|pmov[sz]x|pmul(dq|ld)|ptest|round|pcmp(eqq|gtq|.str)|packusdw'
  instructions+='|mpsadb|movntdqa|movnts|extrq|insertq|gf2p8)'
fi

: >"$scratch/names"
for level in "${levels[@]}"; do
  for set in "${sets[@]}"; do
    # shellcheck disable=SC2086
    compile $level $set "${part[@]}" -DUNIT=older_unit -c "$here/../flags/unit.cpp" -o "$scratch/unit.o" || {
      fault "$level $set does not compile"
      continue
    }
    # shellcheck disable=SC2086
    name=$(echo CCA_TARGET | compile $set -E -P -include cca/detail/base/target.hpp -x c++ - | tail -n 1)
    echo "$name" >>"$scratch/names"
    while IFS=$'\t' read -r symbol instruction; do
      fault "$level $set: $instruction in $(c++filt "$symbol")"
    done < <(beyond "$scratch/unit.o" "${#name}$name")
  done
  echo "$level: ${#sets[@]} sets of flags"
done
(($(sort -u "$scratch/names" | wc -l) == ${#sets[@]})) || fault "sets of flags that have one name: $(sort -u "$scratch/names")"


echo "t $SECONDS"
# -- 3. Programs

linked=("-O1 -flto=auto")
[[ $amount == all ]] && linked=("-O1 -flto=auto" "-O2 -flto=auto" "-O3 -flto=auto")
[[ $("$compiler" --version) == *clang* ]] && linked=("${linked[@]/%=auto/}")

# run OLDER NEWER FEATURE...: linked either way round, optimised in two ways.
run() {
  local older=$1 newer=$2 condition=true order level emulator
  shift 2
  for feature in "$@"; do condition+=" && __builtin_cpu_supports(\"$feature\")"; done
  # shellcheck disable=SC2086
  compile $older -c "$here/../flags/main.cpp" "-DNEWER_RUNS=$condition" -o "$scratch/main.o"
  for level in -O0 "${linked[@]}"; do
    # shellcheck disable=SC2086
    compile $level $older "${part[@]}" -DUNIT=older_unit -c "$here/../flags/unit.cpp" -o "$scratch/older.o"
    # shellcheck disable=SC2086
    compile $level $newer "${part[@]}" -DUNIT=newer_unit -c "$here/../flags/unit.cpp" -o "$scratch/newer.o"
    for order in "newer older" "older newer"; do
      # shellcheck disable=SC2086
      (cd "$scratch" && "$compiler" $level main.o ${order// /.o }.o -o program)
      "$scratch/program" || fault "$level, $order of '$older' and '$newer'"
      for emulator in ${emulators:-}; do
        qemu-x86_64 -cpu "$emulator" "$scratch/program" || fault "$level, $order of '$older' and '$newer' on $emulator"
      done
    done
  done
}

if [[ $target == x86_64* && $(uname -m) == x86_64 ]]; then
  command -v qemu-x86_64 >/dev/null && emulators=core2duo
  run -march=x86-64 -march=x86-64-v3 avx2 fma bmi2
  if [[ $amount == all ]]; then
    run "-mavx2 -mfma" "$framework" avx512f avx512bw avx512dq
    run -march=x86-64 -msse4.1 sse4.1
    run -mavx -march=bdver2 fma4 xop
  fi
fi

echo "$faults faults"
((faults == 0))
