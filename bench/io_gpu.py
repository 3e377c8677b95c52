#!/usr/bin/env python3
"""Standard against flash attention on a GPU, from 1k to 32k tokens: time, extra memory and, where ncu is found, the bytes that the
hardware counters see cross between DRAM and the chip, beside what `tilewise explain` predicts.

Standard attention is the textbook's by PyTorch: S = QK' and PV by cuBLAS, softmax in place between them. Both take turns on the same data.

Wants: python3 with PyTorch, a shared library and the tool: cmake -B build -DBUILD_SHARED_LIBS=ON && cmake --build build
Usage: io_gpu.py --library build/libtilewise.so --tool build/tools/tilewise/tilewise [--no-counters] [--out RESULTS.json]
"""
import argparse
import csv
import json
import pathlib
import shutil
import statistics
import subprocess
import sys

try:
    import torch
except ModuleNotFoundError:
    sys.exit(f"{__doc__}\nNeeds PyTorch: pip install torch")

import compare_gpu
import results
import units

HEADS, HEAD_DIM = 8, 128
LENGTHS = [1 << n for n in range(10, 16)]
TURNS = 9
COUNTERS = {"read_bytes": "dram__bytes_read.sum", "written_bytes": "dram__bytes_write.sum"}


def problem(seqlen):
    return f"fwd q{seqlen} h{HEADS} d{HEAD_DIM} bf16"


class Pair:
    """Both algorithms on one problem: functions that make what they need beyond q, k, v and o, and run once."""

    def __init__(self, tilewise, seqlen):
        q, k, v, o, o_standard = (torch.randn(1, seqlen, HEADS, HEAD_DIM, dtype=torch.bfloat16, device="cuda") for _ in range(5))
        q_rows, k_rows, v_rows, o_rows = (x[0].transpose(0, 1) for x in (q, k, v, o_standard))
        unused, scale = torch.zeros(1, 1, 1, dtype=torch.bfloat16, device="cuda"), HEAD_DIM**-0.5

        def flash():
            lse = torch.empty(1, HEADS, seqlen, device="cuda")
            once = tilewise.call(problem(seqlen), q=q, k=k, v=v, o=o, lse=lse)
            once()
            return once

        def standard():
            s = torch.baddbmm(unused, q_rows, k_rows.transpose(1, 2), beta=0, alpha=scale)
            torch.softmax(s, -1, out=s)
            torch.bmm(s, v_rows, out=o_rows)

        self.o, self.o_standard, self.calls = o, o_standard, {"flash": flash, "standard": standard}


def extra_bytes(call):
    """Growth of PyTorch's peak, and of what is taken on the device without PyTorch."""
    torch.cuda.synchronize()
    outside = lambda: -torch.cuda.mem_get_info()[0] - torch.cuda.memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    before, outside_before = torch.cuda.memory_allocated(), outside()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before + outside() - outside_before


def measure(pair, flush):
    """{algorithm: {seconds, extra_bytes}}: medians of events, L2 flushed before each call, a spinning kernel hides host time."""
    found = {name: {"extra_bytes": extra_bytes(call)} for name, call in pair.calls.items()}
    calls = {"flash": pair.calls["flash"](), "standard": pair.calls["standard"]}
    events = {name: [] for name in calls}
    for _ in range(TURNS):
        for name, call in calls.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            compare_gpu.empty_l2(flush)
            torch.cuda._sleep(400000)
            begin.record()
            call()
            end.record()
            events[name].append((begin, end))
    torch.cuda.synchronize()
    for name, pairs in events.items():
        found[name]["seconds"] = statistics.median(begin.elapsed_time(end) for begin, end in pairs) / 1e3
    return found


def run_counted(tilewise):
    """What ncu watches: for each length flash once, then standard once."""
    for seqlen in LENGTHS:
        pair = Pair(tilewise, seqlen)
        for call in pair.calls.values():
            call()
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        for call in pair.calls.values():
            call()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()


