#!/usr/bin/env bash
# python.sh [pytest argument...]: the tests of examples/python, heavy ones and those of PyTorch and transformers among them,
# with libcca as the tests build it, in a virtual environment of their own. Then the wheel, built and used as the README
# says. Takes a quarter of an hour, most of it for compiling.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

cmake/install_packages.sh python3-venv
environment=build/python
[[ -d $environment ]] || python3 -m venv $environment
$environment/bin/pip install --quiet --requirement examples/python/requirements-test.txt

cmake --preset tests
cmake --build --preset tests --target cca_c
CCA_LIBRARY=$PWD/build/tests/libcca.so PYTHONPATH=examples/python $environment/bin/python -m pytest --heavy "$@" \
  examples/python/tests

$environment/bin/pip install --quiet --force-reinstall --no-deps ./examples/python
$environment/bin/python -m pytest examples/python/tests/test_cca.py
