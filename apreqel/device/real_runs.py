"""Seconds that llama.cpp itself takes with a file, run as a user runs it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from apreqel.llama import engine

if TYPE_CHECKING:
    from apreqel.model.inventory import Inventory

# Prompt and answer fill two whole pages of 256 cells: threads share them, not the cells in use.
PROMPT_TOKENS, GENERATED_TOKENS, FIRST_TOKENS = 480, 32, 8
# Files larger than this stay where they are in memory: reading them again takes too long.
_FORGOTTEN_BYTES = 1 << 30


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
