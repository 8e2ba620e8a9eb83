"""How much to probe: how many probes a tensor, on how much text, and for how long."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from apreqel.errors import UsageError


@dataclass(frozen=True)
class Effort:
    """How long to go on: chunks of text for a first probe, and further probes a tensor."""

    name: str
    first_chunks: int
    further_per_tensor: float
    with_kernels: bool = True  # whether to measure what rounding activations does
    every_layer: int = 1  # of a role every n-th tensor is probed first
    minutes: float | None = None  # stop then, whatever is left


EFFORTS = {
    "quick": Effort("quick", 1, 0.0, with_kernels=False, every_layer=2),
    "normal": Effort("normal", 1, 0.05),
    "thorough": Effort("thorough", 2, 2.0),
}


def effort_from(name: str, minutes: float | None = None) -> Effort:
    """Raises UsageError."""
    if name not in EFFORTS:
        raise UsageError(f"--effort {name!r}: choose one of {', '.join(EFFORTS)}")
    if minutes is not None and not math.isfinite(minutes):
        raise UsageError(f"--minutes {minutes}: give a number, or leave it out for no limit")
    return replace(EFFORTS[name], minutes=minutes)


def rank(name: str) -> int:
    """Greater for more effort; least for '', where nothing was done yet."""
    return ["", *EFFORTS].index(name)
