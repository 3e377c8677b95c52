"""FlashAttention's Python interface: FlashAttention-2's functions with their positional order, and FlashAttention-3's keywords as well.

q: [batch, seqlen, num_heads, head_dim], or [total, num_heads, head_dim] for the varlen functions; num_heads_q is a multiple of
num_heads_kv. causal and window_size are aligned bottom right, -1 is unbounded. A row that sees no key is 0. float32 works too, on CPUs.
Each function returns out, and with return_attn_probs (out, softmax_lse, None): lse is float32 [batch, num_heads, seqlen], or
[num_heads, total]; the third is the mask of a dropout, which is not there. lse is differentiable.

What tilewise does not have raises NotImplementedError; what only tunes FlashAttention's kernels (num_splits, pack_gqa, sm_margin) is
accepted and changes nothing.
"""

from .torch import attention

_NEUTRAL = {  # FlashAttention-3's keywords: the values under which tilewise computes what was asked for
    "qv": None,
    "q_descale": None,
    "k_descale": None,
    "v_descale": None,
    "attention_chunk": 0,
    "page_table": None,
    "block_table": None,
    "seqused_q": None,
    "leftpad_k": None,
    "dropout_p": 0.0,
}
_TUNING = {"num_splits", "pack_gqa", "sm_margin", "scheduler_metadata"}


def _attend(q, k, v, *, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs, softmax_scale, fa3, **options):
    sink = fa3.pop("learnable_sink", None)
    options["seqused_k"] = fa3.pop("seqused_k", None)
    for name, value in fa3.items():
        if name in _TUNING:
            continue
        if name not in _NEUTRAL:
            raise TypeError(f"unexpected keyword argument {name!r}")
        if value is not None and (hasattr(value, "shape") or value != _NEUTRAL[name]):
            given = f"a tensor of shape {list(value.shape)}" if hasattr(value, "shape") else repr(value)
            raise NotImplementedError(f"{name} is {given}, and tilewise has only {_NEUTRAL[name]!r} yet")
    left, right = (-1 if side is None or side < 0 else side for side in window_size)
    result = attention(
        q,
        k,
        v,
        window=(left, 0 if causal else right),
        softcap=softcap or 0.0,
        softmax_scale=softmax_scale,
        alibi_slopes=alibi_slopes,
        sink=sink,
        deterministic=deterministic,
        return_lse=return_attn_probs,
        **options,
    )
    return (*result, None) if return_attn_probs else result


def _parts(name, packed, count, dim):
    if packed.dim() != dim + 3 or packed.shape[dim] != count:
        raise ValueError(f"{name} has shape {list(packed.shape)}, but it has {dim + 3} dimensions, and {count} in dimension {dim}")
    return packed.unbind(dim)


# fmt: off
def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
                    deterministic=False, return_attn_probs=False, **fa3):
    """Attention of q [batch, seqlen_q, num_heads_q, head_dim] to k and v [batch, seqlen_k, num_heads_kv, head_dim]."""
    return _attend(q, k, v, softmax_scale=softmax_scale, causal=causal, window_size=window_size, softcap=softcap,
                   alibi_slopes=alibi_slopes, deterministic=deterministic, return_attn_probs=return_attn_probs,
                   fa3={"dropout_p": dropout_p, **fa3})


def flash_attn_qkvpacked_func(qkv, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
                              alibi_slopes=None, deterministic=False, return_attn_probs=False, **fa3):
    """As flash_attn_func, for qkv [batch, seqlen, 3, num_heads, head_dim]; nothing is copied."""
    return flash_attn_func(*_parts("qkv", qkv, 3, 2), dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
                           return_attn_probs, **fa3)


def flash_attn_kvpacked_func(q, kv, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
                             alibi_slopes=None, deterministic=False, return_attn_probs=False, **fa3):
    """As flash_attn_func, for kv [batch, seqlen_k, 2, num_heads_kv, head_dim]; nothing is copied."""
    return flash_attn_func(q, *_parts("kv", kv, 2, 2), dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
                           return_attn_probs, **fa3)


def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
                           causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
                           return_attn_probs=False, block_table=None, **fa3):
    """Attention of packed sequences: q [total_q, num_heads_q, head_dim], k and v [total_k, num_heads_kv, head_dim].

    cu_seqlens_q, cu_seqlens_k: int32 [batch + 1], sequence b is rows cu_seqlens[b] to cu_seqlens[b + 1]. max_seqlen_q, max_seqlen_k:
    upper bounds of the lengths, numbers of the host.
    """
    return _attend(q, k, v, softmax_scale=softmax_scale, causal=causal, window_size=window_size, softcap=softcap,
                   alibi_slopes=alibi_slopes, deterministic=deterministic, return_attn_probs=return_attn_probs,
                   cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k,
                   fa3={"dropout_p": dropout_p, "block_table": block_table, **fa3})


def flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, max_seqlen, dropout_p=0.0, softmax_scale=None, causal=False,
                                     window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
                                     return_attn_probs=False, **fa3):
    """As flash_attn_varlen_func, for qkv [total, 3, num_heads, head_dim]; nothing is copied."""
    return flash_attn_varlen_func(*_parts("qkv", qkv, 3, 1), cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, dropout_p, softmax_scale,
                                  causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs, **fa3)


def flash_attn_varlen_kvpacked_func(q, kv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
                                    causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
                                    return_attn_probs=False, **fa3):
    """As flash_attn_varlen_func, for kv [total_k, 2, num_heads_kv, head_dim]; nothing is copied."""
    return flash_attn_varlen_func(q, *_parts("kv", kv, 2, 1), cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
                                  softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs, **fa3)


def flash_attn_with_kvcache(q, k_cache, v_cache, *arguments, **options):
    """Not there yet: raises NotImplementedError. flash_attn_func with seqused_k attends to a cache that is not paged."""
    raise NotImplementedError("flash_attn_with_kvcache is not there yet; flash_attn_func(..., seqused_k=lengths) reads a cache that is not paged")
# fmt: on
