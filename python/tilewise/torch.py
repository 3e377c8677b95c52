"""Attention as a PyTorch operator: autograd (lse included), torch.compile without graph breaks, autocast, CUDA graphs, SDPA.

The operators are torch.ops.tilewise.forward and .backward; attention() is how to call them. They are registered from Python over plain
addresses, so that one build serves every PyTorch from 2.4 on.
"""

from __future__ import annotations

import math
import warnings

try:
    import torch
except ModuleNotFoundError as error:
    if error.name != "torch":  # it is there, and something that it needs is not
        raise
    raise ModuleNotFoundError("tilewise.torch needs PyTorch, which is not installed: pip install torch", name="torch") from None

from . import _core
from ._arrays import Alignment, band

_core.use_torch(
    torch.Tensor,
    {
        torch.float32: _core.DataType.FLOAT32,
        torch.bfloat16: _core.DataType.BFLOAT16,
        torch.float16: _core.DataType.FLOAT16,
        torch.int32: _core.DataType.INT32,
    },
)
_FORWARD, _BACKWARD = _core.Pass.FORWARD, _core.Pass.BACKWARD
_WORKSPACE_ALIGNMENT = 256
# Of the older vmap, which is behind is_grads_batched: such a tensor looks plain and has no memory.
_is_batched = getattr(torch._C._functorch, "is_legacy_batchedtensor", torch._C._functorch.is_batchedtensor)
_DIRECT = hasattr(torch.Tensor, "__dlpack_c_exchange_api__")  # PyTorch 2.10: tensors can be read without calling their methods
_PLAIN = torch.Tensor, torch.nn.Parameter
_SINK = 4  # place of sink among the options, the last that is a tensor

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
    alignment: Alignment = "bottom_right",
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
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """tilewise.attention() for PyTorch: same arguments, shapes, results and errors, on the tensors' device and its current stream.

    Differentiable in q, k, v and sink, through o and through lse; not twice. Under autocast q, k and v take its type. sink may have any
    floating type. q, k or v whose last dimension is not contiguous is copied. deterministic is also taken from
    torch.use_deterministic_algorithms().
    """
    left, right, top_left = band(causal, window, alignment)
    tensors = q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, alibi_slopes, sink
    compiling = torch.compiler.is_compiling()
    direct = not (compiling or q is None or k is None or v is None or _observed(*tensors))
    if not (direct or compiling):
        _check_tensors(*tensors)
    if sink is not None:
        sink = sink.float()
    if alibi_slopes is not None and alibi_slopes.requires_grad:
        raise NotImplementedError("alibi_slopes requires a gradient, which tilewise does not compute: detach it")
    deterministic = deterministic or torch.are_deterministic_algorithms_enabled()
    # fmt: off
    options = (cu_seqlens_q, cu_seqlens_k, seqused_k, alibi_slopes, sink, softmax_scale, softcap, left, right, top_left, max_seqlen_q,
               max_seqlen_k, deterministic)
    # fmt: on
    if direct:
        try:
            wanted = q.requires_grad or k.requires_grad or v.requires_grad or sink is not None and sink.requires_grad
            if wanted and torch.is_grad_enabled():
                return _attend(_forward_kernel, return_lse, q, k, v, sink, options)
            o, lse = _forward_kernel(q, k, v, options, return_lse)
            return (o, lse) if return_lse else o
        except RuntimeError as error:
            _check_tensors(*tensors)  # a sparse tensor fails in PyTorch's words
            if not isinstance(error, _core.Unreadable):  # the dispatcher may know such a tensor
                raise
    o, lse = _forward(q, k, v, *options)
    return (o, lse) if return_lse else o


def _observed(*tensors):
    """Whether anything of PyTorch's stands between a call and the kernels: a mode, a transform, autocast, a profiler, a tensor that is no
    plain one of a CPU or CUDA. Where nothing does, calling the kernels directly saves the dispatcher's ways to Python and back: 10
    microseconds forward, 25 with gradients (EPYC, torch 2.13). What else is no plain tensor has no memory: _core.Unreadable."""
    C = torch._C
    for x in tensors:
        if x is not None and (type(x) not in _PLAIN or x.is_neg() or not _DIRECT):
            return True
    return bool(
        C._len_torch_dispatch_stack()
        or C._is_torch_function_mode_enabled()
        or C._are_functorch_transforms_active()
        or C._is_any_autocast_enabled()
        or C._is_tracing()
        or torch.autograd._profiler_enabled()
        or torch.autograd.forward_ad._current_level >= 0
        or not (tensors[0].is_cuda or tensors[0].is_cpu)
    )


