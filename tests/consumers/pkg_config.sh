#!/usr/bin/env bash
# pkg_config.sh compiler version folder: a consumer built by nothing but a compiler and pkg-config, which has found a
# cca.pc of that version; `folder` is for the program. The path to the package is in PKG_CONFIG_PATH.
set -euo pipefail
compiler=$1 version=$2 folder=$3
here=$(dirname "${BASH_SOURCE[0]}")

[[ $(pkg-config --modversion cca) == "$version" ]]
pkg-config --exists "cca >= $version"
if pkg-config --exists 'cca >= 1000'; then
  echo "a version that does not exist was found"
  exit 1
fi
read -ra flags < <(pkg-config --cflags --libs cca)
mkdir -p "$folder"
"$compiler" -std=c++20 "${flags[@]}" "$here/main.cpp" "$here/second.cpp" -o "$folder/consumer"
"$folder/consumer"
