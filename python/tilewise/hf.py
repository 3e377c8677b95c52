"""Hugging Face Transformers: register(), then attn_implementation="tilewise".

Transformers asks an implementation for two functions: one that attends, and one that turns a model's mask into what the first wants.
Without the second the mask is silently None. Here a mask is one of

    [batch, keys]       not 0 for keys that are no padding; with the band that the model's mask function describes
    [batch, 1, keys]    the sequence that a token belongs to, where several are packed into a row
    4 dimensions        a model's own, or one that is none of the above: taken where it is a band and padding, else refused
    [0, 0, keys, left + 1, right + 1]   nothing is padded: a band and no elements, its shape says everything
    None                the model asked for no mask: the layer says whether it is causal

so nothing of size queries x keys is made for causal masks, windows and padding. Masks with elements are read outside of torch.compile's
graphs: what is in them decides what is computed.
"""

import sys

import torch

from .bert_padding import pad_input
from .torch import attention as attend

_MASKS = "transformers.masking_utils"


def register(name: str = "tilewise") -> None:
    """Registers attention and mask functions, so that from_pretrained(..., attn_implementation=name) uses tilewise.

    Raises ImportError where the installed Transformers has no AttentionMaskInterface (it came with 4.53).
    """
    try:
        from transformers import AttentionInterface
        from transformers.masking_utils import AttentionMaskInterface
    except ImportError as error:
        raise ImportError("tilewise.hf needs transformers 4.53 or newer, with AttentionInterface and AttentionMaskInterface") from error
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, mask)


# Transformers describes the queries by q_length and q_offset, a year ago by cache_position.
@torch.compiler.disable
def mask(batch_size, *, kv_length, kv_offset=0, mask_function, attention_mask=None, cache_position=None, q_length=None, q_offset=0,
         **others):  # fmt: skip
    """The mask function: what Transformers knows about a mask, as attention() wants it. See the head of this file."""
    _check_model(others.get("config"))
    if q_length is None:
        q_length, q_offset = cache_position.shape[0], cache_position[0]
    known = _describe(mask_function)
    if known is not None:
        band, segments = known
        if segments is not None and attention_mask is None and bool((segments == segments[:, :1]).all()):
            segments = None  # torch.compile has Transformers give them always
        # Bands are aligned bottom right. A static cache, with room behind the last key, is not.
        aligned = band == (-1, -1) or int(q_offset) - kv_offset == kv_length - q_length
        if segments is not None and attention_mask is None and segments.shape[-1] == kv_length == q_length:
            return _with_band(segments.expand(batch_size, -1)[:, None], band)
        # A model that forbids Transformers to leave the mask out works with it, joins it to another for instance.
        own = not others.get("allow_is_bidirectional_skip" if band == (-1, -1) else "allow_is_causal_skip", True)
        if segments is None and aligned and not own:
            keys = _keys(attention_mask, kv_length, kv_offset)
            if keys is None:
                device = others.get("device") or getattr(cache_position, "device", None)
                return torch.empty(0, 0, kv_length, band[0] + 1, band[1] + 1, dtype=torch.bool, device=device)
            return _with_band(keys, band)
    positions = {"cache_position": cache_position} if cache_position is not None else {"q_length": q_length, "q_offset": q_offset}
    others.update(allow_is_causal_skip=False, allow_is_bidirectional_skip=False, allow_torch_fix=False)
    from transformers.masking_utils import sdpa_mask

    return sdpa_mask(
        batch_size=batch_size,
        kv_length=kv_length,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        **positions,
        **others,
    )


# fmt: off
def attention(module, query, key, value, attention_mask, dropout=0.0, scaling=None, sliding_window=None, softcap=None, is_causal=None,
              s_aux=None, cu_seq_lens_q=None, cu_seq_lens_k=None, max_length_q=None, max_length_k=None, **others):
    """The attention function: query [batch, num_heads_q, seqlen_q, head_dim], key and value [batch, num_heads_kv, seqlen_k, ...].

    Returns (o [batch, seqlen_q, num_heads_q, head_dim_v], None). Queries that are padding get zeros. Raises NotImplementedError for what
    tilewise does not have: dropout, position biases, head masks, weights as an output, masks that are more than a band and padding.
    """
    # fmt: on
    _refuse(module, dropout, scaling, others)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    side = -1 if sliding_window is None else sliding_window - 1  # a window of n keys counts the query's own
    band = (side, 0 if causal else side)
    options = {"softmax_scale": scaling, "softcap": softcap or 0.0, "sink": s_aux}
    if cu_seq_lens_q is not None and cu_seq_lens_k is not None:
        return _packed(q, k, v, cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k, window=band, **options), None
    if attention_mask is not None and attention_mask.dim() == 5:
        _, _, keys, left, right = attention_mask.shape
        if keys != k.shape[1]:
            raise ValueError(f"attention_mask is for {keys} keys, but there are {k.shape[1]}")
        band, attention_mask = (left - 1, right - 1), None
    if attention_mask is None:
        return attend(q, k, v, window=band, **options), None
    return _masked(q, k, v, attention_mask, band, options), None


