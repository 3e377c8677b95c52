#!/usr/bin/env python3
"""Check what `tilewise attend` wrote for a sample against float64 attention and gradients in NumPy.

Usage: sample_check.py INPUT.safetensors OUTPUT.safetensors. Prints the errors; exits 1 where one is above its limit.
"""

import json
import pathlib
import sys

import numpy

LIMITS = {"F32": 2e-6, "BF16": 1e-2, "F16": 2e-3}  # of the relative Frobenius error


def load(path):
    """The tensors of a safetensors file, as float64 or int32, and the element type of q or o."""
    data = pathlib.Path(path).read_bytes()
    header_bytes = int.from_bytes(data[:8], "little")
    tensors, dtype = {}, None
    for name, entry in json.loads(data[8 : 8 + header_bytes]).items():
        if name == "__metadata__":
            continue
        begin, end = (8 + header_bytes + offset for offset in entry["data_offsets"])
        if entry["dtype"] == "BF16":
            value = (numpy.frombuffer(data[begin:end], numpy.uint16).astype(numpy.uint32) << 16).view(numpy.float32)
        else:
            value = numpy.frombuffer(data[begin:end], {"F32": numpy.float32, "F16": numpy.float16, "I32": numpy.int32}[entry["dtype"]])
        tensors[name] = value.reshape(entry["shape"]).astype(numpy.int32 if entry["dtype"] == "I32" else numpy.float64)
        dtype = entry["dtype"] if name in ("q", "o") else dtype
    return tensors, dtype


def attention(q, k, v, do):
    """o, dq, dk, dv of one sequence [seqlen, heads, head_dim], straight from the definition."""
    scale = q.shape[-1] ** -0.5
    q, k, v, do = (numpy.swapaxes(tensor, 0, 1) for tensor in (q, k, v, do))
    scores = scale * (q @ numpy.swapaxes(k, 1, 2))
    p = numpy.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    o = p @ v
    ds = p * (do @ numpy.swapaxes(v, 1, 2) - (do * o).sum(-1, keepdims=True))
    results = o, scale * (ds @ k), scale * (numpy.swapaxes(ds, 1, 2) @ q), numpy.swapaxes(p, 1, 2) @ do
    return {name: numpy.swapaxes(tensor, 0, 1) for name, tensor in zip(("o", "dq", "dk", "dv"), results)}


def main():
    given, dtype = load(sys.argv[1])
    found, _ = load(sys.argv[2])
    inputs = [given[name] for name in ("q", "k", "v", "do")]
    if "cu_seqlens_q" in given:
        parts = [attention(*(tensor[begin:end] for tensor in inputs)) for begin, end in zip(given["cu_seqlens_q"], given["cu_seqlens_q"][1:])]
        expected = {name: numpy.concatenate([part[name] for part in parts]) for name in parts[0]}
    else:
        parts = [attention(*sequence) for sequence in zip(*inputs)]
        expected = {name: numpy.stack([part[name] for part in parts]) for name in parts[0]}
    bad = []
    for name, exact in expected.items():
        difference = found[name] - exact
        relative = numpy.linalg.norm(difference) / numpy.linalg.norm(exact)
        print(f"  {name:3s} largest error {abs(difference).max():.1e}, relative {relative:.1e}")
        if not relative < LIMITS[dtype]:
            bad.append(f"{name} of {sys.argv[2]} differs from float64 by {relative:.1e}, the limit for {dtype} is {LIMITS[dtype]:.0e}")
    print("\n".join(bad) or f"  agrees with float64 attention in NumPy ({dtype}, limit {LIMITS[dtype]:.0e})")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
