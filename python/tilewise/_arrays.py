"""attention() for arrays of any framework: NumPy, CuPy, JAX and whatever else speaks DLPack. PyTorch's tensors go to tilewise.torch."""

import math
import sys
from typing import Any, Literal, NamedTuple

from . import _core

_CPU, _CUDA = 1, 2  # DLPack's device types
_FLOAT32 = _core.DataType.FLOAT32
_NUMPY_TYPES = {"float32": 0, "bfloat16": 1, "float16": 2, "int32": 3}  # _core.DataType
Alignment = Literal["bottom_right", "top_left"]


class Gradients(NamedTuple):
    """What attention_backward() returns: each shaped as its input; dsink is None where no sink was given."""

    dq: Any
    dk: Any
    dv: Any
    dsink: Any


def attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    alignment: Alignment = "bottom_right",
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    sink: Any = None,
    cu_seqlens_q: Any = None,
    cu_seqlens_k: Any = None,
    max_seqlen_q: int = 0,
    max_seqlen_k: int = 0,
    seqused_k: Any = None,
    deterministic: bool = False,
    return_lse: bool = False,
) -> Any:
    """softmax(softmax_scale * q k^T) v, exactly, with memory that grows with the length and not with its square.

    Arrays of one framework on one device: float32, bfloat16 or float16, any strides as long as the last dimension is contiguous. Nothing
    is copied. Shapes are dense, or packed where cu_seqlens_q and cu_seqlens_k are given:

    q: [batch, seqlen_q, num_heads_q, head_dim] or [total_q, num_heads_q, head_dim]
    k: [batch, seqlen_k, num_heads_kv, head_dim] or [total_k, num_heads_kv, head_dim]; num_heads_q is a multiple of num_heads_kv
    v: [batch, seqlen_k, num_heads_kv, head_dim_v] or [total_k, num_heads_kv, head_dim_v]
    causal: a query sees no later key. window: (left, right) keys beside its own that it sees, both included; -1 is unbounded.
    alignment: where the diagonal ends, "bottom_right" (the last query sees the last key) or "top_left" (the first the first).
    softmax_scale: 1/sqrt(head_dim) where not given. softcap: s becomes softcap * tanh(s / softcap) where above 0.
    alibi_slopes: float32 [num_heads_q] or [batch, num_heads_q]. sink: float32 [num_heads_q], a logit that takes part in the sum.
    cu_seqlens_q, cu_seqlens_k: int32 [batch + 1], sequence b is rows cu_seqlens[b] to cu_seqlens[b + 1].
    max_seqlen_q, max_seqlen_k: upper bounds of their lengths; 0: read from cu_seqlens on a CPU, all rows on a GPU. A longer sequence is
    an error on a CPU; a GPU does not look, and may leave rows out. Rows before the first sequence and after the last are 0, their lse -inf.
    seqused_k: int32 [batch], caps the keys of each sequence; one below 0 counts as 0, one above the sequence's length as its length.
    deterministic: bitwise repeatable gradients; on a CPU they always are.

    Returns o, shaped as q with head_dim_v, in q's framework; with return_lse (o, lse), where lse is float32 [batch, num_heads_q, seqlen_q]
    or [num_heads_q, total_q], the natural logarithm of the sum of exponentials. A row that sees no key is 0, its lse -inf (or its sink).

    Raises ValueError for arguments that contradict each other, TypeError for objects and element types that are not known,
    NotImplementedError where no kernel takes the problem; the message names argument, value and rule.
    """
    options = dict(locals())
    if _is_torch(q):
        from . import torch

        return torch.attention(**options)
    want_lse = options.pop("return_lse")
    call, framework = _plan(_core.Pass.FORWARD, **options)
    packed = cu_seqlens_q is not None  # rows of no sequence are not written: they are what rows that see nothing are
    o, o_view = framework.empty((*q.shape[:-1], v.shape[-1]), call.dtype, 0.0 if packed else None)
    lse = lse_view = None
    if want_lse:
        lse, lse_view = framework.empty(_lse_shape(q), _FLOAT32, -math.inf if packed else None)
    call.run(framework.stream, 0, o_view, lse_view)
    framework.finish()
    return (framework.give(o), framework.give(lse)) if want_lse else framework.give(o)


