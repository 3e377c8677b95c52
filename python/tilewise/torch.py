"""Attention as a PyTorch operator: autograd (lse included), torch.compile without graph breaks, autocast, CUDA graphs, SDPA.

The operators are torch.ops.tilewise.forward and .backward; attention() is how to call them. They are registered from Python over plain
addresses, so that one build serves every PyTorch from 2.4 on.
"""

from __future__ import annotations

import torch

from . import _core
from ._arrays import band

_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int32: 3}  # _core.DataType
_DEVICES = {"cpu": 1, "cuda": 2}  # DLPack's device types
_WORKSPACE_ALIGNMENT = 256

# What forward and backward have in common: the optional tensors, then the problem.
_OPTIONS = (
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? seqused_k, Tensor? alibi_slopes, Tensor? sink, float? softmax_scale, "
    "float softcap, SymInt window_left, SymInt window_right, bool top_left, SymInt max_seqlen_q, SymInt max_seqlen_k, bool deterministic"
)
_library = torch.library.Library("tilewise", "DEF")
_library.define(f"forward(Tensor q, Tensor k, Tensor v, {_OPTIONS}) -> (Tensor o, Tensor lse)")
_library.define(
    f"backward(Tensor do, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, {_OPTIONS})"
    " -> (Tensor dq, Tensor dk, Tensor dv, Tensor dsink)"
)
_forward, _backward = torch.ops.tilewise.forward.default, torch.ops.tilewise.backward.default


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    alignment: str = "bottom_right",
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    sink: torch.Tensor | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    max_seqlen_q: int = 0,
    max_seqlen_k: int = 0,
    seqused_k: torch.Tensor | None = None,
    deterministic: bool = False,
    return_lse: bool = False,
):
    """tilewise.attention() for PyTorch: same arguments, shapes, results and errors, on the tensors' device and its current stream.

    Differentiable in q, k, v and sink, through o and through lse; not twice. Under autocast q, k and v take its type. sink may have any
    floating type. A tensor whose last dimension is not contiguous is copied. deterministic is also taken from
    torch.use_deterministic_algorithms().
    """
    left, right, top_left = band(causal, window, alignment)
    if sink is not None:
        sink = sink.float()
    if alibi_slopes is not None and alibi_slopes.requires_grad:
        raise NotImplementedError("alibi_slopes requires a gradient, which tilewise does not compute: detach it")
    deterministic = deterministic or torch.are_deterministic_algorithms_enabled()
    # fmt: off
    o, lse = _forward(q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, alibi_slopes, sink, softmax_scale, softcap, left, right, top_left,
                      max_seqlen_q, max_seqlen_k, deterministic)
    # fmt: on
    return (o, lse) if return_lse else o


# --- The operators on real memory ---


def _view(name, x):
    if x is None:
        return None
    device = x.device
    dtype, device_type = _TYPES.get(x.dtype), _DEVICES.get(device.type)
    if dtype is None:
        raise TypeError(f"{name} has dtype {str(x.dtype).removeprefix('torch.')}, which is none of float32, bfloat16, float16 and (lengths only) int32")
    if device_type is None:
        raise ValueError(f"{name} is on device {device}, which is neither a CPU nor CUDA")
    return x.data_ptr(), dtype, device_type, device.index or 0, x.shape, x.stride()


def _rows(x):
    """x, copied only where its last dimension is not contiguous: transposes, and the expanded gradients of sums."""
    return x if x.shape[-1] <= 1 or x.stride(-1) == 1 else x.contiguous()


def _call(pass_, q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, alibi_slopes, sink, scale, softcap, left, right, top_left, max_q, max_k, deterministic):
    return _core.Call(
        pass_,
        _view("q", q),
        _view("k", k),
        _view("v", v),
        _view("cu_seqlens_q", cu_seqlens_q),
        _view("cu_seqlens_k", cu_seqlens_k),
        _view("seqused_k", seqused_k),
        _view("alibi_slopes", alibi_slopes),
        _view("sink", sink),
        scale,
        softcap,
        left,
        right,
        top_left,
        max_q,
        max_k,
        deterministic,
        0 if q.is_cuda else torch.get_num_threads(),
    )


