"""Between padded batches and packed sequences, with the names and results of FlashAttention's bert_padding."""

import torch


def index_first_axis(x, indices):
    """Rows x[indices] of the first dimension."""
    return x[indices]


def index_put_first_axis(values, indices, first_axis_dim):
    """[first_axis_dim, ...] with values at the rows `indices` and zeros elsewhere."""
    return values.new_zeros((first_axis_dim, *values.shape[1:])).index_copy(0, indices, values)


def unpad_input(hidden_states, attention_mask, unused_mask=None):
    """The rows of a padded batch that count, one after the other.

    hidden_states: [batch, seqlen, ...]. attention_mask: [batch, seqlen], not 0 where a token is. unused_mask: [batch, seqlen], not 0 for
    places that are kept in memory but do not count as tokens.
    Returns (rows [total, ...], indices [total] of the rows in the flattened batch, cu_seqlens int32 [batch + 1], max_seqlen int,
    seqused int32 [batch]: tokens of each sequence, without unused places). Waits for the device: the number of rows is data.
    """
    tokens = attention_mask != 0
    kept = tokens if unused_mask is None else tokens | (unused_mask != 0)
    lengths = kept.sum(-1, dtype=torch.int32)
    indices = kept.flatten().nonzero().flatten()
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    max_seqlen = int(lengths.max()) if lengths.numel() else 0
    return hidden_states.flatten(0, 1)[indices], indices, cu_seqlens, max_seqlen, tokens.sum(-1, dtype=torch.int32)


def pad_input(hidden_states, indices, batch, seqlen):
    """The reverse of unpad_input: [total, ...] to [batch, seqlen, ...], with zeros where no token is."""
    return index_put_first_axis(hidden_states, indices, batch * seqlen).unflatten(0, (batch, seqlen))
