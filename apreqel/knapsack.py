"""The choice itself: one option per tensor, least cost, under linear limits. A pure solver.

A multiple-choice knapsack as a 0/1 programme, solved exactly by HiGHS (scipy.optimize.milp) with
the gap to the proven bound reported.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from apreqel.errors import InfeasiblePlanError

Doubles = npt.NDArray[np.float64]

# Asked of HiGHS; what it proved is reported beside every solution.
_GAP_WANTED = 1e-5
_SECONDS_AT_MOST = 30.0


@dataclass(frozen=True)
class Limit:
    """sum of `costs[item][option]` over the chosen options must not pass `at_most`."""

    name: str
    costs: Sequence[Doubles]
    at_most: float


@dataclass(frozen=True)
class Solution:
    """`choice[i]` is the option of item i; `gap` bounds (objective - optimum) / objective."""

    choice: tuple[int, ...]
    objective: float
    gap: float
    seconds: float


def solve(costs: Sequence[Doubles], limits: Sequence[Limit] = ()) -> Solution:
    """Minimise the sum of `costs[item][option]`, one option per item, within all limits.

    Raises InfeasiblePlanError naming the limit that no choice can meet, where one alone is at
    fault, and the smallest value that it could have.
    """
    started = time.perf_counter()
    for limit in limits:
        least = float(sum(row.min() for row in limit.costs))
        if least > limit.at_most:
            raise InfeasiblePlanError(
                f"{limit.name} of {limit.at_most:.6g} cannot be met; the least possible is "
                f"{least:.6g}"
            )
    kept = [_worth_having(costs, limits, i) for i in range(len(costs))]
    objective = np.concatenate([row[keep] for row, keep in zip(costs, kept, strict=True)])
    counts = [len(keep) for keep in kept]
    item_of = np.repeat(np.arange(len(costs)), counts)
    one_each = csr_array(
        (np.ones(len(item_of)), (item_of, np.arange(len(item_of)))),
        shape=(len(costs), len(item_of)),
    )
    constraints = [LinearConstraint(one_each, 1, 1)]
    for limit in limits:
        row = np.concatenate([c[keep] for c, keep in zip(limit.costs, kept, strict=True)])
        # HiGHS works to absolute tolerances near 1e-6: bring every limit to the same scale.
        scale = len(costs) / max(abs(limit.at_most), 1e-300)
        constraints.append(LinearConstraint(row[None, :] * scale, -np.inf, limit.at_most * scale))
    total = float(sum(row.max() for row in costs)) or 1.0
    result = milp(
        objective * (len(costs) / total),
        integrality=np.ones(len(objective)),
        bounds=Bounds(0, 1),
        constraints=constraints,
        options={"mip_rel_gap": _GAP_WANTED, "time_limit": _SECONDS_AT_MOST},
    )
    if result.x is None:
        names = " and ".join(limit.name for limit in limits)
        raise InfeasiblePlanError(f"no choice meets {names} together ({result.message.strip()})")
    starts = np.cumsum([0, *counts[:-1]])
    choice = tuple(
        int(keep[np.argmax(result.x[start : start + len(keep)])])
        for start, keep in zip(starts, kept, strict=True)
    )
    choice = _repaired(choice, costs, limits)
    reached = float(sum(row[c] for row, c in zip(costs, choice, strict=True)))
    bound = float(result.mip_dual_bound) * total / len(costs)
    gap = max(0.0, (reached - bound) / reached) if reached > 0 else 0.0
    return Solution(choice, reached, gap, time.perf_counter() - started)


def _worth_having(costs: Sequence[Doubles], limits: Sequence[Limit], i: int) -> npt.NDArray[np.intp]:
    """Options of item i that no other option beats in cost and in every limit."""
    table = np.stack([costs[i], *(limit.costs[i] for limit in limits)], axis=1)
    keep = []
    for j, row in enumerate(table):
        better = (table <= row).all(axis=1) & (table < row).any(axis=1)
        same = (table[:j] == row).all(axis=1).any()
        if not better.any() and not same:
            keep.append(j)
    return np.array(keep, np.intp)


def _repaired(
    choice: tuple[int, ...], costs: Sequence[Doubles], limits: Sequence[Limit]
) -> tuple[int, ...]:
    """Undo what the solver's tolerance let slip over a limit: the cheapest exchange that fits."""
    chosen = list(choice)
    for limit in limits:
        used = float(sum(row[c] for row, c in zip(limit.costs, chosen, strict=True)))
        while used > limit.at_most:
            over = used - limit.at_most
            moves = [
                (float(costs[i][j] - costs[i][c]), i, j)
                for i, c in enumerate(chosen)
                for j in range(len(costs[i]))
                if limit.costs[i][c] - limit.costs[i][j] >= over
            ]
            if not moves:
                raise InfeasiblePlanError(f"{limit.name} of {limit.at_most:.6g} cannot be met")
            _, i, j = min(moves)
            used -= float(limit.costs[i][chosen[i]] - limit.costs[i][j])
            chosen[i] = j
    return tuple(chosen)
