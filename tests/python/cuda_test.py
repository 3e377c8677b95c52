"""The package on a GPU: values, streams, CUDA graphs, torch.compile, autocast, SDPA, FlashAttention's functions, models, other frameworks."""

import os

import pytest
from conftest import needs

needs("torch")
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

import tilewise  # noqa: E402
from tilewise import flash_attn_interface as fa  # noqa: E402
from tilewise.torch import attention  # noqa: E402

if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)

HALF = [torch.bfloat16, torch.float16]


def inputs(batch=2, seqlen_q=150, seqlen_k=200, heads=4, kv_heads=2, dim=64, dim_v=None, dtype=torch.bfloat16, grad=True, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    shapes = (batch, seqlen_q, heads, dim), (batch, seqlen_k, kv_heads, dim), (batch, seqlen_k, kv_heads, dim_v or dim)
    return [torch.randn(shape, generator=generator, device="cuda", dtype=dtype).requires_grad_(grad) for shape in shapes]


def like(x, seed=9):
    return torch.randn(x.shape, generator=torch.Generator("cuda").manual_seed(seed), device="cuda", dtype=x.dtype)


def close(got, right, epsilons=6):
    """Within some roundings to got's type of the largest value."""
    right = right.detach().to(got.device, torch.float32)
    worst = (got.detach().float() - right).abs().max()
    assert worst <= epsilons * torch.finfo(got.dtype).eps * right.abs().max(), f"{worst} of {right.abs().max()}"


def on_cpu(options):
    return {name: x.detach().cpu() if isinstance(x, torch.Tensor) else x for name, x in options.items()}


def starts(*lengths):
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).cuda()


OPTIONS = {
    "full": lambda: {},
    "causal": lambda: {"causal": True},
    "window_top_left": lambda: {"window": (40, 3), "alignment": "top_left"},
    "softcap": lambda: {"softcap": 1.5, "softmax_scale": 0.3},
    "alibi": lambda: {"alibi_slopes": torch.tensor([0.5, 0.25, 0.1, 0.0], device="cuda"), "causal": True},
    "sink": lambda: {"sink": torch.tensor([0.3, -1.0, 2.0, 0.0], device="cuda"), "window": (20, 0)},
    "seqused_k": lambda: {"seqused_k": torch.tensor([200, 77], dtype=torch.int32, device="cuda"), "causal": True},
}


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", OPTIONS)
def test_values_and_gradients_equal_the_cpus(name, dtype):
    """The CPU computes in float32, and is itself compared with float64 in torch_test.py."""
    q, k, v = inputs(dtype=dtype)
    options = OPTIONS[name]()
    o, lse = attention(q, k, v, return_lse=True, **options)
    do, dlse = like(o), like(lse)
    gradients = torch.autograd.grad([o, lse], (q, k, v), [do, dlse])
    mine = [x.detach().float().cpu().requires_grad_() for x in (q, k, v)]
    right_o, right_lse = attention(*mine, return_lse=True, **on_cpu(options))
    close(o, right_o)
    assert lse.dtype == torch.float32
    torch.testing.assert_close(lse.cpu(), right_lse, rtol=1e-4, atol=1e-4)
    for got, right in zip(gradients, torch.autograd.grad([right_o, right_lse], mine, [do.float().cpu(), dlse.cpu()])):
        assert got.dtype == dtype
        close(got, right, 10)


@pytest.mark.parametrize(("dim", "dim_v"), [(128, None), (192, 128), (256, None), (40, 72)])
def test_head_dimensions_and_gradient_of_sinks(dim, dim_v):
    q, k, v = inputs(dim=dim, dim_v=dim_v)
    sink = torch.tensor([0.3, -1.0, 2.0, 0.0], device="cuda", requires_grad=True)
    leaves = (q, k, v, sink)
    o = attention(*leaves[:3], causal=True, sink=sink)
    mine = [x.detach().float().cpu().requires_grad_() for x in leaves]
    right = attention(*mine[:3], causal=True, sink=mine[3])
    close(o, right)
    do = like(o)
    for got, expected in zip(torch.autograd.grad(o, leaves, do), torch.autograd.grad(right, mine, do.float().cpu())):
        close(got.bfloat16(), expected, 10)


