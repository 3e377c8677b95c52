"""tilewise.torch: values, autograd, torch.compile, autocast, opcheck, SDPA, errors. cuda_test.py has what needs a GPU."""

import warnings

import numpy as np
import pytest
from conftest import needs

needs("torch")
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from reference import reference, reference_gradients  # noqa: E402

import tilewise  # noqa: E402
from tilewise.torch import attention  # noqa: E402

HALF = [torch.bfloat16, torch.float16]


def inputs(batch=2, seqlen_q=37, seqlen_k=51, heads=4, kv_heads=2, dim=16, dim_v=24, dtype=torch.float32, grad=True):
    generator = torch.Generator().manual_seed(0)
    shapes = (batch, seqlen_q, heads, dim), (batch, seqlen_k, kv_heads, dim), (batch, seqlen_k, kv_heads, dim_v)
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_(grad) for shape in shapes]


OPTIONS = {
    "full": {},
    "causal": {"causal": True},
    "window_top_left": {"window": (5, 3), "alignment": "top_left"},
    "softcap": {"softcap": 1.5, "softmax_scale": 0.7},
    "alibi": {"alibi_slopes": torch.tensor([0.5, 0.25, 0.1, 0.0]), "causal": True},
    "sink": {"sink": torch.tensor([0.3, -1.0, 2.0, 0.0]), "window": (2, 0)},
    "seqused_k": {"seqused_k": torch.tensor([51, 20], dtype=torch.int32), "causal": True},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_values_and_gradients_equal_float64(name):
    q, k, v = inputs()
    options = dict(OPTIONS[name])
    leaves = [q, k, v]
    if "sink" in options:
        options["sink"] = options["sink"].clone().requires_grad_()
        leaves.append(options["sink"])
    o, lse = attention(q, k, v, return_lse=True, **options)
    do, dlse = torch.randn(o.shape, generator=torch.Generator().manual_seed(1)), torch.randn(lse.shape, generator=torch.Generator().manual_seed(2))
    gradients = torch.autograd.grad([o, lse], leaves, [do, dlse])
    arrays = {key: value.detach().numpy() if isinstance(value, torch.Tensor) else value for key, value in options.items()}
    q, k, v, do, dlse = (x.detach().numpy() for x in (q, k, v, do, dlse))
    right_o, right_lse = reference(q, k, v, **arrays)
    np.testing.assert_allclose(o.detach(), right_o, rtol=0, atol=5e-6)
    np.testing.assert_allclose(lse.detach(), right_lse, rtol=0, atol=5e-6)
    for got, expected in zip(gradients, reference_gradients(do, dlse, q, k, v, **arrays)):
        np.testing.assert_allclose(got, expected, rtol=0, atol=3e-5)


def test_lse_alone_is_differentiable():
    q, k, v = inputs()
    lse = attention(q, k, v, return_lse=True)[1]
    dq, dk, dv = torch.autograd.grad(lse.sum(), (q, k, v))
    expected = torch.logsumexp(torch.einsum("bihd,bjhd->bhij", q, k.repeat_interleave(2, 2)) / 4, -1).sum()
    for got, right in zip((dq, dk), torch.autograd.grad(expected, (q, k))):
        torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-5)
    assert not dv.any()


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_equals_sdpa_within_rounding(dtype):
    q, k, v = inputs(seqlen_q=64, seqlen_k=64, dim=32, dim_v=32, dtype=dtype)
    got = attention(q, k, v, causal=True)
    right = F.scaled_dot_product_attention(*(x.double().transpose(1, 2) for x in (q, k, v)), is_causal=True, enable_gqa=True).transpose(1, 2)
    weights = torch.randn(right.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    epsilon = torch.finfo(dtype).eps
    assert (got - right).abs().max() < 4 * epsilon
    pairs = zip(torch.autograd.grad((got * weights.to(dtype)).sum(), (q, k, v)), torch.autograd.grad((right * weights).sum(), (q, k, v)))
    for gradient, expected in pairs:
        assert gradient.dtype == dtype and (gradient - expected).abs().max() < 8 * epsilon * expected.abs().max()


def test_layouts():
    """Views are read in place; a last dimension that is not contiguous, and the expanded gradient of a sum, are copied."""
    q, k, v = inputs(grad=False)
    o = attention(q, k, v)
    heads_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    columns_first = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k, v)]
    packed = torch.cat([q, q.new_full(q.shape, torch.nan)], 2)[:, :, :4]
    for views in (heads_first, columns_first, (packed, k, v)):
        assert torch.equal(attention(*views), o)
    q.requires_grad_()
    (dq,) = torch.autograd.grad(attention(q, k, v).sum(), q)
    (right,) = torch.autograd.grad((attention(q, k, v) * torch.ones(o.shape)).sum(), q)
    assert torch.equal(dq, right)


