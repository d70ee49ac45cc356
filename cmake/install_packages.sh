#!/usr/bin/env bash
# install_packages.sh [package...]: installs what a build needs, and the packages named, on Debian and Ubuntu. Installs
# nothing and needs no rights when all is there. Elsewhere CMake finds what is installed and fetches the rest.
set -euo pipefail

command -v apt-get >/dev/null || exit 0

wanted=(g++ ninja-build libeigen3-dev libxsimd-dev libdlpack-dev libgtest-dev libbenchmark-dev "$@")
# Not as a package, since newer ones than the distribution's are common.
command -v cmake >/dev/null || wanted+=(cmake)

missing=()
for package in "${wanted[@]}"; do
  [[ $(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null) == installed ]] || missing+=("$package")
done
((${#missing[@]})) || exit 0

as_root=()
((EUID == 0)) || as_root=(sudo)
echo "installing ${missing[*]}"
"${as_root[@]}" apt-get update -q
"${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends "${missing[@]}"
