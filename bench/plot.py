"""The demo's pictures, by Matplotlib, each as the text of an SVG that needs no file and no font beside it.

`rows` are what bench/demo.py measures: {"pass": "fwd", "seqlen": 1024, "flops": ..., "flash": {...}, "standard": {...}}, each algorithm
with seconds, extra_bytes and moved_bytes; without seconds and extra_bytes where it did not run.
"""

import io
import math
import re

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import FixedLocator, FuncFormatter, MultipleLocator, NullLocator

from units import PASSES, duration, length, si

FLASH, STANDARD, INK, FAINT = "#0072b2", "#d55e00", "#1f2430", "#c9ced6"
plt.rcParams |= {
    "font.size": 10.5,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.titlesize": 11.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "text.color": INK,
    "lines.linewidth": 2,
    "lines.markersize": 6,
    "svg.hashsalt": "tilewise",
    "figure.constrained_layout.use": True,
}


def svg(figure):
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    plt.close(figure)
    text = out.getvalue()
    return re.sub(r' (width|height)="[0-9.]+pt"', "", text[text.index("<svg") :], count=2)  # the page scales it


def panel(axes, rows, direction, field, title, form):
    """One field of one pass over sequence length, both axes logarithmic."""
    lengths = sorted({row["seqlen"] for row in rows})
    axes.set(xscale="log", yscale="log", xlabel="sequence length (tokens)", title=f"{title}, {PASSES[direction]}")
    axes.set_xlim(lengths[0] / 1.25, lengths[-1] * 1.45)
    axes.xaxis.set_major_locator(FixedLocator(lengths))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: length(int(x))))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: form(y)))
    axes.grid(axis="y", color="#eceef1", zorder=0)
    axes.tick_params(which="both", length=0)
    axes.yaxis.set_minor_locator(NullLocator())
    values = [row[name][field] for row in rows for name in ("flash", "standard") if row[name].get(field)]
    axes.set_ylim(min(values) / 3, max(values) * 4)
    for name, color in (("standard", STANDARD), ("flash", FLASH)):
        points = [(row["seqlen"], row[name][field]) for row in rows if row["pass"] == direction and row[name].get(field)]
        if not points:
            continue
        x, y = zip(*points)
        axes.plot(x, y, "o-", color=color, label=name, zorder=3)
        above = 7 if name == "standard" else -16
        axes.annotate(form(y[-1]), (x[-1], y[-1]), xytext=(0, above), textcoords="offset points", ha="center", color=color, zorder=4)


def over_seqlen(rows, field, title, form):
    """One field over sequence length, forward and backward side by side."""
    passes = [name for name in PASSES if any(row["pass"] == name for row in rows)]
    figure, panels = plt.subplots(1, len(passes), figsize=(8.6, 3.5), sharey=True, squeeze=False)
    for axes, direction in zip(panels[0], passes):
        panel(axes, rows, direction, field, title, form)
    panels[0][0].legend(frameon=False, loc="upper left", labelcolor="linecolor", handlelength=1.2)
    return svg(figure)


