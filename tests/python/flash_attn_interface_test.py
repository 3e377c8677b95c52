"""tilewise.flash_attn_interface against a plain softmax, and its signatures against FlashAttention-2's."""

import inspect

import pytest
from conftest import needs

needs("torch")
import torch  # noqa: E402
from reference import reference  # noqa: E402

from tilewise import bert_padding, flash_attn_interface as fa  # noqa: E402

REST = ["dropout_p", "softmax_scale", "causal", "window_size", "softcap", "alibi_slopes", "deterministic", "return_attn_probs"]
LENGTHS = ["cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"]


@pytest.mark.parametrize(
    ("name", "positional"),
    [
        ("flash_attn_func", ["q", "k", "v", *REST]),
        ("flash_attn_qkvpacked_func", ["qkv", *REST]),
        ("flash_attn_kvpacked_func", ["q", "kv", *REST]),
        ("flash_attn_varlen_func", ["q", "k", "v", *LENGTHS, *REST, "block_table"]),
        ("flash_attn_varlen_qkvpacked_func", ["qkv", "cu_seqlens", "max_seqlen", *REST]),
        ("flash_attn_varlen_kvpacked_func", ["q", "kv", *LENGTHS, *REST]),
    ],
)
def test_positional_order_is_flash_attention_2s(name, positional):
    parameters = list(inspect.signature(getattr(fa, name)).parameters.values())
    assert [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD] == positional
    defaults = dict(zip(REST, (0.0, None, False, (-1, -1), 0.0, None, False, False)))
    assert all(p.default == defaults[p.name] for p in parameters if p.name in defaults)


def qkv(seqlen=23, heads=4):
    return torch.randn(2, seqlen, 3, heads, 16, generator=torch.Generator().manual_seed(0))


def close(got, q, k, v, **options):
    torch.testing.assert_close(got, torch.from_numpy(reference(*(x.numpy() for x in (q, k, v)), **options)[0]).float(), rtol=0, atol=5e-6)


def test_dense():
    x = qkv()
    q, k, v = x.unbind(2)
    slopes = torch.tensor([0.5, 0.25, 0.1, 0.0])
    close(fa.flash_attn_func(q, k, v, 0.0, 0.3, True, (5, 7), 2.0), q, k, v, softmax_scale=0.3, window=(5, 0), softcap=2.0)
    close(fa.flash_attn_func(q[:, :9], k, v, causal=True), q[:, :9], k, v, causal=True)
    close(fa.flash_attn_func(q, k, v, alibi_slopes=slopes), q, k, v, alibi_slopes=slopes.numpy())
    close(fa.flash_attn_qkvpacked_func(x, causal=True), q, k, v, causal=True)
    kv = x[:, :, 1:, :2]
    close(fa.flash_attn_kvpacked_func(q, kv, window_size=(3, None)), q, *kv.unbind(2), window=(3, -1))
    o, lse, dropout_mask = fa.flash_attn_func(q, k, v, return_attn_probs=True)
    assert lse.shape == (2, 4, 23) and lse.dtype == torch.float32 and dropout_mask is None
    sink = torch.ones(4)
    close(fa.flash_attn_func(q, k, v, num_splits=3, pack_gqa=True, learnable_sink=sink), q, k, v, sink=sink.numpy())


def test_packed_functions_and_padding_round_trip():
    x = qkv()
    keep = torch.arange(23)[None] < torch.tensor([[23], [11]])
    rows, indices, starts, longest, used = bert_padding.unpad_input(x, keep)
    assert starts.tolist() == [0, 23, 34] and longest == 23 and used.tolist() == [23, 11] and starts.dtype == torch.int32
    dense = fa.flash_attn_qkvpacked_func(x[1:, :11], causal=True)
    q, k, v = rows.unbind(1)
    for o in (
        fa.flash_attn_varlen_qkvpacked_func(rows, starts, longest, causal=True),
        fa.flash_attn_varlen_kvpacked_func(q, rows[:, 1:], starts, starts, longest, longest, causal=True),
        fa.flash_attn_varlen_func(q, k, v, starts, starts, longest, longest, 0.0, None, True),
    ):
        padded = bert_padding.pad_input(o, indices, 2, 23)
        assert torch.equal(padded[1:, :11], dense) and not padded[1, 11:].any()
    lse = fa.flash_attn_varlen_func(q, k, v, starts, starts, longest, longest, return_attn_probs=True)[1]
    assert lse.shape == (4, 34)
    assert torch.equal(bert_padding.index_put_first_axis(bert_padding.index_first_axis(q, indices[:3]), indices[:3], 34)[:3], q[:3])
    unused = torch.zeros_like(keep)
    unused[1, 11] = True
    rows, _, starts, longest, used = bert_padding.unpad_input(x, keep, unused)
    assert starts.tolist() == [0, 23, 35] and used.tolist() == [23, 11] and len(rows) == 35


def test_gradients_reach_packed_tensors():
    x = qkv().requires_grad_()
    y = x.detach().clone().requires_grad_()
    fa.flash_attn_qkvpacked_func(x, causal=True).square().sum().backward()
    fa.flash_attn_func(*(z.contiguous() for z in y.unbind(2)), causal=True).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)


@pytest.mark.parametrize(
    "option", [{"dropout_p": 0.1}, {"qv": torch.zeros(1)}, {"q_descale": torch.ones(1)}, {"attention_chunk": 4}, {"page_table": torch.zeros(1)}]
)
def test_what_is_not_there_is_refused(option):
    q, k, v = qkv().unbind(2)
    with pytest.raises(NotImplementedError, match=next(iter(option))):
        fa.flash_attn_func(q, k, v, **option)


def test_other_refusals():
    q, k, v = qkv().unbind(2)
    with pytest.raises(TypeError, match="unexpected keyword argument 'casual'"):
        fa.flash_attn_func(q, k, v, casual=True)
    with pytest.raises(NotImplementedError, match="not there yet"):
        fa.flash_attn_with_kvcache(q, k, v)
    starts = torch.tensor([0, 23], dtype=torch.int32)
    with pytest.raises(NotImplementedError, match="block_table"):
        fa.flash_attn_varlen_func(q[0], k[0], v[0], starts, starts, 23, 23, block_table=torch.zeros(1))
    with pytest.raises(ValueError, match=r"cu_seqlens_q\[1\] is 23, the end of a sequence of 23 rows, which is longer than max_seqlen_q 5"):
        fa.flash_attn_varlen_func(q[0], k[0], v[0], starts, starts, 5, 5)
    with pytest.raises(ValueError, match=r"kv has shape \[2, 23, 3, 4, 16\], but it has 5 dimensions, and 2 in dimension 2"):
        fa.flash_attn_kvpacked_func(q, torch.zeros(2, 23, 3, 4, 16))
