#!/usr/bin/env python3
"""Race Tilewise against the attention kernels of PyTorch and ONNX Runtime on this CPU, all in one process, taking turns.

Method: machines and moments differ, so only ratios taken in one run count. The contenders of a case take turns in bursts
of about 60 ms, in rotating order. Before each burst come a rest and one untimed call, because OpenMP's threads (each
contender brings its own pool) keep spinning for a while after their work and would slow down the next contender; a call
that takes long by itself does without. A contender's figure is the median over all its calls, as GFLOP/s of useful work:
only visible (query, key) pairs count.
Every contender's result is compared with PyTorch's before it may race.

Contenders: tilewise (through its C ABI, on PyTorch's own memory, no copy), torch (scaled_dot_product_attention with its
flash kernel), onnxruntime (com.microsoft.MultiHeadAttention: float32, forward).

Wants: pip install torch onnxruntime onnx numpy   (torch from its CPU index; without onnxruntime the race is without it)
       cmake -B build-shared -DBUILD_SHARED_LIBS=ON && cmake --build build-shared --target tilewise
Usage: compare_cpu.py [--threads 2] [--dtypes float32] [--passes fwd] [--cases "s4096 d64"] [--save]
"""

import argparse
import collections
import math
import os
import pathlib
import statistics
import sys
import time

import c_api
import results

SHAPES = (  # batch, heads, seqlen, head_dim, causal
    (1, 16, 512, 64, True),
    (1, 16, 1024, 64, False),
    (1, 16, 4096, 64, False),
    (1, 16, 4096, 64, True),
    (1, 16, 1024, 128, True),
    (1, 16, 4096, 128, False),
    (1, 16, 4096, 128, True),
    (16, 12, 128, 64, False),
)
BURST_SECONDS = 0.06
LONGEST_SECONDS = 20  # of a case, where a contender takes seconds for a call
# Relative Frobenius distance from PyTorch's result, which rounds gradients of 16-bit types once per block of keys.
TOLERANCE = {"float32": 2e-5, "bfloat16": 3e-2, "float16": 1e-2}


class Case(collections.namedtuple("Case", "direction dtype batch heads seqlen head_dim causal")):
    @property
    def label(self):
        mask = "causal" if self.causal else "full"
        return f"{self.direction} {self.dtype} b{self.batch} h{self.heads} s{self.seqlen} d{self.head_dim} {mask}"

    @property
    def flops(self):
        pairs = self.seqlen * (self.seqlen + 1) / 2 if self.causal else self.seqlen**2
        return 4 * self.batch * self.heads * pairs * self.head_dim * (1 if self.direction == "fwd" else 2.5)


class Torch:
    name = "torch"

    def __init__(self, threads):
        torch.set_num_threads(threads)
        self.version = torch.__version__

    def attention(self, q, k, v, causal):
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)

    def fwd(self, case, q, k, v, do):
        def call():
            with torch.no_grad():
                return (self.attention(q, k, v, case.causal),)

        return call

    def bwd(self, case, q, k, v, do):
        inputs = [tensor.detach().requires_grad_() for tensor in (q, k, v)]
        o = self.attention(*inputs, case.causal)
        return lambda: torch.autograd.grad(o, inputs, do, retain_graph=True)


class Tilewise:
    name = "tilewise"

    def __init__(self, threads, path):
        if not path.exists():
            sys.exit(f"{path} is missing; build it as --help says, or name another with --library")
        self.library = c_api.Library(path)
        self.device = self.library.device(threads)
        self.version = self.library.version

    def bind(self, case, direction, **tensors):
        """Runs on the tensors where they lie: PyTorch's [b, h, s, d] is [b, s, h, d] with other strides."""
        dtype = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}[case.dtype]
        mask = "causal" if case.causal else ""
        problem = f"{direction} b{case.batch} q{case.seqlen} k{case.seqlen} h{case.heads} d{case.head_dim} {dtype} {mask}"
        views = {}
        for name, tensor in tensors.items():
            view = tensor if name == "lse" else tensor.transpose(1, 2)
            views[name] = c_api.tensor(view.data_ptr(), str(view.dtype).removeprefix("torch."), view.shape, view.stride())
        run = c_api.Plan(self.library, problem, self.device).bind(views)
        run.memory = tensors  # lives as long as the function that uses it
        return run

    @staticmethod
    def calling(run, *outputs):
        def call():
            run()
            return outputs

        return call

    def forward_tensors(self, case, q, k, v):
        return {"q": q, "k": k, "v": v, "o": torch.empty_like(q), "lse": torch.empty(case.batch, case.heads, case.seqlen)}

    def fwd(self, case, q, k, v, do):
        tensors = self.forward_tensors(case, q, k, v)
        return self.calling(self.bind(case, "fwd", **tensors), tensors["o"])

    def bwd(self, case, q, k, v, do):
        tensors = self.forward_tensors(case, q, k, v)
        self.bind(case, "fwd", **tensors)()
        gradients = {"dq": torch.empty_like(q), "dk": torch.empty_like(k), "dv": torch.empty_like(v)}
        return self.calling(self.bind(case, "bwd", dout=do, **tensors, **gradients), *gradients.values())


