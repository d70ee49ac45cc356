#!/usr/bin/env bash
# create.sh: makes the Conan package of this checkout and builds and runs its test, with the installed Eigen and xsimd in
# place of Conan's and in a Conan home of its own: nothing is fetched, nothing stays. Wants Conan 2 (pip install conan).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

CONAN_HOME=$(mktemp -d)
export CONAN_HOME
trap 'rm -rf "$CONAN_HOME"' EXIT
conan profile detect
conan remote disable '*'
cat >"$CONAN_HOME/installed" <<PROFILE
include(default)
[settings]
build_type=Debug
compiler.cppstd=20
[platform_requires]
eigen/$(pkg-config --modversion eigen3)
xsimd/$(pkg-config --modversion xsimd)
[conf]
tools.cmake.cmake_layout:test_folder=$CONAN_HOME/test
tools.cmake.cmaketoolchain:user_presets=
PROFILE
conan create . --profile "$CONAN_HOME/installed"
