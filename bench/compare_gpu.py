#!/usr/bin/env python3
"""Race Tilewise's GPU kernels against cuDNN and FlashAttention-2, which both come with PyTorch, and FlashAttention-3 and -4 where they are
installed.

Usage: compare_gpu.py --library libtilewise.so [--out results.json] [--cases text] [--repetitions 20]

The contenders of a case take turns call by call, each behind each other one equally often, so that they share one thermal and power state.
L2 is flushed before every call, a spinning kernel keeps host time out of the figure, and figures are medians: TFLOP/s of visible pairs. Every
first result is compared with the other contenders'; where they differ, or Tilewise fails, the race ends. Peers that are not installed here
enter by their ratio to cuDNN (FlashAttention-2 where it is not raced) or to another that is, whichever makes them faster; the ratios were
measured once on an H200 with all of them in one run: bench/results/nvidia-h200-peers.json. Where the first one's figure is 10 % from what it
was then, the case is measured once more.
"""
import argparse
import contextlib
import ctypes
import importlib.metadata
import json
import math
import pathlib
import statistics
import sys
import time

try:
    import torch
except ModuleNotFoundError:
    sys.exit(f"{__doc__}\nNeeds PyTorch: pip install torch")
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import results


class Tensor(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("dtype", ctypes.c_int32), ("rank", ctypes.c_int32), ("shape", ctypes.c_int64 * 4), ("stride", ctypes.c_int64 * 4)]


class Arguments(ctypes.Structure):
    NAMES = "q k v o lse cu_seqlens_q cu_seqlens_k seqused_k alibi_slopes sink dout dlse dq dk dv dsink".split()
    _fields_ = [("struct_size", ctypes.c_size_t)] + [(name, Tensor) for name in NAMES] + [("workspace", ctypes.c_void_p)]


DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int32: 3}


class Tilewise:
    """A plan of the C ABI on tensors of PyTorch."""

    name = "tilewise"

    def __init__(self, library):
        self.lib = ctypes.CDLL(str(pathlib.Path(library).resolve()))
        self.lib.tw_last_error.restype = ctypes.c_char_p
        self.lib.tw_plan_kernel.restype = ctypes.c_char_p
        self.lib.tw_plan_workspace_bytes.restype = ctypes.c_size_t
        self.device = ctypes.create_string_buffer(512)  # a tw_device, which only its own functions look into
        self.lib.tw_device_init(self.device, ctypes.c_size_t(208))
        self.check(self.lib.tw_device_cuda(0, self.device))

    def check(self, status):
        if status:
            raise RuntimeError(self.lib.tw_last_error().decode())

    def call(self, text, **tensors):
        """A function that runs the problem once on the current stream."""
        problem = ctypes.create_string_buffer(256)
        self.lib.tw_problem_init(problem, ctypes.c_size_t(144))
        self.check(self.lib.tw_problem_parse(text.encode(), problem))
        plan = ctypes.c_void_p()
        self.check(self.lib.tw_plan_create(problem, self.device, ctypes.byref(plan)))
        arguments = Arguments()
        self.lib.tw_arguments_init(ctypes.byref(arguments), ctypes.c_size_t(ctypes.sizeof(Arguments)))
        for name, tensor in tensors.items():
            view = getattr(arguments, name)
            view.data, view.dtype, view.rank = tensor.data_ptr(), DTYPES[tensor.dtype], tensor.dim()
            view.shape[: tensor.dim()] = list(tensor.shape)
            view.stride[: tensor.dim()] = list(tensor.stride())
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        run, reference = self.lib.tw_plan_run, ctypes.byref(arguments)

        def once():
            self.check(run(plan, reference, stream))
            return tensors["o"]

        once.kernel = self.lib.tw_plan_kernel(plan).decode()
        once.keep = (arguments, tensors)
        return once

    def forward(self, q, k, v, causal, window):
        b, s, h, d = q.shape
        text = f"fwd b{b} q{s} k{k.shape[1]} h{h}/{k.shape[2]} d{d}/{v.shape[3]} {'bf16' if q.dtype == torch.bfloat16 else 'fp16'}"
        text += f" window={window - 1},0" if window else " causal" if causal else ""
        o = torch.full((b, s, h, v.shape[3]), math.nan, dtype=q.dtype, device="cuda")
        return self.call(text, q=q, k=k, v=v, o=o, lse=torch.empty(b, h, s, device="cuda"))

    def packed(self, q, k, v, cu, longest, causal):
        text = f"fwd b{len(cu) - 1} q{longest} k{longest} h{q.shape[1]}/{k.shape[1]} d{q.shape[2]} bf16 packed tq{q.shape[0]} tk{k.shape[0]}" + (" causal" if causal else "")
        o = torch.full_like(q, math.nan)
        return self.call(text, q=q, k=k, v=v, o=o, lse=torch.empty(q.shape[1], q.shape[0], device="cuda"), cu_seqlens_q=cu, cu_seqlens_k=cu)