def test_gradients_only_where_asked():
    q, k, v = inputs()
    attention(q, k.detach(), v.detach()).sum().backward()
    assert q.grad is not None and k.grad is None
    with torch.no_grad():
        assert not attention(q, k, v).requires_grad
    o = attention(q, k, v)
    (dq,) = torch.autograd.grad(o.square().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="differentiated once"):
        dq.sum().backward()


def test_numbers_of_threads_give_the_same_bits():
    q, k, v = inputs(seqlen_q=200, seqlen_k=200)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            o = attention(q, k, v, causal=True)
            results.append((o, *torch.autograd.grad(o.square().sum(), (q, k, v))))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))


def test_gradcheck_in_float32():
    q, k, v = inputs(batch=1, seqlen_q=3, seqlen_k=4, heads=2, kv_heads=1, dim=4, dim_v=3)
    sink = torch.tensor([0.1, -0.2], requires_grad=True)
    function = lambda q, k, v, sink: attention(q, k, v, sink=sink, causal=True, softcap=3.0, return_lse=True)  # noqa: E731
    assert torch.autograd.gradcheck(function, (q, k, v, sink), eps=1e-2, atol=2e-3, rtol=2e-3)


def operator_arguments(grad, **given):
    q, k, v = inputs(seqlen_q=9, seqlen_k=13, grad=grad)
    sink = torch.tensor([0.3, -1.0, 2.0, 0.0]).requires_grad_(grad)
    return q, k, v, None, None, None, None, given.get("sink", sink), None, 0.0, -1, 0, False, 0, 0, False


@pytest.mark.parametrize("sink", [True, False])
def test_opcheck(sink):
    given = {} if sink else {"sink": None}
    torch.library.opcheck(torch.ops.tilewise.forward.default, operator_arguments(True, **given))
    q, k, v, *options = operator_arguments(False, **given)
    o, lse = torch.ops.tilewise.forward(q, k, v, *options)
    torch.library.opcheck(torch.ops.tilewise.backward.default, (torch.ones_like(o), torch.ones_like(lse), q, k, v, o, lse, *options))


def test_opcheck_packed():
    q, k, v = (torch.randn(9, heads, 8, requires_grad=True) for heads in (4, 2, 2))
    starts = torch.tensor([0, 4, 4, 9], dtype=torch.int32)
    torch.library.opcheck(torch.ops.tilewise.forward.default, (q, k, v, starts, starts, None, None, None, 0.5, 2.0, -1, -1, True, 5, 5, True))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_without_graph_breaks(dynamic):
    def layer(q, k, v, sink):
        o, lse = attention(q * 2, k, v, causal=True, sink=sink, return_lse=True)
        return o.square().sum() + lse.sum()

    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for seqlen in (9, 17):
        q, k, v = inputs(seqlen_q=seqlen, seqlen_k=seqlen)
        sink = torch.zeros(4, requires_grad=True)
        leaves = (q, k, v, sink)
        expected = torch.autograd.grad(layer(*leaves), leaves)
        for got, right in zip(torch.autograd.grad(compiled(*leaves), leaves), expected):
            torch.testing.assert_close(got, right, rtol=1e-5, atol=1e-5)


def test_autocast():
    q, k, v = inputs()
    for function in (attention, torch.compile(attention, fullgraph=True, backend="aot_eager")):
        for dtype in HALF:
            with torch.autocast("cpu", dtype=dtype):
                o, lse = function(q, k, v, causal=True, return_lse=True)
            assert o.dtype == dtype and lse.dtype == torch.float32
            assert torch.equal(o, attention(*(x.to(dtype) for x in (q, k, v)), causal=True))
            (dq,) = torch.autograd.grad(o.float().sum(), q)
            assert dq.dtype == torch.float32 and dq.any()


