"""How far a step has come: one callable, handed down from the command that was typed."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Called whenever more of `what` is done: `done` of `total` steps, or bytes.

    `total` of 0 or 1 says only that it goes on.
    """

    def __call__(self, what: str, done: int, total: int) -> None: ...


def silent(what: str, done: int, total: int) -> None:
    """A `Progress` that nobody watches."""
