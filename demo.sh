#!/usr/bin/env bash
# From nothing to what FlashAttention buys on this machine: installs what is missing, builds, computes real attention and
# checks it, then measures standard against flash attention and writes a page about it. Options go to bench/demo.py. Where there is a GPU
# and nvcc, the same comparison runs there too.
usage='usage: ./demo.sh [--threads N] [--budget SECONDS] [--save]'
value_of= # the option that the next word is the value of
for word in "$@"; do
  case ${value_of:-$word} in
    -h | --help)
      printf '%s\n' "$usage" \
        '  --threads N       of the CPU; all where not given' \
        '  --budget SECONDS  long rows that would exceed it are left out (150)' \
        '  --save            keep the figures in bench/results/<machine>.json'
      exit
      ;;
    --threads | --budget)
      [ -n "$value_of" ] && value_of= || value_of=$word
      ;;
    --threads=* | --budget=* | --save) ;;
    *)
      printf 'demo.sh: %s is no option of the demo\n%s\n' "$word" "$usage" >&2
      exit 2
      ;;
  esac
done
if [ -n "$value_of" ]; then
  printf 'demo.sh: %s wants a value\n%s\n' "$value_of" "$usage" >&2
  exit 2
fi
# shellcheck source-path=SCRIPTDIR source=scripts/setup.sh
. "$(dirname "$0")/scripts/setup.sh"

need "${build_packages[@]}" python3-matplotlib

folder=build/demo # of its own: build/ may be configured for something else
say "building in $folder (a minute or two the first time)"
cuda=OFF
if nvidia-smi -L 2>/dev/null | grep -q '^GPU' && PATH=$PATH:/usr/local/cuda/bin command -v nvcc >/dev/null; then cuda=ON; fi
build $folder -DCMAKE_BUILD_TYPE=Release -DTILEWISE_BUILD_TOOL=ON -DTILEWISE_BUILD_TESTS=OFF -DTILEWISE_BUILD_EXAMPLES=OFF \
  -DTILEWISE_CUDA=$cuda -DBUILD_SHARED_LIBS=$cuda
tilewise=$folder/tools/tilewise/tilewise
for python in /usr/bin/python3 python3; do # the one that Matplotlib was installed for
  if "$python" -c 'import matplotlib' 2>/dev/null; then break; fi
done
mkdir -p demo-output

say "real attention: a layer of a pretrained transformer (all-MiniLM-L6-v2) reading real text, see samples/README.md"
for sample in constitution_preamble gettysburg_address; do
  printf '\n$ tilewise attend samples/%s.safetensors -o demo-output/%s.safetensors\n' "$sample" "$sample"
  "$tilewise" attend "samples/$sample.safetensors" -o "demo-output/$sample.safetensors" | tee demo-output/attend.txt
  "$python" bench/sample_check.py "samples/$sample.safetensors" "demo-output/$sample.safetensors"
  problem=$(head -n 1 demo-output/attend.txt)
  printf '\n$ tilewise verify "%s"\n' "$problem"
  "$tilewise" verify "$problem"
done

say "standard against flash attention (about two minutes)"
"$python" bench/demo.py "$tilewise" demo-output "$@"

if "$tilewise" explain "q1024 d128 bf16" --device cuda >/dev/null 2>&1; then
  say "the same on the GPU"
  if python3 -c 'import torch' 2>/dev/null; then
    python3 bench/io_gpu.py --library $folder/libtilewise.so --tool "$tilewise" --no-counters
  else
    printf 'No PyTorch for python3, which multiplies for standard attention here: flash alone.\n'
    "$tilewise" bench --device cuda "q1024 h8 d128 bf16" "q4096 h8 d128 bf16" "q16384 h8 d128 bf16" "q32768 h8 d128 bf16"
  fi
fi