def test_errors_name_argument_value_and_rule():
    q, k, v = inputs(grad=False)
    for error, sentence, call in (
        (TypeError, r"q has dtype (torch\.)?float64, which is none of float32", lambda: attention(q.double(), k, v)),
        (ValueError, "k has dtype float16, but the problem needs float32", lambda: attention(q, k.half(), v)),
        (ValueError, "num_heads_q 3 is not a multiple of num_heads_kv 2", lambda: attention(q[:, :, :3], k, v)),
        (ValueError, r"v has shape \[2, 50, 2, 24\]", lambda: attention(q, k, v[:, :50])),
        (TypeError, r"seqused_k has dtype (torch\.)?int64", lambda: attention(q, k, v, seqused_k=torch.tensor([1, 2]))),
        (NotImplementedError, "head_dim 600 is above 512", lambda: attention(*[torch.zeros(1, 2, 1, 600)] * 3)),
        (NotImplementedError, "alibi_slopes requires a gradient", lambda: attention(q, k, v, alibi_slopes=torch.zeros(4, requires_grad=True))),
        (ValueError, "max_seqlen_q 37 is given, but it is a bound of packed", lambda: attention(q, k, v, max_seqlen_q=37)),
        (TypeError, "k is of type ndarray, not a PyTorch tensor", lambda: attention(q, k.numpy(), v)),
        (TypeError, "v is None", lambda: attention(q, k, None)),
        (TypeError, "sink is of type list", lambda: attention(q, k, v, sink=[0.0] * 4)),
        (TypeError, r"q has dtype torch\.float8_e4m3fn", lambda: attention(q.to(torch.float8_e4m3fn), k, v)),
        (NotImplementedError, "q is a nested tensor", lambda: attention(torch.nested.nested_tensor([q[0]]), k, v)),
        (NotImplementedError, "q is a nested tensor", lambda: attention(torch.nested.nested_tensor([q[0]], layout=torch.jagged), k, v)),
        (NotImplementedError, "q has layout torch.sparse_coo", lambda: attention(q.to_sparse(), k, v)),
        (NotImplementedError, "v has layout torch.sparse_coo", lambda: attention(q.clone().requires_grad_(), k, v.to_sparse())),
        (NotImplementedError, "k has layout torch.sparse_csr", lambda: attention(q, k[0, 0].to_sparse_csr(), v)),
        (TypeError, r"alibi_slopes has dtype (torch\.)?float64, but it must be float32",
         lambda: attention(q, k, v, alibi_slopes=torch.zeros(4).double())),
        (ValueError, "q has dtype int32, which is none of", lambda: attention(q.int(), k, v)),
        (ValueError, r"alibi_slopes has shape \[0\]", lambda: attention(q, k, v, alibi_slopes=torch.zeros(0))),
        (TypeError, "attention_backward|autograd", lambda: tilewise.attention_backward(q, q, k, v, q, q)),
    ):
        with pytest.raises(error, match=sentence):
            call()


@pytest.mark.skipif(not tilewise.torch._DIRECT, reason="before 2.10 PyTorch's dispatcher reads numbers and flags, in its words")
def test_errors_of_numbers_and_flags():
    q, k, v = inputs(grad=False)
    for error, sentence, call in (
        (TypeError, "softmax_scale 'small' is not a number", lambda: attention(q, k, v, softmax_scale="small")),
        (TypeError, r"softmax_scale tensor\(2.*is not a number", lambda: attention(q, k, v, softmax_scale=torch.tensor(2.0, requires_grad=True))),
        (TypeError, "max_seqlen_q 2.5 is not a whole number", lambda: attention(q, k, v, max_seqlen_q=2.5)),
        (TypeError, "deterministic 'yes' is neither True nor False", lambda: attention(q, k, v, deterministic="yes")),
    ):
        with pytest.raises(error, match=sentence):
            call()


def test_top_level_function_takes_tensors():
    q, k, v = inputs()
    assert torch.equal(tilewise.attention(q, k, v, causal=True), attention(q, k, v, causal=True))


# --- Plain calls go to the kernels directly; whatever stands in between must still see the operator ---


def seen_by(base, method):
    def seen_in(call):
        def see(self, function, types, arguments=(), options=None):
            seen.append(str(function))
            return function(*arguments, **(options or {}))

        seen = []
        with type("Mode", (base,), {method: see})():
            call()
        return seen

    return seen_in


seen_by_mode = seen_by(torch.utils._python_dispatch.TorchDispatchMode, "__torch_dispatch__")
seen_by_function_mode = seen_by(torch.overrides.TorchFunctionMode, "__torch_function__")


