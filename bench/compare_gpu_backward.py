#!/usr/bin/env python3
"""Race Tilewise's backward pass on a GPU against cuDNN, FlashAttention-2, -3 and -4, as compare_gpu.py does forward.

Usage: compare_gpu_backward.py [NAME=]libtilewise.so... [--out results.json] [--cases text,text] [--repetitions 12]

Several libraries are variants of one another; the first is the one whose ratio counts. Contenders take turns call by call, L2 is flushed,
host time is hidden, figures are medians. Peers that are not installed enter by their ratio to cuDNN (FlashAttention-2 where it is not raced,
without its flag where ours has it) or to another that is, whichever makes them faster. `error` is each gradient's largest difference from a
peer's, relative to the peer's largest value: dq/dk/dv; where it is large, or Tilewise fails, the race ends.
"""
import argparse
import ctypes
import json
import math
import pathlib
import sys

try:
    import torch
except ModuleNotFoundError:
    sys.exit(f"{__doc__}\nNeeds PyTorch: pip install torch")
import results
from compare_gpu import DTYPES, Arguments, Tilewise, flash_attention_3, flash_attention_4, race_peers, summary, versions
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

PEERS = json.loads((pathlib.Path(__file__).parent / "results/nvidia-h200-peers.json").read_text())["backward"]


class Variant(Tilewise):
    def __init__(self, text):
        self.name, _, library = text.rpartition("=")
        super().__init__(library)
        self.name = self.name or "tilewise"

    def backward(self, words, q, k, v, do, cu=None, deterministic=False):
        packed, extra = cu is not None, {} if cu is None else dict(cu_seqlens_q=cu, cu_seqlens_k=cu)
        lse = torch.empty((q.shape[1], q.shape[0]) if packed else (q.shape[0], q.shape[2], q.shape[1]), device="cuda")
        o = torch.empty(*q.shape[:-1], v.shape[-1], dtype=q.dtype, device="cuda")
        self.call("fwd " + words, q=q, k=k, v=v, o=o, lse=lse, **extra)()
        gradients = [torch.full_like(x, math.nan) for x in (q, k, v)]
        problem, plan = ctypes.create_string_buffer(256), ctypes.c_void_p()
        self.lib.tw_problem_init(problem, ctypes.c_size_t(144))
        self.check(self.lib.tw_problem_parse(f"bwd {words}{' deterministic' if deterministic else ''}".encode(), problem))
        self.check(self.lib.tw_plan_create(problem, self.device, ctypes.byref(plan)))
        workspace = torch.empty(self.lib.tw_plan_workspace_bytes(plan) + 256, dtype=torch.uint8, device="cuda")
        arguments = Arguments()
        self.lib.tw_arguments_init(ctypes.byref(arguments), ctypes.c_size_t(ctypes.sizeof(Arguments)))
        tensors = dict(q=q, k=k, v=v, o=o, lse=lse, dout=do, dq=gradients[0], dk=gradients[1], dv=gradients[2], **extra)
        for name, tensor in tensors.items():
            view = getattr(arguments, name)
            view.data, view.dtype, view.rank = tensor.data_ptr(), DTYPES[tensor.dtype], tensor.dim()
            view.shape[: tensor.dim()] = list(tensor.shape)
            view.stride[: tensor.dim()] = list(tensor.stride())
        arguments.workspace = (workspace.data_ptr() + 255) // 256 * 256
        stream, reference = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream), ctypes.byref(arguments)

        def once():
            self.check(self.lib.tw_plan_run(plan, reference, stream))
            return gradients

        once.keep = (arguments, tensors, workspace)
        return once


def cudnn(q, k, v, do, causal):
    x = [t.detach().requires_grad_() for t in (q, k, v)]
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        o = scaled_dot_product_attention(*[t.transpose(1, 2) for t in x], is_causal=causal, enable_gqa=q.shape[2] != k.shape[2])
    grad = do.transpose(1, 2)
    return lambda: torch.autograd.grad(o, x, grad, retain_graph=True)