def count(options):
    """{seqlen: {algorithm: {read_bytes, written_bytes}}}. Every kernel starts with empty caches; those of standard attention are added."""
    command = ["ncu", "--csv", "--page", "raw", "--print-units", "base", "--clock-control", "none", "--profile-from-start", "off",
               "--metrics", ",".join(COUNTERS.values()), sys.executable, __file__, "--library", options.library, "--counted"]  # fmt: skip
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    lines = done.stdout.splitlines()
    head = next((n for n, line in enumerate(lines) if line.startswith('"ID"')), None)
    if done.returncode or head is None:
        sys.exit(f"{' '.join(command)}\nfailed:\n" + "\n".join(lines[-20:]))
    counted, lengths = {}, iter(LENGTHS)
    for kernel in list(csv.DictReader(lines[head:]))[1:]:  # the first row holds units
        flash = "forward_sm90" in kernel["Kernel Name"]
        if flash:
            cells = counted.setdefault(next(lengths), {name: dict.fromkeys(COUNTERS, 0) for name in ("flash", "standard")})
        cell = cells["flash" if flash else "standard"]
        for name, counter in COUNTERS.items():
            cell[name] += float(kernel[counter].replace(",", ""))
    return counted


def predict(tool, seqlen):
    done = subprocess.run([tool, "explain", "--json", "--device", "cuda", problem(seqlen)], stdout=subprocess.PIPE, text=True, check=True)
    document = json.loads(done.stdout)
    return {name: {"predicted_bytes": document[name]["bytes_moved"], "predicted_extra_bytes": document[name]["extra_bytes"]}
            | ({"tile_bytes": document[name]["tile_bytes"]} if name == "flash" else {}) for name in ("flash", "standard")}  # fmt: skip


COLUMNS = ("tokens", "standard", "flash", "speed-up", "standard", "flash", "standard", "explain", "flash", "explain")


def cells(row):
    """A row as text: length, times, speed-up, extra memory, DRAM bytes counted and predicted."""
    flash, standard = row["flash"], row["standard"]
    size = lambda value: units.si(value, "B")
    moved = lambda cell: size(cell["read_bytes"] + cell["written_bytes"]) if "read_bytes" in cell else "-"
    return (units.length(row["seqlen"]), units.duration(standard["seconds"]), units.duration(flash["seconds"]),
            f"{standard['seconds'] / flash['seconds']:.1f}x", size(standard["extra_bytes"]), size(flash["extra_bytes"]),
            moved(standard), size(standard["predicted_bytes"]), moved(flash), size(flash["predicted_bytes"]))  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", required=True)
    parser.add_argument("--tool")
    parser.add_argument("--no-counters", action="store_true")
    parser.add_argument("--out", type=pathlib.Path)
    parser.add_argument("--counted", action="store_true", help=argparse.SUPPRESS)  # the child that ncu watches
    options = parser.parse_args()
    torch.manual_seed(0)
    tilewise = compare_gpu.Tilewise(options.library)
    if options.counted:
        return run_counted(tilewise)
    counted = count(options) if shutil.which("ncu") and not options.no_counters else {}
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    for call in Pair(tilewise, LENGTHS[0]).calls.values():  # loads the kernels
        call()
    print(f"{torch.cuda.get_device_name()}: {problem('N')}. Time; extra memory; bytes at DRAM, counted by the hardware and predicted")
    print(" ".join(f"{name:>9}" for name in COLUMNS), flush=True)
    rows = []
    for seqlen in LENGTHS:
        pair = Pair(tilewise, seqlen)
        parts = [measure(pair, flush), counted.get(seqlen, {}), predict(options.tool, seqlen)]
        row = {"seqlen": seqlen, "difference": (pair.o.float() - pair.o_standard.float()).abs().max().item()}
        row |= {name: {key: value for part in parts for key, value in part.get(name, {}).items()} for name in ("flash", "standard")}
        rows.append(row)
        print(" ".join(f"{cell:>9}" for cell in cells(row)), flush=True)
    if options.out:
        results.save("io", {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "problem": problem("N"), "rows": rows}, options.out)


if __name__ == "__main__":
    main()
