"""The Pareto front of a model: what can be had of size, closeness and speed, all plans at once.

For sizes from small to nearly lossless: the closest plan, and, with a device profile, the fastest
that is not much farther from the original. Plans that another one beats in everything are left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from apreqel.device.profile import Speed
from apreqel.errors import InfeasiblePlanError
from apreqel.plan.options import Options, build_options
from apreqel.plan.planner import NEAR_LOSSLESS, hard_limits, stock_map, stock_size
from apreqel.plan.request import PlanRequest
from apreqel.sensitivity.experts import ExpertUse, with_experts
from apreqel.solver.knapsack import solve

if TYPE_CHECKING:
    from apreqel.device.profile import DeviceProfile
    from apreqel.model.inventory import Inventory
    from apreqel.sensitivity.measure import Sensitivity
    from apreqel.solver.knapsack import Limit, Solution

# The front starts where the damage is this many times that of stock Q4_K_M: below lies ruin.
_WORST_TIMES_STOCK = 4.0
# A fast plan may be this much farther from the original than the closest of its size.
_FAST_ALLOWANCE = 1.25
# A picture needs no more than this; a plan made from it is solved to its own gap.
_GAP = 5e-4
_STOCK_SHOWN = ("Q3_K_M", "Q4_K_S", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0")


@dataclass(frozen=True)
class FrontPoint:
    """One plan of the front, or a stock preset beside it. Predicted values."""

    label: str
    size_bytes: int
    kld_nats: float
    speed: Speed | None
    types: Mapping[str, str]


@dataclass(frozen=True)
class Front:
    points: Sequence[FrontPoint]  # smallest first
    stock: Sequence[FrontPoint]


def pareto_front(
    inventory: Inventory,
    sensitivity: Sensitivity,
    request: PlanRequest,
    records: Sequence[bytes],
    profile: DeviceProfile | None,
    n_points: int = 20,
    experts: ExpertUse | None = None,
) -> Front:
    """The front within the request's limits (its priority does not matter here).

    Raises InfeasiblePlanError where nothing meets the limits.
    """
    n_prompt, depth = request.workload[0], request.depth
    options, limits, worst = _room(inventory, sensitivity, request, records, profile, experts)
    stock = [
        _stock_point(name, inventory, sensitivity, profile, depth, n_prompt)
        for name in _STOCK_SHOWN
    ]
    lost = options.fixed_damage
    found: list[tuple[str, Solution]] = []
    n_sizes = n_points if options.timings is None else -(-n_points // 2)
    for size in sizes_of(options, limits, worst, n_sizes):
        within = [options.size_limit(size), *limits]
        closest = solve(options.damages, within, _GAP)
        found.append(("closest", closest))
        if options.timings is not None:
            allowed = options.damage_limit(_FAST_ALLOWANCE * closest.objective, "closeness")
            seconds = options.timings.workload_seconds(*request.workload)
            found.append(("fast", solve(seconds, [*within, allowed], _GAP)))
    points = []
    for label, solution in found:
        types = inventory.types | options.types_of(solution)
        damage = sum(float(row[c]) for row, c in zip(options.damages, solution.choice, strict=True))
        speed = None
        if profile:
            running = with_experts(inventory, experts)
            speed = profile.predict(running, types, depth, n_prompt=n_prompt)
        size = inventory.output_size(types, records)
        points.append(FrontPoint(label, size, options.model.nats(damage) + lost, speed, types))
    return Front(sorted(_not_beaten(points), key=lambda p: (p.size_bytes, p.kld_nats)), stock)


def ladder_sizes(
    inventory: Inventory,
    sensitivity: Sensitivity,
    request: PlanRequest,
    records: Sequence[bytes],
    profile: DeviceProfile | None,
    count: int,
    experts: ExpertUse | None = None,
) -> list[float]:
    """File sizes of a ladder within the request's limits. Raises InfeasiblePlanError."""
    timed = profile if request.needs_profile else None
    return sizes_of(*_room(inventory, sensitivity, request, records, timed, experts), count)


def _room(
    inventory: Inventory,
    sensitivity: Sensitivity,
    request: PlanRequest,
    records: Sequence[bytes],
    profile: DeviceProfile | None,
    experts: ExpertUse | None,
) -> tuple[Options, list[Limit], float]:
    """The choices, the limits but for those on size, and the most that damages may sum to."""
    options = build_options(
        inventory,
        sensitivity,
        records,
        profile,
        request.depth,
        request.constraints,
        experts,
        request.workload[0],
    )
    free = replace(request, max_size_bytes=None, target_bpw=None)
    limits = hard_limits(inventory, options, free, profile, request.n_ctx or 4096)
    usual = sensitivity.model.raw_total(stock_map(inventory, sensitivity, "Q4_K_M"), feedback=False)
    return options, limits, _WORST_TIMES_STOCK * usual


def sizes_of(options: Options, limits: Sequence[Limit], worst: float, count: int) -> list[float]:
    """`count` file sizes, from the smallest plan whose damages sum to at most `worst` upwards.

    The largest is nearly lossless. Equal steps of the logarithm, as sizes matter to people.
    """
    try:
        start = solve(options.sizes, [options.damage_limit(worst, "closeness"), *limits])
    except InfeasiblePlanError:
        start = solve(options.sizes, limits)
    least = options.fixed_bytes + start.objective
    most = options.fixed_bytes + sum(
        float(row[np.argmin(np.where(row < NEAR_LOSSLESS * row.max(), damage, np.inf))])
        for row, damage in zip(options.sizes, options.damages, strict=True)
    )
    # A limit on memory or speed may end the front earlier.
    return [float(size) for size in np.geomspace(least * 1.0005, max(most, least * 1.001), count)]


def _not_beaten(points: Sequence[FrontPoint]) -> list[FrontPoint]:
    def row(point: FrontPoint) -> tuple[float, ...]:
        speed = point.speed
        seconds = (-speed.decode.value, -speed.prefill.value) if speed else ()
        return point.size_bytes, point.kld_nats, *seconds

    kept: list[FrontPoint] = []
    for i, point in enumerate(points):
        mine = row(point)
        beaten = any(
            all(a <= b for a, b in zip(row(other), mine, strict=True))
            and (row(other) != mine or j < i)
            for j, other in enumerate(points)
            if j != i
        )
        if not beaten:
            kept.append(point)
    return kept


def _stock_point(
    preset: str,
    inventory: Inventory,
    sensitivity: Sensitivity,
    profile: DeviceProfile | None,
    depth: int,
    n_prompt: int,
) -> FrontPoint:
    types = stock_map(inventory, sensitivity, preset)
    speed = profile.predict(inventory, types, depth, n_prompt=n_prompt) if profile else None
    size, damage = stock_size(inventory, types), sensitivity.model.total(types, feedback=False)
    return FrontPoint(preset, size, damage.nats, speed, types)
