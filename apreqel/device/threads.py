"""How many threads to run llama.cpp with: given, tuned on this device, or one a physical core."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from statistics import median

from apreqel.device.machine import clusters, pinned, usable_cores
from apreqel.device.real_runs import RealRun, prompt_tokens, time_file
from apreqel.device.shapes import timed_types, write_shapes
from apreqel.device.store import own_profiles
from apreqel.workspace import Workspace

# Tuning: fewer threads win where more are not this much faster.
_THREADS_GAIN = 1.03


def default_threads() -> int:
    """One thread a physical core that may be used, of the fastest kind on big.LITTLE."""
    import psutil

    cores, kinds = usable_cores(), clusters()
    cores = min(cores, psutil.cpu_count(logical=False) or cores)
    return min(cores, len(kinds[0])) if len(kinds) > 1 else cores


def tuned_threads() -> int | None:
    """Threads of the stored profile of this device for which they were tuned, not given."""
    return next((p.n_threads for p in own_profiles() if p.thread_seconds), None)


def usual_threads() -> int:
    """Threads that this device was tuned to, or else one a physical core."""
    return tuned_threads() or default_threads()


def with_threads(space: Workspace, n_threads: int | None) -> Workspace:
    """The same with so many threads; None: as many as this device was, or may be, tuned to."""
    return replace(space, n_threads=n_threads or usual_threads(), tune_threads=n_threads is None)


def tune_threads(space: Workspace) -> tuple[int, dict[str, Sequence[float]]]:
    """The number of threads that decodes fastest here, and (decode, prefill) seconds of each."""
    inventory, most = space.inventory, usable_cores()
    candidates = sorted({1, max(1, most // 2), default_threads(), most})
    if len(candidates) == 1:
        return 1, {}
    names = [qtype.name for qtype in timed_types(inventory, None)]
    name = next((n for n in ("Q4_0", "Q8_0") if n in names), names[0])
    types = inventory.types
    types |= {t.name: name for t in inventory.quantizable if name in t.legal_types}
    path, n_prompt = space.folder / "threads.gguf", prompt_tokens(inventory, 128)
    write_shapes(inventory, types, path)
    runs: dict[int, list[RealRun]] = {n: [] for n in candidates}
    for i in range(3):
        for n in candidates:
            space.progress(f"trying {n} threads", i, 3)
            with pinned(n):
                runs[n].append(time_file(path, n, n_prompt)[0])
    path.unlink()
    decode = {n: median(run.decode for run in runs[n]) for n in candidates}
    best = candidates[0]
    for n in candidates:
        best = n if decode[best] > _THREADS_GAIN * decode[n] else best
    return best, {str(n): (decode[n], median(r.prefill for r in runs[n])) for n in candidates}
