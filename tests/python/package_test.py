"""What is installed: complete, small, and bound to no framework."""

import pathlib

import tilewise

# Two folders where the package is installed for editing.
FOLDERS = {pathlib.Path(module.__file__).parent for module in (tilewise, tilewise._core)}
FILES = [path for folder in FOLDERS for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc"]


def test_nothing_is_missing_and_it_is_small():
    names = {path.name for path in FILES}
    modules = {"__init__.py", "_arrays.py", "torch.py", "flash_attn_interface.py", "bert_padding.py", "hf.py"}
    assert modules | {"py.typed", "_core.pyi"} <= names
    assert sum(path.stat().st_size for path in FILES) < 30e6


def test_the_binary_knows_no_framework():
    (binary,) = [path for path in FILES if path.name.startswith("_core") and path.suffix == ".so"]
    content = binary.read_bytes()
    assert not any(name in content for name in (b"libtorch", b"libc10", b"libhwy", b"libcudart.so", b"GLIBCXX_DEBUG"))
