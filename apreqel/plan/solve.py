"""A request solved: one knapsack decides the type of every tensor.

What is made small follows from the priority, the rest are limits. Where no limit is given, stock
Q4_K_M sets it: its size for accuracy, its quality for memory and latency.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np

from apreqel.arrays import Doubles
from apreqel.device.memory import usable_context
from apreqel.errors import ArtifactError, InfeasiblePlanError, UsageError
from apreqel.plan.cache_types import CACHES
from apreqel.plan.options import Options
from apreqel.plan.plan import Binding
from apreqel.plan.planner import Planner
from apreqel.plan.request import PlanRequest, require_priority
from apreqel.solver.knapsack import Limit, Solution, solve, total

# Points of the size/damage front from which `balanced` takes the knee.
_FRONT_POINTS = 24
# Contexts are tried in steps of this many tokens.
_CONTEXT_STEP = 256


@dataclass(frozen=True)
class Solved:
    """A request as a knapsack: what could be chosen, under which limits, and what was."""

    options: Options
    limits: Sequence[Limit]
    costs: Sequence[Doubles]
    unit: str
    solution: Solution
    limit_factor: float = 1.0  # what a limit on damage was multiplied by

    def allows(self, types: Mapping[str, str]) -> bool:
        """Whether a map of the weights' types meets every limit but those on damage.

        Beside it the KV cache stays as it was chosen.
        """
        choice = self._choice(types)
        limits = [limit for limit in self.limits if limit.costs is not self.options.damages]
        return choice is not None and all(total(li.costs, choice) <= li.at_most for li in limits)

    def with_types(self, types: Mapping[str, str]) -> Solved:
        """The same with a map's choice, and how far that is from optimal. Raises ArtifactError."""
        choice = self._choice(types)
        if choice is None:
            raise ArtifactError("a planned type is no longer an option; plan again")
        bound = self.solution.objective * (1 - self.solution.gap)
        objective = total(self.costs, choice)
        gap = max(0.0, 1 - bound / objective) if objective > 0 else 0.0
        solution = replace(self.solution, choice=choice, objective=objective, gap=gap)
        return replace(self, solution=solution)

    def _choice(self, types: Mapping[str, str]) -> tuple[int, ...] | None:
        """None where a type is no option."""
        found = self.options.choice_of(types)
        if CACHES in self.options.names and CACHES not in types:
            found[-1] = self.solution.choice[-1]
        known = tuple(j for j in found if j is not None)
        return known if None not in found else None

    def binding(self) -> Iterator[Binding]:
        """The limits that stand in the way, and what one more of each would save."""
        objective, scale = self.solution.objective, 1.0
        if self.unit == "nats" and objective > 0:
            scale = self.options.damage.file_nats(objective) / objective
        for limit, price in zip(self.limits, self.solution.prices, strict=True):
            more, text = limit.one_more
            if price > 0:
                at_most, buys = limit.show(limit.at_most), price * more * scale
                yield Binding(limit.name, at_most, text, buys, self.unit)


def solve_request(planner: Planner, limit_factor: float = 1.0) -> Solved:
    """What the planner's request asks for.

    `limit_factor` is what a limit on damage is multiplied by, for plans that were measured and
    could come closer to it, or went beyond it. Raises UsageError, InfeasiblePlanError,
    CalibrationError.
    """
    request = planner.request
    require_priority(request.prefer)
    if request.needs_profile and planner.profile is None:
        raise UsageError(
            "--prefer latency, --max-ram and --min-*-tps need a device profile; run "
            "apreqel profile MODEL first"
        )
    options = planner.options(planner.profile if request.uses_profile else None)
    limits = planner.limits(options, limit_factor)
    asked = {limit.name for limit in limits}
    if request.max_type_changes is not None:
        limits.append(options.change_limit(planner.stock, request.max_type_changes))
    usual = limit_factor * planner.stock_damage_sum
    costs, unit = objective(options, request, planner.stock)
    if request.prefer == "balanced" and not request.weights:
        if request.max_kld_nats is not None:
            usual = limit_factor * options.sum_for(request.max_kld_nats)
        solution, limits = knee(options, planner.size_budget(options), limits, usual)
        return Solved(options, limits, costs, unit, solution, limit_factor)
    # What stock Q4_K_M takes of what is not made small, where no limit on it was asked for.
    by_accuracy = request.prefer == "accuracy"
    if (
        not request.weights
        and by_accuracy
        and not asked & {"--max-size", "--target-bpw", "--max-ram"}
    ):
        name = f"the size of stock {planner.probed.default_preset} (--max-size)"
        limits.append(options.size_limit(planner.inventory.output_size(planner.stock), name))
    if not request.weights and not by_accuracy and "--max-kld" not in asked:
        name = f"the quality of stock {planner.probed.default_preset} (--max-kld)"
        limits.append(options.damage_limit(usual, name))
    speeds = planner.stock_speed_limits(options) if request.is_as_fast_as_stock else []
    if speeds:
        # Nobody asked for these: what else was asked for goes first.
        with suppress(InfeasiblePlanError):
            within = [*limits, *speeds]
            return Solved(options, within, costs, unit, solve(costs, within), limit_factor)
    return Solved(options, limits, costs, unit, solve(costs, limits), limit_factor)


