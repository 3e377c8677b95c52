"""Tests of the Python package. Each file says with importorskip what it needs beside NumPy."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here downloads

try:
    import torch
except ImportError:
    pass
else:
    torch.set_num_threads(min(2, os.cpu_count() or 1))