def fa2(q, k, v, do, causal, left=None, cu=None, longest=None):
    edge = dict(scale=q.shape[-1] ** -0.5, window_size_left=left, window_size_right=None if left is None else 0)
    shape = (cu, cu, longest or q.shape[1], longest or k.shape[1], 0.0, causal)
    r = torch.ops.aten._flash_attention_forward(q, k, v, *shape, False, **edge)
    return lambda: torch.ops.aten._flash_attention_backward(do, q, k, v, r[0], r[1], *shape, r[2], r[3], **edge)


FA3, FA4 = flash_attention_3(), flash_attention_4()


def fa4(q, k, v, do, causal, left=None, cu=None, longest=None, **flags):
    edge = dict(causal=causal) if left is None else dict(window_size_left=left, window_size_right=0)
    if cu is not None:
        edge |= dict(cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=longest, max_seqlen_k=longest)
    o, lse = FA4._flash_attn_fwd(q, k, v, return_lse=True, **edge)[:2]
    return lambda: FA4._flash_attn_bwd(q, k, v, o, do, lse, **edge, **flags)[:3]


def and_newer(q, k, v, do, causal, left=None, *packed, **flags):
    """FlashAttention-3 and -4, where they are installed."""
    calls = dict(fa3=lambda: FA3.gradients(q, k, v, do, causal, left and left + 1, *packed, **flags)) if FA3 else {}
    return calls | (dict(fa4=lambda: fa4(q, k, v, do, causal, left, *packed, **flags)) if FA4 else {})


