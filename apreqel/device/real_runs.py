"""Seconds that llama.cpp itself takes with a file, run as a user runs it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from apreqel.device.machine import default_threads, pinned, usable_cores
from apreqel.device.shapes import timed_types, write_shapes
from apreqel.llama import engine

if TYPE_CHECKING:
    from apreqel.model.inventory import Inventory
    from apreqel.workspace import Workspace

# Prompt and answer fill two whole pages of 256 cells: threads share them, not the cells in use.
PROMPT_TOKENS, GENERATED_TOKENS, FIRST_TOKENS = 480, 32, 8
# Files larger than this stay where they are in memory: reading them again takes too long.
_FORGOTTEN_BYTES = 1 << 30
# Tuning: fewer threads win where more are not this much faster.
_THREADS_GAIN = 1.03


@dataclass(frozen=True)
class RealRun:
    """Seconds per token in llama.cpp itself: of a prompt, after a short one, after the prompt."""

    prefill: float
    decode: float
    decode_at_depth: float


def forget_pages(path: Path) -> None:
    """Drop a file from the page cache, so that it comes to lie elsewhere in memory.

    Where its pages happen to lie changes decode by several percent here (five copies of one file:
    7.8 to 9.2 ms a token, steadily): a new place for every run makes that luck average out.
    """
    if path.stat().st_size <= _FORGOTTEN_BYTES and hasattr(os, "posix_fadvise"):
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def time_file(path: Path, n_threads: int, n_prompt: int) -> tuple[RealRun, float]:
    """(one real run, seconds to pick a token)."""
    forget_pages(path)
    with (
        engine.LoadedModel(path, offload=True) as model,
        model.context(n_prompt + GENERATED_TOKENS, 1, n_threads, as_users_run=True) as context,
    ):
        context.seconds(FIRST_TOKENS, 2)  # brings everything in
        _, decode = context.seconds(FIRST_TOKENS, GENERATED_TOKENS)
        prefill, deep = context.seconds(n_prompt, GENERATED_TOKENS)
        sampling = context.sampling_seconds()
    return RealRun(prefill / n_prompt, decode / GENERATED_TOKENS, deep / GENERATED_TOKENS), sampling


def prompt_tokens(inventory: Inventory, wanted: int = PROMPT_TOKENS) -> int:
    """So many as are wanted, or as the model's context holds beside an answer."""
    room = (inventory.context_length or 4096) - GENERATED_TOKENS - 1
    return max(FIRST_TOKENS, min(wanted, room))


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
