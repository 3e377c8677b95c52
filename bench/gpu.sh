#!/bin/sh
# On a machine with a Hopper GPU, in one go: correctness of the CUDA backend, then its race against the peers that come with PyTorch.
# Usage: bench/gpu.sh [BUILD]   BUILD: a folder that holds test_cuda, test_cuda_tile and libtilewise.so; built here where not given.
# Writes bench/results/<gpu>-forward.json. Needs python3 with PyTorch for the race.
set -e
root=$(cd "$(dirname "$0")/.." && pwd)
build=$1
if [ -z "$build" ]; then
  build=$root/build-gpu
  cmake -S "$root" -B "$build" -DBUILD_SHARED_LIBS=ON -DTILEWISE_CUDA=ON
  cmake --build "$build" -j --target tilewise test_cuda test_cuda_tile
  ln -sf "$build"/tests/cuda/test_cuda "$build"/tests/cuda/test_cuda_tile "$build"/
fi
"$build"/test_cuda_tile --gtest_brief=1
"$build"/test_cuda --gtest_brief=1
if command -v compute-sanitizer > /dev/null; then
  for tool in memcheck racecheck initcheck synccheck; do
    compute-sanitizer --tool $tool --error-exitcode 3 "$build"/test_cuda --gtest_brief=1 --gtest_filter=Problems.SmokeProblems
  done
fi
gpu=$(nvidia-smi --query-gpu=name --format=csv,noheader | head -1 | tr 'A-Z ' 'a-z-')
python3 "$root"/bench/compare_gpu.py --library "$build"/libtilewise.so --out "${RESULTS:-$root/bench/results}/$gpu-forward.json"