def test_packed_sequences_and_rows_of_none():
    lengths_q, lengths_k = (70, 0, 130, 1), (33, 20, 0, 300)
    q, k, v = (x[0] for x in inputs(batch=1, seqlen_q=230, seqlen_k=400, grad=False))
    q, k, v = (x.clone().requires_grad_() for x in (q, k, v))
    options = dict(cu_seqlens_q=starts(*lengths_q), cu_seqlens_k=starts(*lengths_k), causal=True, return_lse=True)
    unbounded = attention(q, k, v, **options)
    o, lse = attention(q, k, v, max_seqlen_q=130, max_seqlen_k=300, **options)
    assert torch.equal(unbounded[0], o) and torch.equal(unbounded[1], lse)
    do = like(o)
    dq, dk, dv = torch.autograd.grad(o, (q, k, v), do)
    mine = [x.detach().float().cpu().requires_grad_() for x in (q, k, v)]
    right, right_lse = attention(*mine, **on_cpu(options))
    close(o, right)
    torch.testing.assert_close(lse.cpu(), right_lse, rtol=1e-4, atol=1e-4)
    for got, expected in zip((dq, dk, dv), torch.autograd.grad(right, mine, do.float().cpu())):
        close(got, expected, 10)
    assert not o[201:].any() and not dq[201:].any() and not dk[353:].any() and (lse[:, 201:] == -torch.inf).all()


def test_the_current_stream_is_used():
    """A stream that is busy first: whoever ran beside it would read what is not there yet."""
    q, k, v = inputs()
    do = like(q)
    right = attention(q * 2, k, v, causal=True)
    right_gradients = torch.autograd.grad(right, (q, k, v), do)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        late, late_do = torch.zeros_like(q), torch.zeros_like(do)
        torch.cuda._sleep(200_000_000)
        late.copy_(q.detach() * 2)
        late.requires_grad_()
        o = attention(late, k, v, causal=True)
        torch.cuda._sleep(200_000_000)
        late_do.copy_(do)
        gradients = torch.autograd.grad(o, (late, k, v), late_do)
    assert not stream.query()  # and nobody waited for the device
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(o, right)
    close(gradients[0] * 2, right_gradients[0], 4)
    for got, expected in zip(gradients[1:], right_gradients[1:]):
        close(got, expected, 4)


@pytest.mark.parametrize("packed", [False, True])
def test_cuda_graphs_capture_forward_and_backward(packed):
    q, k, v = inputs(seqlen_k=150)
    options = {"causal": True}
    if packed:
        q, k, v = (x.detach().flatten(0, 1).requires_grad_() for x in (q, k, v))
        options.update(cu_seqlens_q=starts(100, 200), cu_seqlens_k=starts(100, 200), max_seqlen_q=200, max_seqlen_k=200)
    do = like(q)

    def run():
        o, lse = attention(q, k, v, return_lse=True, deterministic=True, **options)
        return (o, lse, *torch.autograd.grad(o, (q, k, v), do))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for seed in (1, 2):
        with torch.no_grad():
            q.copy_(like(q, seed))
            do.copy_(like(do, seed + 10))
        if packed and seed == 2:  # lengths are data too
            options["cu_seqlens_q"].copy_(starts(130, 170))
            options["cu_seqlens_k"].copy_(starts(130, 170))
        graph.replay()
        replayed = [x.clone() for x in captured]
        for got, right in zip(replayed, run()):
            assert torch.equal(got, right)


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_compile_fullgraph(mode):
    pytest.importorskip("triton", reason="triton, which torch.compile needs on a GPU, is not installed")

    def layer(q, k, v, sink):
        o, lse = attention(q * 2, k, v, causal=True, sink=sink, return_lse=True)
        return o.float().square().mean() + lse.mean()

    compiled = torch.compile(layer, fullgraph=True, mode=mode)
    for seed in range(3 if mode else 1):  # the third time the graph is replayed
        torch.compiler.cudagraph_mark_step_begin()
        leaves = (*inputs(seed=seed), torch.zeros(4, device="cuda", requires_grad=True))
        expected = torch.autograd.grad(layer(*leaves), leaves)
        got = torch.autograd.grad(compiled(*leaves), leaves)
        for x, right in zip(got, expected):
            close(x.bfloat16(), right, 4)


def test_autocast():
    q, k, v = inputs(dtype=torch.float32)
    for dtype in HALF:
        with torch.autocast("cuda", dtype=dtype):
            o, lse = attention(q, k, v, causal=True, return_lse=True)
        assert o.dtype == dtype and lse.dtype == torch.float32
        assert torch.equal(o, attention(*(x.to(dtype) for x in (q, k, v)), causal=True))
        dq, dk, dv = torch.autograd.grad(o.float().square().sum(), (q, k, v))
        assert dq.dtype == torch.float32 and dq.any() and dk.any() and dv.any()


