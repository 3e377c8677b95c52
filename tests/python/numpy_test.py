"""tilewise for NumPy users: values, gradients, layouts, errors, and what importing costs."""

import array
import itertools
import os
import subprocess
import sys

import numpy as np
import pytest

import tilewise
from reference import reference, reference_gradients


def normal(*shape, seed=0):
    return np.random.default_rng((seed, *shape)).standard_normal(shape, dtype=np.float32)


def inputs(batch=2, seqlen_q=37, seqlen_k=51, heads=4, kv_heads=2, dim=16, dim_v=24):
    return normal(batch, seqlen_q, heads, dim), normal(batch, seqlen_k, kv_heads, dim, seed=1), normal(batch, seqlen_k, kv_heads, dim_v, seed=2)


OPTIONS = {
    "full": {},
    "causal": {"causal": True},
    "top_left": {"causal": True, "alignment": "top_left"},
    "window": {"window": (5, 3)},
    "causal_window": {"window": (5, -1), "causal": True},
    "softcap": {"softcap": 1.5, "softmax_scale": 0.7},
    "alibi": {"alibi_slopes": np.array([0.5, 0.25, 0.1, 0.0], np.float32), "causal": True},
    "sink": {"sink": np.array([0.3, -1.0, 2.0, 0.0], np.float32), "window": (2, 0)},
    "seqused_k": {"seqused_k": np.array([51, 20], np.int32), "causal": True},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_equals_float64(name):
    q, k, v = inputs()
    options = OPTIONS[name]
    o, lse = tilewise.attention(q, k, v, return_lse=True, **options)
    right_o, right_lse = reference(q, k, v, **options)
    assert o.dtype == lse.dtype == np.float32
    np.testing.assert_allclose(o, right_o, rtol=0, atol=5e-6)
    np.testing.assert_allclose(lse, right_lse, rtol=0, atol=5e-6)
    assert np.array_equal(tilewise.attention(q, k, v, **options), o)


@pytest.mark.parametrize("name", OPTIONS)
def test_gradients_equal_float64(name):
    q, k, v = inputs()
    options = OPTIONS[name]
    o, lse = tilewise.attention(q, k, v, return_lse=True, **options)
    do, dlse = normal(*o.shape, seed=3), normal(*lse.shape, seed=4)
    gradients = tilewise.attention_backward(do, q, k, v, o, lse, dlse=dlse, **options)
    right = reference_gradients(do, dlse, q, k, v, **options)
    for name, got, expected in zip(("dq", "dk", "dv", "dsink"), gradients, right):
        if expected is None:
            assert got is None
        else:
            np.testing.assert_allclose(got, expected, rtol=0, atol=3e-5, err_msg=name)


def test_packed_equals_one_by_one():
    lengths_q, lengths_k = (5, 0, 17, 3), (9, 4, 0, 31)
    starts_q, starts_k = (np.concatenate([[0], np.cumsum(x)]).astype(np.int32) for x in (lengths_q, lengths_k))
    q, k, v = (normal(n, h, 8, seed=s) for s, (n, h) in enumerate(((sum(lengths_q), 4), (sum(lengths_k), 2), (sum(lengths_k), 2))))
    o, lse = tilewise.attention(q, k, v, causal=True, cu_seqlens_q=starts_q, cu_seqlens_k=starts_k, return_lse=True)
    bounded = tilewise.attention(q, k, v, causal=True, cu_seqlens_q=starts_q, cu_seqlens_k=starts_k, max_seqlen_q=40, max_seqlen_k=40)
    assert np.array_equal(bounded, o)
    more = [np.concatenate([x, np.full_like(x[:40], np.nan)]) for x in (q, k, v)]  # rows of no sequence, more than the bounds have room for
    o_more, lse_more = tilewise.attention(*more, causal=True, cu_seqlens_q=starts_q, cu_seqlens_k=starts_k, return_lse=True)
    assert np.array_equal(o_more[: len(o)], o) and np.array_equal(lse_more[:, : len(o)], lse)
    assert not o_more[len(o) :].any() and np.all(lse_more[:, len(o) :] == -np.inf)
    gradients = tilewise.attention_backward(np.ones_like(o_more), *more, o_more, lse_more, causal=True, cu_seqlens_q=starts_q, cu_seqlens_k=starts_k)
    assert all(not x[y:].any() for x, y in zip(gradients, (len(q), len(k), len(v))))
    for (a, b), (c, d) in zip(itertools.pairwise(starts_q), itertools.pairwise(starts_k)):
        alone, alone_lse = tilewise.attention(q[None, a:b], k[None, c:d], v[None, c:d], causal=True, return_lse=True)
        assert np.array_equal(o[a:b], alone[0]) and np.array_equal(lse[:, a:b], alone_lse[0])


def test_strides_and_read_only_memory():
    q, k, v = inputs()
    o = tilewise.attention(q, k, v)
    heads_first = [np.ascontiguousarray(x.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3) for x in (q, k, v)]
    wide = np.full((*q.shape[:3], 40), np.nan, np.float32)
    wide[..., 3:19] = q
    backwards = k[:, ::-1].copy()[:, ::-1]
    for x in (q, k, v):
        x.flags.writeable = False
    assert np.array_equal(tilewise.attention(*heads_first), o)
    assert np.array_equal(tilewise.attention(wide[..., 3:19], backwards, v), o)


def test_float16_and_bfloat16():
    q, k, v = (x.astype(np.float16) for x in inputs())
    o = tilewise.attention(q, k, v, causal=True)
    assert o.dtype == np.float16
    np.testing.assert_allclose(o, reference(q, k, v, causal=True)[0], rtol=0, atol=2e-3)
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="ml_dtypes, which brings bfloat16 to NumPy, is not installed")
    q, k, v = (x.astype(ml_dtypes.bfloat16) for x in inputs())
    o = tilewise.attention(q, k, v, causal=True)
    assert o.dtype == ml_dtypes.bfloat16
    np.testing.assert_allclose(o.astype(np.float32), reference(*(x.astype(np.float32) for x in (q, k, v)), causal=True)[0], rtol=0, atol=2e-2)


