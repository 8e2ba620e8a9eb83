"""The choice itself: one option per tensor, least cost, under linear limits. A pure solver.

A multiple-choice knapsack as a 0/1 programme, solved exactly by HiGHS (scipy.optimize) with the gap
to the proven bound reported. First the relaxation is solved: its prices show which options cannot
be part of any solution better than a rounded one, and those are left out (reduced-cost fixing,
Nemhauser & Wolsey 1988, II.5.2). What is left of 1,000 tensors with 20 types is solved at once.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import Bounds, LinearConstraint, linprog, milp
from scipy.sparse import csr_array

from apreqel.errors import InfeasiblePlanError

Doubles = npt.NDArray[np.float64]
Choice = tuple[int, ...]

# Asked of HiGHS; what it proved is reported beside every solution.
_GAP_WANTED = 5e-5
_SECONDS_AT_MOST = 30.0


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
    kept = [_not_dominated(costs, limits, i) for i in range(len(costs))]
    relaxed = _Programme(costs, limits, kept).relaxation()
    if relaxed is None:
        raise _conflict(limits)
    bound, prices, rounded = relaxed
    rounded_choice = _repaired(rounded, costs, limits)
    if rounded_choice:
        rounded_choice = _improved(rounded_choice, costs, limits)
    ceiling = _total(costs, rounded_choice) if rounded_choice else math.inf
    if rounded_choice and ceiling - bound <= gap_wanted * ceiling:
        gap = max(0.0, (ceiling - bound) / ceiling) if ceiling > 0 else 0.0
        seconds = time.perf_counter() - started
        return Solution(rounded_choice, ceiling, gap, seconds, tuple(map(float, prices)))
    kept = [
        _within_reach(
            costs[i], [limit.costs[i] for limit in limits], prices, kept[i], ceiling - bound
        )
        for i in range(len(costs))
    ]
    programme = _Programme(costs, limits, kept)
    # HiGHS also stops at an absolute gap of 1e-6, so the objective is brought near a thousand.
    scale = 1000 / ceiling if 0 < ceiling < math.inf else 1.0
    solved = programme.exact(scale, gap_wanted)
    choice = _repaired(solved[1], costs, limits) if solved else None
    if choice is None or _total(costs, choice) > ceiling:
        choice = rounded_choice
    if choice is None:
        raise _conflict(limits)
    reached = _total(costs, choice)
    proven = max(bound, solved[0]) if solved else bound
    gap = max(0.0, (reached - proven) / reached) if reached > 0 else 0.0
    seconds = time.perf_counter() - started
    return Solution(choice, reached, gap, seconds, tuple(map(float, prices)))


@contextmanager
def _quiet() -> Iterator[None]:
    """HiGHS 1.8 to 1.12 print debugging lines on the process's stdout; results belong there."""
    sys.stdout.flush()
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def _conflict(limits: Sequence[Limit]) -> InfeasiblePlanError:
    """Which limits stand against each other, and how far each would have to give way alone."""
    names = " and ".join(f"{limit.name} {limit.show(limit.at_most)}" for limit in limits)
    ways = []
    for i, limit in enumerate(limits):
        others = [other for j, other in enumerate(limits) if j != i]
        try:
            nearest = solve(limit.costs, others).objective
        except InfeasiblePlanError:
            continue
        ways.append(f"{limit.name} {limit.show(nearest)}")
    advice = f"; with the others as they are, possible is {', or '.join(ways)}" if ways else ""
    return InfeasiblePlanError(f"no choice meets {names} together{advice}")


def _total(costs: Sequence[Doubles], choice: Choice) -> float:
    return float(sum(row[c] for row, c in zip(costs, choice, strict=True)))


