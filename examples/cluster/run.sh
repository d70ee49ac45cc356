#!/usr/bin/env bash
# run.sh [option...]: installs what is missing, builds, prepares SmolLM2 and a text, and takes the text through the model
# over RANKS ranks of this machine, 4 unless said, and in one process. Options go to the program; see README.md.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

cmake/install_packages.sh python3-venv libcli11-dev libfmt-dev nlohmann-json3-dev libopenmpi-dev openmpi-bin
export CMAKE_BUILD_PARALLEL_LEVEL=${CMAKE_BUILD_PARALLEL_LEVEL:-$(nproc)}
cmake --preset release -D CCA_BUILD_TESTS=OFF -D CCA_BUILD_BENCHMARKS=OFF -D CCA_MPI=ON -B build/example
cmake --build build/example --target cluster_prefill cluster_layer cluster_cost

venv=build/venv data=build/smollm2-data
[[ -x $venv/bin/pip ]] || python3 -m venv $venv
$venv/bin/pip install --quiet --disable-pip-version-check -r examples/smollm2/requirements.txt
[[ -f $data/text.safetensors ]] || $venv/bin/python examples/smollm2/prepare.py $data

# More ranks than cores are welcome, and so is root, in a container.
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
ranks=${RANKS:-4}
mpirun --oversubscribe -n "$ranks" build/example/examples/cluster/cluster_prefill $data --check "$@"