class Array:
    """An array that is none of the known frameworks': only DLPack and from_dlpack, and types that print in a way of their own."""

    device_type = 1

    def __init__(self, array):
        self._array, self.shape, self.ndim, self.dtype = array, array.shape, array.ndim, f"<type '{array.dtype}'>"

    def __dlpack__(self, **options):
        return self._array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.device_type, 0

    def __array_namespace__(self):
        return np


@pytest.mark.parametrize("device_type", [1, 3])  # 3: pinned memory
def test_any_dlpack_exporter(device_type, monkeypatch):
    monkeypatch.setattr(Array, "device_type", device_type)
    for dtype in (np.float32, np.float16):
        q, k, v = (x.astype(dtype) for x in inputs())
        o, lse = tilewise.attention(q, k, v, return_lse=True)
        got, got_lse = tilewise.attention(*(Array(x) for x in (q, k, v)), return_lse=True)
        assert got.dtype == dtype and np.array_equal(got, o) and np.array_equal(got_lse, lse)
    starts = np.array([0, 20, 30], np.int32)
    for x in (np.full(1 << 20, 7, np.float32) for _ in range(4)):  # memory that is used again
        del x
    o, lse = tilewise.attention(*(Array(x[0]) for x in (q, k, v)), cu_seqlens_q=starts, cu_seqlens_k=starts, return_lse=True)
    assert o[:30].any() and not o[30:].any() and np.all(lse[:, 30:] == -np.inf)


def test_jax():
    jax = pytest.importorskip("jax", reason="jax is not installed")
    q, k, v = inputs()
    o = tilewise.attention(q, k, v, causal=True)
    got = tilewise.attention(*(jax.numpy.asarray(x) for x in (q, k, v)), causal=True)
    assert isinstance(got, jax.Array) and np.array_equal(np.asarray(got), o)
    half = tilewise.attention(*(jax.numpy.asarray(x, jax.numpy.bfloat16) for x in (q, k, v)), causal=True)
    assert half.dtype == jax.numpy.bfloat16
    np.testing.assert_allclose(np.asarray(half, np.float32), o, rtol=0, atol=5e-2)