def test_opcheck():
    q, k, v = inputs(seqlen_q=32, seqlen_k=48)
    options = (None, None, None, None, torch.zeros(4, device="cuda"), None, 0.0, -1, 0, False, 0, 0, True)
    torch.library.opcheck(torch.ops.tilewise.forward.default, (q, k, v, *options))
    q, k, v = (x.detach() for x in (q, k, v))
    o, lse = torch.ops.tilewise.forward(q, k, v, *options)
    torch.library.opcheck(torch.ops.tilewise.backward.default, (torch.ones_like(o), torch.ones_like(lse), q, k, v, o, lse, *options))


def test_vmap_and_batched_gradients_equal_calls_one_by_one():
    q, k, v = (x.detach()[:, None] for x in inputs(batch=3))
    attend = lambda q, k, v: attention(q, k, v, causal=True)  # noqa: E731
    each = torch.stack([attend(*one) for one in zip(q, k, v)])
    assert torch.equal(torch.func.vmap(attend)(q, k, v), each)
    q, k, v = inputs(batch=1)
    o = attend(q, k, v)
    do = torch.stack([like(o, seed) for seed in (1, 2)])
    together = torch.autograd.grad(o, (q, k, v), do, is_grads_batched=True, retain_graph=True)
    for i in range(2):
        for batched, right in zip(together, torch.autograd.grad(o, (q, k, v), do[i], retain_graph=True)):
            close(batched[i], right)


def test_what_the_device_cannot_do_is_refused():
    q, k, v = inputs(grad=False)
    shifted = torch.cat([q, q], -1)[..., 1:65]
    odd = torch.cat([q, q], -1)[..., :68].contiguous()[..., :64]
    for error, sentence, call in (
        (NotImplementedError, "dtype fp32 is neither bf16 nor fp16", lambda: attention(q.float(), k.float(), v.float())),
        (NotImplementedError, "q begins 2 bytes past a multiple of 16", lambda: attention(shifted, k, v)),
        (NotImplementedError, "q has stride 68.*multiple of 16 bytes", lambda: attention(odd, k, v)),
        (NotImplementedError, "head_dim 12", lambda: attention(*(x[..., :12].contiguous() for x in (q, k, v)))),
        (ValueError, "k is on cpu, but q is on cuda:0", lambda: attention(q, k.cpu(), v)),
        (ValueError, "cu_seqlens_k is on cpu, but q is on cuda:0", lambda: attention(q[0], k[0], v[0], cu_seqlens_q=starts(150), cu_seqlens_k=starts(200).cpu())),
        (ValueError, "k has dtype float16, but the problem needs bfloat16", lambda: attention(q, k.half(), v)),
    ):
        with pytest.raises(error, match=sentence):
            call()
    columns_first = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k, v)]
    heads_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    for views in (columns_first, heads_first):
        assert torch.equal(attention(*views), attention(q, k, v))


def test_expanded_tensors_and_gradients_of_any_layout():
    q, k, v = inputs(kv_heads=1, seqlen_k=150)
    wide = [x.expand(-1, -1, 4, -1) for x in (k, v)]
    assert torch.equal(attention(q, *wide), attention(q, k, v))
    leaves = (q, k, v)
    right = torch.autograd.grad(attention(*leaves), leaves, torch.full_like(q, 1 / 150))
    extra = torch.zeros(2, 150, 4, 4, device="cuda", dtype=q.dtype)
    for loss in (
        lambda o: o.mean(1).float().sum(),  # the gradient has stride 0 between queries
        lambda o: torch.cat([o, extra], -1)[..., :64].float().sum() / 150,
        lambda o: (torch.cat([extra[..., :1], o], -1) / 150).float().sum(),  # a gradient that begins 2 bytes past a multiple of 16
    ):
        for got, expected in zip(torch.autograd.grad(loss(attention(*leaves)), leaves), right):
            close(got, expected, 4)


# --- FlashAttention-2, which PyTorch carries ---


def fa2(q, k, v, causal=False, window=(-1, -1), cu=(None, None), longest=None):
    sizes = longest or (q.shape[1], k.shape[1])
    result = torch.ops.aten._flash_attention_forward(
        q, k, v, *cu, *sizes, 0.0, causal, False, window_size_left=window[0], window_size_right=window[1]
    )
    return result[0], result[1]