def seen_by_profiler(call):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    return [event.name.replace("::", ".") for event in profile.events()]


@pytest.mark.parametrize("watch", [seen_by_mode, seen_by_function_mode, seen_by_profiler])
def test_modes_and_profilers_see_the_operator(watch):
    q, k, v = inputs()
    assert any("tilewise.forward" in name for name in watch(lambda: attention(q.detach(), k.detach(), v.detach())))
    o = attention(q, k, v)
    if watch is not seen_by_function_mode:  # the engine calls backward beneath functions
        assert any("tilewise.backward" in name for name in watch(lambda: o.sum().backward()))


def test_direct_calls_equal_the_dispatchers(monkeypatch):
    q, k, v = inputs()
    sink = torch.zeros(4, requires_grad=True)

    def run():
        o, lse = attention(q, k, v, sink=sink, causal=True, return_lse=True)
        return (o, lse, *torch.autograd.grad(o.square().sum() + lse.sum(), (q, k, v, sink)))

    direct = run()
    monkeypatch.setattr(tilewise.torch, "_observed", lambda *tensors: True)
    assert all(torch.equal(a, b) for a, b in zip(direct, run()))


def test_tensors_that_are_not_plain():
    q, k, v = inputs(grad=False)
    right = attention(-q, k, v)
    negative = torch._neg_view(q)  # its memory is q's
    assert torch.equal(attention(negative, k, v), right)

    class Mine(torch.Tensor):
        pass

    got = attention((-q).as_subclass(Mine), k, v)
    assert type(got) is Mine and torch.equal(got.as_subclass(torch.Tensor), right)
    x = q.as_subclass(Mine).requires_grad_()
    attention(x, k, v).sum().backward()
    y = q.clone().requires_grad_()
    attention(y, k, v).sum().backward()
    assert torch.equal(x.grad.as_subclass(torch.Tensor), y.grad)
    with torch.inference_mode():
        assert torch.equal(attention(-q, k, v), right)


def test_what_backward_needs_must_not_be_overwritten():
    for change in ("q", "starts"):
        q = torch.randn(7, 2, 8, requires_grad=True)
        starts = torch.tensor([0, 3, 7], dtype=torch.int32)
        x = q * 1
        o = attention(x, q, q, cu_seqlens_q=starts, cu_seqlens_k=starts)
        with torch.no_grad():
            (x if change == "q" else starts)[1] = 2
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            o.sum().backward()


def test_torch_func():
    from torch.func import grad, vjp, vmap

    q, k, v = inputs(seqlen_q=9, seqlen_k=9, grad=False)
    loss = lambda q, k, v: attention(q, k, v, causal=True).sin().sum()  # noqa: E731
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    right = torch.autograd.grad(loss(*leaves), leaves)
    for got, expected in zip(grad(loss, argnums=(0, 1, 2))(q, k, v), right):
        torch.testing.assert_close(got, expected)
    o, pull = vjp(lambda q: attention(q, k, v, causal=True), q)
    torch.testing.assert_close(pull(o.cos())[0], right[0])
    each = vmap(grad(loss))(torch.stack([q, 2 * q]), torch.stack([k, k]), torch.stack([v, v]))
    torch.testing.assert_close(each[0], right[0])
    assert not torch.equal(each[1], right[0])
    with pytest.raises(NotImplementedError, match="differentiated once"):
        grad(lambda q: grad(loss)(q, k, v).sum())(q)


MAPS = {  # options of a call, dimensions of them that are mapped, and how often each kernel runs then
    "plain": ({}, {}, 1),
    "seqused_k": ({"seqused_k": torch.tensor([[7, 3], [1, 7], [0, 5]], dtype=torch.int32)}, {"seqused_k": 0}, 1),
    "seqused_k_shared": ({"seqused_k": torch.tensor([7, 3], dtype=torch.int32)}, {}, 1),
    "slopes": ({"alibi_slopes": torch.rand(4, 3)}, {"alibi_slopes": 1}, 1),
    "slopes_shared": ({"alibi_slopes": torch.rand(4)}, {}, 1),
    "slopes_of_each_sequence": ({"alibi_slopes": torch.rand(2, 3, 4)}, {"alibi_slopes": 1}, 1),
    "slopes_of_each_sequence_shared": ({"alibi_slopes": torch.rand(2, 4)}, {}, 1),
    "sink": ({"sink": torch.rand(3, 4)}, {"sink": 0}, 3),
    "packed": ({name: torch.tensor([0, 4, 9], dtype=torch.int32) for name in ("cu_seqlens_q", "cu_seqlens_k")}, {}, 3),
}


