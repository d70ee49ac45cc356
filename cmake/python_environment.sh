#!/usr/bin/env bash
# python_environment.sh <folder> <requirements>: makes a virtual environment of exactly these packages, or leaves the one that
# is there where it is of the same ones. Fails where Python 3.11, its venv module or the packages cannot be had: where
# no server answers, within a minute.
set -euo pipefail
folder=$1 requirements=$2

cmp -s "$requirements" "$folder/requirements.txt" && exit 0
rm -rf "$folder"
command -v python3 >/dev/null || exit 1
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet --disable-pip-version-check --retries 1 --timeout 10 \
  --requirement "$requirements"
cp "$requirements" "$folder/requirements.txt"  # last: it says that the rest is there
