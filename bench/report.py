#!/usr/bin/env python3
"""Write the measured tables of README.md and docs/, and the picture of README.md, from bench/results/<machine>.json and, for the
GPU's, the last nvidia-<gpu>-forward.json that has the section and nvidia-<gpu>-backward.json.

Wants: Matplotlib (Debian: python3-matplotlib, for /usr/bin/python3).
Usage: report.py [RESULTS.json]. A table stands between <!-- measured: NAME --> and <!-- end -->; the text around is untouched.
       report.py --summary GPU_RESULTS.json prints what bench/gpu.sh found, and writes nothing.
"""

import pathlib
import re
import sys

import results
import units

# Each place and the section of the results that it is made from.
PLACES = {
    "README.md": {"demo": "demo", "cpu": "compare_cpu", "gpu": "race"},
    "docs/io.md": {"traffic": "traffic", "io": "io"},
    "docs/kernels/forward_sm90.md": {"race": "race", "more": "race", "host": "host_cost"},
    "docs/kernels/backward_sm90_measured.md": {"backward": "backward"},
}
GPU_SECTIONS = ("race", "io", "host_cost")


def table(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def source(everything, section):
    machine, run = everything["machine"], everything[section]
    family, model, _ = machine["family_model_stepping"]
    return f"{machine['cpu']} (family {family}, model {model}), {machine['cpus']} CPUs, {run['date']}, commit {run['commit']}"


def demo(everything):
    size = lambda value: "-" if value is None else units.si(value, "B")
    rows = []
    for row in everything["demo"]["rows"]:
        flash, standard = row["flash"], row["standard"]
        ran = "seconds" in standard
        rows.append((
            units.PASSES[row["pass"]], units.length(row["seqlen"]),
            units.duration(standard["seconds"]) if ran else "does not fit", units.duration(flash["seconds"]),
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
            units.si(row["standard_counted"], "B"), units.si(row["standard_bytes"], "B"),
            units.si(row["flash_counted"], "B"), units.si(row["flash_bytes"], "B"),
            f"{row['standard_counted'] / row['flash_counted']:.0f}x",
        )
        for row in run["rows"]
    ]  # fmt: skip
    head = "tokens", "desk", "block_m", "standard, counted", "predicted", "flash, counted", "predicted", "standard / flash, counted"
    return f"{table(head, rows)}\n\n`bench/traffic.py`, {run['versions']['valgrind']}: {source(everything, 'traffic')}."


def gpu_source(run):
    note = f" ({run['note']})" if "note" in run else ""
    return f"{run['device']}, PyTorch {run['torch']}, {run['date']}, commit {run['commit']}{note}"


def gpu(everything):
    run = everything["race"]
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
        f"{summary['geomean']:.2f}, least {summary['lowest']:.2f}. {gpu_source(run)}."
    )


def figure(row, name):
    """A contender's, "~" where it did not run beside the others but enters by its ratio to one that did."""
    estimate = row.get(f"{name} by ratio")
    return f"{row[name]:.0f}" if isinstance(row.get(name), float) else f"~{estimate:.0f}" if estimate else "-"


def cases(run, kinds):
    names = ("tilewise", "cudnn", "fa2", "fa3", "fa4")
    words = {"fwd-fp16": " fp16", "bwd-det": " deterministic", "bwd-det-more": " deterministic"}
    rows = [(row["case"] + words.get(row["kind"], ""), *(figure(row, name) for name in names), f"{row['ratio']:.2f}" if "ratio" in row else "-")
            for row in run["rows"] if row["kind"] in kinds]  # fmt: skip
    return table(("case", "Tilewise", "cuDNN", "FA2", "FA3", "FA4", "ratio"), rows)


def race(everything):
    run = everything["race"]
    return f"{means(run)}\n\n{cases(run, ['fwd'])}\n\n{gpu_source(run)}."


def backward(everything):
    run = everything["backward"]
    return f"{means(run)}\n\n{cases(run, dict.fromkeys(row['kind'] for row in run['rows']))}\n\n{gpu_source(run)}."


def means(run):
    rows = [(name, mean["cases"], f"{mean['geomean']:.2f}", f"{mean['lowest']:.2f}") for name, mean in run["summary"].items()]
    return table(("group", "cases", "geometric mean of ratios", "least"), rows)


def more(everything):
    run = everything["race"]
    kinds = sorted({row["kind"] for row in run["rows"]} - {"fwd"})
    if not kinds:
        return "Not measured with this kernel yet."
    return f"{cases(run, kinds)}\n\n`bench/gpu.sh`, {gpu_source(run)}."