@pytest.mark.parametrize(("causal", "window"), [(False, (-1, -1)), (True, (-1, -1)), (False, (30, 10))])
def test_flash_attention_2_returns_the_same(causal, window):
    q, k, v = inputs(grad=False)
    o, lse, _ = fa.flash_attn_func(q, k, v, causal=causal, window_size=window, return_attn_probs=True)
    right, right_lse = fa2(q, k, v, causal, window)
    close(o, right, 4)
    torch.testing.assert_close(lse, right_lse, rtol=1e-4, atol=1e-4)
    cu = starts(60, 90), starts(100, 100)
    rows = q.flatten(0, 1)[:150], k.flatten(0, 1)[:200], v.flatten(0, 1)[:200]
    o, lse, _ = fa.flash_attn_varlen_func(*rows, *cu, 90, 100, causal=causal, window_size=window, return_attn_probs=True)
    right, right_lse = fa2(*rows, causal, window, cu, (90, 100))
    close(o, right, 4)
    torch.testing.assert_close(lse, right_lse, rtol=1e-4, atol=1e-4)


@pytest.fixture
def calls(monkeypatch):
    """The calls of the library, so that a test shows whose attention ran."""
    calls, call = [], tilewise.torch._core.Call
    monkeypatch.setattr(tilewise.torch._core, "Call", lambda *args: (calls.append(args[0].name), call(*args))[1])
    return calls


@pytest.mark.skipif(not hasattr(torch.nn.attention, "register_flash_attention_impl"), reason="this PyTorch cannot take SDPA implementations")
def test_sdpa(calls):
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.attention.bias import causal_lower_right

    tilewise.torch.install()
    q, k, v = (x.detach().transpose(1, 2).requires_grad_() for x in inputs(kv_heads=4))
    same = (q, *(x.detach().transpose(1, 2).requires_grad_() for x in inputs(kv_heads=2, seqlen_k=150)[1:]))
    cases = [
        ((q, k, v), {}),
        ((q, k, v), {"scale": 0.3}),
        ((q, k, v), {"attn_mask": causal_lower_right(150, 200)}),
        (same, {"is_causal": True, "enable_gqa": True}),
        (tuple(x.detach().contiguous().requires_grad_() for x in (q, k, v)), {}),
    ]

    def run(tensors, options):
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            o = F.scaled_dot_product_attention(*tensors, **options)
            return (o, *torch.autograd.grad(o, tensors, like(o)))

    expected = [run(*case) for case in cases]
    assert not calls
    torch.nn.attention.activate_flash_attention_impl("tilewise")
    try:
        got = [run(*case) for case in cases]
        assert calls == ["FORWARD", "BACKWARD"] * len(cases)
        with pytest.raises(NotImplementedError, match="dropout_p 0.5 is not 0"):
            run(*cases[0][:1], {"dropout_p": 0.5})
        rows = [x.detach().transpose(1, 2).flatten(0, 1).requires_grad_() for x in same]
        cu = starts(100, 200)
        o, lse = fa2(*rows, True, cu=(cu, cu), longest=(200, 200))
        right = attention(*rows, causal=True, cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=200, max_seqlen_k=200)
        assert torch.equal(o, right)
        for x, y in zip(*(torch.autograd.grad(out, rows, like(right)) for out in (o, right))):
            close(x, y, 2)
        with pytest.raises(NotImplementedError, match="seqused_k is given and a gradient wanted"):
            torch.ops.aten._flash_attention_forward(*same[:1], *same[1:], None, None, 150, 150, 0.0, True, False, seqused_k=starts(5))
    finally:
        torch.nn.attention.restore_flash_attention_impl()
    del calls[:]
    run(*cases[0])
    assert not calls
    for right, ours in zip(expected, got):
        for a, b in zip(ours, right):
            close(a, b, 6)


# --- Other frameworks ---


def test_cupy():
    cupy = pytest.importorskip("cupy", reason="cupy is not installed")
    q, k, v = (cupy.asarray(x) for x in inputs(dtype=torch.float16, grad=False))
    right = attention(*(torch.as_tensor(x, device="cuda") for x in (q, k, v)), causal=True)
    torch.cuda.synchronize()
    with cupy.cuda.Stream(non_blocking=True):
        late = cupy.zeros_like(q)
        for _ in range(30):  # the stream is busy
            late += cupy.sin(cupy.ones((4096, 4096), cupy.float32)).sum().astype(cupy.float16) * 0
        late[...] = q
        o, lse = tilewise.attention(late, k, v, causal=True, return_lse=True)
        do = cupy.ones_like(o)
        gradients = tilewise.attention_backward(do, late, k, v, o, lse, causal=True)
        o = cupy.asnumpy(o)
    assert isinstance(lse, cupy.ndarray) and isinstance(gradients.dq, cupy.ndarray)
    assert torch.equal(torch.from_numpy(o), right.cpu())
    cu = cupy.asarray([0, 100, 140], cupy.int32)
    o, lse = tilewise.attention(q[0], k[0], v[0], cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=100, max_seqlen_k=100, return_lse=True)
    assert o[:140].any() and not o[140:].any() and (lse[:, 140:] == -cupy.inf).all()


