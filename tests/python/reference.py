"""Attention as docs/numerics.md defines it, in float64 with every score in memory: what the package is compared with."""

import numpy as np


def _scores(q, k, causal=False, window=(-1, -1), alignment="bottom_right", softmax_scale=None, softcap=0.0, alibi_slopes=None,
            sink=None, seqused_k=None):  # fmt: skip
    """Scores [batch, heads, seqlen_q, seqlen_k], -inf where hidden, and d score / d (q k^T)."""
    q, k = np.asarray(q, np.float64), np.repeat(np.asarray(k, np.float64), q.shape[2] // k.shape[2], axis=2)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    s = np.einsum("bihd,bjhd->bhij", q, k) * scale
    slope = np.full_like(s, scale)
    if softcap:
        s = softcap * np.tanh(s / softcap)
        slope *= 1 - (s / softcap) ** 2
    batch, seqlen_q, seqlen_k = q.shape[0], q.shape[1], k.shape[1]
    used = np.full(batch, seqlen_k) if seqused_k is None else np.asarray(seqused_k)
    offset = (used - seqlen_q if alignment == "bottom_right" else 0 * used)[:, None, None, None]
    i, j = np.arange(seqlen_q)[:, None], np.arange(seqlen_k)[None, :]
    if alibi_slopes is not None:
        s = s - alibi_slopes[None, :, None, None] * np.abs(i + offset - j)
    left, right = window[0], 0 if causal else window[1]
    visible = j < used[:, None, None, None]
    if left >= 0:
        visible = visible & (j >= i + offset - left)
    if right >= 0:
        visible = visible & (j <= i + offset + right)
    return np.where(visible, s, -np.inf), slope


def _softmax(s, sink):
    with np.errstate(divide="ignore", invalid="ignore"):
        most = np.maximum(s.max(-1, initial=-np.inf), -1e300)
        total = np.exp(s - most[..., None]).sum(-1)
        if sink is not None:
            total = total + np.exp(sink[None, :, None] - most)
        lse = np.where(total > 0, most + np.log(total), -np.inf)
        p = np.where(np.isneginf(lse)[..., None], 0.0, np.exp(s - lse[..., None]))
    return p, lse


def reference(q, k, v, **options):
    """o and lse."""
    s, _ = _scores(q, k, **options)
    p, lse = _softmax(s, options.get("sink"))
    v = np.repeat(np.asarray(v, np.float64), q.shape[2] // v.shape[2], axis=2)
    return np.einsum("bhij,bjhd->bihd", p, v), lse


def reference_gradients(do, dlse, q, k, v, **options):
    """dq, dk, dv and dsink of the loss sum(do * o) + sum(dlse * lse)."""
    s, slope = _scores(q, k, **options)
    sink = options.get("sink")
    p, lse = _softmax(s, sink)
    group = q.shape[2] // k.shape[2]
    do, q64 = np.asarray(do, np.float64), np.asarray(q, np.float64)
    k64, v64 = (np.repeat(np.asarray(x, np.float64), group, axis=2) for x in (k, v))
    dp = np.einsum("bihd,bjhd->bhij", do, v64)
    delta = (p * dp).sum(-1) - dlse
    ds = p * (dp - delta[..., None]) * slope
    of_group = lambda x: x.reshape(*x.shape[:2], -1, group, x.shape[-1]).sum(3)  # noqa: E731
    dsink = None
    if sink is not None:
        p_sink = np.exp(sink[None, :, None] - lse)
        dsink = (-p_sink * delta).sum((0, 2))
    return (
        np.einsum("bhij,bjhd->bihd", ds, k64),
        of_group(np.einsum("bhij,bihd->bjhd", ds, q64)),
        of_group(np.einsum("bhij,bihd->bjhd", p, do)),
        dsink,
    )
