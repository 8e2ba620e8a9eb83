"""What one llama.cpp run takes of memory: as llama.cpp accounts for it, and as it really peaks.

The peak is that of a process of its own: `python -m apreqel.llama.footprint FILE CONTEXT PROMPT
THREADS K V`, K and V being the types of the KV cache; prints one line of JSON.
"""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from apreqel.errors import EngineError
from apreqel.llama.engine import LoadedModel
from apreqel.llama.library import library, listen_to_log
from apreqel.model.qtypes import QuantType, lookup

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
    """Bytes of KV cache that llama.cpp would reserve for `path`: {"kv", "k", "v"}.

    From its own simulation. Raises EngineError.
    """
    with (
        listen_to_log() as lines,
        LoadedModel(path, simulated=True) as model,
        model.context(n_ctx, 1, 1, as_users_run=True, cache_types=(type_k, type_v)),
    ):
        pass
    sizes = dict.fromkeys(("kv", "k", "v"), 0.0)
    for found in _KV_LINE.findall("".join(lines)):
        for name, size in zip(sizes, found, strict=True):
            sizes[name] += float(size or 0)
    return {name: int(size * 2**20) for name, size in sizes.items()}


@dataclass(frozen=True)
class Footprint:
    """Bytes resident before the model was loaded, and at the peak."""

    before_bytes: int
    peak_bytes: int

    @property
    def run_bytes(self) -> int:
        """What the run itself took: weights, KV cache, buffers, vocabulary."""
        return self.peak_bytes - self.before_bytes


def measure_footprint(
    path: Path,
    n_ctx: int,
    n_prompt: int,
    n_threads: int,
    cache_types: Sequence[str] = ("F16", "F16"),
) -> Footprint:
    """Load `path` in a new process, fill `n_prompt` of `n_ctx` tokens, generate a few.

    Raises EngineError where that fails, also where the system kills it for its memory.
    """
    command = [sys.executable, "-m", "apreqel.llama.footprint", str(path)]
    command += [str(n) for n in (n_ctx, n_prompt, n_threads)] + list(cache_types)
    try:
        done = subprocess.run(command, capture_output=True, timeout=_SECONDS_AT_MOST)
        return Footprint(**json.loads(done.stdout))
    except (OSError, subprocess.SubprocessError, ValueError, TypeError) as error:
        raise EngineError(f"{path}: its memory at context {n_ctx} cannot be measured") from error


def _peak_bytes() -> int:
    """The process's largest resident size. (Linux's ru_maxrss starts at the parent's.)"""
    if sys.platform == "darwin":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) << 10


def _run(path: Path, n_ctx: int, n_prompt: int, n_threads: int, k: str, v: str) -> Footprint:
    import psutil

    library()
    types, before = (lookup(k), lookup(v)), psutil.Process().memory_info().rss
    with (
        LoadedModel(path) as model,
        model.context(n_ctx, 1, n_threads, as_users_run=True, cache_types=types) as context,
    ):
        context.seconds(min(n_prompt, n_ctx - 4), 4)
    return Footprint(before, _peak_bytes())


if __name__ == "__main__":
    n_ctx, n_prompt, n_threads = map(int, sys.argv[2:5])
    found = _run(Path(sys.argv[1]), n_ctx, n_prompt, n_threads, *sys.argv[5:7])
    print(json.dumps(asdict(found)))