def _check_tensors(q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, alibi_slopes, sink):
    for name, x in dict(locals()).items():
        if not isinstance(x, torch.Tensor) and (x is not None or name in ("q", "k", "v")):
            raise TypeError(f"{name} is {'None' if x is None else 'of type ' + type(x).__name__}, not a PyTorch tensor")
        if x is not None and x.is_nested:
            raise NotImplementedError(f"{name} is a nested tensor, which tilewise does not read: give its rows packed, with cu_seqlens")
        if x is not None and x.layout is not torch.strided:
            raise NotImplementedError(f"{name} has layout {x.layout}, which tilewise does not read: give it dense, as to_dense() makes it")


# --- The operators on real memory ---


def _rows(x):
    """x, copied only where its last dimension is not contiguous: transposes, and the expanded gradients of sums."""
    return x if x is None or x.is_contiguous() or x.shape[-1] <= 1 or x.stride(-1) == 1 else x.contiguous()


def _gradient(do):
    """do as kernels of a GPU read it, rows at multiples of 16 bytes: it is autograd's, so that nobody can be asked to align it."""
    do = _rows(do)
    aligned = not do.is_cuda or do.data_ptr() % 16 == 0 and math.gcd(*do.stride()[:-1]) % 8 == 0
    return do if aligned else do.clone(memory_format=torch.contiguous_format)


def _place(q):
    """Threads of the CPU and the stream of a GPU that PyTorch would use now."""
    return (0, torch._C._cuda_getCurrentRawStream(q.get_device())) if q.is_cuda else (torch.get_num_threads(), 0)