class Sdpa:
    def __init__(self, name, backend):
        self.name, self.backend = name, backend

    def forward(self, q, k, v, causal, window):
        if window:
            raise NotImplementedError("window")
        t = [x.transpose(1, 2) for x in (q, k, v)]

        def once():
            with sdpa_kernel(self.backend):
                return F.scaled_dot_product_attention(*t, is_causal=causal, enable_gqa=q.shape[2] != k.shape[2]).transpose(1, 2)

        return once


class FlashAttention2(Sdpa):
    def op(self, q, k, v, causal, window, cu=None, longest=None):
        edge = {} if window is None else dict(window_size_left=window - 1, window_size_right=0)
        return lambda: torch.ops.aten._flash_attention_forward(q, k, v, cu, cu, longest or q.shape[1], longest or k.shape[1], 0.0, causal, False, scale=q.shape[-1] ** -0.5, **edge)[0]

    def forward(self, q, k, v, causal, window):
        return self.op(q, k, v, False, window) if window else super().forward(q, k, v, causal, None)

    def packed(self, q, k, v, cu, longest, causal):
        return self.op(q, k, v, causal, None, cu, longest)


class FlashAttention3:
    """The operators that the package flash_attn_3 registers, or xformers up to 0.0.34, whose package has them too."""

    name = "fa3"

    def __init__(self, operators):
        self.operators = operators

    def forward(self, q, k, v, causal, window):
        return lambda: self.call(q, k, v, causal, window)[0]

    def packed(self, q, k, v, cu, longest, causal):
        return lambda: self.call(q, k, v, causal, None, cu, longest)[0]

    def call(self, q, k, v, causal, window=None, cu=None, longest=None):
        """o and lse."""
        return self.operators.fwd(q, k, v, **self.options(q, causal, window, cu, longest), num_splits=1)[:2]

    def gradients(self, q, k, v, do, causal, window=None, cu=None, longest=None, deterministic=False):
        """A function that computes dq, dk and dv."""
        o, lse = self.call(q, k, v, causal, window, cu, longest)
        options = self.options(q, causal, window, cu, longest)
        return lambda: self.operators.bwd(do, q, k, v, o, lse, **options, deterministic=deterministic)[:3]

    @staticmethod
    def options(q, causal, window, cu, longest):
        options = dict(softmax_scale=q.shape[-1] ** -0.5, is_causal=causal and not window)
        if window:
            options |= dict(window_size_left=window - 1, window_size_right=0)
        if cu is not None:
            options |= dict(cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=longest, max_seqlen_k=longest)
        return options


class FlashAttention4:
    """Of the package flash-attn-4, which compiles each kernel when it is first called: tens of seconds."""

    name = "fa4"

    def __init__(self, package):
        self.package = package

    def forward(self, q, k, v, causal, window):
        edge = dict(window_size_left=window - 1, window_size_right=0) if window else dict(causal=causal)
        return lambda: self.package._flash_attn_fwd(q, k, v, **edge)[0]

    def packed(self, q, k, v, cu, longest, causal):
        return lambda: self.package._flash_attn_fwd(q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=longest, max_seqlen_k=longest, causal=causal)[0]


def module_of(*names):
    """The first of these modules that is installed, or None."""
    for name in names:
        with contextlib.suppress(ModuleNotFoundError):
            return importlib.import_module(name)


def flash_attention_3():
    return FlashAttention3(torch.ops.flash_attn_3) if module_of("flash_attn_3._C", "xformers.flash_attn_3._C") else None


def flash_attention_4():
    """Its module, or None."""
    return module_of("flash_attn.cute.interface")


def versions():
    """Of what is raced here, as results say it."""
    found = dict(torch=torch.__version__, cudnn=torch.backends.cudnn.version())
    for name, there, packages in [("fa3", flash_attention_3(), ["flash_attn_3", "xformers"]), ("fa4", flash_attention_4(), ["flash-attn-4"])]:
        for package in packages if there else []:
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                found.setdefault(name, f"{package} {importlib.metadata.version(package)}")
    return found


