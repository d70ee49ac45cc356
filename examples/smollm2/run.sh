#!/usr/bin/env bash
# run.sh [option...]: installs what is missing, builds, prepares the model and a text, and runs SmolLM2 over it with dense,
# Core Context Aware and sliding-window attention. Options go to the program; see README.md beside this file.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

cmake/install_packages.sh python3-venv libcli11-dev libfmt-dev nlohmann-json3-dev
export CMAKE_BUILD_PARALLEL_LEVEL=${CMAKE_BUILD_PARALLEL_LEVEL:-$(nproc)}
cmake --preset release -D CCA_BUILD_TESTS=OFF -D CCA_BUILD_BENCHMARKS=OFF -B build/example
cmake --build build/example --target smollm2

venv=build/venv data=build/smollm2-data
[[ -x $venv/bin/pip ]] || python3 -m venv $venv
$venv/bin/pip install --quiet --disable-pip-version-check -r examples/smollm2/requirements.txt
[[ -f $data/vocabulary.safetensors && -f $data/text.safetensors ]] || $venv/bin/python examples/smollm2/prepare.py $data
build/example/examples/smollm2/smollm2 $data "$@"