def _workspace(call, q):
    """On a GPU memory of PyTorch's allocator, so that CUDA graphs can capture it, and the first address in it that is aligned."""
    if not q.is_cuda or not call.workspace_bytes:
        return None, 0
    memory = torch.empty(call.workspace_bytes + _WORKSPACE_ALIGNMENT, dtype=torch.uint8, device=q.device)
    return memory, -(-memory.data_ptr() // _WORKSPACE_ALIGNMENT) * _WORKSPACE_ALIGNMENT


def _forward_kernel(q, k, v, options, want_lse=True, o=None):
    q, k, v = _rows(q), _rows(k), _rows(v)
    threads, stream = _place(q)
    call = _core.Call(_FORWARD, q, k, v, options, threads)
    o, lse = _forward_outputs(q, v, want_lse, o)
    memory, workspace = _workspace(call, q)
    call.run(stream, workspace, o, lse)
    return o, lse


def _backward_kernel(do, dlse, q, k, v, o, lse, options, gradients=None):
    do, dlse, q, k, v = _gradient(do), _rows(dlse), _rows(q), _rows(k), _rows(v)
    threads, stream = _place(q)
    call = _core.Call(_BACKWARD, q, k, v, options, threads)
    if gradients is None:
        gradients = _backward_outputs(q, k, v, options[_SINK])
    memory, workspace = _workspace(call, q)
    call.run(stream, workspace, o, lse, do, dlse, *gradients)
    return gradients


def _forward_operator(q, k, v, *options):
    return _forward_kernel(q, k, v, options)


def _backward_operator(do, dlse, q, k, v, o, lse, *options):
    return _tensors(*_backward_kernel(do, dlse, q, k, v, o, lse, options))


def _tensors(dq, dk, dv, dsink):
    """The results of the operator, which has no None among them."""
    return dq, dk, dv, dq.new_empty(0, dtype=torch.float32) if dsink is None else dsink


# --- What torch.compile needs to know: the same shapes without memory ---


def _forward_outputs(q, v, want_lse=True, o=None):
    if q.dim() == 3:  # rows of no sequence are not written: 0, as rows that see nothing
        rows, heads, _ = q.shape
        o = q.new_zeros((rows, heads, v.shape[-1])) if o is None else o
        return o, q.new_full((heads, rows), -torch.inf, dtype=torch.float32) if want_lse else None
    batch, seqlen, heads, dim = q.shape
    if o is None:
        o = _empty_like(q) if dim == v.shape[-1] else q.new_empty((batch, seqlen, heads, v.shape[-1]))
    return o, q.new_empty((batch, heads, seqlen), dtype=torch.float32) if want_lse else None


def _backward_outputs(q, k, v, sink):
    if q.dim() == 3:
        gradients = (x.new_zeros(x.shape) for x in (q, k, v))
    else:
        gradients = _empty_like(q), _empty_like(k), _empty_like(v)
    return *gradients, None if sink is None else torch.empty_like(sink)


def _empty_like(x):
    """Contiguous, whatever x is. What PyTorch has for exactly that costs a microsecond more on a GPU's host."""
    return torch.empty_like(x) if x.is_contiguous() else x.new_empty(x.shape)


def _check_devices(q, *others):
    """Real tensors beside meta tensors come here too, and only here."""
    for x in others:
        if isinstance(x, torch.Tensor) and x.device != q.device:
            raise ValueError(f"a tensor of shape {list(x.shape)} is on device {x.device}, but q is on {q.device}")


def _forward_fake(q, k, v, *options):
    _check_devices(q, k, v, *options)
    return _forward_outputs(q, v)


def _backward_fake(do, dlse, q, k, v, o, lse, *options):
    _check_devices(q, do, dlse, k, v, o, lse, *options)
    return _tensors(*_backward_outputs(q, k, v, options[_SINK]))


# --- Autograd: written out, because what torch.library.register_autograd generates costs 75 microseconds more a call (EPYC, torch 2.13) ---


# autograd.Function, but for what that does in torch.func's transforms: _apply() does it.
_SingleLevelFunction = torch.autograd.function._SingleLevelFunction


class _Attention(_SingleLevelFunction):
    @staticmethod
    def forward(ctx, run, return_lse, q, k, v, sink, options):
        o, lse = run(q, k, v, options)
        ctx.save_for_backward(q, k, v, o, lse, *options[: _SINK + 1])
        ctx.options = options[_SINK + 1 :]
        if not return_lse:
            return o
        ctx.set_materialize_grads(False)
        return o, lse

    @staticmethod
    def backward(ctx, do, dlse=None):
        if do is None and dlse is None:
            return (None,) * 7
        q, k, v, o, lse, *tensors = ctx.saved_tensors
        if do is None:  # the loss depends on lse alone
            do = torch.zeros_like(o)
        options = *tensors, *ctx.options
        alone = not (torch.compiler.is_compiling() or torch.is_grad_enabled() or _is_batched(do))
        if alone and not _observed(q, do, dlse, k, v, o, lse, *tensors):
            try:
                return None, None, *_backward_kernel(do, dlse, q, k, v, o, lse, options), None
            except _core.Unreadable:
                pass
        dq, dk, dv, dsink = _backward(do, dlse, q, k, v, o, lse, *options)
        return None, None, dq, dk, dv, dsink if tensors[_SINK] is not None else None, None


_attend = _Attention.apply  # an argument costs 0.1 us: those without a gradient come as one


class _Gradient(_SingleLevelFunction):
    @staticmethod
    def forward(ctx, run, *arguments):
        return run(*arguments)

    @staticmethod
    def backward(ctx, *gradients):
        raise NotImplementedError("attention can be differentiated once: tilewise has no gradient of its backward")


_differentiate = _Gradient.apply


def _apply(apply, run, *arguments):
    """apply(run, *arguments), inside of torch.func's transforms too: at the level where it is called, as PyTorch's own operators do it."""
    if not torch._C._are_functorch_transforms_active():
        return apply(run, *arguments)
    with torch._functorch.autograd_function.enable_single_level_autograd_function():
        return apply(torch.enable_grad()(run), *arguments)  # apply() turns gradients off, which the levels below may need


def _apply_forward(run, arguments):
    (q, k, v), options = arguments[:3], arguments[3:]
    return _apply(_attend, lambda q, k, v, options: run(q, k, v, *options), True, q, k, v, options[_SINK], options)


def _apply_backward(run, arguments):
    return _apply(_differentiate, run, *arguments)


def _refuse_tangents(arguments):
    for x in arguments:
        if isinstance(x, torch.Tensor) and torch.autograd.forward_ad.unpack_dual(x).tangent is not None:
            raise NotImplementedError("a tensor has a tangent: tilewise has gradients in reverse mode, none in forward mode")


def _differentiable(operator, apply):
    def below(*arguments):
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*arguments)

    def call(*arguments):
        if torch.autograd.forward_ad._current_level >= 0:
            _refuse_tangents(arguments)
        if torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in arguments):
            return apply(below, arguments)
        return below(*arguments)

    return call