@pytest.mark.skipif(not hasattr(torch.library, "register_vmap"), reason="this PyTorch takes no rules for vmap")
@pytest.mark.parametrize("shared_keys", [False, True])
@pytest.mark.parametrize("name", MAPS)
def test_vmap_folds_into_the_batch(name, shared_keys, monkeypatch):
    options, mapped, times = MAPS[name]
    shape = (3, 9) if name == "packed" else (3, 2, 9)
    q, k, v = (torch.randn(*shape, heads, 8) for heads in (4, 2, 2))
    k, v = (k[0], v[0]) if shared_keys else (k, v)
    names, dims = list(options), (0, *(None if shared_keys else 0,) * 2, *(mapped.get(name) for name in options))

    def gradients(*tensors):
        def loss(q, k, v):
            o, lse = attention(q, k, v, causal=True, return_lse=True, **dict(zip(names, tensors[3:])))
            return o.sin().sum() + lse.sum(), o

        return torch.func.grad(loss, argnums=(0, 1, 2), has_aux=True)(*tensors[:3])

    calls = []
    call = tilewise.torch._core.Call
    tensors = (q, k, v, *options.values())
    each = [gradients(*(x if dim is None else x.select(dim, i).contiguous() for x, dim in zip(tensors, dims))) for i in range(3)]
    monkeypatch.setattr(tilewise.torch._core, "Call", lambda *args: (calls.append(args), call(*args))[1])
    got = torch.func.vmap(gradients, in_dims=dims)(*tensors)
    assert len(calls) == 2 * times
    for i, (one, o) in enumerate(each):
        torch.testing.assert_close(got[1][i], o)
        for a, b in zip(got[0], one):
            torch.testing.assert_close(a[i], b)


HAS_SDPA = hasattr(torch.nn.attention, "register_flash_attention_impl")
SDPA = pytest.mark.skipif(not HAS_SDPA, reason="this PyTorch cannot take SDPA implementations")


@SDPA
def test_sdpa():
    tilewise.torch.install()
    assert torch.nn.attention.current_flash_attention_impl() is None
    q, k, v = (x.detach().transpose(1, 2).requires_grad_() for x in inputs(dim_v=16, kv_heads=4))
    mask = torch.rand(37, 51, generator=torch.Generator().manual_seed(1)) > 0.3
    cases = [{}, {"is_causal": True}, {"scale": 0.3}, {"attn_mask": mask}]

    def run(options):
        o = F.scaled_dot_product_attention(q, k, v, **options)
        return (o, *torch.autograd.grad(o.square().sum(), (q, k, v)))

    expected = [run(options) for options in cases]
    dropped = lambda: (torch.manual_seed(0), F.scaled_dot_product_attention(q, k, v, dropout_p=0.5))[1]  # noqa: E731
    expected_dropped = dropped()
    calls = []
    call, tilewise.torch._core.Call = tilewise.torch._core.Call, lambda *args: (calls.append(args), call(*args))[1]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            torch.nn.attention.activate_flash_attention_impl("tilewise")
        got = [run(options) for options in cases]
        assert torch.equal(dropped(), expected_dropped)
        assert len(calls) == 6  # forward and backward of all but those with a mask and dropout, which PyTorch keeps
        with pytest.raises(NotImplementedError, match="dropout"):
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.5)
        torch.nn.attention.restore_flash_attention_impl()
        run({})
        assert len(calls) == 6
    finally:
        tilewise.torch._core.Call = call
    for right, ours in zip(expected, got):
        for a, b in zip(right, ours):
            torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)


LAYOUTS = {  # [batch, heads, seqlen, dim], as it may lie in memory
    "contiguous": lambda seqlen, dtype: torch.randn(2, 3, seqlen, 16, dtype=dtype),
    "transposed": lambda seqlen, dtype: torch.randn(2, seqlen, 3, 16, dtype=dtype).transpose(1, 2),
    "of_three": lambda seqlen, dtype: torch.randn(2, seqlen, 3, 3, 16, dtype=dtype)[:, :, 1].transpose(1, 2),
    "columns": lambda seqlen, dtype: torch.randn(2, 3, 16, seqlen, dtype=dtype).mT,
    "expanded": lambda seqlen, dtype: torch.randn(2, 1, seqlen, 16, dtype=dtype).expand(-1, 3, -1, -1),
}


