#!/usr/bin/env bash
# aarch64.sh [name...]: builds tests for aarch64 with the distribution's cross compiler and runs them in an emulator:
# <name>_test of each name, without names a choice that covers the kernels and takes minutes. Ends with CTest's count.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

cmake/install_packages.sh g++-aarch64-linux-gnu googletest qemu-user

tests=("${@:-attention}")
(($#)) || tests+=(attend dispatch element gradient kv_cache merge partition pooling simd support view)
build=build/aarch64
# The headers of this machine's libraries serve any processor, and lie where the cross compiler looks last.
cmake -S . -B $build -G Ninja -DCMAKE_BUILD_TYPE=Release -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
  -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ "-DCMAKE_CROSSCOMPILING_EMULATOR=qemu-aarch64;-L;/usr/aarch64-linux-gnu" \
  -DFETCHCONTENT_SOURCE_DIR_GOOGLETEST=/usr/src/googletest -DCCA_TEST_ARCHS=baseline \
  -DCCA_BUILD_TESTS=ON -DCCA_BUILD_BENCHMARKS=OFF -DCCA_BUILD_EXAMPLES=OFF
targets=("${tests[@]/#/baseline.}")
cmake --build $build --target "${targets[@]/%/_test}"
ctest --test-dir $build --output-on-failure -R "^baseline\.($(IFS='|' && echo "${tests[*]}"))_test\$"