# --- Autocast: the element type is the autocast type, lse and sink stay float32 ---


def _autocast(device_type):
    def cast(q, k, v, *options):
        dtype = torch.get_autocast_dtype(device_type)
        with torch.autocast(device_type, enabled=False):
            return _forward(q.to(dtype), k.to(dtype), v.to(dtype), *options)

    return cast


for _key in ("CPU", "CUDA"):
    _library.impl("forward", _forward_operator, _key)
    _library.impl("backward", _backward_operator, _key)
    _library.impl("forward", _autocast(_key.lower()), f"Autocast{_key}")
_library.impl("forward", _differentiable(_forward, _apply_forward), "Autograd")
_library.impl("backward", _differentiable(_backward, _apply_backward), "Autograd")


# --- vmap: the mapped dimension becomes a part of the batch ---


def _mapped(operator, dense):
    """vmap's rule of an operator whose first `dense` arguments have the batch in front. Calls go one by one for packed sequences, and for
    sinks where each element has its own, or its own gradient."""

    def rule(info, in_dims, *arguments):
        size, dims = info.batch_size, in_dims[dense:]
        starts_q, starts_k, seqused_k, slopes, sink, *problem = arguments[dense:]
        own_sink = sink is not None and (operator is _backward or dims[_SINK] is not None)
        if starts_q is not None or starts_k is not None or own_sink:
            each = [operator(*(x if at is None else x.select(at, i) for x, at in zip(arguments, in_dims))) for i in range(size)]
            return tuple(torch.stack(results) for results in zip(*each)), (0,) * len(each[0])

        def front(x, at):
            return x.expand(size, *x.shape) if at is None else x.movedim(at, 0)

        def fold(x, at):
            return None if x is None else front(x, at).flatten(0, 1)

        folded = [fold(x, at) for x, at in zip(arguments[:dense], in_dims)]
        batch = front(arguments[dense - 1], in_dims[dense - 1]).shape[1]
        if slopes is not None and slopes.dim() - (dims[3] is not None) == 2:
            slopes = fold(slopes, dims[3])
        elif dims[3] is not None:
            slopes = slopes.movedim(dims[3], 0).repeat_interleave(batch, 0)
        results = operator(*folded, None, None, fold(seqused_k, dims[2]), slopes, sink, *problem)
        own = [x.dim() > 1 for x in results]  # all but the empty gradient of no sink
        results = tuple(x.unflatten(0, (size, batch)) if its_own else x for x, its_own in zip(results, own))
        return results, tuple(0 if its_own else None for its_own in own)

    return rule


torch.library.register_fake("tilewise::forward", _forward_fake, lib=_library)
torch.library.register_fake("tilewise::backward", _backward_fake, lib=_library)
if hasattr(torch.library, "register_vmap"):  # PyTorch 2.5; before, every call goes one by one
    torch.library.register_vmap("tilewise::forward", _mapped(_forward, 3), lib=_library)
    torch.library.register_vmap("tilewise::backward", _mapped(_backward, 7), lib=_library)


# --- scaled_dot_product_attention ---


