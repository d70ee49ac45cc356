#!/usr/bin/env bash
# check.sh nm older newer program: two objects with different -m flags share no symbol of the library, and the program of
# both runs on a processor that knows the older one's instructions alone (under qemu-user, where that is installed).
set -euo pipefail
nm=$1 older=$2 newer=$3 program=$4

# Definitions of which the linker keeps one: those of cca, by their mangled names.
mergeable() { "$nm" --defined-only "$1" | awk '$2 ~ /^[WVu]$/ && $3 ~ /3cca/ { print $3 }' | sort; }

for object in "$older" "$newer"; do
  [[ -n $(mergeable "$object") ]] || { echo "no symbol of cca in $object: nothing is tested"; exit 1; }
done
shared=$(comm -12 <(mergeable "$older") <(mergeable "$newer"))
if [[ -n $shared ]]; then
  echo "symbols of cca that units with different -m flags share:"
  c++filt <<<"$shared"
  exit 1
fi
if command -v qemu-x86_64 >/dev/null; then
  qemu-x86_64 -cpu Nehalem "$program"
fi
