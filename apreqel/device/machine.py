"""What this machine is and what it is doing, as far as timings and memory depend on it.

Nothing is read at import. `Watch` tells whether a reading can be trusted: a processor that was
throttled, swapping, page-ins or other processes at work make it invalid, not slow.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from apreqel.llama.library import build_info, gpu_name

# Other processes may take this part of the cores before a reading is refused.
_BUSY_SHARE = 0.10
# A core below this part of its usual clock is throttled.
_CLOCK_SHARE = 0.85
# vcgencmd get_throttled: under-voltage, frequency capped, throttled, soft temperature limit: now.
_PI_THROTTLED_NOW = 0xF
# Linux's limits, and where a process's own are among them.
_CGROUPS, _OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
# Linux's names of instructions, and ggml's.
_FEATURES = {
    "avx": "AVX",
    "avx2": "AVX2",
    "fma": "FMA",
    "f16c": "F16C",
    "avx512f": "AVX512",
    "amx_int8": "AMX_INT8",
    "asimd": "NEON",
    "asimddp": "DOTPROD",
}
# Below this a zone's trip point is not one of a processor, or not set at all.
_LEAST_TRIP_CELSIUS = 50.0


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
    cluster_cores: Sequence[int] = ()  # cores of each kind, fastest first; one entry on most
    gpu: str = ""  # on which llama.cpp runs all layers; '' for the CPU

    def fingerprint(self, llama_build: str) -> str:
        """What a timing depends on, as 16 hex digits: not the memory that happens to be free.

        Nor the kernel's version: it changes with every update of a system.
        """
        facts = asdict(self) | {"system": self.system.split()[0]}
        del facts["available_bytes"], facts["memory_bytes"]
        if not self.gpu:
            del facts["gpu"]
        text = json.dumps([facts, llama_build], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def detect() -> Device:
    """Look at the machine, but for its GPU. Missing files and commands leave fields unknown."""
    import psutil

    memory = psutil.virtual_memory()
    max_khz = _integer(Path("/sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq"))
    return Device(
        cpu=_cpu_name(),
        machine=platform.machine(),
        system=f"{platform.system()} {'.'.join(platform.release().split('.')[:2])}",
        usable_cores=usable_cores(),
        physical_cores=psutil.cpu_count(logical=False) or 0,
        cache_bytes=_last_level_cache(),
        memory_bytes=int(memory.total),
        available_bytes=available_bytes(int(memory.available)),
        governor=_read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        max_mhz=max_khz / 1000 if max_khz else None,
        cluster_cores=[len(cores) for cores in clusters()],
    )


def this_device() -> tuple[Device, str]:
    """(the device that runs this, its fingerprint with the llama.cpp that is installed)."""
    device = replace(detect(), gpu=gpu_name())
    return device, device.fingerprint(build_info())


def available_bytes(free: int, cgroups: Path = _CGROUPS, own: Path = _OWN_CGROUPS) -> int:
    """Of `free` memory what this process may have: a container's limit, or one around it."""
    for folder in _control_groups("memory", cgroups, own):
        limits = [_integer(folder / name) for name in ("memory.max", "memory.limit_in_bytes")]
        uses = [_integer(folder / name) for name in ("memory.current", "memory.usage_in_bytes")]
        # Pages of files that are given back when memory is wanted count as used.
        stat = _read(folder / "memory.stat") or ""
        cached = [int(n) for n in re.findall(r"^(?:total_)?inactive_file (\d+)", stat, re.M)]
        for limit, used in zip(limits, uses, strict=True):
            if limit is not None and used is not None:
                free = min(free, limit - used + (cached[-1] if cached else 0))
    return max(0, free)


def usable_cores(cgroups: Path = _CGROUPS, own: Path = _OWN_CGROUPS) -> int:
    """Cores this process may use: its affinity, and the quotas of the containers around it."""
    here = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if here else os.cpu_count() or 1
    for folder in _control_groups("cpu", cgroups, own):
        old = (_read(folder / f"cpu.cfs_{name}_us") or "" for name in ("quota", "period"))
        text = _read(folder / "cpu.max") or " ".join(old)
        if quota := re.fullmatch(r"(\d+) 0*([1-9]\d*)", text):
            cores = min(cores, max(1, round(int(quota[1]) / int(quota[2]))))
    return cores


def _control_groups(controller: str, cgroups: Path, own: Path) -> Iterator[Path]:
    """Linux's control groups that this process is in, version 1 or 2, the outermost first."""
    named = re.findall(r"^\d+:([^:]*):/?(.*)$", _read(own) or "0::/", re.M)
    for controllers, path in named:
        if not controllers or controller in controllers.split(","):
            root = cgroups / controllers  # version 2 has no controllers in its name
            inner = root / path
            yield from (p for p in [*reversed(inner.parents), inner] if p.is_relative_to(root))


def clusters(sysfs: Path = Path("/sys/devices/system/cpu")) -> list[list[int]]:
    """Usable cores by kind, the fastest kind first: Arm's capacity, or else the highest clock.

    One list on processors whose cores are alike, and where the system does not say.
    """
    if not hasattr(os, "sched_getaffinity"):
        return [list(range(usable_cores()))]
    by_speed: dict[int, list[int]] = {}
    for core in sorted(os.sched_getaffinity(0)):
        folder = sysfs / f"cpu{core}"
        stated = _integer(folder / "cpu_capacity") or _integer(folder / "cpufreq/cpuinfo_max_freq")
        by_speed.setdefault(stated or 0, []).append(core)
    kinds: dict[int, list[int]] = {}  # by the highest speed in each
    for speed, cores in sorted(by_speed.items(), reverse=True):
        # Boost clocks of one kind differ by a few percent from core to core.
        like = next((s for s in kinds if speed > 0.9 * s), speed)
        kinds[like] = sorted(kinds.get(like, []) + cores)
    return list(kinds.values())