def summary(rows):
    """Time and extra memory of the forward pass: the picture of README.md."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.6, 3.5))
    rows = [row for row in rows if row["pass"] == "fwd"]
    panel(left, rows, "fwd", "seconds", "Time", duration)
    panel(right, rows, "fwd", "extra_bytes", "Extra memory", lambda value: si(value, "B"))
    left.legend(frameon=False, loc="upper left", labelcolor="linecolor", handlelength=1.2)
    return svg(figure)


def roofline(rows, rates, machine):
    """FLOP/s over FLOP per byte: the machine's two limits, and where both algorithms stand under them."""
    peak, bandwidth = rates["flops_per_second"], rates["bytes_per_second"]
    figure, axes = plt.subplots(figsize=(8.6, 4.2))
    points = []
    for row in rows:
        for name, color in (("standard", STANDARD), ("flash", FLASH)):
            cell = row[name]
            if "seconds" in cell:
                points.append((row["flops"] / cell["moved_bytes"], row["flops"] / cell["seconds"], color, row["pass"], row["seqlen"]))
    ridge = peak / bandwidth
    left, right = min(ridge / 4, *(p[0] / 2 for p in points)), max(ridge * 8, *(p[0] * 2.5 for p in points))
    low = min(p[1] for p in points) / 2.5
    axes.set(xscale="log", yscale="log", xlim=(left, right), ylim=(low, peak * 2.2))
    axes.plot([left, ridge, right], [left * bandwidth, peak, peak], color=INK, zorder=2)
    axes.annotate(f"arithmetic: {si(peak, 'FLOP/s')}", (right, peak), xytext=(-4, 5), textcoords="offset points", ha="right")
    start = max(left, low / bandwidth)
    middle = math.sqrt(start * ridge)
    angle = axes.transData.transform([(start, start * bandwidth), (ridge, peak)])
    slope = math.degrees(math.atan2(angle[1][1] - angle[0][1], angle[1][0] - angle[0][0]))
    axes.annotate(
        f"reading memory: {si(bandwidth, 'B/s')}", (middle, middle * bandwidth), xytext=(-6, 8), textcoords="offset points",
        ha="center", va="center", rotation=slope, rotation_mode="anchor",
    )
    for x, y, color, direction, _ in points:
        axes.plot(x, y, "o" if direction == "fwd" else "s", color=color, markersize=7, markeredgecolor="white", zorder=3)
    for color in (FLASH, STANDARD):
        same = [p for p in points if p[2] == color and p[3] == "fwd"]
        for p in (min(same, key=lambda p: p[4]), max(same, key=lambda p: p[4])):
            axes.annotate(length(p[4]), (p[0], p[1]), xytext=(0, -15), textcoords="offset points", ha="center", color=color, fontsize=9)
    axes.set(xlabel="useful FLOP per byte moved between warehouse and desk", ylabel="useful FLOP/s", title=f"Roofline of {machine}")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: si(y, "")))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.grid(color="#eceef1", zorder=0)
    axes.tick_params(which="both", length=0)
    axes.yaxis.set_minor_locator(NullLocator())
    marks = [
        axes.plot([], [], mark, color=color, label=label)[0]
        for mark, color, label in (
            ("o", FLASH, "flash, forward"), ("s", FLASH, "flash, backward"),
            ("o", STANDARD, "standard, forward"), ("s", STANDARD, "standard, backward"),
        )
    ]
    axes.legend(handles=marks, frameon=False, loc="lower right", ncol=2)
    return svg(figure)


def tile_plan(explanation, highlight=0.65):
    """The scores of one head as `tilewise explain` cuts them into tiles, with one work item framed."""
    colors = {"full": "#9cc6e3", "masked": "#4d9bcc", "skipped": "#f1f2f4", "mixed": "#c9ced6"}
    names = {"full": "no mask needed", "masked": "mask applied", "skipped": "never touched"}
    tiles, picture = explanation["tiles"], explanation["picture"]
    kinds = {picture[kind]: kind for kind in names}
    cells = picture["rows"]
    height, width = tiles["block_m"] * picture["tiles_down"], tiles["block_n"] * picture["tiles_across"]
    seqlen_q, seqlen_k = (int(re.search(rf"\b{letter}(\d+)", explanation["problem"]).group(1)) for letter in "qk")
    figure, axes = plt.subplots(figsize=(8.6, 4.8))
    for m, row in enumerate(cells):
        for n, sign in enumerate(row):
            box = (n * width, m * height), min(width, seqlen_k - n * width), min(height, seqlen_q - m * height)
            axes.add_patch(Rectangle(*box, facecolor=colors[kinds.get(sign, "mixed")], edgecolor="white"))
    m = int(len(cells) * highlight)
    touched = len(cells[m].rstrip(picture["skipped"])) * width
    top, bottom = m * height, min((m + 1) * height, seqlen_q)
    axes.add_patch(Rectangle((0, top), min(touched, seqlen_k), bottom - top, fill=False, edgecolor=STANDARD, linewidth=2))
    axes.text(seqlen_k * 1.03, (top + bottom) / 2, "one work item:\nits queries stay on the desk,\nkeys and values pass by,\ntile after tile",
              color=STANDARD, va="center")  # fmt: skip
    axes.set(xlim=(0, seqlen_k), ylim=(seqlen_q, 0), aspect="equal")
    axes.set(xlabel=f"keys, {tiles['block_n']} to a tile", ylabel=f"queries, {tiles['block_m']} to a block")
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.xaxis.set_major_locator(MultipleLocator(seqlen_k // 4))
    axes.yaxis.set_major_locator(MultipleLocator(seqlen_q // 4))
    axes.tick_params(length=0)
    handles = [Patch(facecolor=colors[kind], edgecolor=FAINT, label=f"{name}: {tiles[kind]}") for kind, name in names.items()]
    axes.legend(handles=handles, title="tiles", alignment="left", frameon=False, loc="upper left", bbox_to_anchor=(1.01, 1.0))
    return svg(figure)
