#!/bin/bash
# Unpacks libaio, which DeepSpeed's async_io is compiled against: bash integrations/deepspeed/unpack_libaio.sh libaio
# Needs apt (Debian, Ubuntu) and no root: package lists and packages go into that directory alone. Then, on each node:
#   export CPATH=$PWD/libaio/include LIBRARY_PATH=$PWD/libaio/lib LD_LIBRARY_PATH=$PWD/libaio/lib
set -euo pipefail

mkdir -p "${1:?usage: unpack_libaio.sh DIRECTORY}"
cd "$1"
mkdir -p lists/partial cache/archives/partial root include lib
private=(-qq -o Dir::State::lists="$PWD/lists" -o Dir::Cache="$PWD/cache" -o APT::Sandbox::User="$(id -un)")
apt-get "${private[@]}" update
# The library's own name has a suffix in newer releases: libaio1, libaio1t64
library=$(apt-cache "${private[@]}" depends libaio-dev | grep --only-matching --max-count 1 'libaio1[a-z0-9]*')
apt-get "${private[@]}" download libaio-dev "$library"
for package in *.deb; do dpkg -x "$package" root; done
find root -name libaio.h -exec cp {} include \;
find root -name 'libaio.so.*' -exec cp -P {} lib \;
ln -sf "$(find lib -type f -printf '%f')" lib/libaio.so
rm -r lists cache root ./*.deb