@contextmanager
def pinned(n_threads: int) -> Iterator[None]:
    """Keep this process on the fastest cores where cores differ and these suffice."""
    kinds = clusters()
    if len(kinds) < 2 or n_threads > len(kinds[0]):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, kinds[0])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


# --- whether a reading can be trusted ------------------------------------------------------------


@dataclass(frozen=True)
class _Load:
    """Counters of the system and of this process, at one moment."""

    wall: float
    busy: float  # CPU seconds of all processes, the hypervisor's included
    own: float
    page_ins: int
    swapped: int
    throttled: int = 0  # times the processor was, where it counts them

    @staticmethod
    def now() -> _Load:
        import resource

        import psutil

        cpu, own = psutil.cpu_times(), sum(os.times()[:2])
        # Seconds of guests are counted as users' as well.
        others = (getattr(cpu, n, 0.0) for n in ("idle", "iowait", "guest", "guest_nice"))
        busy, page_ins = sum(cpu) - sum(others), resource.getrusage(resource.RUSAGE_SELF).ru_majflt
        swaps = re.findall(r"^pswp(?:in|out) (\d+)", _read("/proc/vmstat") or "", re.M)
        return _Load(time.monotonic(), busy, own, page_ins, sum(map(int, swaps)), times_throttled())


class Watch:
    """Around one measurement: `with Watch() as watch: ...`, then `watch.reasons`."""

    reasons: tuple[str, ...] = ()

    def __enter__(self) -> Watch:
        self._before = _Load.now()
        return self

    def __exit__(self, *_: object) -> None:
        self.reasons = tuple(doubts(self._before, _Load.now(), usable_cores()))
        if "throttled" not in self.reasons and is_throttled():
            self.reasons += ("throttled",)


def doubts(before: _Load, after: _Load, n_cores: int) -> Iterator[str]:
    """What disturbed the time between two loads."""
    wall = after.wall - before.wall
    others = (after.busy - before.busy) - (after.own - before.own)
    # The system counts in hundredths of a second: short readings cannot be judged.
    if wall > 0.2 and others > _BUSY_SHARE * wall * n_cores:
        yield "busy neighbours"
    if after.page_ins > before.page_ins:
        yield "paging"
    if after.swapped > before.swapped:
        yield "swapping"
    if after.throttled > before.throttled:
        yield "throttled"


def times_throttled(root: Path = Path("/sys")) -> int:
    """How often the processor was held back by heat since it started, where it counts that."""
    counts = (root / "devices/system/cpu").glob("cpu*/thermal_throttle/*_throttle_count")
    return sum(_integer(path) or 0 for path in counts)


def is_throttled(root: Path = Path("/sys")) -> bool:
    """Whether the system says that the processor is held back by heat or power right now."""
    pi = _read(root / "devices/platform/soc/soc:firmware/get_throttled")
    if pi is not None:
        flags = re.fullmatch(r"(?:0x)?([0-9a-fA-F]+)", pi)
        return bool(flags and int(flags[1], 16) & _PI_THROTTLED_NOW)
    cpu = root / "devices/system/cpu/cpu0/cpufreq"
    limit, usual = _integer(cpu / "scaling_max_freq"), _integer(cpu / "cpuinfo_max_freq")
    capped = bool(limit and usual and limit < _CLOCK_SHARE * usual)
    return capped or any(map(_is_too_hot, (root / "class/thermal").glob("thermal_zone*")))


def _is_too_hot(zone: Path) -> bool:
    """Whether a zone is as hot as where Linux starts to slow what heats it (its passive trip)."""
    now = _integer(zone / "temp") or 0
    kinds = [kind for kind in zone.glob("trip_point_*_type") if _read(kind) == "passive"]
    trips = [_integer(kind.with_name(kind.name.replace("_type", "_temp"))) for kind in kinds]
    return any(now >= (trip or 0) >= 1000 * _LEAST_TRIP_CELSIUS for trip in trips)


def cpu_features(cpuinfo: str | Path = "/proc/cpuinfo") -> set[str]:
    """Instructions that this processor has, under ggml's names; empty where that is not told."""
    line = re.search(r"^(?:flags|Features)\s*:(.*)", _read(cpuinfo) or "", re.M)
    has = set(line[1].split()) if line else set()
    return {name for flag, name in _FEATURES.items() if flag in has}


# --- reading the system --------------------------------------------------------------------------


def _read(path: str | Path) -> str | None:
    try:
        return Path(path).read_text().strip() or None
    except (OSError, UnicodeDecodeError):
        return None


def _integer(path: Path) -> int | None:
    text = _read(path) or ""
    return int(text) if re.fullmatch(r"-?[0-9]+", text) else None


def _cpu_name() -> str:
    if platform.system() == "Darwin":
        return _sysctl("machdep.cpu.brand_string") or "Apple"
    board = (_read("/sys/firmware/devicetree/base/model") or "").strip("\0")
    pairs = re.findall(r"^([^:\n]*):(.*)", _read("/proc/cpuinfo") or "", re.M)
    fields = {key.strip().lower(): value.strip() for key, value in reversed(pairs)}
    name = fields.get("model name") or fields.get("cpu part") or platform.processor()
    return " ".join(filter(None, (board, name))) or "unknown"


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
    texts = map(_read, Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"))
    sizes = [re.fullmatch(r"(\d+)([KM])", text or "") for text in texts]
    return max((int(s[1]) << (10 if s[2] == "K" else 20) for s in sizes if s), default=None)
