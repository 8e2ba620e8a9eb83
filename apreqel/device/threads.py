"""How many threads to run llama.cpp with: given, tuned on this device, or one a physical core."""

from __future__ import annotations

import math
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

from apreqel.device.machine import Watch, clusters, pinned, usable_cores
from apreqel.device.profile import ThreadTuning
from apreqel.device.real_runs import RealRun, prompt_tokens, time_file
from apreqel.device.shapes import timed_types, write_shapes
from apreqel.device.store import own_profiles
from apreqel.model.inventory import Inventory
from apreqel.workspace import Workspace

# Tuning: fewer threads win where more are not this much faster.
_THREADS_GAIN = 1.03
# A model up to so many times larger or smaller runs best with as many threads.
_LIKE_SIZE = 2.0
# A run that other programs disturbed is taken again, so often, after a pause.
_TRIES, _PAUSE_SECONDS = 3, 5.0


def default_threads() -> int:
    """One thread a physical core that may be used, of the fastest kind on big.LITTLE."""
    import psutil

    cores, kinds = usable_cores(), clusters()
    cores = min(cores, psutil.cpu_count(logical=False) or cores)
    return min(cores, len(kinds[0])) if len(kinds) > 1 else cores


def threads_for(inventory: Inventory) -> tuple[int, str]:
    """Threads for a model that none were given for, and why so many."""
    if tuned := tuned_threads(inventory):
        return tuned, "as tuned on this device for a model of this size"
    return default_threads(), "one a physical core"


def tuned_threads(inventory: Inventory) -> int | None:
    """What a quiet device was tuned to with a model of like size; None where it was not."""
    weights, found = _n_weights(inventory), dict[float, int]()
    for profile in own_profiles():
        for tuning in profile.tunings:
            factor = math.exp(abs(math.log(tuning.n_weights / weights)))
            if factor <= _LIKE_SIZE and tuning.seconds:
                found[factor] = tuning.n_threads
    return found[min(found)] if found else None


def with_threads(space: Workspace, n_threads: int | None) -> Workspace:
    """The same with so many threads; None: as many as this device was, or may be, tuned to."""
    if n_threads is not None:
        return replace(space, n_threads=n_threads, tune_threads=False)
    n, why = threads_for(space.inventory)
    space.progress(f"{n} thread{'s' if n > 1 else ''}, {why}", 0, 1)
    return replace(space, n_threads=n, tune_threads=True)


def tune_threads(space: Workspace) -> ThreadTuning:
    """The number of threads that decodes fastest here, with (decode, prefill) seconds of each.

    Without seconds, and one thread a physical core, where other programs were at work all along.
    """
    inventory, most = space.inventory, usable_cores()
    candidates = sorted({1, max(1, most // 2), default_threads(), most})
    names = [qtype.name for qtype in timed_types(inventory, None)]
    name = next((n for n in ("Q4_0", "Q8_0") if n in names), names[0])
    types = inventory.types
    types |= {t.name: name for t in inventory.quantizable if name in t.legal_types}
    n_prompt = prompt_tokens(inventory, 128)
    runs: dict[int, list[RealRun]] = {n: [] for n in candidates}
    with tempfile.TemporaryDirectory(prefix="threads-", dir=space.folder) as folder:
        path = Path(folder) / "threads.gguf"
        write_shapes(inventory, types, path)
        for i in range(3):
            for n in candidates:
                space.progress(f"trying {n} threads", i, 3)
                run = _undisturbed_run(path, n, n_prompt)
                if run is None:
                    return ThreadTuning(_n_weights(inventory), default_threads())
                runs[n].append(run)
    decode = {n: median(run.decode for run in runs[n]) for n in candidates}
    best = candidates[0]
    for n in candidates:
        best = n if decode[best] > _THREADS_GAIN * decode[n] else best
    seconds = {str(n): (decode[n], median(r.prefill for r in runs[n])) for n in candidates}
    return ThreadTuning(_n_weights(inventory), best, seconds)


def _undisturbed_run(path: Path, n_threads: int, n_prompt: int) -> RealRun | None:
    """None where other programs kept cores busy each time."""
    for attempt in range(_TRIES):
        time.sleep(_PAUSE_SECONDS if attempt else 0.0)
        with pinned(n_threads), Watch() as watch:
            run, _ = time_file(path, n_threads, n_prompt)
        if "busy neighbours" not in watch.reasons:
            return run
    return None


def _n_weights(inventory: Inventory) -> int:
    return sum(tensor.n_elements for tensor in inventory.quantizable)
