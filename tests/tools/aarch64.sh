#!/usr/bin/env bash
# aarch64.sh [program...]: builds programs of tests for aarch64 with the distribution's cross compiler and runs them in an
# emulator; without names a choice that covers the kernels and takes minutes. Ends with CTest's count.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

cmake/install_packages.sh g++-aarch64-linux-gnu googletest qemu-user

tests=("$@")
if ((!$#)); then
  tests=({attend,attention,gradient,kv_cache,merge,pooling}_test)  # through cca::dispatch
  tests+=(baseline.{dispatch,element,mixed_types,partition,simd,support,view}_test)
fi
build=build/aarch64
# The headers of this machine's libraries serve any processor, and lie where the cross compiler looks last.
cmake -S . -B $build -G Ninja -DCMAKE_BUILD_TYPE=Release -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
  -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ "-DCMAKE_CROSSCOMPILING_EMULATOR=qemu-aarch64;-L;/usr/aarch64-linux-gnu" \
  -DFETCHCONTENT_SOURCE_DIR_GOOGLETEST=/usr/src/googletest -DCCA_TEST_ARCHS=baseline \
  -DCCA_BUILD_TESTS=ON -DCCA_BUILD_BENCHMARKS=OFF -DCCA_BUILD_EXAMPLES=OFF
cmake --build $build --target "${tests[@]}"
ctest --test-dir $build --output-on-failure -R "^(neon64\.)?($(IFS='|' && echo "${tests[*]//./\\.}"))\$"
