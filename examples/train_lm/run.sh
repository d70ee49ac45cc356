#!/usr/bin/env bash
# run.sh [option...]: installs what is missing, builds, and trains the same language model with dense attention, with
# Core Context Aware attention, with its window alone and with mean pooling; then draws the curves. Options go to every
# training, so --group-size and --window, which dense attention has not, cannot be among them. A second run goes on
# where the first was stopped. See README.md beside this file.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

cmake/install_packages.sh python3-venv perl-doc libcli11-dev libfmt-dev nlohmann-json3-dev
export CMAKE_BUILD_PARALLEL_LEVEL=${CMAKE_BUILD_PARALLEL_LEVEL:-$(nproc)}
cmake --preset release -D CCA_BUILD_TESTS=OFF -D CCA_BUILD_BENCHMARKS=OFF -B build/example
cmake --build build/example --target train_lm

venv=build/venv runs=build/train_lm
[[ -x $venv/bin/pip ]] || python3 -m venv $venv
$venv/bin/pip install --quiet --disable-pip-version-check -r examples/train_lm/requirements.txt

train_lm=build/example/examples/train_lm/train_lm
for attention in dense cca window mean; do
  resume=()
  [[ -f $runs/$attention/checkpoint.safetensors ]] && resume=(--resume)
  $train_lm $runs/$attention --attention $attention --threads "$(nproc)" "${resume[@]}" "$@"
done
$venv/bin/python examples/train_lm/plot.py $runs/curves.svg $runs/{dense,cca,window,mean}
echo "curves: $runs/curves.svg"
