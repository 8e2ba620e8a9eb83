"""What one llama.cpp run takes of memory: as llama.cpp accounts for it, and as it really peaks.

The peak is that of a process of its own: `python -m apreqel.llama.footprint FILE CONTEXT PROMPT
THREADS K V`, K and V being the types of the KV cache; prints its bytes.
"""

from __future__ import annotations

import re
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from apreqel.errors import EngineError
from apreqel.llama.engine import LoadedModel
from apreqel.llama.library import library, listen_to_log
from apreqel.model.qtypes import USUAL_CACHES, QuantType, lookup

# What one run takes at most before something is wrong with it.
_SECONDS_AT_MOST = 600

_KV_LINE = re.compile(
    r"^llama_kv_cache\S*: size = +([\d.]+) MiB"
    r"(?:.*K \(\S+\): +([\d.]+) MiB, V \(\S+\): +([\d.]+) MiB)?",
    re.MULTILINE,
)


def memory_accounting(
    path: Path, n_ctx: int, type_k: QuantType, type_v: QuantType
) -> dict[str, int]:
    """Bytes of {"kv", "k", "v"} cache, by llama.cpp's own simulation. Raises EngineError."""
    with (
        listen_to_log() as lines,
        LoadedModel(path, simulated=True) as model,
        model.context(n_ctx, 1, 1, as_users_run=True, cache_types=(type_k, type_v)),
    ):
        pass
    caches = _KV_LINE.findall("".join(lines))
    sizes = [sum(float(cache[i] or 0) for cache in caches) for i in range(3)]
    return {name: int(mib * 2**20) for name, mib in zip(("kv", "k", "v"), sizes, strict=True)}


def measure_footprint(
    path: Path, n_ctx: int, n_prompt: int, n_threads: int, cache_types: Sequence[str] = USUAL_CACHES
) -> int:
    """Load `path` in a new process, fill `n_prompt` of `n_ctx` tokens, generate a few.

    Bytes that this took at its peak, beyond those resident before: weights, KV cache, buffers,
    vocabulary. Raises EngineError where that fails, also where the system kills it for its memory.
    """
    command = [sys.executable, "-m", "apreqel.llama.footprint", str(path)]
    command += [*map(str, (n_ctx, n_prompt, n_threads)), *cache_types]
    try:
        return int(subprocess.run(command, capture_output=True, timeout=_SECONDS_AT_MOST).stdout)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        raise EngineError(f"{path}: its memory at context {n_ctx} cannot be measured") from error


def _peak_bytes() -> int:
    """The process's largest resident size. (Linux's ru_maxrss starts at the parent's.)"""
    if sys.platform == "darwin":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) << 10


def _run(path: Path, n_ctx: int, n_prompt: int, n_threads: int, k: str, v: str) -> int:
    import psutil

    library()
    types, before = (lookup(k), lookup(v)), psutil.Process().memory_info().rss
    with (
        LoadedModel(path) as model,
        model.context(n_ctx, 1, n_threads, as_users_run=True, cache_types=types) as context,
    ):
        context.seconds(min(n_prompt, n_ctx - 4), 4)
    return _peak_bytes() - before


if __name__ == "__main__":
    n_ctx, n_prompt, n_threads = map(int, sys.argv[2:5])
    print(_run(Path(sys.argv[1]), n_ctx, n_prompt, n_threads, *sys.argv[5:7]))
