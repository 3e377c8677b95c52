#!/usr/bin/env python3
"""What FlashAttention buys on this machine: standard against flash over sequence length, as a table and as one HTML page.

Usage: demo.py TOOL OUTPUT_FOLDER [--threads N] [--budget SECONDS] [--save]. ./demo.sh calls it. Everything measured comes
from `tilewise bench` and `tilewise explain`; the pictures are made by plot.py.
"""

import argparse
import datetime
import html
import json
import math
import pathlib
import string
import subprocess
import sys
import time

import plot
import results
import units

HEADS, HEAD_DIM = 2, 64
LENGTHS = [1 << n for n in range(10, 15)]
LONGEST = 1 << 15  # forward only
PLAN = "fwd q2048 k2048 h1 d64 fp32 causal"


def tool_json(tool, *arguments):
    done = subprocess.run([tool, *arguments], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"tilewise {' '.join(arguments)} failed with exit code {done.returncode}")
    return json.loads(done.stdout)


def problem(direction, seqlen):
    return f"{direction} q{seqlen} k{seqlen} h{HEADS} d{HEAD_DIM} fp32"


def measure(tool, threads, direction, seqlen):
    """One row, standard and flash taking turns, and the document that it comes from."""
    turns = ("--rounds", "3", "--seconds", "0.5") if seqlen <= 4096 else ("--rounds", "1", "--seconds", "0")
    document = tool_json(tool, "bench", "--peers", "standard", "--error", "--json", "-", *turns, *threads, problem(direction, seqlen))
    result = document["results"][0]
    row = {"pass": direction, "seqlen": seqlen, "flops": result["flops"], "rates": result["rates"]}
    for contender in result["contenders"]:
        cell = {"moved_bytes": contender["bytes_moved"]}
        if "refusal" in contender:
            cell |= {"refusal": contender["refusal"], "needed_bytes": contender.get("needed_bytes")}
        else:
            cell |= {"seconds": contender["seconds"]["median"], "extra_bytes": contender["extra_bytes"], "error": contender["max_error"]}
        row["flash" if contender["name"] == "tilewise" else "standard"] = cell
    return row, document


def cells(row):
    """A row of the table as text: length, times, speed-up, extra memory, bytes moved, errors."""
    flash, standard = row["flash"], row["standard"]
    size = lambda value: "-" if value is None else units.si(value, "B")
    moved = (units.si(standard["moved_bytes"], "B"), units.si(flash["moved_bytes"], "B"))
    if "seconds" not in standard:
        needs = standard.get("needed_bytes")
        why = "does not fit" if needs else "refused"
        memory = f"needs {size(needs)}" if needs else "-"
        return (units.length(row["seqlen"]), why, units.duration(flash["seconds"]), "-", memory, size(flash["extra_bytes"]), *moved, "-",
                f"{flash['error']:.1e}")  # fmt: skip
    return (
        units.length(row["seqlen"]), units.duration(standard["seconds"]), units.duration(flash["seconds"]),
        f"{standard['seconds'] / flash['seconds']:.1f}x", size(standard["extra_bytes"]), size(flash["extra_bytes"]), *moved,
        f"{standard['error']:.1e}", f"{flash['error']:.1e}",
    )  # fmt: skip


GROUPS = (("", 1), ("time", 2), ("", 1), ("extra memory", 2), ("bytes moved", 2), ("largest error", 2))
COLUMNS = ("tokens", "standard", "flash", "speed-up", "standard", "flash", "standard", "flash", "standard", "flash")
WIDTHS = (7, 13, 9, 9, 14, 9, 10, 9, 9, 9)


def line(values):
    return " ".join(f"{value:>{width}s}" for value, width in zip(values, WIDTHS))


def heading():
    groups, first = [], 0
    for text, count in GROUPS:
        groups.append(f"{text:>{sum(WIDTHS[first : first + count]) + count - 1}s}")
        first += count
    return " ".join(groups) + "\n" + line(COLUMNS)


