"""The choice itself: one option per tensor, least cost, under linear limits. A pure solver.

A multiple-choice knapsack, solved to a proven gap. With many items and a few limits the relaxation
is nearly whole, so that a good choice is near its bound and no tree needs to be searched:

1. Prices of the limits by cutting planes on the Lagrangian dual (Kelley 1960), which look at every
   option but need programmes of a few variables only. Then the relaxation over the options near
   those prices: its bound, its prices, and a choice in which few items are left between options.
2. A local search from there (`local_search`), until the gap to the bound is the one wanted.
3. Where that is not reached: HiGHS (scipy.optimize) on the options that can be part of a better
   choice (reduced-cost fixing, Nemhauser & Wolsey 1988, II.5.2).
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, linprog, milp
from scipy.sparse import csr_array

from apreqel.arrays import Doubles, Mask, Whole
from apreqel.errors import InfeasiblePlanError
from apreqel.solver.local_search import neighbours

Choice = tuple[int, ...]

# Asked for; what was proven is reported beside every solution.
_GAP_WANTED = 5e-5
# HiGHS's, where it is needed.
_SECONDS_AT_MOST = 30.0
# Three limits take 20 to 30.
_PLANES = 100
# Options beyond one per item in the first relaxation, which settles 2,000 items of 20 options under
# three limits in 0.03 s; all their options take 5 s.
_NEAR = 1000
# Moves considered, round by round. The first round brings 2,000 items within 1e-4 of the bound,
# the others 500 items; the last takes 0.03 s.
_CORES = (60, 120, 240, 480)


@dataclass(frozen=True)
class Limit:
    """sum of `costs[item][option]` over the chosen options must not pass `at_most`.

    `show` renders a sum in the user's own unit; `one_more` is what one such unit more adds to
    `at_most` (see `Plan.binding`).
    """

    name: str
    costs: Sequence[Doubles]
    at_most: float
    show: Callable[[float], str] = "{:.6g}".format
    one_more: tuple[float, str] = (1.0, "1 more")


@dataclass(frozen=True)
class Solution:
    """`choice[i]` is the option of item i; `gap` bounds (objective - optimum) / objective.

    `prices[j]` is what the relaxed objective falls by when limit j is eased by one: its shadow
    price, 0 where the limit does not bind.
    """

    choice: Choice
    objective: float
    gap: float
    seconds: float
    prices: tuple[float, ...] = ()


def solve(
    costs: Sequence[Doubles], limits: Sequence[Limit] = (), gap_wanted: float = _GAP_WANTED
) -> Solution:
    """Minimise the sum of `costs[item][option]`, one option per item, within all limits.

    Proven to within `gap_wanted` of the optimum, unless that takes over 30 seconds.

    Raises InfeasiblePlanError naming the limit that no choice can meet, where one alone is at
    fault, and the smallest value that it could have.
    """
    started = time.perf_counter()
    for limit in limits:
        least = float(sum(row.min() for row in limit.costs))
        if least > limit.at_most:
            raise InfeasiblePlanError(
                f"{limit.name} {limit.show(limit.at_most)}: cannot be met; the nearest possible is "
                f"{limit.show(least)}"
            )
    table = _Table(costs, limits)
    relaxed = table.relaxed()
    if relaxed is None:
        raise _conflict(limits)
    bound, prices, best = relaxed
    ceiling = table.value(best)
    for core in _CORES:
        if ceiling - bound <= gap_wanted * abs(ceiling) < math.inf:
            break
        best, ceiling = table.improved(best, ceiling, prices, core)
    else:
        if solved := table.exact(prices, bound, ceiling, gap_wanted):
            bound, found = max(bound, solved[0]), solved[1]
            # HiGHS may pass a limit by its tolerance.
            found, value = table.improved(found, table.value(found), prices, _CORES[0])
            if value <= ceiling:
                best, ceiling = found, value
    if ceiling == math.inf:
        raise _conflict(limits)
    gap = max(0.0, (ceiling - bound) / ceiling) if ceiling > 0 else 0.0
    seconds = time.perf_counter() - started
    return Solution(tuple(map(int, best)), ceiling, gap, seconds, tuple(map(float, prices)))


def priced(
    i: int, costs: Sequence[Doubles], limits: Sequence[Limit], solution: Solution
) -> Doubles:
    """Of the options of item i: cost + prices x what they use of the limits.

    At the optimum of the relaxation an item takes the option of which this is least.
    """
    pairs = zip(limits, solution.prices, strict=True)
    return np.asarray(sum((price * limit.costs[i] for limit, price in pairs), costs[i]))


def total(costs: Sequence[Doubles], choice: Sequence[int] | Whole) -> float:
    """The sum of the costs of the chosen options."""
    return float(sum(row[c] for row, c in zip(costs, choice, strict=True)))


class _Table:
    """Costs and limits as arrays [item, option]; an option that another one beats costs inf."""

    def __init__(self, costs: Sequence[Doubles], limits: Sequence[Limit]) -> None:
        self._costs, self._limits = costs, limits
        self._items = np.arange(len(costs))
        counts = np.array([len(row) for row in costs])
        exists = np.arange(counts.max()) < counts[:, None]
        tables = np.full((1 + len(limits), *exists.shape), math.inf)
        for table, rows in zip(tables, (costs, *(limit.costs for limit in limits)), strict=True):
            table[exists] = np.concatenate(rows)
        less_or_equal = np.ones((*exists.shape, exists.shape[1]), dtype=bool)
        less = ~less_or_equal
        for table in tables:
            less_or_equal &= table[:, :, None] <= table[:, None]
            less |= table[:, :, None] < table[:, None]
        twin_before = np.triu(less_or_equal & ~less, 1)
        self._open = exists & ~(less_or_equal & less | twin_before).any(axis=1)
        for uses, limit in zip(tables[1:], limits, strict=True):
            # What alone takes more than all room that the least of every item leaves.
            least = uses.min(axis=1)
            room = limit.at_most - float(least.sum())
            self._open &= uses - least[:, None] <= room + 1e-12 * np.abs(least).sum()
        self._cost = np.where(self._open, tables[0], math.inf)
        self._uses = np.where(self._open, tables[1:], 0.0)
        self._at_most = np.array([limit.at_most for limit in limits])
        # HiGHS works to absolute tolerances near 1e-7: bring every limit to the same scale.
        # A limit near 0 has that of what the options use.
        most = np.abs(self._uses).sum(axis=(1, 2))
        self._units = len(costs) / np.maximum(np.abs(self._at_most), 1e-4 * most + 1e-300)

    def value(self, choice: Whole) -> float:
        """The objective of a choice; inf where it passes a limit."""
        if any(total(limit.costs, choice) > limit.at_most for limit in self._limits):
            return math.inf
        return total(self._costs, choice)

    def relaxed(self) -> tuple[float, Doubles, Whole] | None:
        """(lower bound, price of each limit, nearest whole choice) with fractions allowed.

        Of the options near the best prices, and of more where those do not settle the matter.
        """
        if not self._open.any(axis=1).all():
            return None  # an item whose every option takes too much of one limit or another
        count = len(self._items) + _NEAR
        near = self._open
        if near.sum() > count:
            near = self._nearest(self._near_prices(), count)
        while True:
            everything = bool((near == self._open).all())
            solved = self._relaxation(near)
            if solved:
                value, prices, choice = solved
                # No choice within the limits costs less than this, whatever the prices.
                bound = float(self._reduced(prices).min(axis=1).sum() - prices @ self._at_most)
                if everything or value - bound <= 1e-6 * abs(value):
                    return bound, prices, choice
            elif everything:
                return None
            count *= 4
            near = near | self._nearest(prices, count)

    def _reduced(self, prices: Doubles) -> Doubles:
        return np.asarray(self._cost + np.tensordot(prices, self._uses, 1))

    def _extra(self, prices: Doubles) -> Doubles:
        """What choosing an option adds to the lower bound at these prices, at least."""
        reduced = self._reduced(prices)
        return np.asarray(reduced - reduced.min(axis=1, keepdims=True))

    def _nearest(self, prices: Doubles, count: int) -> Mask:
        extra = self._extra(prices)
        last = min(count, int(self._open.sum())) - 1
        return np.asarray(self._open & (extra <= np.partition(extra, last, axis=None)[last]))

    def _near_prices(self) -> Doubles:
        """Prices whose lower bound is within about 1e-6 of the greatest.

        Cutting planes, each halfway between the best prices and those that the planes suggest.
        """
        most = np.where(self._open, self._cost, -math.inf).max(axis=1)
        least = np.where(self._open, self._uses, math.inf).min(axis=2).sum(axis=1)
        room = np.maximum(self._at_most - least, 1e-9 * np.abs(self._at_most) + 1e-300)
        # One limit alone has no higher price than this.
        highest = float((most - self._cost.min(axis=1)).sum()) / room
        slopes, heights = [], []
        share = best_share = np.zeros(len(room))
        best = -math.inf
        for _ in range(_PLANES):
            choice = self._reduced(share * highest).argmin(axis=1)
            used = self._uses[:, self._items, choice].sum(axis=1)
            slopes.append((used - self._at_most) * highest)
            heights.append(float(self._cost[self._items, choice].sum()))
            if (value := heights[-1] + slopes[-1] @ share) > best:
                best, best_share = value, share
            scale = abs(best) or 1.0
            suggested = linprog(
                np.append(np.zeros(len(room)), -1.0),
                A_ub=np.column_stack([-np.array(slopes) / scale, np.ones(len(slopes))]),
                b_ub=np.array(heights) / scale,
                bounds=[(0, 1)] * len(room) + [(None, None)],
            )
            if suggested.x is None or -suggested.fun - best / scale <= 1e-6:
                break
            share = (best_share + suggested.x[:-1]) / 2
        return np.asarray(best_share * highest)

    def _relaxation(self, near: Mask) -> tuple[float, Doubles, Whole] | None:
        """(least cost, prices, nearest whole choice) of the options `near`."""
        scale = 1000 / (float(np.abs(self._cost[near]).max()) or 1.0)
        result = linprog(
            self._cost[near] * scale,
            A_ub=self._uses[:, near] * self._units[:, None],
            b_ub=self._at_most * self._units,
            A_eq=_one_each(near),
            b_eq=np.ones(len(near)),
            bounds=(0, 1),
        )
        if result.x is None:
            return None
        prices = np.maximum(-np.asarray(result.ineqlin.marginals) * self._units / scale, 0.0)
        return float(result.fun) / scale, prices, _whole(near, result.x)

    def exact(
        self, prices: Doubles, bound: float, ceiling: float, gap_wanted: float
    ) -> tuple[float, Whole] | None:
        """(lower bound, choice) by tree search. HiGHS may pass a limit by its tolerance.

        Left out are options whose choice alone pushes the bound at `prices` over `ceiling`.
        """
        reach = (ceiling - bound) * (1 + 1e-9) + 1e-12 * abs(bound)
        near = self._open & (self._extra(prices) <= reach)
        # HiGHS also stops at an absolute gap of 1e-6, so the objective is brought near a thousand.
        scale = 1000 / (abs(ceiling if ceiling < math.inf else bound) or 1.0)
        rows = self._uses[:, near] * self._units[:, None]
        with _quiet():
            result = milp(
                self._cost[near] * scale,
                integrality=np.ones(near.sum()),
                bounds=Bounds(0, 1),
                constraints=[
                    LinearConstraint(_one_each(near), 1, 1),
                    LinearConstraint(rows, -np.inf, self._at_most * self._units),
                ],
                options={"mip_rel_gap": gap_wanted, "time_limit": _SECONDS_AT_MOST},
            )
        if result.x is None:
            return None
        return float(result.mip_dual_bound) / scale, _whole(near, result.x)

    def improved(
        self, choice: Whole, value: float, prices: Doubles, core: int
    ) -> tuple[Whole, float]:
        """The best choice found by moving up to four items to other options, and its objective."""
        left = self._at_most - self._uses[:, self._items, choice].sum(axis=1)
        # What is left of the limits, at their prices, is all that a better choice could gain.
        gain = float(prices @ left) if value < math.inf else math.inf
        reduced, slip = self._reduced(prices), 1e-12 * np.abs(self._at_most)
        for found in neighbours(choice, reduced, self._uses, left + slip, prices, core, gain):
            if (reached := self.value(found)) < value:
                return found, reached
        return choice, value


def _one_each(near: Mask) -> csr_array:
    items = np.nonzero(near)[0]
    return csr_array((np.ones(len(items)), (items, np.arange(len(items)))), (len(near), len(items)))


def _whole(near: Mask, x: Doubles) -> Whole:
    shares = np.zeros(near.shape)
    shares[near] = x
    return np.asarray(shares.argmax(axis=1))


@contextmanager
def _quiet() -> Iterator[None]:
    """HiGHS 1.8 to 1.12 print debugging lines on the process's stdout; results belong there."""
    sys.stdout.flush()
    kept = os.dup(1)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def _conflict(limits: Sequence[Limit]) -> InfeasiblePlanError:
    """Which limits stand against each other, and how far each would have to give way alone."""
    names = " and ".join(f"{limit.name} {limit.show(limit.at_most)}" for limit in limits)
    ways = []
    for limit in limits:
        with suppress(InfeasiblePlanError):
            nearest = solve(limit.costs, [other for other in limits if other is not limit])
            ways.append(f"{limit.name} {limit.show(nearest.objective)}")
    advice = f"; with the others as they are, possible is {', or '.join(ways)}" if ways else ""
    return InfeasiblePlanError(f"no choice meets {names} together{advice}")
