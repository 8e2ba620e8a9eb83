"""The Pareto front of a model: what can be had of size, closeness and speed, all plans at once.

For sizes from small to nearly lossless: the closest plan, and, with a device profile, the fastest
that is not much farther from the original. Plans that another one beats in everything are left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from operator import le

import numpy as np

from apreqel.device.profile import DeviceProfile, Speed
from apreqel.errors import InfeasiblePlanError
from apreqel.plan.options import Options
from apreqel.plan.plan import encode_metadata
from apreqel.plan.planner import Planner
from apreqel.solver.knapsack import Limit, Solution, solve, total

# The front starts where the damage is this many times that of stock Q4_K_M: files below that are of
# no use.
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
    damage_nats: float
    speed: Speed | None
    types: Mapping[str, str]


@dataclass(frozen=True)
class Front:
    points: Sequence[FrontPoint]  # smallest first
    stock: Sequence[FrontPoint]


def pareto_front(planner: Planner, n_points: int = 20) -> Front:
    """The front within the request's limits (its priority does not matter here).

    Raises InfeasiblePlanError where nothing meets the limits.
    """
    inventory, records = planner.inventory, encode_metadata(planner.metadata)
    options, limits, worst = _room(planner, planner.profile)

    def point(label: str, solution: Solution) -> FrontPoint:
        types = inventory.types | options.types_of(solution)
        nats = options.damage.file_nats(total(options.damages, solution.choice))
        size, speed = inventory.output_size(types, records), planner.speed(planner.running, types)
        return FrontPoint(label, size, nats + options.experts_nats, speed, types)

    points: list[FrontPoint] = []
    n_sizes = n_points if options.timings is None else -(-n_points // 2)
    for size in sizes_of(options, limits, worst, n_sizes):
        within = [options.size_limit(size), *limits]
        closest = solve(options.damages, within, _GAP)
        points.append(point("closest", closest))
        if options.timings is not None:
            allowed = options.damage_limit(_FAST_ALLOWANCE * closest.objective, "closeness")
            seconds = options.timings.workload_seconds(*planner.request.workload)
            points.append(point("fast", solve(seconds, [*within, allowed], _GAP)))
    stock = [_stock_point(planner, preset) for preset in _STOCK_SHOWN]
    return Front(sorted(_not_beaten(points), key=lambda p: (p.size_bytes, p.damage_nats)), stock)


def ladder_sizes(planner: Planner, count: int) -> list[float]:
    """File sizes of a ladder within the request's limits. Raises InfeasiblePlanError."""
    timed = planner.profile if planner.request.uses_profile else None
    return sizes_of(*_room(planner, timed), count)


def _room(planner: Planner, profile: DeviceProfile | None) -> tuple[Options, list[Limit], float]:
    """The choices, the limits but for those on size, and the most that damages may sum to."""
    free = replace(planner.request, max_size_bytes=None, target_bpw=None)
    planner = replace(planner, request=free, caches=None)
    options = planner.options(profile)
    return options, planner.limits(options), _WORST_TIMES_STOCK * planner.stock_damage_sum


def sizes_of(options: Options, limits: Sequence[Limit], worst: float, count: int) -> list[float]:
    """`count` file sizes, from the smallest plan whose damages sum to at most `worst` upwards.

    The largest is nearly lossless. Equal steps of the logarithm, as sizes matter to people.
    """
    try:
        start = solve(options.sizes, [options.damage_limit(worst, "closeness"), *limits])
    except InfeasiblePlanError:
        start = solve(options.sizes, limits)
    least, most = options.fixed_bytes + start.objective, options.near_lossless_bytes
    # A limit on memory or speed may end the front earlier.
    return [float(size) for size in np.geomspace(least * 1.0005, max(most, least * 1.001), count)]


def _not_beaten(points: Sequence[FrontPoint]) -> list[FrontPoint]:
    """Those that no other equals or beats in everything; of equal ones the first."""
    rows: dict[tuple[float, ...], FrontPoint] = {}
    for p in points:
        speeds = (-p.speed.decode.value, -p.speed.prefill.value) if p.speed else ()
        rows.setdefault((p.size_bytes, p.damage_nats, *speeds), p)
    return [
        point
        for mine, point in rows.items()
        if not any(other != mine and all(map(le, other, mine)) for other in rows)
    ]


def _stock_point(planner: Planner, preset: str) -> FrontPoint:
    inventory, types = planner.inventory, planner.probed.stock_types(preset)
    size, nats = inventory.output_size(types), planner.damage.predicted(types, plain=True).nats
    return FrontPoint(preset, size, nats, planner.speed(inventory, types), types)
