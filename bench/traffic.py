#!/usr/bin/env python3
"""Count the bytes that cross between desk and warehouse, for flash and for standard attention, forward, on one thread.

How: Valgrind's callgrind simulates two levels of cache. The last level is given the size of a desk, so every line it
misses comes from the warehouse and every changed line it lets go of returns there (--simulate-wb). Only what happens
inside Plan::run() or Standard::forward() counts. Valgrind knows no AVX-512, so flash runs its AVX2 kernel, and the plan
is made for a device with a desk of that size. The prediction is explain()'s, of the same plan.

Wants: apt-get install valgrind, and a Release build with the tool: cmake -B build && cmake --build build
Usage: traffic.py [--build build] [--seqlens 512,1024,2048] [--desks 131072,262144,524288,1048576] [--head-dim 64] [--save]
"""

import argparse
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

import results

LINE_BYTES = 64
NEAR_BYTES, NEAR_WAYS, DESK_WAYS = 48 << 10, 12, 16
COUNTED = {"flash": "tilewise::Plan::run(*", "standard": "tilewise::reference::Standard::forward(*"}


def compile_driver(build, folder):
    program = pathlib.Path(folder) / "traffic"
    libraries = [next(build.rglob(name), None) for name in ("libtilewise_reference.a", "libtilewise.a")]
    if None in libraries:
        sys.exit(f"{build} holds no libtilewise_reference.a and libtilewise.a: build there first, see --help")
    source = [results.ROOT / "bench/traffic.cpp", f"-I{results.ROOT}/include", f"-I{results.ROOT}/src"]
    command = [os.environ.get("CXX", "c++"), "-std=c++20", "-O2", "-fopenmp", *source, *libraries, "-lopenblas", "-o", program]
    subprocess.run(list(map(str, command)), check=True)
    return program


def count(program, algorithm, problem, desk_bytes, folder):
    """Bytes moved in one run, and what explain() says about the plan."""
    out = pathlib.Path(folder) / "callgrind.out"
    command = [
        "valgrind", "--tool=callgrind", "--cache-sim=yes", "--simulate-wb=yes", f"--callgrind-out-file={out}",
        f"--D1={NEAR_BYTES},{NEAR_WAYS},{LINE_BYTES}", f"--LL={desk_bytes},{DESK_WAYS},{LINE_BYTES}",
        f"--toggle-collect={COUNTED[algorithm]}", program, algorithm, problem, NEAR_BYTES, desk_bytes,
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\nfailed:\n{done.stderr[-2000:]}")
    text = out.read_text()
    events = re.search(r"^events: (.*)$", text, re.M).group(1).split()
    totals = dict(zip(events, map(int, re.search(r"^(?:totals|summary): (.*)$", text, re.M).group(1).split())))
    if not totals.get("Ir"):
        sys.exit(f"callgrind counted nothing inside {COUNTED[algorithm]}")
    lines = sum(totals.get(event, 0) for event in ("DLmr", "DLmw", "DLdmr", "DLdmw"))
    return lines * LINE_BYTES, json.loads(done.stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=pathlib.Path, default=results.ROOT / "build")
    parser.add_argument("--seqlens", default="512,1024,2048")
    parser.add_argument("--desks", default="131072,262144,524288,1048576", help="bytes; every one with the longest seqlen, the last with all")
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--save", action="store_true", help="keep the figures in bench/results/<machine>.json")
    options = parser.parse_args()
    if not shutil.which("valgrind"):
        sys.exit("valgrind is missing: apt-get install valgrind")
    seqlens, desks = (sorted(map(int, text.split(","))) for text in (options.seqlens, options.desks))
    pairs = [(seqlen, desks[-1]) for seqlen in seqlens] + [(seqlens[-1], desk) for desk in desks[:-1]]

    print(f"{'seqlen':>6s} {'desk':>9s} {'block_m':>8s} | {'flash counted':>13s} {'predicted':>10s} | {'standard counted':>16s} {'predicted':>10s}")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        program = compile_driver(options.build, folder)
        for seqlen, desk in pairs:
            problem = f"fwd q{seqlen} h1 d{options.head_dim} fp32"
            flash, plan = count(program, "flash", problem, desk, folder)
            standard, _ = count(program, "standard", problem, desk, folder)
            rows.append({"problem": problem, "seqlen": seqlen, "desk_bytes": desk, "flash_counted": flash, "standard_counted": standard, **plan})
            print(
                f"{seqlen:6d} {desk >> 10:5d} KiB {plan['block_m']:8d} | {flash / 1e6:10.1f} MB {plan['flash_bytes'] / 1e6:7.1f} MB"
                f" | {standard / 1e6:13.1f} MB {plan['standard_bytes'] / 1e6:7.1f} MB",
                flush=True,
            )
    if options.save:
        version = subprocess.run(["valgrind", "--version"], capture_output=True, text=True, check=True).stdout.strip()
        print("saved in", results.save("traffic", {"versions": {"valgrind": version}, "rows": rows}))


if __name__ == "__main__":
    main()