def promised(operator, *arguments):
    """What PyTorch's meta kernel says of an operator's results, which torch.compile believes."""

    def to_meta(x):
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta") if isinstance(x, torch.Tensor) else x

    return operator(*(to_meta(x) for x in arguments))


def assert_promise(results, promise):
    for got, expected in zip(results, promise, strict=True):
        if isinstance(expected, torch.Tensor):
            strides = [[stride for stride, extent in zip(x.stride(), x.shape) if extent > 1] for x in (got, expected)]
            assert got.dtype == expected.dtype and got.shape == expected.shape and strides[0] == strides[1]
        else:
            assert got == expected


@SDPA
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_flash_operators_lay_results_out_as_promised(layout, dtype):
    """Those of CUDA too, on a CPU's memory."""
    aten, ours = torch.ops.aten, tilewise.torch
    q, k, v = (LAYOUTS[layout](seqlen, dtype) for seqlen in (7, 9, 9))
    right = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    close = dict(rtol=0, atol=1e-5 if dtype == torch.float32 else 5e-2)
    leaves = [x.detach().double().requires_grad_() for x in (q, k, v)]
    do = torch.randn(2, 3, 7, 16, dtype=dtype)
    right_gradients = torch.autograd.grad(F.scaled_dot_product_attention(*leaves), leaves, do.double())

    def check(name, forward, backward, options, arguments_of, heads_second):
        turn = (lambda x: x.transpose(1, 2)) if heads_second else lambda x: x
        rows = [turn(x) for x in (q, k, v)]
        results = forward(*rows, *options)
        assert_promise(results, promised(getattr(aten, name[0]), *rows, *options))
        torch.testing.assert_close(turn(results[0]).double(), right, **close)
        arguments = turn(do), *rows, *results[:2], *arguments_of(results)
        gradients = backward(*arguments)
        assert_promise(gradients, promised(getattr(aten, name[1]), *arguments))
        for got, expected in zip(gradients, right_gradients):
            torch.testing.assert_close(turn(got).double(), expected, **close)

    ours.install()
    torch.nn.attention.activate_flash_attention_impl("tilewise")
    try:
        name = "_scaled_dot_product_flash_attention_for_cpu"
        names = name, name + "_backward"
        check(names, *(getattr(aten, name) for name in names), (0.0, False), lambda results: (0.0, False), False)
    finally:
        torch.nn.attention.restore_flash_attention_impl()
    names = "_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_backward"
    check(names, ours._sdpa, ours._sdpa_backward, (0.0, False), lambda results: (None, None, 7, 9, 0.0, False, *results[6:8]), False)
    names = "_flash_attention_forward", "_flash_attention_backward"
    problem = None, None, 7, 9, 0.0, False
    check(names, ours._flash, ours._flash_backward, (*problem, False), lambda results: (*problem, *results[2:4]), True)


@SDPA
def test_packed_flash_operators_lay_results_out_as_promised():
    ours = tilewise.torch
    for layout in ("contiguous", "transposed", "of_three", "columns"):
        q, k, v = (LAYOUTS[layout](9, torch.float32)[0] for _ in range(3))  # 3 rows of 9 heads
        starts = torch.tensor([0, 1, 2], dtype=torch.int32)
        problem = starts, starts, 1, 1, 0.0, False
        results = ours._flash(q, k, v, *problem, False)
        assert_promise(results, promised(torch.ops.aten._flash_attention_forward, q, k, v, *problem, False))
        o, lse = attention(q, k, v, cu_seqlens_q=starts, cu_seqlens_k=starts, max_seqlen_q=1, max_seqlen_k=1, return_lse=True)
        assert torch.equal(results[0], o) and torch.equal(results[1], lse) and not o[2].any()
        arguments = torch.ones_like(o), q, k, v, *results[:2], *problem, *results[2:4]
        gradients = ours._flash_backward(*arguments)
        assert_promise(gradients, promised(torch.ops.aten._flash_attention_backward, *arguments))
        assert not any(x[2].any() for x in gradients) and gradients[2][:2].all()


