#!/usr/bin/env bash
# flags.sh [all|quick] [compiler [xsimd include folder]]: translation units that are compiled for different instruction sets
# share no function whose code depends on them.
#  1. Every feature that a flag of the compiler turns on is a part of the name in detail/base/target.hpp, or stands below
#     among those that no compiler uses unasked.
#  2. One unit that uses the whole library is compiled with many flags, optimised in many ways. What a linker would take for
#     another unit's has the name of the flags in its own, or is code of instructions that are on every processor, or data
#     that are the same with all flags.
#  3. Programs of two such units run, either one linked first, and both give the same numbers: here, and on an emulated
#     processor that has the older one's instructions alone, where qemu-user is installed.
# `quick`, the default, takes few flags and a minute; `all` takes an hour, and more ways of optimising, -flto among them.
# Ends with the number of faults.
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
levels=("-O2 -fno-inline")
[[ $amount == all ]] && levels+=("-O3 -fno-inline" -O0 -O1 -O2 -O3)
part=()
[[ $amount == all ]] || part=(-DFEW_TYPES)

compile() { nice ${CMAKE_CXX_COMPILER_LAUNCHER-} "$compiler" "${common[@]}" -mtune=generic "$@"; }

# unit LEVEL SET: the object of the unit, what the assembler reads of it, and its function, which has the name of the flags.
unit() {
  # shellcheck disable=SC2086
  name=$(echo CCA_TARGET | compile $2 -E -P -include cca/detail/base/target.hpp -x c++ - | tail -n 1)
  object="$scratch/${1// /}$name.o" assembler="$scratch/${1// /}$name.s"
  [[ -e $object ]] && return
  local flags="$1 $2 ${part[*]} -DUNIT=unit_$name $here/../flags/unit.cpp"
  # shellcheck disable=SC2086
  case $1 in
    *flto*) compile $flags -c -o "$object" ;;
    *) compile $flags -S -o "$assembler" && "$compiler" $2 -c "$assembler" -o "$object" ;;
  esac
}

# The kinds of instructions: what is done and, on ARM, to which part of which kind of register.
# shellcheck disable=SC2016
kind='function kind() {
  return $1 ($2 ~ /^[{]?[a-z][0-9]+(\.[0-9]*[a-z])?,$/ ? " " substr($2, 1, 1) substr($2, length($2) - 1, 1) : "")
}'

# shared: what a linker takes for other units' and what does not carry the unit's name, if it is code with instructions of
# kinds that the first set of flags, the plain architecture, has nowhere, or data unlike other sets'.
shared() {
  awk -v name="${#name}$name" -v plain="$scratch/plain_kinds" -v known="$scratch/known_data" "$kind"'
    FILENAME == plain { everywhere[$0]; next }
    FILENAME == known { tab = index($0, "\t"); data[substr($0, 1, tab - 1)] = substr($0, tab + 1); next }
    /^\t\.(text|data|bss)/ { section = ""; next }
    /^\t\.section\t/ {
      count = split($0, field, /[\t,]/)
      own += $0 ~ name
      section = field[3]
      if (count > 3) {
        code[section] = field[4] ~ /x/
        merged[section] = /,comdat$/ && !/gcc_except_table/ && $0 !~ name
      }
      if (!merged[section]) section = ""
      next
    }
    section && code[section] && /^\t[a-z]/ && !(kind() in everywhere) { print section ": " $0; section = "" }
    section && !code[section] && /^\t\.([248]?byte|[hx]?word|long|int|short|value|quad|zero|skip|asciz|ascii|string)\t/ {
      gsub(/[ \t]*(#|\/\/).*|\.L[A-Za-z.]*[0-9]+/, "")
      here[section] = here[section] $1 " " $2 ";"
    }
    END {
      for (section in here)
        if (!(section in data)) print section "\t" here[section] >>known
        else if (data[section] != here[section]) print section ": " here[section] " and, with other flags, " data[section]
      if (!own) print "nothing carries " name
    }' "$scratch/plain_kinds" "$scratch/known_data" "$assembler"
}

: >"$scratch/names"
for level in "${levels[@]}"; do
  : >"$scratch/known_data"
  for set in "${sets[@]}"; do
    unit "$level" "$set" || {
      fault "$level $set does not compile"
      continue
    }
    echo "$name" >>"$scratch/names"
    if [[ $set == "${sets[0]}" ]]; then  # without those that serve the matrix units, whatever the flags
      awk "$kind"' /^\t[a-z]/ && $1 !~ /^(v|kmov|tile|tdp)/ { print kind() }' "$assembler" | sort -u >"$scratch/plain_kinds"
    fi
    while read -r section; do fault "$level $set: $(c++filt <<<"${section/*._Z/_Z}")"; done < <(shared)
    rm -f "$assembler"
  done
  echo "$level: ${#sets[@]} sets of flags"
done
(($(sort -u "$scratch/names" | wc -l) == ${#sets[@]})) ||
  fault "sets of flags that have one name: $(sort "$scratch/names" | uniq -c)"

# -- 3. Programs

linked=("-O2 -fno-inline")
[[ $amount == all ]] && linked=(-O0 "-O1 -flto=auto" "-O2 -flto=auto" "-O3 -flto=auto")
[[ $("$compiler" --version) == *clang* ]] && linked=("${linked[@]/%=auto/}")

# Whether this processor has all that the flags turn on.
runs_here() { [[ -z $(comm -23 <(features "$@") <(features "$processor=native")) ]]; }

# run OLDER NEWER PROCESSOR: linked either way round; emulated, on a processor that has what OLDER asks for and lacks
# what NEWER does.
run() {
  local level older newer order units=both
  # shellcheck disable=SC2086
  runs_here $1 || { echo "'$1' beside '$2': not run, this processor lacks what the first asks for" && return; }
  # shellcheck disable=SC2086
  runs_here $2 || { units=older && echo "'$1' beside '$2': this processor runs the first alone"; }
  for level in "${linked[@]}"; do
    unit "$level" "$1" && older=$object flags=(-DOLDER="unit_$name")
    unit "$level" "$2" && newer=$object flags+=(-DNEWER="unit_$name")
    # shellcheck disable=SC2086
    compile $level $1 "${flags[@]}" -c "$here/../flags/main.cpp" -o "$scratch/main.o"
    for order in "$older $newer" "$newer $older"; do
      # shellcheck disable=SC2086
      "$compiler" $level "$scratch/main.o" $order -o "$scratch/program"
      "$scratch/program" $units || fault "$level, '$1' beside '$2': $order"
      if command -v qemu-x86_64 >/dev/null; then
        qemu-x86_64 -cpu "$3" "$scratch/program" older || fault "$level, '$1' beside '$2' on $3: $order"
      fi
    done
  done
}

if [[ $target == x86_64* && $(uname -m) == x86_64 ]]; then
  run -march=x86-64 -march=x86-64-v3 core2duo
  if [[ $amount == all ]]; then
    run "-mavx2 -mfma" "$framework" Haswell
    run -march=x86-64 -msse4.1 core2duo
    run -mavx -march=bdver2 SandyBridge
  fi
fi

echo "$faults faults"
((faults == 0))
