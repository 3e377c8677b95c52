"""Where measurements are kept: bench/results/<machine>.json, one section per kind of measurement, each with its commit."""

import datetime
import json
import os
import pathlib
import platform
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]


def _cpuinfo():
    """The fields of the first processor in /proc/cpuinfo."""
    try:
        first = pathlib.Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return {}
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}


def _caches():
    """Bytes of the caches that one core sees: {"L1d": ..., "L2": ..., "L3": ...}."""
    found = {}
    for index in sorted(pathlib.Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        kind, level, size = ((index / name).read_text().strip() for name in ("type", "level", "size"))
        if kind != "Instruction":
            found[f"L{level}" + ("d" if kind == "Data" else "")] = int(size.rstrip("KM")) * (1 << 20 if size.endswith("M") else 1 << 10)
    return found


def machine():
    """This machine in plain values: no name of the host."""
    info = _cpuinfo()
    return {
        "cpu": info.get("model name", platform.machine()),
        "family_model_stepping": [int(info.get(key, 0)) for key in ("cpu family", "model", "stepping")],
        "cpus": len(os.sched_getaffinity(0)),
        "cache_bytes": _caches(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.machine()}",
    }


def slug():
    """The name of this machine's file, from the CPU: "amd-epyc-f26m2-2cpus"."""
    facts = machine()
    family, model, _ = facts["family_model_stepping"]
    name = re.sub(r"\(.*?\)|@.*|\bcpu\b|processor", " ", facts["cpu"].lower())
    return re.sub(r"[^a-z0-9]+", "-", f"{name} f{family}m{model} {facts['cpus']}cpus").strip("-")


def commit():
    """The commit that was measured; "-dirty" where files that git tracks had been changed."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git, or no checkout
        return "unknown"


def load(path=None):
    path = pathlib.Path(path or ROOT / "bench/results" / f"{slug()}.json")
    return json.loads(path.read_text()) if path.exists() else {}


def save(section, data, path=None):
    """Replaces one section of this machine's file, adding when and at which commit it was measured."""
    path = pathlib.Path(path or ROOT / "bench/results" / f"{slug()}.json")
    everything = load(path) | {"machine": machine(), section: {"date": datetime.date.today().isoformat(), "commit": commit(), **data}}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(everything, indent=1) + "\n")
    return path


if __name__ == "__main__":  # results.py SECTION FILE: saves the JSON object on stdin
    save(sys.argv[1], json.load(sys.stdin), sys.argv[2])
