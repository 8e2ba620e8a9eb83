"""What people ask of a plan, as they write it: the values of `plan`'s and `auto`'s options.

`request.request_of` makes sense of them. Nothing heavy is imported here: --help answers at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Wishes:
    """What is asked of any plan, then how it is found; a command that lacks an option leaves it."""

    prefer: str = "accuracy"
    weights: str | None = None
    max_size: str | None = None
    target_bpw: float | None = None
    max_kld: float | None = None
    max_degradation: str | None = None
    max_ram: str | None = None
    fit: bool = False
    ctx: str | None = None
    min_decode: float | None = None
    min_prefill: float | None = None
    any_speed: bool = False
    workload: str = "512:128"
    pin: list[str] | None = None
    only_types: str | None = None
    exclude_types: str | None = None
    max_type_changes: int | None = None
    experts: int | None = None
    like: Path | None = None
    recipe: Path | None = None
    front: bool = False
    ladder: int | None = None
    device: str | None = None
    effort: str = "normal"
    minutes: float | None = None
    metric: str = "kld"
    plain: bool = False
    unchecked: bool = False
    refine: bool | None = None
