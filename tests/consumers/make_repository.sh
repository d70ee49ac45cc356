#!/usr/bin/env bash
# make_repository.sh folder tag file..: a git repository of these files, with a tag, for a consumer to fetch.
set -euo pipefail
folder=$1 tag=$2

rm -rf "$folder"
mkdir -p "$folder"
cp -r "${@:3}" "$folder"
cd "$folder"
git init --quiet
git add .
git -c user.name=cca -c user.email=cca@localhost commit --quiet --message "$tag"
git tag "$tag"