@SDPA
@pytest.mark.parametrize("dtype, causal", [(torch.float32, False), (torch.bfloat16, True)])
def test_sdpa_compiles(dtype, causal):
    attend = lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=causal) * 2  # noqa: E731
    tilewise.torch.install()
    torch.nn.attention.activate_flash_attention_impl("tilewise")
    try:
        for layout in LAYOUTS.values():
            torch.compiler.reset()
            compiled = torch.compile(attend, fullgraph=True)
            tensors = [layout(seqlen, dtype) for seqlen in (32, 24, 24)]
            torch.testing.assert_close(compiled(*tensors), attend(*tensors))
            leaves = [x.detach().requires_grad_() for x in tensors]
            results = []
            for call in (compiled, attend):
                o = call(*leaves)
                results.append((o, *torch.autograd.grad(o.sin().sum(), leaves)))
            for got, expected in zip(*results):
                torch.testing.assert_close(got, expected)
    finally:
        torch.nn.attention.restore_flash_attention_impl()
        torch.compiler.reset()


@SDPA
def test_a_transformer_layer_compiles():
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(32, 4, 48, dropout=0.0, batch_first=True)
    x = torch.randn(2, 11, 32)

    def run(layer):
        layer.zero_grad()
        o = layer(x)
        o.sin().sum().backward()
        return o, *(p.grad.clone() for p in layer.parameters())

    expected = run(layer)
    tilewise.torch.install()
    torch.nn.attention.activate_flash_attention_impl("tilewise")
    try:
        for got, right in zip(run(torch.compile(layer, fullgraph=True)), expected, strict=True):
            torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-5)
    finally:
        torch.nn.attention.restore_flash_attention_impl()
        torch.compiler.reset()


def test_flash_operators_refuse_what_their_backward_is_not_told():
    aten = torch.library.Library("aten", "IMPL")
    aten.impl("_flash_attention_forward", tilewise.torch._flash, "CPU")  # registered for CUDA only: cuda_test.py runs it there
    try:
        q, k, v = inputs(grad=False)
        used = torch.tensor([51, 20], dtype=torch.int32)
        call = lambda q: torch.ops.aten._flash_attention_forward(q, k, v, None, None, 37, 51, 0.0, True, False, seqused_k=used)  # noqa: E731
        assert torch.equal(call(q)[0], attention(q, k, v, causal=True, seqused_k=used))
        with pytest.raises(NotImplementedError, match="seqused_k is given and a gradient wanted"):
            call(q.clone().requires_grad_())
    finally:
        aten._destroy()


def test_forward_mode_is_refused():
    q = torch.randn(1, 5, 2, 8)
    with pytest.raises(NotImplementedError, match="reverse mode"):
        torch.func.jvp(lambda x: attention(x, q, q), (q,), (torch.ones_like(q),))


def test_rows_of_no_sequence_are_zero(monkeypatch):
    empty = torch.Tensor.new_empty  # memory is what nobody promised
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda x, *shape, **options: empty(x, *shape, **options).fill_(torch.nan))
    q = torch.randn(33, 2, 8, requires_grad=True)
    starts = torch.tensor([0, 20, 30], dtype=torch.int32)
    o, lse = attention(q, q, q, cu_seqlens_q=starts, cu_seqlens_k=starts, max_seqlen_q=20, max_seqlen_k=20, return_lse=True)
    o.sum().backward()
    assert (o[30:] == 0).all() and (lse[:, 30:] == -torch.inf).all() and (q.grad[30:] == 0).all() and (q.grad[:30] != 0).any()


def test_meta_beside_real_tensors_is_refused():
    q = torch.randn(1, 5, 2, 8)
    with pytest.raises(ValueError, match="is on device meta"):
        attention(q, q.to("meta"), q)
    with pytest.raises(ValueError, match="is on device meta, but q is on cpu"):
        torch.ops.tilewise.forward(q, q.to("meta"), q, None, None, None, None, None, None, 0.0, -1, -1, False, 0, 0, False)
    assert attention(*[q.to("meta")] * 3).is_meta


def test_batched_gradients():
    q, k, v = (torch.randn(1, 5, 2, 16, requires_grad=True) for _ in range(3))
    o = attention(q, k, v, causal=True)
    g = torch.randn(3, *o.shape)
    together = torch.autograd.grad(o, (q, k, v), g, is_grads_batched=True, retain_graph=True)
    for i in range(3):
        for one, of_all in zip(torch.autograd.grad(o, (q, k, v), g[i], retain_graph=True), together, strict=True):
            torch.testing.assert_close(of_all[i], one, rtol=0, atol=0)