def attention_backward(
    do: Any,
    q: Any,
    k: Any,
    v: Any,
    o: Any,
    lse: Any,
    *,
    dlse: Any = None,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    alignment: Alignment = "bottom_right",
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    sink: Any = None,
    cu_seqlens_q: Any = None,
    cu_seqlens_k: Any = None,
    max_seqlen_q: int = 0,
    max_seqlen_k: int = 0,
    seqused_k: Any = None,
    deterministic: bool = False,
) -> Gradients:
    """The gradients of attention() with respect to q, k, v and sink.

    do: the gradient of o, shaped as o. o, lse: what attention(..., return_lse=True) returned for the same q, k, v and options.
    dlse: the gradient of lse, where the loss depends on it. Everything else as in attention().
    Returns Gradients(dq, dk, dv, dsink). Raises as attention() does. PyTorch users have autograd: this is for everybody else.
    """
    options = dict(locals())
    arrays = {name: options.pop(name) for name in ("do", "o", "lse", "dlse")}
    if _is_torch(q):
        raise TypeError("q is a PyTorch tensor, whose gradients autograd computes: call attention() and backward()")
    call, framework = _plan(_core.Pass.BACKWARD, **options)
    unwritten = 0.0 if cu_seqlens_q is not None else None
    (dq, dq_view), (dk, dk_view), (dv, dv_view) = (framework.empty(tuple(x.shape), call.dtype, unwritten) for x in (q, k, v))
    dsink = dsink_view = None
    if sink is not None:
        dsink, dsink_view = framework.empty(tuple(sink.shape), _FLOAT32)
    inputs = {name: framework.view(name, array) for name, array in arrays.items()}
    call.run(framework.stream, 0, **inputs, dq=dq_view, dk=dk_view, dv=dv_view, dsink=dsink_view)
    framework.finish()
    return Gradients(*(framework.give(x) for x in (dq, dk, dv, dsink)))


def band(causal: bool, window: tuple[int | None, int | None], alignment: Alignment) -> tuple[int, int, bool]:
    """window_left, window_right and whether the diagonal starts at the top left; causal is window_right 0."""
    if type(window) is tuple and window == (-1, -1) and type(causal) is bool and alignment == "bottom_right":
        return -1, 0 if causal else -1, False  # what nearly everybody asks for
    if causal not in (True, False):
        raise ValueError(f"causal {causal!r} is neither True nor False")
    if not isinstance(window, (tuple, list)) or len(window) != 2 or not all(side is None or hasattr(side, "__index__") for side in window):
        raise TypeError(f"window {window!r} is not two whole numbers: (left, right), -1 is unbounded")
    left, right = (-1 if side is None else int(side) for side in window)
    if causal and right > 0:
        raise ValueError(f"window right {right} contradicts causal, which is window right 0")
    if alignment not in ("bottom_right", "top_left"):
        raise ValueError(f"alignment {alignment!r} is neither 'bottom_right' nor 'top_left'")
    return left, 0 if causal else right, alignment == "top_left"


def _is_torch(x):
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(x, torch.Tensor)


def _lse_shape(q):
    return (q.shape[0], q.shape[2], q.shape[1]) if q.ndim == 4 else (q.shape[1], q.shape[0])