def deterministic(call):
    def once():
        torch.use_deterministic_algorithms(True)
        try:
            return call()
        finally:
            torch.use_deterministic_algorithms(False)

    return once


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("libraries", nargs="+")
    parser.add_argument("--out")
    parser.add_argument("--cases", default="")
    parser.add_argument("--repetitions", type=int, default=12)
    args = parser.parse_args()
    torch.manual_seed(0)
    ours = [Variant(text) for text in args.libraries]
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    result = dict(device=torch.cuda.get_device_name(), **versions(), unit="TFLOP/s of visible pairs, medians", rows=[])

    def race(kind, case, flops, make, peers, beside=None):
        """make(variant), peers' functions and those beside, which count for no ratio to peers, each prepare one call."""
        row, calls, gradients = dict(kind=kind, case=case), {}, {}
        if not any(text in f"{kind} {case}" for text in args.cases.split(",")):
            return
        for name, prepare in {**{v.name: (lambda v=v: make(v)) for v in ours}, **peers, **(beside or {})}.items():
            try:
                call = prepare()
                gradients[name] = [x.clone() for x in call()]
                torch.cuda.synchronize()
                calls[name] = call
            except Exception as error:
                if name == ours[0].name:
                    raise
                row[name] = "no: " + (str(error) or repr(error)).split("\n")[0][:80]
        errors = []
        for name in (name for name in peers if name in gradients):
            found = [((a.float() - b.float()).abs().max() / b.float().abs().max()).item() for a, b in zip(gradients[ours[0].name], gradients[name])]
            if not all(error < 0.03 for error in found):  # NaN neither
                raise RuntimeError(f"{kind} {case}: gradients differ from {name}'s by {found} of the largest")
            errors = list(map(max, errors or found, found))
            row["error"] = "/".join(f"{error:.1e}" for error in errors)
        del gradients
        # of FlashAttention-2 only the figure without its flag was measured with the others
        bases = ("cudnn" if "cudnn" in calls else "fa2 without the flag" if "fa2 without the flag" in calls else "fa2", "fa3", "fa4")
        by_ratio = race_peers(row, calls, flush, args.repetitions, flops, PEERS.get(f"{kind} {case}", {}), bases)
        live = [row[name] for name in peers if name in calls] + by_ratio
        if live:
            row["ratio"] = round(row[ours[0].name] / max(live), 3)
        if "without the flag" in calls:
            row["of without the flag"] = round(row[ours[0].name] / row["without the flag"], 3)
        result["rows"].append(row)
        print(" ".join(f"{key}={value}" for key, value in row.items()), flush=True)

    def random(*shape):
        return torch.randn(*shape, dtype=torch.bfloat16, device="cuda")

    def race_deterministic(kind, case, flops, words, q, k, v, do, causal, cu=None, longest=None):
        inputs = (q, k, v, do, causal, None, cu, longest)
        race(kind, case, flops, lambda x: x.backward(words, q, k, v, do, cu, deterministic=True), dict(fa2=lambda: deterministic(fa2(*inputs)), **and_newer(*inputs, deterministic=True)),
             {"without the flag": lambda: ours[0].backward(words, q, k, v, do, cu), "fa2 without the flag": lambda: fa2(*inputs)})  # fmt: skip

    for d, d_v, lengths in [(64, 64, (1024, 2048, 4096, 8192, 16384)), (128, 128, (1024, 2048, 4096, 8192, 16384)), (256, 256, (1024, 2048, 4096, 8192, 16384)), (96, 96, (4096,)), (192, 192, (4096,)), (192, 128, (4096,))]:
        for causal in (False, True):
            for s in lengths:
                b, h, word = 16384 // s, 2048 // d, "causal" if causal else "full"
                q, k, v, do = random(b, s, h, d), random(b, s, h, d), random(b, s, h, d_v), random(b, s, h, d_v)
                case = f"d{d if d == d_v else f'{d}/{d_v}'} {word} s{s} b{b} h{h}"
                words = f"b{b} q{s} h{h} d{d}/{d_v} bf16" + (" causal" if causal else "")
                flops = b * h * s * s * (6 * d + 4 * d_v) * (0.5 if causal else 1)
                if s != 2048:
                    race("bwd", case, flops, lambda x: x.backward(words, q, k, v, do), dict(cudnn=lambda: cudnn(q, k, v, do, causal), **and_newer(q, k, v, do, causal)))
                if s not in (1024, 4096):
                    race_deterministic("bwd-det", case, flops, words, q, k, v, do, causal)
    q, do, k, v = random(2, 8192, 32, 128), random(2, 8192, 32, 128), random(2, 8192, 8, 128), random(2, 8192, 8, 128)
    for causal in (False, True):
        words = "b2 q8192 h32/8 d128 bf16" + (" causal" if causal else "")
        case, flops = f"d128 {'causal' if causal else 'full'} s8192 b2 h32/8", 10 * 2 * 32 * 128 * 8192**2 * (0.5 if causal else 1)
        race("bwd-gqa", case, flops, lambda x: x.backward(words, q, k, v, do), dict(cudnn=lambda: cudnn(q, k, v, do, causal), **and_newer(q, k, v, do, causal)))
        race_deterministic("bwd-det-more", case, flops, words, q, k, v, do, causal)
    q, do, k, v = (random(1, 16384, 16, 128) for _ in range(4))
    race("bwd-window", "d128 s16384 w1024 b1 h16", 10 * 16 * 128 * (16384 * 1024 - 1024 * 1023 / 2), lambda x: x.backward("b1 q16384 h16 d128 bf16 window=1023,0", q, k, v, do), dict(fa2=lambda: fa2(q, k, v, do, False, 1023), **and_newer(q, k, v, do, False, 1023)))
    x = torch.exp(torch.randn(32, generator=torch.Generator().manual_seed(5)) * 1.1)
    lengths = (x / x.sum() * 65536).int().clamp(min=16)
    cu, longest = torch.cat([torch.zeros(1), lengths.cumsum(0)]).int().cuda(), int(lengths.max())
    q, k, v, do = (random(int(cu[-1]), 16, 128) for _ in range(4))
    for causal in (False, True):
        words = f"b32 q{longest} k{longest} h16 d128 bf16 packed tq{q.shape[0]} tk{q.shape[0]}" + (" causal" if causal else "")
        flops = 10 * 16 * 128 * float((lengths.double() ** 2).sum()) * (0.5 if causal else 1)
        case = f"d128 {'causal' if causal else 'full'} 32 sequences, 64k tokens, longest {longest}"
        race("bwd-varlen", case, flops, lambda x: x.backward(words, q, k, v, do, cu), dict(fa2=lambda: fa2(q, k, v, do, causal, None, cu, longest), **and_newer(q, k, v, do, causal, None, cu, longest)))
        race_deterministic("bwd-det-more", case, flops, words, q, k, v, do, causal, cu, longest)

    result["summary"] = summary((row["kind"], row["ratio"]) for row in result["rows"] if "ratio" in row)
    print(json.dumps(result["summary"]))
    if args.out:
        results.save("race", result, args.out)


if __name__ == "__main__":
    main()