class _Programme:
    """The options `kept[item]` of every item as one programme over a 0/1 vector."""

    def __init__(
        self,
        costs: Sequence[Doubles],
        limits: Sequence[Limit],
        kept: Sequence[npt.NDArray[np.intp]],
    ) -> None:
        self._kept = kept
        counts = [len(keep) for keep in kept]
        self._starts = np.cumsum([0, *counts[:-1]])
        n = sum(counts)
        self._objective = np.concatenate([row[keep] for row, keep in zip(costs, kept, strict=True)])
        items = np.repeat(np.arange(len(costs)), counts)
        self._one_each = csr_array((np.ones(n), (items, np.arange(n))), shape=(len(costs), n))
        # HiGHS works to absolute tolerances near 1e-7: bring every limit to the same scale.
        self._units = [len(costs) / max(abs(limit.at_most), 1e-300) for limit in limits]
        self._rows = np.array(
            [
                np.concatenate([c[keep] for c, keep in zip(limit.costs, kept, strict=True)]) * unit
                for limit, unit in zip(limits, self._units, strict=True)
            ]
        ).reshape(len(limits), n)
        self._most = np.array(
            [limit.at_most * unit for limit, unit in zip(limits, self._units, strict=True)]
        )

    def relaxation(self) -> tuple[float, Doubles, Choice] | None:
        """(least cost with fractions allowed, price of each limit, nearest whole choice)."""
        scale = 1000 / (float(np.abs(self._objective).max()) or 1.0)
        result = linprog(
            self._objective * scale,
            A_ub=self._rows if len(self._rows) else None,
            b_ub=self._most if len(self._rows) else None,
            A_eq=self._one_each,
            b_eq=np.ones(self._one_each.shape[0]),
            bounds=(0, 1),
            method="highs",
        )
        if result.x is None:
            return None
        marginals = result.ineqlin.marginals if len(self._rows) else np.empty(0)
        prices = -np.asarray(marginals) * np.array(self._units) / scale
        return float(result.fun) / scale, prices, self._choice(result.x)

    def exact(self, scale: float, gap_wanted: float) -> tuple[float, Choice] | None:
        """(proven lower bound, choice) of the 0/1 programme."""
        limits = [LinearConstraint(self._one_each, 1, 1)]
        if len(self._rows):
            limits.append(LinearConstraint(self._rows, -np.inf, self._most))
        with _quiet():
            result = milp(
                self._objective * scale,
                integrality=np.ones(len(self._objective)),
                bounds=Bounds(0, 1),
                constraints=limits,
                options={"mip_rel_gap": gap_wanted, "time_limit": _SECONDS_AT_MOST},
            )
        if result.x is None:
            return None
        return float(result.mip_dual_bound) / scale, self._choice(result.x)

    def _choice(self, x: Doubles) -> Choice:
        return tuple(
            int(keep[np.argmax(x[start : start + len(keep)])])
            for start, keep in zip(self._starts, self._kept, strict=True)
        )


def _not_dominated(
    costs: Sequence[Doubles], limits: Sequence[Limit], i: int
) -> npt.NDArray[np.intp]:
    """Options of item i that no other option beats in cost and in every limit."""
    table = np.stack([costs[i], *(limit.costs[i] for limit in limits)], axis=1)
    less_or_equal = (table[:, None] <= table[None]).all(axis=2)
    less = (table[:, None] < table[None]).any(axis=2)
    beaten = (less_or_equal & less).any(axis=0)
    twin_before = np.triu(less_or_equal & ~less, 1).any(axis=0)
    return np.flatnonzero(~beaten & ~twin_before)


def _within_reach(
    costs: Doubles,
    limit_costs: Sequence[Doubles],
    prices: Doubles,
    keep: npt.NDArray[np.intp],
    slack: float,
) -> npt.NDArray[np.intp]:
    """Of `keep`, the options whose choice does not alone push the bound over the best known."""
    reduced = costs[keep] + sum(
        (price * row[keep] for price, row in zip(prices, limit_costs, strict=True)),
        start=np.zeros(len(keep)),
    )
    extra = reduced - reduced.min()
    within = extra <= slack * (1 + 1e-9) + 1e-12 * abs(float(reduced.min()))
    reachable: npt.NDArray[np.intp] = keep[np.asarray(within)]
    return reachable


def _repaired(choice: Choice, costs: Sequence[Doubles], limits: Sequence[Limit]) -> Choice | None:
    """Bring a choice that slips over a limit back under it, each time by the cheapest exchange.

    None where exchanges of single options do not lead there.
    """
    chosen = list(choice)
    for limit in limits:
        used = _total(limit.costs, tuple(chosen))
        while used > limit.at_most:
            over = used - limit.at_most
            moves = [
                (float(costs[i][j] - costs[i][c]) / min(over, saved), i, j, saved)
                for i, c in enumerate(chosen)
                for j in range(len(costs[i]))
                if (saved := float(limit.costs[i][c] - limit.costs[i][j])) > 0
            ]
            if not moves:
                return None
            _, i, j, saved = min(moves)
            used -= saved
            chosen[i] = j
    result = tuple(chosen)
    within = all(_total(limit.costs, result) <= limit.at_most for limit in limits)
    return result if within else None


def _improved(choice: Choice, costs: Sequence[Doubles], limits: Sequence[Limit]) -> Choice:
    """Take the best single exchange that fits all limits, as long as there is one."""
    chosen = list(choice)
    item = np.repeat(np.arange(len(costs)), [len(row) for row in costs])
    option = np.concatenate([np.arange(len(row)) for row in costs])
    cost = np.concatenate(costs)
    rows = [np.concatenate(limit.costs) for limit in limits]
    starts = np.cumsum([0, *(len(row) for row in costs[:-1])])
    for _ in range(2 * len(costs)):
        at = (starts + chosen)[item]
        delta = cost - cost[at]
        for limit, row in zip(limits, rows, strict=True):
            room = limit.at_most - _total(limit.costs, tuple(chosen))
            delta = np.where(row - row[at] <= room, delta, np.inf)
        best = int(np.argmin(delta))
        if not delta[best] < -1e-12 * abs(cost[at[best]]):
            break
        chosen[item[best]] = int(option[best])
    return tuple(chosen)
