"""As much of include/tilewise/tilewise.h as the race needs, by ctypes: plans that run on memory someone else owns."""

import ctypes
from ctypes import POINTER, byref, c_char, c_char_p, c_float, c_int32, c_int64, c_size_t, c_void_p

DTYPES = {"float32": 0, "bfloat16": 1, "float16": 2}


class Tensor(ctypes.Structure):
    _fields_ = [("data", c_void_p), ("dtype", c_int32), ("rank", c_int32), ("shape", c_int64 * 4), ("stride", c_int64 * 4)]


class Problem(ctypes.Structure):
    _fields_ = (
        [("struct_size", c_size_t), ("pass_", c_int32), ("dtype", c_int32)]
        + [(name, c_int64) for name in "batch seqlen_q seqlen_k num_heads_q num_heads_kv head_dim head_dim_v".split()]
        + [("has_softmax_scale", c_int32), ("softmax_scale", c_float), ("softcap", c_float), ("alignment", c_int32)]
        + [(name, c_int64) for name in "window_left window_right total_q total_k".split()]
        + [(name, c_int32) for name in "packed seqused_k alibi sink deterministic reserved".split()]
    )


class Device(ctypes.Structure):
    _fields_ = (
        [("struct_size", c_size_t), ("type", c_int32), ("index", c_int32), ("name", c_char * 128), ("arch", c_char * 32)]
        + [("units", c_int32), ("reserved", c_int32)]
        + [(name, c_int64) for name in "near_bytes desk_bytes memory_bytes".split()]
    )


TENSORS = "q k v o lse cu_seqlens_q cu_seqlens_k seqused_k alibi_slopes sink dout dlse dq dk dv dsink".split()


class Arguments(ctypes.Structure):
    _fields_ = [("struct_size", c_size_t), *((name, Tensor) for name in TENSORS), ("workspace", c_void_p)]


class Library:
    def __init__(self, path):
        self.c = ctypes.CDLL(str(path))
        for name in ("tw_version", "tw_last_error", "tw_plan_kernel"):
            getattr(self.c, name).restype = c_char_p
        self.c.tw_plan_workspace_bytes.restype = c_size_t
        self.c.tw_plan_workspace_bytes.argtypes = self.c.tw_plan_kernel.argtypes = self.c.tw_plan_destroy.argtypes = [c_void_p]
        self.c.tw_plan_create.argtypes = [POINTER(Problem), POINTER(Device), POINTER(c_void_p)]
        self.c.tw_plan_run.argtypes = [c_void_p, POINTER(Arguments), c_void_p]
        self.version = self.c.tw_version().decode()

    def check(self, status):
        if status:
            raise RuntimeError(self.c.tw_last_error().decode())

    def make(self, kind, name):
        value = kind()
        getattr(self.c, f"tw_{name}_init")(byref(value), c_size_t(ctypes.sizeof(kind)))
        return value

    def device(self, threads):
        device = self.make(Device, "device")
        self.check(self.c.tw_device_cpu(c_int32(threads), byref(device)))
        return device


class Plan:
    """A plan and a workspace of its own. run() takes tensors() of memory that outlives the call."""

    def __init__(self, library, text, device):
        self.library, problem, self.handle = library, library.make(Problem, "problem"), c_void_p()
        library.check(library.c.tw_problem_parse(text.encode(), byref(problem)))
        library.check(library.c.tw_plan_create(byref(problem), byref(device), byref(self.handle)))
        self.kernel = library.c.tw_plan_kernel(self.handle).decode()
        self.workspace = ctypes.create_string_buffer(library.c.tw_plan_workspace_bytes(self.handle) + 256)

    def bind(self, tensors):
        """A function that runs the plan once on these tensors, {name: Tensor}."""
        arguments = self.library.make(Arguments, "arguments")
        for name, tensor in tensors.items():
            setattr(arguments, name, tensor)
        arguments.workspace = (ctypes.addressof(self.workspace) + 255) & ~255

        def run():
            self.library.check(self.library.c.tw_plan_run(self.handle, byref(arguments), None))

        return run

    def __del__(self):
        if self.handle:
            self.library.c.tw_plan_destroy(self.handle)


def tensor(pointer, dtype, shape, stride):
    """Strides in elements."""
    rank = len(shape)
    return Tensor(pointer, DTYPES[dtype], rank, (c_int64 * 4)(*shape), (c_int64 * 4)(*stride))