def install() -> None:
    """Registers "tilewise" as an implementation of torch.nn.functional.scaled_dot_product_attention, on CPUs and CUDA.

    torch.nn.attention.activate_flash_attention_impl("tilewise") then uses it wherever PyTorch would use its flash kernel, and
    restore_flash_attention_impl() ends that. Nothing happens on import. On a CPU PyTorch's own kernels compute, as they did before, what
    tilewise does not have: attn_mask, float64, and dropout, which PyTorch never hands to a flash kernel there. On CUDA dropout_p above 0
    raises NotImplementedError. Raises RuntimeError where the installed PyTorch has no register_flash_attention_impl.
    """
    if not hasattr(torch.nn.attention, "register_flash_attention_impl"):
        raise RuntimeError(f"torch {torch.__version__} has no torch.nn.attention.register_flash_attention_impl: install a newer one")
    torch.nn.attention.register_flash_attention_impl("tilewise", register_fn=_Sdpa)


class _Sdpa:
    """PyTorch's flash operators overridden, until remove(). They take [batch, heads, seqlen, dim]; causal masks are aligned top left on a CPU."""

    def __init__(self):
        self._aten = torch.library.Library("aten", "IMPL")
        self._cpu_forward = torch.library.get_kernel("aten::_scaled_dot_product_flash_attention_for_cpu", "CPU")
        self._cpu_backward = torch.library.get_kernel("aten::_scaled_dot_product_flash_attention_for_cpu_backward", "CPU")
        for name, function, key in (
            ("_scaled_dot_product_flash_attention_for_cpu", self._for_cpu, "CPU"),
            ("_scaled_dot_product_flash_attention_for_cpu_backward", self._for_cpu_backward, "CPU"),
            ("_scaled_dot_product_flash_attention", _sdpa, "CUDA"),
            ("_scaled_dot_product_flash_attention_backward", _sdpa_backward, "CUDA"),
            ("_flash_attention_forward", _flash, "CUDA"),
            ("_flash_attention_backward", _flash_backward, "CUDA"),
        ):
            with warnings.catch_warnings():  # that a kernel is overridden is what was asked for
                warnings.simplefilter("ignore")
                self._aten.impl(name, function, key, with_keyset=key == "CPU", allow_override=True)

    def remove(self):
        self._aten._destroy()

    def _for_cpu(self, keyset, q, k, v, dropout_p=0.0, is_causal=False, *, attn_mask=None, scale=None):
        if attn_mask is not None or q.dtype == torch.float64:
            return self._cpu_forward.call_boxed(keyset, q, k, v, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)
        o, lse = _sdpa_forward(q, k, v, dropout_p, is_causal, scale, top_left=True)
        return o, lse.transpose(1, 2).contiguous().transpose(1, 2)

    def _for_cpu_backward(self, keyset, do, q, k, v, o, lse, dropout_p, is_causal, *, attn_mask=None, scale=None):
        if attn_mask is not None or q.dtype == torch.float64:
            return self._cpu_backward.call_boxed(keyset, do, q, k, v, o, lse, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)
        gradients = [x.new_empty(x.transpose(1, 2).shape).transpose(1, 2) for x in (q, k, v)]
        return _sdpa_gradients(gradients, do, q, k, v, o, lse, is_causal, scale, top_left=True)


def _options(scale, is_causal, top_left, window=(-1, -1), cu_seqlens=(None, None), seqused_k=None, alibi=None, lengths=(0, 0)):
    left, right, _ = band(False, window, "bottom_right")
    right = 0 if is_causal else right
    deterministic = torch.are_deterministic_algorithms_enabled()
    return *cu_seqlens, seqused_k, alibi, None, scale, 0.0, left, right, top_left, *lengths, deterministic


def _no_dropout(dropout_p):
    if dropout_p:
        raise NotImplementedError(f"dropout_p {dropout_p} is not 0, and tilewise has no dropout")


def _heads_second(*tensors):
    return tuple(x.transpose(1, 2) for x in tensors)


# torch.compile believes that results lie in memory as PyTorch's meta kernels (torch/_meta_registrations.py) say: o as q does, gradients
# on CUDA as what they are of, gradients and lse on a CPU as [batch, seqlen, heads, dim].
def _forward_into(o, q, k, v, options):
    """lse, and attention written to o, which may lie in memory as it likes."""
    rows = _rows(o)
    _, lse = _forward_kernel(q, k, v, options, o=rows)
    if rows is not o:
        o.copy_(rows)
    return lse


