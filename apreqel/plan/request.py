"""What is asked of a plan: limits and priorities, and how people write them."""

from __future__ import annotations

import glob
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from apreqel import artifacts
from apreqel.device.machine import detect
from apreqel.errors import UsageError
from apreqel.llama.stock import stock_presets, stock_types
from apreqel.model.inventory import Inventory
from apreqel.model.recipes import read_recipe, types_of_file
from apreqel.plan.constraints import Constraints, parse_constraints
from apreqel.plan.wishes import Wishes
from apreqel.sensitivity.experts import require_count
from apreqel.sensitivity.measurement import METRICS

# Of tokens/s, nats and bits alike: more stands for a slip.
_MOST = 1e9

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
    any_speed: bool = False  # else the closest plan is as fast as the stock preset of its size
    workload: tuple[int, int] = (512, 128)  # tokens of a prompt and of its answer
    weights: Mapping[str, float] = field(default_factory=dict)  # of memory, latency, accuracy
    max_type_changes: int | None = None  # against stock Q4_K_M
    experts_used: int | None = None  # a token, instead of the model's own count
    plain: bool = False  # weights as ggml rounds them
    constraints: Constraints = field(default_factory=Constraints)

    @property
    def needs_profile(self) -> bool:
        """Whether it cannot be met without timings of the device."""
        limits = self.max_ram_bytes, self.min_decode_tps, self.min_prefill_tps
        latency = self.prefer == "latency" or self.weights.get("latency", 0) > 0
        return latency or any(limit is not None for limit in limits)

    @property
    def is_as_fast_as_stock(self) -> bool:
        """Whether nothing was said about speed: then what is closest must not be slow."""
        asked = self.min_decode_tps, self.min_prefill_tps, self.max_ram_bytes
        free = self.any_speed or self.weights or any(limit is not None for limit in asked)
        return self.prefer == "accuracy" and not free

    @property
    def trades_damage(self) -> bool:
        """Whether damage, up to its limit, is given for size or speed."""
        return self.prefer in ("memory", "latency") and not self.weights

    @property
    def uses_profile(self) -> bool:
        """Whether timings of the device count, if there are any."""
        return self.needs_profile or self.is_as_fast_as_stock

    @property
    def has_one_measure(self) -> bool:
        """Whether plans within the limits are ranked by size, speed or closeness alone."""
        return self.prefer != "balanced" and not self.weights

    @property
    def decode_context(self) -> int:
        """Tokens of context that decode is reckoned at: half of the answer is written."""
        n_prompt, n_generated = self.workload
        return n_prompt + n_generated // 2


def request_from(settings: Mapping[str, Any]) -> PlanRequest:
    """A request as a plan recorded it. Raises ArtifactError."""
    with artifacts.understood("the plan's request", "plan again"):
        request: PlanRequest = artifacts.from_json(PlanRequest, dict(settings), "request")
        return request


# --- what people write ---------------------------------------------------------------------------


def require_priority(prefer: str) -> None:
    """Raises UsageError."""
    if prefer not in PRIORITIES:
        raise UsageError(f"--prefer {prefer!r}: choose one of {', '.join(PRIORITIES)}")


def require_compatible(wishes: Wishes) -> None:
    """Raise UsageError for wishes that contradict each other, before any work."""
    metric = wishes.metric
    if metric not in METRICS:
        raise UsageError(f"--metric {metric!r}: choose one of {', '.join(METRICS)}")
    if metric != "kld" and wishes.max_kld is not None:
        raise UsageError("--max-kld limits KL divergence; with --metric perplexity leave it out")
    if not wishes.refine:
        return
    if wishes.unchecked or wishes.front or wishes.ladder or metric != "kld":
        raise UsageError(
            "--refine compares real files of one plan by KL divergence: not with --unchecked, "
            "--front, --ladder or --metric perplexity"
        )
    if wishes.weights or wishes.prefer == "balanced":
        raise UsageError(
            "--refine compares plans by size, speed or closeness: not with --prefer balanced or "
            "--weights"
        )


def request_of(wishes: Wishes, inventory: Inventory) -> PlanRequest:
    """What the wishes mean for this model. Raises UsageError, UnsupportedModelError."""
    require_priority(wishes.prefer)
    for option, value in (
        ("--target-bpw", wishes.target_bpw),
        ("--max-kld", wishes.max_kld),
        ("--min-decode-tps", wishes.min_decode),
        ("--min-prefill-tps", wishes.min_prefill),
    ):
        if value is not None and not value <= _MOST:  # as nan is not, either
            raise UsageError(f"{option} {value}: give a number up to {_MOST:g}, or leave it out")
    if wishes.experts is not None:
        require_count(inventory, wishes.experts)
    constraints = parse_constraints(wishes.pin or [], wishes.only_types, wishes.exclude_types)
    constraints.check(inventory)
    copied = copied_pins(inventory, wishes.like, wishes.recipe)
    size = any_size(inventory) if copied else None
    if wishes.max_size is not None:
        size = size_from(wishes.max_size, inventory)
    klds = [] if wishes.max_kld is None else [wishes.max_kld]
    if wishes.max_degradation is not None:
        klds.append(parse_degradation(wishes.max_degradation))
    rams = [parse_size(wishes.max_ram, "--max-ram")] if wishes.max_ram is not None else []
    if wishes.fit:  # all that is free here now, less a tenth for what else happens
        rams.append(int(0.9 * detect().available_bytes))
    return PlanRequest(
        wishes.prefer,
        max_size_bytes=size,
        target_bpw=wishes.target_bpw,
        max_kld_nats=min(klds, default=None),
        max_ram_bytes=min(rams, default=None),
        n_ctx=parse_context(wishes.ctx),
        longest_context=wishes.ctx == "max",
        min_decode_tps=wishes.min_decode,
        min_prefill_tps=wishes.min_prefill,
        any_speed=wishes.any_speed,
        workload=parse_workload(wishes.workload),
        weights={} if wishes.weights is None else parse_weights(wishes.weights),
        max_type_changes=wishes.max_type_changes,
        experts_used=wishes.experts,
        plain=wishes.plain,
        constraints=replace(constraints, pins=[*copied, *constraints.pins]),
    )


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
    types = dict(types_of_file(like, inventory)) if like else {}
    types |= read_recipe(recipe, inventory) if recipe else {}
    return [(glob.escape(name), type_name) for name, type_name in types.items()]


def any_size(inventory: Inventory) -> int:
    """A limit that no plan reaches: for maps that are given, whatever they take."""
    return 2 * inventory.size_bytes


def parse_weights(text: str) -> dict[str, float]:
    """'memory=1,latency=2,accuracy=3' as numbers. Raises UsageError."""
    form = re.compile(r"(memory|latency|accuracy)=(\d*\.?\d+)")
    parts = [form.fullmatch(part.strip()) for part in text.split(",")]
    weights = {part[1]: float(part[2]) for part in parts if part}
    if not all(parts):
        raise UsageError(f"--weights {text!r}: give memory=NUMBER,latency=NUMBER,accuracy=NUMBER")
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
    known = stock_presets()
    for name in names:
        if name.upper() not in known:
            listed = ", ".join(known)
            raise UsageError(f"--against {name!r}: there is no such preset; there are {listed}")


def size_from(text: str, inventory: Inventory) -> int:
    """--max-size: bytes, or the exact size of a stock preset of this model. Raises UsageError."""
    if text.upper() not in stock_presets():
        return parse_size(text)
    names = [t.name for t in inventory.quantizable]
    return inventory.output_size(stock_types(inventory.files[0], text, has_imatrix_for=names))