@torch.compiler.disable
def _masked(q, k, v, attention_mask, band, options):
    band = getattr(attention_mask, "_tilewise_band", band)
    if attention_mask.dim() == 3:
        starts = _starts(attention_mask[:, 0])
        return _packed(q, k, v, starts, starts, None, None, window=band, **options)
    if attention_mask.dim() == 4:
        attention_mask, band = _read_dense(attention_mask, q.shape[0], q.shape[1], k.shape[1], band)
        k, v = k[:, : attention_mask.shape[1]], v[:, : attention_mask.shape[1]]
    return _padded(q, k, v, attention_mask, band, options)


def _check_model(config):
    """Raises for a model that asks for masks but attends by itself: it would take a mask that is None for no mask at all."""
    name = getattr(config, "model_type", "").replace("-", "_")
    modeling = sys.modules.get(f"transformers.models.{name}.modeling_{name}")
    if modeling is not None and not hasattr(modeling, "ALL_ATTENTION_FUNCTIONS"):
        raise NotImplementedError(f"model_type {name!r} does not use Transformers' attention interface, which tilewise needs: use 'eager'")


def _refuse(module, dropout, scaling, others):
    if dropout:
        raise NotImplementedError(f"dropout {dropout} is not 0, and tilewise has no dropout: set the config's attention dropout to 0")
    for name in ("position_bias", "head_mask", "layer_head_mask"):
        if others.get(name) is not None:
            raise NotImplementedError(f"{name} is given, and tilewise does not have it yet")
    if others.get("output_attentions"):
        raise NotImplementedError("output_attentions is True, but tilewise never writes attention weights to memory: use 'eager'")
    if scaling is None and (getattr(module, "scale_attn_by_inverse_layer_idx", False) or not getattr(module, "scale_attn_weights", True)):
        raise NotImplementedError("this layer scales scores in a way that it does not tell its attention function: use 'eager'")


# --- What a mask function of Transformers describes ---


def _describe(function):
    """((window_left, window_right), segments or None) of a mask function that is made of parts known here, else None.

    The parts are closures of transformers.masking_utils, told apart by name; one that is renamed there becomes unknown, never wrong.
    """
    left = right = -1
    segments, remapped = None, False
    for part in _parts(function):
        if getattr(part, "__module__", None) != _MASKS:
            return None
        name, inside = part.__qualname__.partition(".")[0], _inside(part)
        if name == "causal_mask_function":
            right = 0
        elif name == "sliding_window_overlay":
            left = _narrower(left, inside["sliding_window"] - 1)
        elif name == "sliding_window_bidirectional_overlay":
            left, right = _narrower(left, inside["sliding_window"]), _narrower(right, inside["sliding_window"])
        elif name == "packed_sequence_mask_function":
            segments = inside["packed_sequence_mask"]
        elif name == "remap_positions_for_packed_sequence":  # distances within a sequence stay what they are
            remapped = True
        elif name != "bidirectional_mask_function":
            return None
    return None if remapped and segments is None else ((left, right), segments)


def _parts(function):
    name = getattr(function, "__qualname__", "").partition(".")[0]
    if name == "and_masks":
        for part in _inside(function)["mask_functions"]:
            yield from _parts(part)
    else:
        yield function
    if name == "remap_positions_for_packed_sequence":
        yield from _parts(_inside(function)["mask_function"])


def _inside(function):
    return dict(zip(function.__code__.co_freevars, (cell.cell_contents for cell in function.__closure__ or ())))


def _narrower(a, b):
    return b if a < 0 else min(a, b)


def _with_band(keys, band):
    keys._tilewise_band = band
    return keys


def _keys(attention_mask, kv_length, kv_offset):
    """The part of a padding mask that belongs to the keys, or None where it masks nothing."""
    if attention_mask is None:
        return None
    keys = attention_mask[:, kv_offset : kv_offset + kv_length].bool()
    keys = torch.nn.functional.pad(keys, (0, kv_length - keys.shape[1]))
    return None if bool(keys.all()) else keys


def _read_dense(dense, batch, seqlen_q, seqlen_k, layers_band):
    """(keys [batch, n <= seqlen_k], band) of a mask of 4 dimensions, if that is all it says. The mask counts, not what a layer says of
    itself; but that is the likeliest."""
    if dense.shape[-1] < seqlen_k:
        raise ValueError(f"attention_mask has shape {list(dense.shape)}, but there are {seqlen_k} keys")
    dense = dense[..., :seqlen_k]
    visible = dense if dense.dtype == torch.bool else dense == 0
    hidden = ~visible if dense.dtype == torch.bool else dense <= torch.finfo(dense.dtype).min / 2
    visible = visible.expand(batch, -1, seqlen_q, -1)
    if bool((visible | hidden).all()):
        for band in dict.fromkeys((layers_band, (-1, -1), (-1, 0))):
            keys = _keys_in_band(visible, band)
            if keys is not None:
                return keys, band
    raise NotImplementedError(
        f"the attention mask of shape {list(dense.shape)} is more than padding and a band (tried: the layer's window, {layers_band[0]} "
        f"keys back and {layers_band[1]} ahead, where -1 is unbounded; none; causal), and tilewise has no other masks or biases yet"
    )