def test_jax():
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the card is PyTorch's too
    jax = pytest.importorskip("jax", reason="jax is not installed")
    if jax.default_backend() != "gpu":
        pytest.skip("this jax has no GPU")
    q, k, v = inputs(grad=False)
    o, lse = tilewise.attention(*(jax.dlpack.from_dlpack(x) for x in (q, k, v)), causal=True, return_lse=True)
    assert isinstance(o, jax.Array) and o.dtype == jax.numpy.bfloat16
    right, right_lse = attention(q, k, v, causal=True, return_lse=True)
    assert torch.equal(torch.from_dlpack(o), right) and torch.equal(torch.from_dlpack(lse), right_lse)


# --- Models ---

COMMON = dict(vocab_size=99, hidden_size=128, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
              max_position_embeddings=128, pad_token_id=0, head_dim=32)  # fmt: skip
MODELS = {
    "llama": ("Llama", COMMON),
    "mistral_window": ("Mistral", dict(COMMON, sliding_window=7)),
    "gemma2_softcap": ("Gemma2", dict(COMMON, sliding_window=7, attn_logit_softcapping=2.0, query_pre_attn_scalar=16)),
    "gpt_oss_sinks": ("GptOss", dict(COMMON, sliding_window=7, num_local_experts=2, num_experts_per_tok=1, attention_dropout=0.0)),
}


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("family", MODELS)
def test_models_are_as_near_to_float32_as_eager_attention(family, side, calls):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    import tilewise.hf

    tilewise.hf.register()
    name, options = MODELS[family]
    lengths = torch.tensor([[19], [11], [15]], device="cuda")
    place = torch.arange(19, device="cuda")
    keep = {"none": place >= 0, "right": place < lengths, "left": place >= 19 - lengths}[side].expand(3, -1).long()
    torch.manual_seed(2)
    ids = torch.randint(3, 99, (3, 19), device="cuda") * keep
    positions = (keep.cumsum(-1) - 1).clamp(min=0)
    weights = None
    results = {}
    for label, implementation, dtype in (
        ("right", "eager", torch.float32),
        ("eager", "eager", torch.bfloat16),
        ("ours", "tilewise", torch.bfloat16),
    ):
        config = getattr(transformers, f"{name}Config")(**options)
        torch.manual_seed(1)
        model = getattr(transformers, f"{name}ForCausalLM")._from_config(config, attn_implementation=implementation).cuda().eval()
        if weights is None:
            for key, parameter in model.named_parameters():  # scores of a trained model's size
                if "q_proj" in key or "k_proj" in key:
                    parameter.data *= 4
                if "sinks" in key:
                    parameter.data.normal_()
            weights = {key: x.bfloat16() for key, x in model.state_dict().items()}
        model.load_state_dict(weights)
        model.to(dtype)
        del calls[:]
        logits = model(input_ids=ids, attention_mask=keep, position_ids=positions, use_cache=False).logits.float() * keep[..., None]
        logits.square().mean().backward()
        gradient = torch.cat([p.grad.float().flatten() for key, p in model.named_parameters() if "q_proj.weight" in key or "v_proj.weight" in key])
        assert calls == (["FORWARD"] * 2 + ["BACKWARD"] * 2 if label == "ours" else [])
        with torch.no_grad():  # a prompt, then a token with the cache
            cache = model(input_ids=ids[:, :-1], attention_mask=keep[:, :-1], position_ids=positions[:, :-1], use_cache=True).past_key_values
            last = model(input_ids=ids[:, -1:], attention_mask=keep, position_ids=positions[:, -1:], past_key_values=cache).logits.float()
        results[label] = logits.detach(), gradient, last * keep[:, -1:, None]
    for right, eager, ours in zip(*(results[label] for label in ("right", "eager", "ours"))):
        error = lambda x: ((x - right).norm() / right.norm()).item()  # noqa: E731
        assert error(ours) < 1.3 * error(eager) + 2e-3, f"{error(ours)} beside {error(eager)} of eager attention in bfloat16"
