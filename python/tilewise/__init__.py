"""Exact attention on CPUs and NVIDIA GPUs, forward and backward, with linear memory.

    o = tilewise.attention(q, k, v, causal=True)        # NumPy, PyTorch, CuPy, JAX: what goes in comes out
    tilewise.explain("q4096 h16 d64 causal")            # which kernel, which tiles, why not another
    tilewise.devices()

`tilewise.torch` holds the PyTorch operator (autograd, torch.compile, SDPA), `tilewise.flash_attn_interface` FlashAttention's functions,
`tilewise.hf` the registration with Hugging Face Transformers. Importing this module imports none of those frameworks.
"""

import operator

from . import _core
from ._arrays import Gradients, attention, attention_backward
from ._core import Device, Explanation, devices

__version__ = _core.__version__
__all__ = ["Device", "Explanation", "Gradients", "attention", "attention_backward", "devices", "explain"]


def explain(problem: str, device: Device | None = None, *, lengths_q=(), lengths_k=()) -> Explanation:
    """What a plan will do, and every kernel with the sentence of its refusal.

    problem: words in any order, as in "bwd b2 q4096 k4096 h32/8 d128 bf16 causal"; README.md has the grammar.
    device: a tilewise.Device; the CPU where none is given.
    lengths_q, lengths_k: [batch] lengths of packed sequences; without them each counts with its upper bound.
    Returns an Explanation. Raises ValueError for a problem that makes no sense, NotImplementedError where no kernel takes it.
    """
    if not isinstance(problem, str):
        raise TypeError(f"problem {problem!r} is not a string: a problem in words, as in 'q4096 h16 d64 causal'")
    if device is not None and not isinstance(device, Device):
        raise TypeError(f"device {device!r} is not a tilewise.Device: Device.cpu(), Device.cuda(0), or one of devices()")
    lengths = []
    for name, given in (("lengths_q", lengths_q), ("lengths_k", lengths_k)):
        try:
            lengths.append([operator.index(length) for length in given])
        except TypeError:
            raise TypeError(f"{name} {given!r} is not a sequence of whole numbers") from None
        if (beyond := next((length for length in lengths[-1] if not 0 <= length < 2**31), None)) is not None:
            raise ValueError(f"{name} has {beyond}, which is not between 0 and 2147483647")
    return _core.explain(problem, Device.cpu() if device is None else device, *lengths)
