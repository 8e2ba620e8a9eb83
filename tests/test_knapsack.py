"""The solver against brute force, and its proof against its own answer."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from apreqel.errors import InfeasiblePlanError
from apreqel.knapsack import Limit, solve


def brute_force(costs: list, limits: list[Limit]) -> float:
    best = np.inf
    for choice in itertools.product(*(range(len(row)) for row in costs)):

        def total(rows: list, choice: tuple = choice) -> float:
            return sum(row[c] for row, c in zip(rows, choice, strict=True))

        if all(total(limit.costs) <= limit.at_most for limit in limits):
            best = min(best, total(costs))
    return best


@pytest.mark.parametrize("seed", range(40))
def test_equals_brute_force(seed: int) -> None:
    random = np.random.default_rng(seed)
    n = int(random.integers(1, 7))
    counts = random.integers(1, 6, n)
    costs = [np.round(random.exponential(1, k) * 10 ** random.uniform(-6, 2), 9) for k in counts]
    limits = []
    for i in range(int(random.integers(1, 4))):
        rows = [random.integers(1, 10**6, k).astype(float) for k in counts]
        least, most = sum(r.min() for r in rows), sum(r.max() for r in rows)
        limits.append(Limit(f"limit {i}", rows, float(random.uniform(least, most * 1.1))))
    expected = brute_force(costs, limits)
    if expected == np.inf:
        with pytest.raises(InfeasiblePlanError):
            solve(costs, limits)
        return
    solution = solve(costs, limits)
    assert solution.objective <= expected * (1 + 1e-4) + 1e-12
    assert solution.objective >= expected * (1 - 1e-9)
    for limit in limits:
        used = sum(row[c] for row, c in zip(limit.costs, solution.choice, strict=True))
        assert used <= limit.at_most


def test_no_limits_takes_the_cheapest() -> None:
    costs = [np.array([3.0, 1.0, 2.0]), np.array([0.5, 0.7])]
    assert solve(costs).choice == (1, 0)


def test_an_impossible_limit_is_named() -> None:
    costs = [np.array([1.0, 2.0])] * 3
    with pytest.raises(InfeasiblePlanError, match=r"--max-size 5: cannot be met.*is 6"):
        solve(costs, [Limit("--max-size", [np.array([2.0, 3.0])] * 3, 5)])


def test_limits_that_conflict_only_together() -> None:
    costs = [np.array([0.0, 0.0])]
    limits = [Limit("a", [np.array([0.0, 9.0])], 1), Limit("b", [np.array([9.0, 0.0])], 1)]
    with pytest.raises(
        InfeasiblePlanError, match=r"a 1 and b 1 together; .* possible is a 9, or b 9"
    ):
        solve(costs, limits)


def test_a_thousand_tensors_are_proven() -> None:
    random = np.random.default_rng(1)
    weights = random.integers(1, 50, 1000) * 4096
    bits = np.sort(random.uniform(2, 9, 20))
    sizes = [w * bits / 8 // 32 * 32 for w in weights]
    damages = [
        np.exp(random.normal(0, 2)) * 4.0**-bits * np.exp(random.normal(0, 0.3, 20))
        for _ in weights
    ]
    for bits_per_weight in (3, 4.5, 6):
        limit = Limit("size", sizes, bits_per_weight / 8 * float(weights.sum()))
        solution = solve(damages, [limit])
        assert solution.gap <= 1e-4
        used = sum(row[c] for row, c in zip(sizes, solution.choice, strict=True))
        assert used <= limit.at_most
        # A Lagrangian sweep is another way to a good answer: never better than ours.
        best = np.inf
        for price in np.geomspace(1e-12, 1e-2, 400):
            choice = [int(np.argmin(d + price * s)) for d, s in zip(damages, sizes, strict=True)]
            if sum(s[c] for s, c in zip(sizes, choice, strict=True)) <= limit.at_most:
                best = min(best, sum(d[c] for d, c in zip(damages, choice, strict=True)))
        assert solution.objective <= best * (1 + 1e-4)