def _keys_in_band(visible, band):
    """The keys [batch, n] that anybody sees, if visible [batch, 1 or heads, seqlen_q, seqlen_k] is these and the band, else None."""
    seqlen_q, seqlen_k = visible.shape[2:]
    keys = visible.any(2).any(1)
    shown = keys.any(0).nonzero()
    end = max(int(shown.max()) + 1, seqlen_q) if len(shown) and band != (-1, -1) else seqlen_k
    if band != (-1, -1) and not seqlen_q <= end <= seqlen_k:  # a band has a key at each query's place
        return None
    keys = keys[:, :end]
    key = torch.arange(end, device=visible.device)
    query = torch.arange(end - seqlen_q, end, device=visible.device)[:, None]
    in_band = torch.ones(1, 1, dtype=torch.bool, device=visible.device)
    if band[0] >= 0:
        in_band = in_band & (key >= query - band[0])
    if band[1] >= 0:
        in_band = in_band & (key <= query + band[1])
    expected = keys[:, None, None, :] & in_band
    padding = torch.zeros((), dtype=torch.bool, device=visible.device) if band == (-1, -1) else ~keys[:, None, end - seqlen_q :, None]
    return keys if bool(((visible[..., :end] == expected) | padding).all()) else None


# --- Padding and packing ---


def _packed(q, k, v, starts_q, starts_k, max_q, max_k, **options):
    rows = (x.flatten(0, 1) for x in (q, k, v))
    lengths = {"max_seqlen_q": int(max_q or 0), "max_seqlen_k": int(max_k or 0)}
    return attend(*rows, cu_seqlens_q=starts_q.int(), cu_seqlens_k=starts_k.int(), **lengths, **options).unflatten(0, q.shape[:2])


def _starts(segments):
    """cu_seqlens of the flattened rows: a sequence begins with each row and wherever the number changes."""
    change = torch.nn.functional.pad(segments[:, 1:] != segments[:, :-1], (1, 0), value=True).flatten().nonzero().flatten()
    return torch.nn.functional.pad(change, (0, 1), value=segments.numel()).int()


class _Padding:
    """Where the tokens of a padded batch are. The same for every layer of a model, so it is computed once a mask."""

    def __init__(self, keys, seqlen_q, banded):
        lengths = keys.sum(-1, dtype=torch.int32)
        self.none = bool(keys.all())
        self.keys = keys.flatten().nonzero().flatten()
        self.starts_k = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
        self.max_k = int(lengths.max()) if lengths.numel() else 0
        self.queries = None  # without a band a query sees the same keys wherever it is: all queries stay
        self.starts_q = torch.arange(0, keys.shape[0] + 1, dtype=torch.int32, device=keys.device) * seqlen_q
        self.max_q = seqlen_q
        if banded:  # a query stands at its key's place: one whose key is padding is padding too
            queries = keys[:, keys.shape[1] - seqlen_q :]
            lengths_q = queries.sum(-1, dtype=torch.int32)
            self.queries = queries.flatten().nonzero().flatten()
            self.starts_q = torch.nn.functional.pad(lengths_q.cumsum(0, dtype=torch.int32), (1, 0))
            self.max_q = int(lengths_q.max()) if lengths_q.numel() else 0
            place = torch.arange(keys.shape[1], device=keys.device)
            first, last = torch.where(keys, place, keys.shape[1]).amin(-1), torch.where(keys, place, -1).amax(-1)
            self.holes = bool((keys.any(-1) & (last - first + 1 != lengths)).any())


def _padded(q, k, v, keys, band, options):
    batch, seqlen_q = q.shape[:2]
    banded = band != (-1, -1)
    if keys.shape != (batch, k.shape[1]) or banded and seqlen_q > k.shape[1]:
        raise ValueError(f"attention_mask has shape {list(keys.shape)}, but there are {batch} sequences, {seqlen_q} queries and {k.shape[1]} keys")
    version = (None if keys.is_inference() else keys._version, seqlen_q, banded)
    padding, of = getattr(keys, "_tilewise_padding", (None, None))
    if of != version:
        padding = _Padding(keys.bool(), seqlen_q, banded)
        keys._tilewise_padding = padding, version
    if padding.none:
        return attend(q, k, v, window=band, **options)
    if banded and padding.holes and (band[0] >= 0 or band[1] > 0):
        raise NotImplementedError("attention_mask hides keys between others, and tilewise's windows count every key: pad at the ends only")
    queries = q.flatten(0, 1)
    o = attend(
        queries if padding.queries is None else queries[padding.queries],
        k.flatten(0, 1)[padding.keys],
        v.flatten(0, 1)[padding.keys],
        cu_seqlens_q=padding.starts_q,
        cu_seqlens_k=padding.starts_k,
        max_seqlen_q=padding.max_q,
        max_seqlen_k=padding.max_k,
        window=band,
        **options,
    )
    return o.unflatten(0, (batch, seqlen_q)) if padding.queries is None else pad_input(o, padding.queries, batch, seqlen_q)