# fmt: off
def _plan(pass_, q, k, v, causal, window, alignment, softmax_scale, softcap, alibi_slopes, sink, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
          max_seqlen_k, seqused_k, deterministic):
    # fmt: on
    framework = _NumPy(q) if _is_numpy(q) else _DLPack(q)
    left, right, top_left = band(causal, window, alignment)
    view = framework.view
    options = (
        *(view("cu_seqlens_q", cu_seqlens_q), view("cu_seqlens_k", cu_seqlens_k), view("seqused_k", seqused_k)),
        *(view("alibi_slopes", alibi_slopes), view("sink", sink)),
        *(softmax_scale, softcap, left, right, top_left, max_seqlen_q, max_seqlen_k, deterministic),
    )
    return _core.Call(pass_, view("q", q), view("k", k), view("v", v), options, 0), framework


def _is_numpy(x):
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(x, numpy.ndarray)


class _NumPy:
    """NumPy's own description of its memory: DLPack knows neither its read-only arrays nor its bfloat16 (ml_dtypes)."""

    stream = 0

    def __init__(self, q):
        self._dtype = q.dtype

    def view(self, name, x):
        if x is None:
            return None
        if not _is_numpy(x):
            raise TypeError(f"{name} is of type {type(x).__name__}, but q is a NumPy array")
        if hasattr(x, "mask"):  # numpy.ma's, which numpy need not have imported
            raise TypeError(f"{name} is of type {type(x).__name__}, whose mask tilewise does not read: fill it")
        dtype = _NUMPY_TYPES.get(x.dtype.name) if x.dtype.isnative else None
        if dtype is None:
            _core.refuse_dtype(name, x.dtype.name if x.dtype.isnative else x.dtype.str)
        if any(stride % x.itemsize for stride in x.strides):
            raise ValueError(f"{name} has strides of {x.strides} bytes, which are no multiples of its element size {x.itemsize}")
        return x.ctypes.data, dtype, _CPU, 0, x.shape, tuple(stride // x.itemsize for stride in x.strides)

    def empty(self, shape, dtype, fill=None):
        import numpy

        dtype = numpy.float32 if dtype == _FLOAT32 else self._dtype
        array = numpy.empty(shape, dtype) if fill is None else numpy.full(shape, fill, dtype)
        return array, self.view("the result", array)

    def finish(self):
        pass

    def give(self, array):
        return array


class _DLPack:
    """Every other framework: memory comes by DLPack, results go back by it. On a GPU CuPy's current stream is used; for frameworks whose
    streams cannot be asked for, the default stream, and the call waits for its result."""

    def __init__(self, q):
        if not hasattr(q, "__dlpack_device__"):
            raise TypeError(
                f"q is of type {type(q).__name__}, which is not read: NumPy's arrays, PyTorch's tensors and everything with __dlpack__ "
                "will do"
            )
        device_type, index = (int(x) for x in q.__dlpack_device__())
        self._cuda = device_type not in (_CPU, 3)  # 3: pinned memory of the host
        self._device = (_CUDA, index) if self._cuda else (_CPU, 0)
        self._cupy = type(q).__module__.partition(".")[0] == "cupy"
        self._from_dlpack = self._importer(q)
        self.stream = sys.modules["cupy"].cuda.get_current_stream().ptr if self._cuda and self._cupy else 0

    def view(self, name, x):
        if x is None or not hasattr(x, "__dlpack__"):
            return x  # _core says what is wrong with it
        # DLPack's 1 is CUDA's default stream: the producer makes it wait for what it has in flight.
        return x.__dlpack__(stream=self.stream or 1) if self._cuda else x

    def empty(self, shape, dtype, fill=None):
        array = _core.empty(shape, dtype, *self._device, fill)
        return array, array

    def finish(self):
        if self._cuda and not self._cupy:
            _core.synchronize(self._device[1])

    def give(self, array):
        return None if array is None else self._from_dlpack(array)

    @staticmethod
    def _importer(q):
        if hasattr(q, "__array_namespace__"):
            return q.__array_namespace__().from_dlpack
        module = sys.modules[type(q).__module__.partition(".")[0]]
        if not hasattr(module, "from_dlpack"):
            raise TypeError(f"q is of type {type(q).__name__}, and {module.__name__} has no from_dlpack to take the result")
        return module.from_dlpack