def host(everything):
    run = everything["host_cost"]
    return (
        f"`plan.run` takes {run['run_us']:.1f} us of the host, launching an empty kernel {run['empty_launch_us']:.1f} us: "
        f"**{run['difference_us']:.1f} us above an empty launch** (`bench/host_cost.cu`, medians, {run['problem']}; "
        f"{run['device']}, {run['date']}, commit {run['commit']})."
    )


def io(everything):
    run = everything["io"]
    size = lambda value: units.si(value, "B")
    moved = lambda cell: f"{size(cell['read_bytes'])} + {size(cell['written_bytes'])}" if "read_bytes" in cell else "-"
    rows = [
        (
            units.length(row["seqlen"]), units.duration(row["standard"]["seconds"]), units.duration(row["flash"]["seconds"]),
            f"**{row['standard']['seconds'] / row['flash']['seconds']:.1f}x**",
            size(row["standard"]["extra_bytes"]), size(row["flash"]["extra_bytes"]),
            moved(row["standard"]), size(row["standard"]["predicted_bytes"]),
            moved(row["flash"]), size(row["flash"]["predicted_bytes"]), size(row["flash"]["tile_bytes"]),
        )
        for row in run["rows"]
    ]  # fmt: skip
    head = ("tokens", "time, standard", "flash", "speed-up", "extra memory, standard", "flash", "DRAM read + written, standard", "predicted",
            "flash", "predicted", "flash, L2 to SMs, predicted")  # fmt: skip
    return f"{table(head, rows)}\n\n`bench/io_gpu.py`, `{run['problem']}`: {gpu_source(run)}."


def print_summary(everything):
    """What bench/gpu.sh found of one pass, a line each."""
    for name, mean in everything["race"]["summary"].items():
        print(f"{name:24s} {mean['cases']:3d} cases, geometric mean {mean['geomean']:.3f} of the best peer, least {mean['lowest']:.3f}")
    rows = everything["race"]["rows"]
    for peer in ("cudnn", "fa2", "fa3", "fa4"):
        ran, scaled = (sum(isinstance(row.get(name), float) for row in rows) for name in (peer, f"{peer} by ratio"))
        print(f"{peer:24s} {ran:3d} cases raced, {scaled} by ratio")
    if "host_cost" in everything:
        print(f"{'host cost':24s} {everything['host_cost']['difference_us']:.2f} us above an empty launch")
    if "io" in everything:
        longest = everything["io"]["rows"][-1]
        flash, standard = longest["flash"], longest["standard"]
        print(f"{units.length(longest['seqlen']) + ' tokens':24s} {units.duration(flash['seconds'])} against {units.duration(standard['seconds'])}, "
              f"extra memory {units.si(flash['extra_bytes'], 'B')} against {units.si(standard['extra_bytes'], 'B')}")  # fmt: skip


def main():
    if {"-h", "--help"} & set(sys.argv):
        return print(__doc__)
    if sys.argv[1:2] == ["--summary"]:
        return print_summary(results.load(sys.argv[2]))
    everything = results.load(sys.argv[1] if len(sys.argv) > 1 else None)
    for path in sorted((results.ROOT / "bench/results").glob("nvidia-*-forward.json")):
        everything |= {section: value for section, value in results.load(path).items() if section in GPU_SECTIONS}
    for path in sorted((results.ROOT / "bench/results").glob("nvidia-*-backward.json")):
        everything["backward"] = results.load(path)["race"]
    made = {"backward": backward, "demo": demo, "cpu": cpu, "traffic": traffic, "gpu": gpu, "race": race, "more": more, "host": host, "io": io}
    for name, places in PLACES.items():
        path = results.ROOT / name
        text = path.read_text()
        for place, section in places.items():
            if section not in everything:
                print(f"{name}: nothing measured for {place}, left as it was")
                continue
            pattern = re.compile(rf"(<!-- measured: {place} -->\n).*?(<!-- end -->)", re.S)
            if not pattern.search(text):
                sys.exit(f"{name} has no place for {place}")
            text = pattern.sub(lambda match: match.group(1) + made[place](everything) + "\n" + match.group(2), text)
        path.write_text(text)
    if "demo" in everything:
        import plot  # wants Matplotlib

        pathlib.Path(results.ROOT / "docs/flash.svg").write_text(plot.summary(everything["demo"]["rows"]))


if __name__ == "__main__":
    main()