def _run(call, q, **tensors):
    """Runs on the current stream, with a workspace of PyTorch's allocator: nothing here waits, and CUDA graphs can capture it."""
    views = {name: _view(name, x) for name, x in tensors.items()}
    address = 0
    if call.workspace_bytes:
        workspace = torch.empty(call.workspace_bytes + _WORKSPACE_ALIGNMENT, dtype=torch.uint8, device=q.device)
        address = -(-workspace.data_ptr() // _WORKSPACE_ALIGNMENT) * _WORKSPACE_ALIGNMENT
    stream = torch.cuda.current_stream(q.device).cuda_stream if q.is_cuda else 0
    call.run(**views, workspace=address, stream=stream)


def _forward_kernel(q, k, v, *options):
    q, k, v = _rows(q), _rows(k), _rows(v)
    call = _call(_core.Pass.FORWARD, q, k, v, *options)
    o, lse = _forward_outputs(q, v)
    _run(call, q, o=o, lse=lse)
    return o, lse


def _backward_kernel(do, dlse, q, k, v, o, lse, *options):
    do, q, k, v = _rows(do), _rows(q), _rows(k), _rows(v)
    call = _call(_core.Pass.BACKWARD, q, k, v, *options)
    dq, dk, dv, dsink = outputs = _backward_outputs(q, k, v, options[4])
    _run(call, q, o=o, lse=lse, do=do, dlse=dlse, dq=dq, dk=dk, dv=dv, dsink=dsink if options[4] is not None else None)
    return outputs


# --- What torch.compile needs to know: the same shapes without memory ---


def _forward_outputs(q, v):
    lse_shape = (q.shape[0], q.shape[2], q.shape[1]) if q.dim() == 4 else (q.shape[1], q.shape[0])
    return q.new_empty((*q.shape[:-1], v.shape[-1])), q.new_empty(lse_shape, dtype=torch.float32)


def _backward_outputs(q, k, v, sink):
    return (*(x.new_empty(x.shape) for x in (q, k, v)), q.new_empty(0 if sink is None else sink.shape, dtype=torch.float32))


def _forward_fake(q, k, v, *options):
    return _forward_outputs(q, v)


def _backward_fake(do, dlse, q, k, v, o, lse, *options):
    return _backward_outputs(q, k, v, options[4])


# --- Autograd ---

_TENSOR_OPTIONS = 5  # of the options, those that are tensors: cu_seqlens_q, cu_seqlens_k, seqused_k, alibi_slopes, sink


def _setup_context(ctx, inputs, output):
    q, k, v, *options = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, *output, *options[:_TENSOR_OPTIONS])
    ctx.options = options[_TENSOR_OPTIONS:]


def _gradient(ctx, do, dlse):
    q, k, v, o, lse, *tensors = ctx.saved_tensors
    if do is None and dlse is None:
        return (None,) * 16
    if do is None:  # the loss depends on lse alone
        do = torch.zeros_like(o)
    dq, dk, dv, dsink = _backward(do, dlse, q, k, v, o, lse, *tensors, *ctx.options)
    return dq, dk, dv, None, None, None, None, dsink if tensors[4] is not None else None, *(None,) * len(ctx.options)


def _no_second_gradient(ctx, *gradients):
    raise NotImplementedError("the gradient of tilewise's backward is not there: attention can be differentiated once")


# --- Autocast: the element type is the autocast type, lse and sink stay float32 ---


def _autocast(device_type):
    def cast(q, k, v, *options):
        dtype = torch.get_autocast_dtype(device_type)
        with torch.autocast(device_type, enabled=False):
            return _forward(q.to(dtype), k.to(dtype), v.to(dtype), *options)

    return cast


for _key in ("CPU", "CUDA"):
    _library.impl("forward", _forward_kernel, _key)
    _library.impl("backward", _backward_kernel, _key)
    _library.impl("forward", _autocast(_key.lower()), f"Autocast{_key}")
torch.library.register_fake("tilewise::forward", _forward_fake, lib=_library)
torch.library.register_fake("tilewise::backward", _backward_fake, lib=_library)
torch.library.register_autograd("tilewise::forward", _gradient, setup_context=_setup_context, lib=_library)
torch.library.register_autograd("tilewise::backward", _no_second_gradient, lib=_library)
