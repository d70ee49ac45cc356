#!/usr/bin/env bash
# fuzz.sh [seconds] [libFuzzer argument...]: lets libFuzzer look for calls that disagree with the textbook, touch memory
# that is not theirs or accept nonsense (fuzz/fuzz.hpp). What it finds, and what reaches new code, is kept in build/fuzz/corpus;
# a finding goes into tests/fuzz/corpus once it is mended.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

seconds=${1:-3600}
cmake/install_packages.sh clang libclang-rt-dev
cmake --preset fuzz
cmake --build --preset fuzz
mkdir -p build/fuzz/corpus
build/fuzz/tests/fuzz -max_total_time="$seconds" -max_len=4096 -len_control=0 -artifact_prefix=build/fuzz/ "${@:2}" \
  build/fuzz/corpus tests/fuzz/corpus
