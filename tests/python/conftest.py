"""Tests of the Python package. A group of them needs more than NumPy; where that is not installed the group is skipped and says so."""

import importlib
import os

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here downloads


def needs(*modules):
    """Skips the rest of a test file where a module is not installed; one that is installed and broken is an error."""
    for name in modules:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name:
                raise
            pytest.skip(f"{name} is not installed", allow_module_level=True)


try:
    import torch
except ModuleNotFoundError:
    pass
else:
    torch.set_num_threads(1)  # the problems are tiny, and threads that wait for each other are slow where cores are shared
