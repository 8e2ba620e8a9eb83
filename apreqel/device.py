"""What this machine is, as far as timings and memory depend on it. Nothing is read at import."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Device:
    """Unknown fields are None (or 0 for a count)."""

    cpu: str
    machine: str
    system: str
    usable_cores: int
    physical_cores: int
    cache_bytes: int | None
    memory_bytes: int
    available_bytes: int
    governor: str | None
    max_mhz: float | None

    def fingerprint(self, n_threads: int, llama_build: str) -> str:
        """What a timing depends on, as 16 hex digits: not the memory that happens to be free."""
        facts = asdict(self)
        del facts["available_bytes"]
        text = json.dumps([facts, n_threads, llama_build], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def detect() -> Device:
    """Look at the machine. Missing files and commands leave fields unknown."""
    import psutil

    memory = psutil.virtual_memory()
    return Device(
        cpu=_cpu_name(),
        machine=platform.machine(),
        system=f"{platform.system()} {platform.release()}",
        usable_cores=usable_cores(),
        physical_cores=psutil.cpu_count(logical=False) or 0,
        cache_bytes=_last_level_cache(),
        memory_bytes=int(memory.total),
        available_bytes=int(memory.available),
        governor=_read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        max_mhz=_max_mhz(),
    )


def usable_cores() -> int:
    """Cores this process may use: its affinity, and a container's quota."""
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    quota = (_read("/sys/fs/cgroup/cpu.max") or "").split()
    if len(quota) == 2 and quota[0].isdigit() and int(quota[1]) > 0:
        cores = min(cores, max(1, round(int(quota[0]) / int(quota[1]))))
    return max(1, cores)


def default_threads() -> int:
    """One thread a physical core that may be used: what llama.cpp runs best with."""
    import psutil

    return max(1, min(usable_cores(), psutil.cpu_count(logical=False) or usable_cores()))


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text().strip() or None
    except (OSError, UnicodeDecodeError):
        return None


def _cpu_name() -> str:
    if platform.system() == "Darwin":
        return _sysctl("machdep.cpu.brand_string") or "Apple"
    board = (_read("/sys/firmware/devicetree/base/model") or "").strip("\0")
    fields: dict[str, str] = {}
    for line in (_read("/proc/cpuinfo") or "").splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip().lower(), value.strip())
    name = fields.get("model name") or fields.get("cpu part") or platform.processor()
    return " ".join(part for part in (board, name) if part) or "unknown"


def _sysctl(name: str) -> str | None:
    try:
        done = subprocess.run(["sysctl", "-n", name], capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def _last_level_cache() -> int | None:
    if platform.system() == "Darwin":
        found = _sysctl("hw.l3cachesize") or _sysctl("hw.l2cachesize")
        return int(found) if found and found.isdigit() else None
    sizes = []
    for index in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = _read(str(index)) or ""
        if text.endswith("K") and text[:-1].isdigit():
            sizes.append(int(text[:-1]) << 10)
        elif text.endswith("M") and text[:-1].isdigit():
            sizes.append(int(text[:-1]) << 20)
    return max(sizes, default=None)


def _max_mhz() -> float | None:
    khz = _read("/sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq")
    return int(khz) / 1000 if khz and khz.isdigit() else None