def with_longest_context(planner: Planner) -> Planner:
    """With the longest context at which the limits and the quality can be met.

    The quality is `--max-kld`, or else that of stock Q4_K_M. In steps of 256 tokens. Raises
    UsageError, InfeasiblePlanError where not even one step fits.
    """
    request = planner.request
    if request.max_ram_bytes is None:
        raise UsageError("--ctx max: how much memory may it take? give --max-ram or --fit")
    floor = request.max_kld_nats
    if floor is None:
        floor = planner.damage.predicted(planner.stock, plain=True).nats + planner.experts_nats
    request = replace(request, max_kld_nats=floor, longest_context=False)

    trained = usable_context(planner.inventory, planner.inventory.context_length or None)

    def is_too_long(steps: int) -> bool:
        n_ctx = min(trained, steps * _CONTEXT_STEP)
        attempt = replace(request, n_ctx=n_ctx, prefer="memory", weights={})
        try:
            solve_request(replace(planner, request=attempt))
        except InfeasiblePlanError:
            return True
        return False

    steps = bisect_left(range(1, max(1, trained // _CONTEXT_STEP) + 1), True, key=is_too_long)
    if steps == 0:
        solve_request(replace(planner, request=replace(request, n_ctx=_CONTEXT_STEP)))
    n_ctx = min(trained, max(1, steps) * _CONTEXT_STEP)
    return replace(planner, request=replace(request, n_ctx=n_ctx))


def objective(
    options: Options, request: PlanRequest, stock: Mapping[str, str]
) -> tuple[Sequence[Doubles], str]:
    """What is made small, per option, and its unit.

    With weights: the weighted sum of bytes, seconds and nats, each as a part of what stock Q4_K_M
    takes, so that equal weights mean equal percentages.
    """
    parts = {"memory": (options.sizes, "bytes"), "accuracy": (options.damages, "nats")}
    if options.timings is not None:
        seconds = options.timings.workload_seconds(*request.workload)
        parts["latency"] = seconds, "seconds"
    if not request.weights:
        return parts["accuracy" if request.prefer == "balanced" else request.prefer]
    weighted = [np.zeros(len(row)) for row in options.sizes]
    for name, weight in request.weights.items():
        if weight > 0:
            rows, _ = parts[name]
            usual = options.sum_of(rows, stock)
            weighted = [w + weight * row / usual for w, row in zip(weighted, rows, strict=True)]
    return weighted, "of the stock preset's costs, weighted"


def knee(
    options: Options, budget: int | None, limits: Sequence[Limit], worst: float
) -> tuple[Solution, list[Limit]]:
    """The point of the size/damage front farthest below its chord (Satopaa et al. 2011).

    The front is taken from the smallest plan whose damages sum to at most `worst` up: below that
    every byte saved is dear, and the knee would lie among useless files. With the limits it was
    solved under.
    """
    first = [options.damage_limit(worst, "the quality floor"), *limits]
    start = solve(options.sizes, first)
    least, most = options.fixed_bytes + start.objective, options.near_lossless_bytes
    if budget is not None:
        least, most = min(least, budget), min(most, budget)
    points, sizes = [], []
    for size in np.linspace(least, most, _FRONT_POINTS):
        within = [options.size_limit(size), *limits]
        with suppress(InfeasiblePlanError):
            points.append((solve(options.damages, within), within))
            sizes.append(float(size))
    if not points:
        return start, first
    x, y = np.array(sizes), np.array([solution.objective for solution, _ in points])
    if len(points) < 3 or y[0] <= y[-1]:
        return points[-1]
    below = (x - x[0]) / (x[-1] - x[0]) + (y - y[-1]) / (y[0] - y[-1])
    return points[int(np.argmin(below))]
