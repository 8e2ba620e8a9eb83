"""The real peak memory of one llama.cpp run, in a process of its own.

Run as `python -m apreqel.llama.footprint FILE CONTEXT PROMPT THREADS K V`, K and V being the types
of the KV cache; prints one line of JSON.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from apreqel import llama
from apreqel.errors import EngineError
from apreqel.model.qtypes import lookup

# What one run takes at most before something is wrong with it.
_SECONDS_AT_MOST = 600


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
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS_AT_MOST)
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

    llama.library()
    before = psutil.Process().memory_info().rss
    with (
        llama.LoadedModel(path) as model,
        model.context(
            n_ctx, 1, n_threads, as_users_run=True, cache_types=(lookup(k), lookup(v))
        ) as context,
    ):
        context.seconds(min(n_prompt, n_ctx - 4), 4)
    return Footprint(before, _peak_bytes())


if __name__ == "__main__":
    n_ctx, n_prompt, n_threads = (int(n) for n in sys.argv[2:5])
    found = _run(Path(sys.argv[1]), n_ctx, n_prompt, n_threads, *sys.argv[5:7])
    print(json.dumps({"before_bytes": found.before_bytes, "peak_bytes": found.peak_bytes}))
