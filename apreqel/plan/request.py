"""What is asked of a plan: limits and priorities, and how people write them."""

from __future__ import annotations

import glob
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apreqel import artifacts, llama
from apreqel.device.machine import detect
from apreqel.errors import UsageError
from apreqel.model.recipes import read_recipe, types_of_file
from apreqel.plan.options import Constraints

if TYPE_CHECKING:
    from apreqel.model.inventory import Inventory

PRIORITIES = ("memory", "latency", "accuracy", "balanced")


@dataclass(frozen=True)
class PlanRequest:
    """What the user wants. Sizes are of the whole file, in bytes."""

    prefer: str = "accuracy"
    max_size_bytes: int | None = None
    target_bpw: float | None = None
    max_kld_nats: float | None = None
    max_ram_bytes: int | None = None
    n_ctx: int | None = None
    longest_context: bool = False  # instead of n_ctx: as long as the limits allow
    min_decode_tps: float | None = None
    min_prefill_tps: float | None = None
    workload: tuple[int, int] = (512, 128)  # tokens of a prompt and of its answer
    weights: Mapping[str, float] = field(default_factory=dict)  # of memory, latency, accuracy
    max_type_changes: int | None = None  # against stock Q4_K_M
    experts_used: int | None = None  # a token, instead of the model's own count
    feedback: bool = False  # move weights against rounding when they are written
    constraints: Constraints = field(default_factory=Constraints)

    @property
    def needs_profile(self) -> bool:
        """Whether it cannot be met without timings of the device."""
        wishes = self.max_ram_bytes, self.min_decode_tps, self.min_prefill_tps
        latency = self.prefer == "latency" or self.weights.get("latency", 0) > 0
        return latency or any(wish is not None for wish in wishes)

    @property
    def has_one_measure(self) -> bool:
        """Whether plans within the limits are ranked by size, speed or closeness alone."""
        return self.prefer != "balanced" and not self.weights

    @property
    def depth(self) -> int:
        """Tokens of context that decode is reckoned at: half of the answer is written."""
        n_prompt, n_generated = self.workload
        return n_prompt + n_generated // 2


def request_from(settings: Mapping[str, Any]) -> PlanRequest:
    """A request as a plan recorded it. Raises ArtifactError."""
    with artifacts.understood("the plan's request", "plan again"):
        data = dict(settings)
        data["constraints"] = Constraints(**data["constraints"])
        data["workload"] = tuple(data["workload"])
        return PlanRequest(**data)


# --- what people write ---------------------------------------------------------------------------


def parse_size(text: str, option: str = "--max-size") -> int:
    """Bytes of '95MB', '1.5GiB', '102400' (decimal and binary units). Raises UsageError."""
    units = {"": 1, "B": 1}
    for power, letter in enumerate("KMGT", 1):
        units[f"{letter}B"] = units[letter] = 1000**power
        units[f"{letter}IB"] = 1024**power
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]*)\s*", text)
    if not found or found[2].upper() not in units:
        raise UsageError(f"{option} {text!r}: give bytes, or a number with MB, MiB, GB or GiB")
    return int(float(found[1]) * units[found[2].upper()])


def parse_context(text: str | None) -> int | None:
    """Tokens of context; None for none given and for 'max'. Raises UsageError."""
    if text is None or text == "max":
        return None
    if not text.isdigit() or int(text) < 32:
        raise UsageError(f"--ctx {text!r}: give a number of tokens from 32, or max")
    return int(text)


def parse_workload(text: str) -> tuple[int, int]:
    """'512:128' is a prompt of 512 tokens and an answer of 128. Raises UsageError."""
    found = re.fullmatch(r"(\d{1,7}):(\d{1,7})", text)
    if not found or int(found[1]) + int(found[2]) == 0:
        raise UsageError(f"--workload {text!r}: give tokens of prompt and answer, as in 512:128")
    return int(found[1]), int(found[2])


def copied_pins(
    inventory: Inventory, like: Path | None, recipe: Path | None
) -> list[tuple[str, str]]:
    """Pins that hold every tensor to another file's or a recipe's type. Raises UsageError."""
    types: dict[str, str] = {}
    if like is not None:
        types |= types_of_file(like, inventory)
    if recipe is not None:
        types |= read_recipe(recipe, inventory)
    return [(glob.escape(name), kind) for name, kind in types.items()]


def any_size(inventory: Inventory) -> int:
    """A limit that no plan reaches: for maps that are given, whatever they take."""
    return 2 * inventory.size_bytes


def free_memory() -> int:
    """Bytes of memory that are free here now, less a tenth for what else happens."""
    return int(0.9 * detect().available_bytes)


def parse_weights(text: str) -> dict[str, float]:
    """'memory=1,latency=2,accuracy=3' as numbers. Raises UsageError."""
    weights = {}
    for part in text.split(","):
        name, _, value = part.strip().partition("=")
        if name not in ("memory", "latency", "accuracy") or not re.fullmatch(r"\d*\.?\d+", value):
            raise UsageError(
                f"--weights {text!r}: give memory=NUMBER,latency=NUMBER,accuracy=NUMBER"
            )
        weights[name] = float(value)
    if not any(weights.values()):
        raise UsageError(f"--weights {text!r}: one must be above 0")
    return weights


def parse_degradation(text: str) -> float:
    """'1%' more perplexity as the KL divergence, in nats, that stands for it. Raises UsageError.

    On text as the model itself would write it, the logarithm of the ratio of perplexities is the
    KL divergence.
    """
    found = re.fullmatch(r"\s*(\d*\.?\d+)\s*%\s*", text)
    if not found or float(found[1]) <= 0:
        raise UsageError(f"--max-degradation {text!r}: give a percentage of perplexity, as in 1%")
    return math.log1p(float(found[1]) / 100)


def require_presets(names: Sequence[str]) -> None:
    """Raise UsageError where --against names no preset of llama.cpp."""
    known = llama.stock_presets()
    for name in names:
        if name.upper() not in known:
            raise UsageError(
                f"--against {name!r}: there is no such preset; there are {', '.join(known)}"
            )


def size_from(text: str, inventory: Inventory) -> int:
    """--max-size: bytes, or the exact size of a stock preset of this model. Raises UsageError."""
    if text.upper() not in llama.stock_presets():
        return parse_size(text)
    names = [t.name for t in inventory.quantizable]
    return inventory.output_size(llama.stock_types(inventory.files[0], text, has_imatrix_for=names))
