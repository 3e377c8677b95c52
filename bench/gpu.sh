#!/usr/bin/env bash
# On a machine with a Hopper GPU, in one go: the race against the peers that come with PyTorch (and FlashAttention-3 and -4 where they are
# installed; the package flash-attn-4 compiles its kernels for a minute or two), host cost, standard against flash with the hardware's counters;
# then correctness of the CUDA backend, and the sanitizers. Five minutes beside building.
# Usage: bench/gpu.sh [BUILD]   BUILD: a folder that holds test_cuda, test_cuda_tile, host_cost, tilewise and libtilewise.so; built here
# where not given. Writes <gpu>-forward.json and -backward.json to bench/results, or to the folder $RESULTS; bench/report.py makes the tables
# of README.md and docs/ from them. Needs python3 with PyTorch, and what ./test.sh installs; compute-sanitizer and ncu are
# used where they are found.
set -euo pipefail
if [[ ${1:-} == -* ]]; then
  sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"
  exit
fi
root=$(cd "$(dirname "$0")/.." && pwd)
build=${1:-}
if [ -z "$build" ]; then
  build=$root/build-gpu
  cmake -S "$root" -B "$build" -DBUILD_SHARED_LIBS=ON -DTILEWISE_CUDA=ON
  cmake --build "$build" -j "$(nproc)" --target tilewise tilewise_tool test_cuda test_cuda_tile host_cost
  ln -sf "$build"/tests/cuda/test_cuda "$build"/tests/cuda/test_cuda_tile "$build"/bench/host_cost "$build"/tools/tilewise/tilewise "$build"/
fi
export LD_LIBRARY_PATH=$build${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
gpu=$(nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1 | tr 'A-Z ' 'a-z-')
out=${RESULTS:-$root/bench/results}/$gpu

python3 "$root"/bench/compare_gpu.py --library "$build"/libtilewise.so --out "$out"-forward.json
python3 "$root"/bench/compare_gpu_backward.py "$build"/libtilewise.so --out "$out"-backward.json
"$build"/host_cost | python3 "$root"/bench/results.py host_cost "$out"-forward.json
python3 "$root"/bench/io_gpu.py --library "$build"/libtilewise.so --tool "$build"/tilewise --out "$out"-forward.json
python3 "$root"/bench/report.py --summary "$out"-forward.json
python3 "$root"/bench/report.py --summary "$out"-backward.json

"$build"/test_cuda_tile --gtest_brief=1
"$build"/test_cuda --gtest_brief=1
if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck initcheck synccheck; do
    # Where a CTA has many work items, racecheck and synccheck report the forward kernel: docs/kernels/backward_sm90.md, "Checks".
    case $tool in memcheck | initcheck) more=':Backward.Smoke*:Backward.ManyPacked*' ;; *) more= ;; esac
    compute-sanitizer --tool $tool --error-exitcode 3 "$build"/test_cuda --gtest_brief=1 --gtest_filter="Problems.*SmokeProblems$more"
  done
fi
