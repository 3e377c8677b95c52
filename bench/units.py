"""Figures as text."""

PASSES = {"fwd": "forward", "bwd": "backward"}


def _short(value):
    """Three digits at most, no zeros at the end of a whole number."""
    return f"{value:.0f}" if value >= 99.5 or value == round(value) else f"{value:.1f}" if value >= 9.95 else f"{value:.2f}"


def si(value, unit):
    """3.2e9, "B" -> "3.20 GB"."""
    for prefix in ("", "k", "M", "G", "T"):
        if value < 999.5 or prefix == "T":
            break
        value /= 1000
    return f"{_short(value)} {prefix}{unit}"


def duration(seconds):
    """0.0021 -> "2.10 ms"."""
    scale, unit = next((pair for pair in ((1, "s"), (1e-3, "ms")) if seconds >= pair[0] * 0.9995), (1e-6, "µs"))
    return f"{_short(round(seconds / scale, 9))} {unit}"


def length(seqlen):
    return f"{seqlen // 1024}k" if seqlen % 1024 == 0 else str(seqlen)