def test_errors_name_argument_value_and_rule():
    q, k, v = inputs()
    packed, two = np.array([0, 1], np.int32), np.array([0, 30, 37], np.int32)
    for error, sentence, call in (
        (TypeError, "q has dtype float64, which is none of float32, bfloat16, float16", lambda: tilewise.attention(q.astype(float), k, v)),
        (TypeError, "q has dtype >f4", lambda: tilewise.attention(q.astype(">f4"), k, v)),
        (TypeError, "q is of type list, which is not read", lambda: tilewise.attention([1.0], k, v)),
        (TypeError, "v is of type float, but q is a NumPy array", lambda: tilewise.attention(q, k, 1.0)),
        (ValueError, "v has dtype float16, but the problem needs float32", lambda: tilewise.attention(q, k, v.astype(np.float16))),
        (ValueError, "num_heads_q 3 is not a multiple of num_heads_kv 2", lambda: tilewise.attention(q[:, :, :3], k, v)),
        (ValueError, r"v has shape \[2, 50, 2, 24\].*seqlen_k 51", lambda: tilewise.attention(q, k, v[:, :50])),
        (TypeError, "q is of type MaskedArray, whose mask", lambda: tilewise.attention(np.ma.masked_array(q, q > 1), k, v)),
        (TypeError, "softmax_scale 'x' is not a number", lambda: tilewise.attention(q, k, v, softmax_scale="x")),
        (TypeError, "softcap None is not a number", lambda: tilewise.attention(q, k, v, softcap=None)),
        (TypeError, "max_seqlen_k '5' is not a whole number", lambda: tilewise.attention(q, k, v, max_seqlen_k="5")),
        (TypeError, "deterministic 1 is neither True nor False", lambda: tilewise.attention(q, k, v, deterministic=1)),
        (ValueError, "max_seqlen_q 37 is given, but", lambda: tilewise.attention(q, k, v, max_seqlen_q=37)),
        (ValueError, "max_seqlen_k -2 is negative", lambda: tilewise.attention(q[0], k[0], v[0], cu_seqlens_q=packed, cu_seqlens_k=packed, max_seqlen_k=-2)),
        (ValueError, "cu_seqlens_q is missing", lambda: tilewise.attention(q[0], k[0], v[0], cu_seqlens_k=packed)),
        (ValueError, r"cu_seqlens_q\[1\] is 30, the end of a sequence of 30 rows, which is longer than max_seqlen_q 20",
         lambda: tilewise.attention(q[0], k[0], v[0], cu_seqlens_q=two, cu_seqlens_k=two, max_seqlen_q=20)),
        (ValueError, "q has 3 dimensions", lambda: tilewise.attention(q[0], k, v)),
        (ValueError, "q has 5 dimensions", lambda: tilewise.attention(q[None], k, v)),
        (ValueError, "window right 3 contradicts causal", lambda: tilewise.attention(q, k, v, causal=True, window=(1, 3))),
        (TypeError, "window \\(2.7, 0\\) is not two whole numbers", lambda: tilewise.attention(q, k, v, window=(2.7, 0))),
        (TypeError, "window 5 is not two whole numbers", lambda: tilewise.attention(q, k, v, window=5)),
        (ValueError, "causal 'no' is neither True nor False", lambda: tilewise.attention(q, k, v, causal="no")),
        (ValueError, "alignment 'middle' is neither", lambda: tilewise.attention(q, k, v, alignment="middle")),
        (ValueError, "softcap -1 is negative", lambda: tilewise.attention(q, k, v, softcap=-1.0)),
        (ValueError, "q has 4 dimensions, but packed tensors", lambda: tilewise.attention(q, k, v, cu_seqlens_q=packed, cu_seqlens_k=packed)),
        (ValueError, "last dimension must be contiguous", lambda: tilewise.attention(q[..., ::2], k[..., ::2], v)),
        (TypeError, "seqused_k has dtype int64, but it must be int32", lambda: tilewise.attention(q, k, v, seqused_k=np.array([1, 2]))),
        (ValueError, "sink has dtype float16", lambda: tilewise.attention(q, k, v, sink=np.zeros(4, np.float16))),
        (TypeError, "sink has dtype float64, but it must be float32", lambda: tilewise.attention(q, k, v, sink=np.zeros(4))),
        (TypeError, "cu_seqlens_k has dtype int64, but it must be int32",
         lambda: tilewise.attention(q[0], k[0], v[0], cu_seqlens_q=packed, cu_seqlens_k=packed.astype(np.int64))),
        (ValueError, r"cu_seqlens_k\[1\] is 51, the end of a sequence of 51 rows, which is longer than max_seqlen_k 10",
         lambda: tilewise.attention(q[0], k[0], v[0], cu_seqlens_q=packed, cu_seqlens_k=packed * 51, max_seqlen_k=10)),
        (ValueError, "q has dtype int32, which is none of float32", lambda: tilewise.attention(q.astype(np.int32), k, v)),
        (TypeError, "q is of type array, which is not read", lambda: tilewise.attention(array.array("f", [1.0]), k, v)),
        (NotImplementedError, "head_dim 600 is above 512", lambda: tilewise.attention(*[np.zeros((1, 2, 1, 600), np.float32)] * 3)),
        (RuntimeError, "CUDA device 99 is not there", lambda: tilewise.Device.cuda(99)),
        (ValueError, "token 'q' needs a number, as in q4096", lambda: tilewise.explain("q d64")),
        (TypeError, "problem 4096 is not a string", lambda: tilewise.explain(4096)),
        (TypeError, "device 'cpu' is not a tilewise.Device", lambda: tilewise.explain("q8 d64", "cpu")),
        (TypeError, "lengths_q 'ab' is not a sequence", lambda: tilewise.explain("q8 d64", lengths_q="ab")),
        (TypeError, r"lengths_k \[2.5\] is not a sequence of whole", lambda: tilewise.explain("q8 d64", lengths_k=[2.5])),
        (TypeError, "lengths_k 5 is not a sequence of whole", lambda: tilewise.explain("q8 d64", lengths_k=5)),
        (ValueError, "lengths_q has 1099511627776, which is not between 0", lambda: tilewise.explain("q8 d64", lengths_q=[1, 2**40])),
        (TypeError, "v is None", lambda: tilewise.attention(q, k, None)),
    ):
        with pytest.raises(error, match=sentence):
            call()


