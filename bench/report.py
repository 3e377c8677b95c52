#!/usr/bin/env python3
"""Write the measured tables of README.md and docs/io.md, and the picture of README.md, from bench/results/<machine>.json and, for
the GPU's, nvidia-<gpu>-forward.json.

Wants: Matplotlib (Debian: python3-matplotlib, for /usr/bin/python3).
Usage: report.py [RESULTS.json]. A table stands between <!-- measured: NAME --> and <!-- end -->; the text around is untouched.
"""

import json
import pathlib
import re
import sys

import plot
import results

SECTIONS = {"README.md": ("demo", "cpu", "gpu"), "docs/io.md": ("traffic",)}


def table(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def source(everything, section):
    machine, run = everything["machine"], everything[section]
    family, model, _ = machine["family_model_stepping"]
    return f"{machine['cpu']} (family {family}, model {model}), {machine['cpus']} CPUs, {run['date']}, commit {run['commit']}"


def demo(everything):
    size = lambda value: "-" if value is None else plot.si(value, "B")
    rows = []
    for row in everything["demo"]["rows"]:
        flash, standard = row["flash"], row["standard"]
        ran = "seconds" in standard
        rows.append((
            plot.PASSES[row["pass"]], plot.length(row["seqlen"]),
            plot.duration(standard["seconds"]) if ran else "does not fit", plot.duration(flash["seconds"]),
            f"**{standard['seconds'] / flash['seconds']:.1f}x**" if ran else "-",
            size(standard["extra_bytes"]) if ran else f"needs {size(standard['needed_bytes'])}", size(flash["extra_bytes"]),
            size(standard["moved_bytes"]), size(flash["moved_bytes"]),
        ))  # fmt: skip
    head = "pass", "tokens", "time, standard", "flash", "speed-up", "extra memory, standard", "flash", "bytes moved, standard", "flash"
    return f"{table(head, rows)}\n\n`./demo.sh`, {everything['demo']['problem']}: {source(everything, 'demo')}."


def cpu(everything):
    run = everything["compare_cpu"]
    peers = [name for name in run["versions"] if name != "tilewise"]
    parts = []
    for threads, measured in run["threads"].items():
        rows = []
        for row in measured["rows"]:
            figures = row["gflops"]
            best = f"**{min(row['ratio'].values()):.2f}x**" if "ratio" in row else "-"
            rows.append((row["case"], f"{figures['tilewise']:.0f}", *(f"{figures[name]:.0f}" if name in figures else "-" for name in peers), best))
        means = [
            (group, *(f"{mean[name]:.2f}x" if name in mean else "-" for name in peers), f"{mean['best']:.2f}x", f"{mean['least']:.2f}x")
            for group, mean in measured["summary"].items()
        ]
        parts += [
            f"Geometric means of Tilewise / peer, {threads} threads:",
            table(("", *peers, "best peer", "least of all cases"), means),
            f"<details><summary>Every case, GFLOP/s of useful work, {threads} threads</summary>\n\n"
            + table(("case", "tilewise", *peers, "/ best peer"), rows)
            + "\n</details>",
        ]
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    return "\n\n".join(parts) + f"\n\n`bench/compare_cpu.py`, {versions}: {source(everything, 'compare_cpu')}."


def traffic(everything):
    run = everything["traffic"]
    rows = [
        (
            row["seqlen"], f"{row['desk_bytes'] >> 10} KiB", row["block_m"],
            plot.si(row["standard_counted"], "B"), plot.si(row["standard_bytes"], "B"),
            plot.si(row["flash_counted"], "B"), plot.si(row["flash_bytes"], "B"),
            f"{row['standard_counted'] / row['flash_counted']:.0f}x",
        )
        for row in run["rows"]
    ]  # fmt: skip
    head = "tokens", "desk", "block_m", "standard, counted", "predicted", "flash, counted", "predicted", "standard / flash, counted"
    return f"{table(head, rows)}\n\n`bench/traffic.py`, {run['versions']['valgrind']}: {source(everything, 'traffic')}."


def gpu(everything):
    run = everything["gpu"]
    lengths, cells = [], {}
    for row in run["rows"]:
        if row["kind"] != "fwd":
            continue
        head_dim, mask, length = row["case"].split()[:3]
        lengths += [length] if length not in lengths else []
        cells.setdefault(f"{head_dim} {mask}", {})[length] = f"{row['tilewise']:.0f} ({row['ratio']:.2f})"
    rows = [(case, *(by_length.get(length, "-") for length in lengths)) for case, by_length in cells.items()]
    summary = run["summary"]["fwd"]
    return (
        f"{table(('bf16, forward', *lengths), rows)}\n\nTFLOP/s, and the ratio to the best peer; geometric mean of {summary['cases']} cases "
        f"{summary['geomean']:.2f}, least {summary['lowest']:.2f}. `bench/gpu.sh`, {run['device']}, PyTorch {run['torch']}, {run['when']}."
    )


def main():
    everything = results.load(sys.argv[1] if len(sys.argv) > 1 else None)
    forward = sorted((results.ROOT / "bench/results").glob("nvidia-*-forward.json"))
    if forward:
        everything["gpu"] = json.loads(forward[-1].read_text())
    made = {"demo": demo, "cpu": cpu, "gpu": gpu, "traffic": traffic}
    for name, sections in SECTIONS.items():
        path = results.ROOT / name
        text = path.read_text()
        for section in sections:
            if {"cpu": "compare_cpu"}.get(section, section) not in everything:
                print(f"{name}: nothing measured for {section}, left as it was")
                continue
            pattern = re.compile(rf"(<!-- measured: {section} -->\n).*?(<!-- end -->)", re.S)
            if not pattern.search(text):
                sys.exit(f"{name} has no place for {section}")
            text = pattern.sub(lambda match: match.group(1) + made[section](everything) + "\n" + match.group(2), text)
        path.write_text(text)
    if "demo" in everything:
        pathlib.Path(results.ROOT / "docs/flash.svg").write_text(plot.summary(everything["demo"]["rows"]))


if __name__ == "__main__":
    main()
