#!/usr/bin/env python3
"""Includes point downwards only: every #include of the project goes to a room that its own room may see.

Usage: includes.py [ROOT]. Prints each include that breaks a rule and exits 1; see docs/architecture.md for the rooms.
"""
import pathlib
import re
import sys

# room: the rooms it may include from, besides itself. A file's room is the longest of these paths that it lies under.
MAY_SEE = {
    "include": [],
    "src/core": [],
    "src/registry": ["include", "src/core"],
    "src/reference": ["include", "src/core"],
    "src/api": ["include", "src/registry", "src/core"],
    "src/cpu": ["include", "src/registry", "src/core"],
    "src/cuda": ["include", "src/registry", "src/core", "src/cuda/kernels", "src/cuda/tile", "src/cuda/ptx"],
    "src/cuda/kernels": ["src/core", "src/cuda/tile", "src/cuda/ptx"],
    "src/cuda/tile": ["src/core", "src/cuda/ptx"],
    "src/cuda/ptx": [],
    "tools": ["include", "src/reference"],
    "python": ["include"],
    "examples": ["include"],
    "tests": None,  # tests look everywhere
    "bench": ["include", "src/reference"],
}
# Headers from outside, by pattern: the only rooms that may include them.
ONLY_IN = {
    r"hwy/": ["src/cpu"],
    r"cuda|cute|nv/|cooperative_groups|cub/": ["src/cuda", "src/cuda/kernels", "src/cuda/tile", "src/cuda/ptx", "tests", "bench", "examples"],
    r"torch/|ATen/|c10/|Python\.h|nanobind/": ["python"],
    r"cblas|openblas": ["src/reference"],
    r"CLI/|fmt/|nlohmann/": ["tools", "tests"],
    r"gtest/|gmock/|benchmark/": ["tests", "bench"],
}
SUFFIXES = {".h", ".hpp", ".cpp", ".cc", ".c", ".cu", ".cuh"}
INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]', re.M)
KERNEL = re.compile(r"src/cuda/kernels/\w+_sm\d")


def room_of(path):
    return max((room for room in MAY_SEE if path == room or path.startswith(room + "/")), key=len, default=None)


def resolve(root, file, name):
    """The project's file that is meant, as a path from the root, or None."""
    for base in (file.parent, root / "include", root / "src", root / "tests", root / "tools/tilewise"):
        target = (base / name).resolve()
        if target.is_file() and target.is_relative_to(root):
            return target.relative_to(root).as_posix()
    return None


def complaints(root):
    files = (path for room in MAY_SEE for path in sorted((root / room).rglob("*")) if path.suffix in SUFFIXES)
    for file in dict.fromkeys(files):
        here = file.relative_to(root).as_posix()
        room = room_of(here)
        text = file.read_text()
        for match in INCLUDE.finditer(text):
            quote, name = match.groups()
            where = f"{here}:{text.count(chr(10), 0, match.start(1)) + 1}: #include of {name}:"
            target = resolve(root, file, name)
            if target is None:
                owners = next((rooms for pattern, rooms in ONLY_IN.items() if re.match(pattern, name)), None)
                if owners is not None and room not in owners:
                    yield f"{where} only {', '.join(owners)} may"
                elif quote == '"':
                    yield f"{where} no such file in the project"
                elif room == "include" and re.search(r"[/.]", name) and name not in ("stddef.h", "stdint.h"):
                    yield f"{where} public headers use the standard library only"
            elif MAY_SEE[room] is not None and room_of(target) not in [room, *MAY_SEE[room]]:
                yield f"{where} {room} may see only {', '.join(MAY_SEE[room]) or 'itself'}"
            elif KERNEL.match(here) and KERNEL.match(target):
                yield f"{where} one kernel file never includes another"


def main():
    root = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else pathlib.Path(__file__).parents[1]).resolve()
    found = list(complaints(root))
    print("\n".join(found) if found else "includes point downwards only")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