def _backward_into(gradients, do, q, k, v, o, lse, options):
    rows = [_rows(x) for x in gradients]
    _backward_kernel(do, None, q, k, v, _rows(o), _rows(lse), options, (*rows, None))
    for x, computed in zip(gradients, rows):
        if computed is not x:
            x.copy_(computed)


def _sdpa_forward(q, k, v, dropout_p, is_causal, scale, top_left):
    _no_dropout(dropout_p)
    o = torch.empty_like(q)
    return o, _forward_into(*_heads_second(o, q, k, v), _options(scale, is_causal, top_left))


def _sdpa_gradients(gradients, do, q, k, v, o, lse, is_causal, scale, top_left):
    _backward_into(_heads_second(*gradients), *_heads_second(do, q, k, v, o), lse, _options(scale, is_causal, top_left))
    return tuple(gradients)


def _no_dropout_state(q):
    """What PyTorch's operators return about the random numbers of a dropout that did not happen."""
    return *(torch.empty(shape, dtype=torch.uint64, device=q.device) for shape in ((2,), ())), q.new_empty(0)


# On CUDA PyTorch calls its flash operator for lower-right masks too, and for top-left ones only where both are the same.
def _sdpa(q, k, v, dropout_p=0.0, is_causal=False, return_debug_mask=False, *, scale=None):
    o, lse = _sdpa_forward(q, k, v, dropout_p, is_causal, scale, top_left=False)
    return o, lse, None, None, q.shape[2], k.shape[2], *_no_dropout_state(q)


def _sdpa_backward(do, q, k, v, o, lse, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, seed, offset, *, scale=None):
    gradients = [torch.empty_like(x) for x in (q, k, v)]
    return _sdpa_gradients(gradients, do, q, k, v, o, lse, is_causal, scale, top_left=False)


def _flash_options(cum_seq_q, cum_seq_k, max_q, max_k, is_causal, scale, left, right, seqused_k=None, alibi=None):
    window = tuple(-1 if side is None else side for side in (left, right))
    lengths = (0, 0) if cum_seq_q is None else (max_q, max_k)
    return _options(scale, is_causal, False, window, (cum_seq_q, cum_seq_k), seqused_k, alibi, lengths)


def _flash_output(x):
    """Memory for a result like x. Rows of no sequence are not written, and are 0."""
    return torch.zeros_like(x) if x.dim() == 3 else torch.empty_like(x)


# Under aten's own flash operators lies FlashAttention-2's interface: [batch, seqlen, heads, dim] or packed, causal aligned bottom right.
# fmt: off
def _flash(q, k, v, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, return_debug_mask, *, scale=None, window_size_left=None,
           window_size_right=None, seqused_k=None, alibi_slopes=None, block_table=None, num_splits=None):
    _no_dropout(dropout_p)
    if block_table is not None:
        raise NotImplementedError("block_table is given, and tilewise has no paged key/value cache yet")
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        for name, given in (("seqused_k", seqused_k), ("alibi_slopes", alibi_slopes)):
            if given is not None:
                raise NotImplementedError(f"{name} is given and a gradient wanted, but PyTorch does not tell {name} to the backward operator")
    options = _flash_options(cum_seq_q, cum_seq_k, max_q, max_k, is_causal, scale, window_size_left, window_size_right, seqused_k, alibi_slopes)
    o = _flash_output(q if q.shape[-1] == v.shape[-1] else q.new_empty((*q.shape[:-1], v.shape[-1])))
    return o, _forward_into(o, q, k, v, options), *_no_dropout_state(q)


def _flash_backward(do, q, k, v, o, lse, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, rng_state, unused, *, scale=None,
                    window_size_left=None, window_size_right=None):
    options = _flash_options(cum_seq_q, cum_seq_k, max_q, max_k, is_causal, scale, window_size_left, window_size_right)
    gradients = tuple(_flash_output(x) for x in (q, k, v))
    _backward_into(gradients, do, q, k, v, o, lse, options)
    return gradients
# fmt: on