class OnnxRuntime:
    name = "onnxruntime"

    def __init__(self, threads):
        import onnx
        import onnxruntime

        self.onnx, self.runtime, self.threads = onnx, onnxruntime, threads
        self.version = onnxruntime.__version__

    def fwd(self, case, q, k, v, do):
        if case.dtype != "float32":
            raise NotImplementedError("float32 only")
        helper, tensor_type = self.onnx.helper, self.onnx.TensorProto.FLOAT
        node = helper.make_node(
            "MultiHeadAttention", ["q", "k", "v"], ["o"], domain="com.microsoft", num_heads=case.heads, unidirectional=int(case.causal)
        )
        values = {name: helper.make_tensor_value_info(name, tensor_type, ["b", "s", "hd"]) for name in "qkvo"}
        graph = helper.make_graph([node], "attention", [values[name] for name in "qkv"], [values["o"]])
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
        options = self.runtime.SessionOptions()
        options.intra_op_num_threads = self.threads
        session = self.runtime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        shape = (case.batch, case.seqlen, case.heads * case.head_dim)
        inputs = {name: tensor.transpose(1, 2).reshape(shape).numpy() for name, tensor in zip("qkv", (q, k, v))}
        unpacked = (case.batch, case.seqlen, case.heads, case.head_dim)
        return lambda: (torch.from_numpy(session.run(None, inputs)[0]).view(unpacked).transpose(1, 2),)