def empty_l2(flush):
    """Fills L2 with `flush`, whose lines push out all others, also those that a kernel has asked to be kept. Waits for the device."""
    torch.cuda.synchronize()
    if error := ctypes.CDLL("libcuda.so.1").cuCtxResetPersistingL2Cache():
        raise RuntimeError(f"cuCtxResetPersistingL2Cache: CUresult {error}, so L2 may not be empty")
    flush.zero_()


def balanced_orders(names):
    """Orders in which each name comes behind each other one equally often: who always came behind the same one would have a card that is
    always as hot or as cool. Williams' squares: one for an even count, two for an odd one."""
    zigzag = [i // 2 if i % 2 == 0 else len(names) - 1 - i // 2 for i in range(len(names))]
    rows = [[names[(place + row) % len(names)] for place in zigzag] for row in range(len(names))]
    return rows + [row[::-1] for row in rows] if len(names) % 2 else rows


def take_turns(calls, flush, repetitions, flops):
    """TFLOP/s of each call, the median of at least `repetitions`: they take turns, L2 flushed, the host's time hidden behind a spinning kernel."""
    orders, events = balanced_orders(list(calls)), {name: [] for name in calls}
    for i in range(-(-repetitions // len(orders)) * len(orders) if calls else 0):
        for name in orders[i % len(orders)]:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            empty_l2(flush)
            torch.cuda._sleep(400000)
            begin.record()
            calls[name]()
            end.record()
            events[name].append((begin, end))
    torch.cuda.synchronize()
    return {name: round(flops / statistics.median(b.elapsed_time(e) for b, e in events[name]) / 1e9, 1) for name in calls}


def race_peers(row, calls, flush, repetitions, flops, known, bases):
    """Fills the row: what take_turns() says of the calls, and FA3 and FA4, where they do not run here, by their ratio when `known` was measured
    to one of `bases` that runs here and ran then: the one that makes them fastest. Returns those figures."""
    bases = [name for name in bases if name in calls and known.get(name)]
    for _ in range(2):
        row.update(take_turns(calls, flush, repetitions, flops))
        if not bases or abs(row[bases[0]] / known[bases[0]] - 1) < 0.1:
            break
    row.update(estimates(row, known, bases, calls))
    return [figure for name, figure in row.items() if name.endswith(" by ratio")]


def estimates(row, known, bases, calls):
    return {name + " by ratio": round(max(row[base] * known[name] / known[base] for base in bases), 1)
            for name in ("fa3", "fa4") if bases and name in known and name not in calls}  # fmt: skip


def summary(ratios):
    """Of pairs (group, ratio): how many, their geometric mean and the lowest."""
    groups = {}
    for group, ratio in ratios:
        groups.setdefault(group, []).append(ratio)
    return {g: dict(cases=len(r), geomean=round(math.exp(statistics.mean(map(math.log, r))), 3), lowest=min(r)) for g, r in groups.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", required=True)
    parser.add_argument("--out")
    parser.add_argument("--cases", default="")
    parser.add_argument("--repetitions", type=int, default=20)
    args = parser.parse_args()
    torch.manual_seed(0)
    contenders = [Tilewise(args.library), Sdpa("cudnn", SDPBackend.CUDNN_ATTENTION), FlashAttention2("fa2", SDPBackend.FLASH_ATTENTION)]
    contenders += [fa3] if (fa3 := flash_attention_3()) else []
    contenders += [FlashAttention4(package)] if (package := flash_attention_4()) else []
    table = json.loads((pathlib.Path(__file__).parent / "results/nvidia-h200-peers.json").read_text())["forward"]
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    result = dict(device=torch.cuda.get_device_name(), **versions(), unit="TFLOP/s of visible pairs, medians", rows=[])

    def race(kind, case, flops, method, *inputs):
        if args.cases not in case:
            return
        row, calls, outputs = dict(kind=kind, case=case), {}, []
        for contender in contenders:
            try:
                call = getattr(contender, method)(*inputs)
                outputs.append(call().clone())
                call()
                calls[contender.name] = call
                if contender.name == "tilewise":
                    row["kernel"] = call.kernel
            except Exception as error:
                if contender.name == "tilewise":
                    raise
                row[contender.name] = "no: " + (str(error) or repr(error)).split("\n")[0][:80]
        for other in outputs[1:]:
            difference = (outputs[0].float() - other.float()).abs()
            # Of the largest of each row: rows with many keys are small. NaN is no small difference.
            if not (difference.amax(-1) <= 0.03 * other.float().abs().amax(-1)).all():
                raise RuntimeError(f"{kind} {case}: outputs differ by up to {difference.max().item()}")
            row["difference"] = max(row.get("difference", 0), difference.max().item())
        del outputs
        bases = ("cudnn" if "cudnn" in calls else "fa2", "fa3", "fa4")
        by_ratio = race_peers(row, calls, flush, args.repetitions, flops, table.get(f"{kind} {case}", {}), bases)
        live = [row[contender.name] for contender in contenders[1:] if contender.name in calls] + by_ratio
        if live:
            row["ratio"] = round(row["tilewise"] / max(live), 3)
        result["rows"].append(row)
        print(" ".join(f"{key}={value}" for key, value in row.items()), flush=True)

    def random(*shape, dtype=torch.bfloat16):
        return torch.randn(*shape, dtype=dtype, device="cuda")

    for d, d_v, lengths, dtype in [(64, 64, 6, torch.bfloat16), (128, 128, 6, torch.bfloat16), (256, 256, 6, torch.bfloat16), (128, 128, 2, torch.float16), (64, 64, 2, torch.float16),
                                   (256, 256, 2, torch.float16), (96, 96, 2, torch.bfloat16), (192, 192, 2, torch.bfloat16), (192, 128, 2, torch.bfloat16)]:
        for causal in (False, True):
            for s in (512, 1024, 2048, 4096, 8192, 16384) if lengths == 6 else (1024, 8192):
                b, h = 16384 // s, 2048 // d
                q, k, v = random(b, s, h, d, dtype=dtype), random(b, s, h, d, dtype=dtype), random(b, s, h, d_v, dtype=dtype)
                kind = "fwd" if (d == d_v and lengths == 6) else "fwd-fp16" if dtype == torch.float16 else "fwd-more"
                width = f"d{d}" if d == d_v else f"d{d}/{d_v}"
                race(kind, f"{width} {'causal' if causal else 'full'} s{s} b{b} h{h}", 2 * b * h * s * s * (d + d_v) * (0.5 if causal else 1), "forward", q, k, v, causal, None)
    q, k, v = random(2, 8192, 32, 128), random(2, 8192, 8, 128), random(2, 8192, 8, 128)
    for causal in (False, True):
        race("fwd-gqa", f"d128 {'causal' if causal else 'full'} s8192 b2 h32/8", 4 * 2 * 32 * 128 * 8192**2 * (0.5 if causal else 1), "forward", q, k, v, causal, None)
    q, k, v = (random(1, 16384, 16, 128) for _ in range(3))
    race("fwd-window", "d128 s16384 w1024 b1 h16", 4 * 16 * 128 * (16384 * 1024 - 1024 * 1023 / 2), "forward", q, k, v, True, 1024)
    x = torch.exp(torch.randn(32, generator=torch.Generator().manual_seed(5)) * 1.1)
    lengths = (x / x.sum() * 65536).int().clamp(min=16)
    cu, longest = torch.cat([torch.zeros(1), lengths.cumsum(0)]).int().cuda(), int(lengths.max())
    q, k, v = (random(int(cu[-1]), 16, 128) for _ in range(3))
    for causal in (False, True):
        race("fwd-varlen", f"d128 {'causal' if causal else 'full'} 32 sequences, 64k tokens, longest {longest}", 4 * 16 * 128 * float((lengths.double() ** 2).sum()) * (0.5 if causal else 1), "packed", q, k, v, cu, longest, causal)

    tiny = [random(1, 128, 4, 128) for _ in range(3)]
    result["host_us"] = {}
    for contender in contenders:
        try:
            call = contender.forward(*tiny, True, None)
            for _ in range(300):
                call()
            torch.cuda.synchronize()
            begin = time.perf_counter()
            for _ in range(3000):
                call()
            result["host_us"][contender.name] = round((time.perf_counter() - begin) / 3000 * 1e6, 2)
            torch.cuda.synchronize()
        except Exception as error:
            result["host_us"][contender.name] = str(error)[:60]
    torch.cuda.synchronize()
    q, k, v = (random(1, 16384, 16, 128) for _ in range(3))
    call = contenders[0].forward(q, k, v, True, None)
    before = torch.cuda.mem_get_info()[0]
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    result["extra_memory_bytes"] = before - torch.cuda.mem_get_info()[0]

    rated = [row for row in result["rows"] if "ratio" in row]
    short = [row for row in rated if row["kind"] == "fwd" and (" s512 " in row["case"] or " s1024 " in row["case"])]
    result["summary"] = summary([(row["kind"], row["ratio"]) for row in rated] + [("fwd s512 and s1024", row["ratio"]) for row in short])
    print(json.dumps(result["summary"]), "host us a call", result["host_us"], "extra memory", result["extra_memory_bytes"])
    if args.out:
        results.save("race", result, args.out)


if __name__ == "__main__":
    main()
