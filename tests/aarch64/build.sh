#!/usr/bin/env bash
# Builds the library and its tests for 64-bit Arm in the folder build/aarch64, ready for ctest: programs run under emulation.
# Usage: tests/aarch64/build.sh [CMAKE OPTION]...
# Wants: apt-get install g++-aarch64-linux-gnu qemu-user libgtest-dev libhwy-dev cmake make
set -euo pipefail
cd "$(dirname "$0")/../.."
here=$PWD/tests/aarch64
folder=$PWD/build/aarch64

# What serves any processor comes from this machine: headers of Highway, sources of GoogleTest.
mkdir -p "$folder/include"
ln -sfn /usr/include/hwy "$folder/include/hwy"
if [ ! -f "$folder/prefix/lib/libgtest.a" ]; then
  cmake -S /usr/src/googletest -B "$folder/googletest" -DCMAKE_TOOLCHAIN_FILE="$here/toolchain.cmake" -DCMAKE_BUILD_TYPE=Release \
    -DBUILD_GMOCK=OFF -DCMAKE_INSTALL_PREFIX="$folder/prefix" -DCMAKE_INSTALL_LIBDIR=lib
  cmake --build "$folder/googletest" --parallel "$(nproc)" --target install
fi
cmake -S . -B "$folder" -DCMAKE_TOOLCHAIN_FILE="$here/toolchain.cmake" -DCMAKE_BUILD_TYPE=Release -DCMAKE_PREFIX_PATH="$folder/prefix" \
  -DTILEWISE_HIGHWAY_INCLUDE="$folder/include" -DTILEWISE_CBLAS_INCLUDE="$here" -DTILEWISE_OPENBLAS=m -DTILEWISE_CUDA=OFF \
  -DTILEWISE_BUILD_TOOL=OFF -DTILEWISE_BUILD_EXAMPLES=OFF "$@"
cmake --build "$folder" --parallel "$(nproc)"