def relative_distance(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def enter(contenders, case, tensors):
    """The contenders that can run this case and agree with the first of them, as {name: call}, and why the others cannot."""
    calls, absent, expected = {}, {}, None
    for contender in contenders:
        try:
            call = getattr(contender, case.direction)(case, *tensors)
            got = call()
        except (NotImplementedError, AttributeError, RuntimeError) as error:
            absent[contender.name] = str(error).split("\n", maxsplit=1)[0]
            continue
        expected = expected or [tensor.clone() for tensor in got]
        distance = max(relative_distance(a, b) for a, b in zip(got, expected))
        if not distance < TOLERANCE[case.dtype]:
            raise SystemExit(f"{contender.name} disagrees with {contenders[0].name} on {case.label}: relative distance {distance:.1e}")
        calls[contender.name] = call
    return calls, absent


def race(calls, budget, rest):
    """Seconds of every timed call, by contender."""
    names, seconds, turn = list(calls), {name: [] for name in calls}, 0
    begin = time.perf_counter()
    while turn == 0 or time.perf_counter() - begin < budget * len(names) or (turn < 3 and time.perf_counter() - begin < LONGEST_SECONDS):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            time.sleep(rest)
            if not seconds[name] or seconds[name][-1] < 10 * BURST_SECONDS:
                calls[name]()
            burst = now = time.perf_counter()
            while now - burst < BURST_SECONDS:
                calls[name]()
                last, now = now, time.perf_counter()
                seconds[name].append(now - last)
        turn += 1
    return seconds


def measure(contenders, case, budget, rest):
    generator = torch.Generator().manual_seed(0)
    shape = (case.batch, case.heads, case.seqlen, case.head_dim)
    tensors = [torch.randn(shape, generator=generator).to(getattr(torch, case.dtype)) for _ in range(4)]
    calls, absent = enter(contenders, case, tensors)
    row = {"case": case.label, "absent": absent, "gflops": {}, "spread": {}}
    for name, seconds in race(calls, budget, rest).items():
        middle = statistics.median(seconds)
        low, high = statistics.quantiles(seconds, n=10)[:: 8] if len(seconds) > 9 else (min(seconds), max(seconds))
        row["gflops"][name] = round(case.flops / middle / 1e9, 2)
        row["spread"][name] = round((high - low) / middle, 3)  # of the middle 80 % of the calls, against the median
    peers = {name: value for name, value in row["gflops"].items() if name != "tilewise"}
    if "tilewise" in row["gflops"] and peers:
        row["best_peer"] = max(peers, key=peers.get)
        row["ratio"] = {name: round(row["gflops"]["tilewise"] / value, 3) for name, value in peers.items()}
    return row


def geometric_mean(values):
    values = list(values)
    return round(math.exp(sum(map(math.log, values)) / len(values)), 3) if values else None


def summarize(rows, names):
    """Geometric means of tilewise against each peer and against the best one, by direction and type."""
    groups = collections.defaultdict(list)
    for row in rows:
        if "ratio" in row:
            groups[" ".join(row["case"].split()[:2])].append(row["ratio"])
    summary = {}
    for group, ratios in groups.items():
        summary[group] = {name: geometric_mean(r[name] for r in ratios if name in r) for name in names if any(name in r for r in ratios)}
        summary[group] |= {"best": geometric_mean(min(r.values()) for r in ratios), "least": min(min(r.values()) for r in ratios)}
    return summary


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of every contender (default: all)")
    parser.add_argument("--dtypes", default="float32,bfloat16,float16")
    parser.add_argument("--passes", default="fwd,bwd")
    parser.add_argument("--cases", default="", help='only cases that hold this text, such as "s4096 d64 causal"')
    parser.add_argument("--budget", type=float, default=0.8, help="seconds for each contender of a case (default 0.8)")
    parser.add_argument("--rest", type=float, default=0.03, help="seconds of rest before a burst (default 0.03)")
    parser.add_argument("--library", default=results.ROOT / "build-shared/libtilewise.so", type=pathlib.Path)
    parser.add_argument("--save", action="store_true", help="keep the figures in bench/results/<machine>.json")
    return parser.parse_args()


def main():
    options = arguments()
    contenders = [Torch(options.threads), Tilewise(options.threads, options.library)]
    try:
        contenders.append(OnnxRuntime(options.threads))
    except ImportError as error:
        print(f"without ONNX Runtime: {error}")
    versions = {contender.name: contender.version for contender in contenders}
    names = list(versions)
    machine = results.machine()
    print(f"{machine['cpu']}, {options.threads} threads; " + ", ".join(f"{name} {version}" for name, version in versions.items()))
    print(f"{'GFLOP/s':42s}" + "".join(f"{name:>13s}" for name in names) + "   / best peer")

    rows = []
    for dtype in options.dtypes.split(","):
        for direction in options.passes.split(","):
            for shape in SHAPES:
                case = Case(direction, dtype, *shape)
                if options.cases not in case.label:
                    continue
                row = measure(contenders, case, options.budget, options.rest)
                rows.append(row)
                cells = "".join(f"{row['gflops'][name]:13.1f}" if name in row["gflops"] else f"{'-':>13s}" for name in names)
                ratio = f"{min(row['ratio'].values()):9.2f} ({row['best_peer']})" if "ratio" in row else f"{'-':>9s}"
                print(f"{case.label:42s}{cells}   {ratio}", flush=True)

    summary = summarize(rows, names)
    print("\ngeometric means of tilewise / peer")
    for group, means in summary.items():
        print(f"  {group:14s} " + ", ".join(f"{name} {value:.2f}x" for name, value in means.items()))
    if options.save:
        old = results.load().get("compare_cpu", {}).get("threads", {})
        data = {"versions": versions, "threads": old | {str(options.threads): {"summary": summary, "rows": rows}}}
        print("saved in", results.save("compare_cpu", data))


if __name__ == "__main__":
    try:
        import torch
        from torch.nn.attention import SDPBackend, sdpa_kernel
    except ImportError:
        sys.exit(f"{__doc__}\nNeeds PyTorch: pip install torch onnxruntime onnx numpy")
    main()
