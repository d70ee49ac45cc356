#!/usr/bin/env bash
# python.sh [pytest argument...]: builds the wheel of examples/python, installs it as the README says, into a virtual
# environment of its own, and runs all of its tests, heavy ones and those of PyTorch and transformers among them. Takes a
# quarter of an hour, most of it for compiling.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

cmake/install_packages.sh python3-venv
environment=build/python
cmake/python_environment.sh $environment examples/python/requirements-test.txt
$environment/bin/pip install --quiet --force-reinstall --no-deps ./examples/python
$environment/bin/python -P -m pytest --heavy "$@" examples/python/tests examples/finetune