def measure_all(tool, threads, budget):
    """Rows of both passes, printed as they come. A row that would not fit in the time left is left out, and says so."""
    begin, rows, spent, document = time.monotonic(), [], {}, None
    for direction in ("fwd", "bwd"):
        print(f"\n{units.PASSES[direction]}, float32, {HEADS} heads of {HEAD_DIM}\n{heading()}", flush=True)
        lengths = [*LENGTHS, LONGEST] if direction == "fwd" else LENGTHS
        for seqlen in lengths:
            expected = 4 * spent.get((direction, seqlen // 2), spent.get(("fwd", seqlen), 0))
            if seqlen > 4096 and time.monotonic() - begin + expected > budget:
                print(f"{units.length(seqlen):>7s} left out: about {expected:.0f} s more, and the demo keeps to {budget:.0f} s (--budget)")
                continue
            start = time.monotonic()
            row, document = measure(tool, threads, direction, seqlen)
            spent[direction, seqlen] = time.monotonic() - start
            rows.append(row)
            print(line(cells(row)), flush=True)
    return rows, document


def html_table(rows, direction):
    groups = "".join(f'<th colspan="{count}">{text}</th>' for text, count in GROUPS)
    columns = "".join(f"<th>{text}</th>" for text in COLUMNS)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells(row)) + "</tr>" for row in rows if row["pass"] == direction)
    caption = f"{units.PASSES[direction].capitalize()} pass, float32, {HEADS} heads of {HEAD_DIM}"
    return f"<table><caption>{caption}</caption><thead><tr>{groups}</tr><tr>{columns}</tr></thead><tbody>{body}</tbody></table>"


def headline(rows):
    row = max((row for row in rows if row["pass"] == "fwd" and "seconds" in row["standard"]), key=lambda row: row["seqlen"])
    flash, standard = row["flash"], row["standard"]
    text = f"At {row['seqlen']:,} tokens the same result takes <b>{units.duration(flash['seconds'])}</b> instead of {units.duration(standard['seconds'])}"
    if flash["extra_bytes"] and standard["extra_bytes"]:
        text += f", and <b>{units.si(flash['extra_bytes'], 'B')}</b> of extra memory instead of {units.si(standard['extra_bytes'], 'B')}"
    return text + "."


def write_page(folder, rows, document, explanation, machine):
    rates = {key: max(row["rates"][key] for row in rows) for key in rows[0]["rates"]}  # a busy moment only ever lowers a rate
    size = lambda value: units.si(value, "B")
    template = string.Template((pathlib.Path(__file__).parent / "page.html").read_text())
    tiles = explanation["tiles"]
    page = template.substitute(
        headline=headline(rows),
        tables=html_table(rows, "fwd") + html_table(rows, "bwd"),
        time=plot.over_seqlen(rows, "seconds", "Time", units.duration),
        memory=plot.over_seqlen(rows, "extra_bytes", "Extra memory", size),
        moved=plot.over_seqlen(rows, "moved_bytes", "Bytes moved", size),
        roofline=plot.roofline(rows, rates, machine),
        tiles=plot.tile_plan(explanation),
        peak=units.si(rates["flops_per_second"], "FLOP/s"),
        bandwidth=units.si(rates["bytes_per_second"], "B/s"),
        balance=f"{rates['flops_per_second'] / rates['bytes_per_second']:.0f}",
        plan=html.escape(explanation["problem"]),
        kernel=html.escape(explanation["kernel"]),
        block_m=tiles["block_m"],
        block_n=tiles["block_n"],
        desk=size(explanation["device"]["desk_bytes"]),
        machine=html.escape(machine),
        memory_method=html.escape(document["memory_method"]),
        error_method=html.escape(document["error_method"]),
        bytes_method=html.escape(document["bytes_method"]),
        version=html.escape(document["tilewise"]),
        commit=html.escape(results.commit()),
        date=datetime.date.today().isoformat(),
    )
    path = folder / "index.html"
    path.write_text(page)
    return path


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tool")
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--threads", type=int, help="default: all")
    parser.add_argument("--budget", type=float, default=150, help="seconds; long rows that would exceed it are left out (default 150)")
    parser.add_argument("--save", action="store_true", help="keep the figures in bench/results/<machine>.json")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    threads = ("--threads", str(options.threads)) if options.threads else ()

    explanation = tool_json(options.tool, "explain", "--json", *threads, PLAN)
    rows, document = measure_all(options.tool, threads, options.budget)
    device = document["device"]
    machine = f"{device['name']}, {device['arch']}, {device['units']} threads"
    path = write_page(options.folder, rows, document, explanation, machine)
    if options.save:
        print("saved in", results.save("demo", {"device": device, "problem": f"h{HEADS} d{HEAD_DIM} fp32", "rows": rows}))
    slower = [row["seqlen"] for row in rows if row["standard"].get("seconds", math.inf) < row["flash"]["seconds"]]
    if slower:
        print(f"\nUp to {max(slower):,} tokens standard attention was faster here: so short a call is mostly the start of the threads, which others who use the machine delay.")
    print(f"\nThe same as a page with plots, the roofline and the tile plan:\n  {path.resolve()}")


if __name__ == "__main__":
    main()