def test_a_forked_child_computes_too():
    """GNU's OpenMP would wait for ever for threads that a fork does not copy."""
    code = (
        "import os, numpy as np, tilewise; q = np.ones((1, 300, 4, 16), np.float32); o = tilewise.attention(q, q, q); child = os.fork();\n"
        "if child == 0: os._exit(0 if np.array_equal(tilewise.attention(q, q, q), o) else 1)\n"
        "raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, env=os.environ | {"OMP_NUM_THREADS": "3"})


def test_empty_inputs():
    q, k, v = inputs()
    assert tilewise.attention(q[:0], k[:0], v[:0]).shape == (0, 37, 4, 24)
    o, lse = tilewise.attention(q, k[:, :0], v[:, :0], return_lse=True)
    assert not o.any() and np.all(lse == -np.inf)


def test_explain_and_devices():
    explanation = tilewise.explain("bwd q512 h8/2 d64 causal")
    assert explanation.kernel == next(c.name for c in explanation.candidates if not c.refusal)
    assert explanation.masked_tiles > 0 and explanation.flops == 2 * 5 * 64 * 8 * (512 * 513 / 2)
    shorter = tilewise.explain("b2 packed tq300 tk300 q200 d64", lengths_q=[200, 100], lengths_k=[200, 100])
    assert shorter.flops == 4 * 64 * (200**2 + 100**2)
    lengths = {name: (np.int64(length) for length in (200, 100)) for name in ("lengths_q", "lengths_k")}
    assert tilewise.explain("b2 packed tq300 tk300 q200 d64", **lengths).flops == shorter.flops
    cpu = tilewise.devices()[0]
    assert cpu.type == "cpu" and cpu.units >= 1 and tilewise.Device.cpu(3).units == 3


def test_import_without_pytorch_says_what_is_missing():
    code = "import sys; sys.modules['torch'] = None; import tilewise.torch"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "ModuleNotFoundError: tilewise.torch needs PyTorch, which is not installed" in run.stderr


def test_import_takes_less_than_100_ms_and_no_framework():
    code = (
        "import sys, time; start = time.perf_counter(); import tilewise; seconds = time.perf_counter() - start;"
        "print(seconds, [name for name in ('numpy', 'torch', 'transformers') if name in sys.modules])"
    )
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split(" ", 1) for _ in range(5)]
    assert all(modules.strip() == "[]" for _, modules in runs)
    assert min(float(seconds) for seconds, _ in runs) < 0.1
