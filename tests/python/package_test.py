"""What is installed: complete, small, and bound to no framework."""

import pathlib

import tilewise

FILES = [path for path in pathlib.Path(tilewise.__file__).parent.rglob("*") if path.is_file() and path.suffix != ".pyc"]


def test_nothing_is_missing_and_it_is_small():
    names = {path.name for path in FILES}
    modules = {"__init__.py", "_arrays.py", "torch.py", "flash_attn_interface.py", "bert_padding.py", "hf.py"}
    assert modules | {"py.typed", "_core.pyi"} <= names
    assert sum(path.stat().st_size for path in FILES) < 30e6


def test_the_binary_knows_no_framework():
    (binary,) = [path for path in FILES if path.name.startswith("_core") and path.suffix == ".so"]
    content = binary.read_bytes()
    assert not any(name in content for name in (b"libtorch", b"libc10", b"libhwy", b"libcudart.so", b"GLIBCXX_DEBUG"))
