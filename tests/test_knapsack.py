"""The solver against brute force, and its proof against its own answer."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from apreqel.errors import InfeasiblePlanError
from apreqel.solver.knapsack import Limit, solve


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


def test_a_limit_of_nothing() -> None:
    costs = [np.array([5.0, 1.0]), np.array([4.0, 2.0])]
    free = Limit("damage", [np.array([0.0, 0.3]), np.array([0.0, 1e-9])], 0.0)
    assert solve(costs, [free]).choice == (0, 0)


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


def test_three_limits_are_proven_and_no_greedy_does_better() -> None:
    random = np.random.default_rng(7)
    n, types = 300, 20
    weights = random.integers(1, 50, n) * 4096
    bits = np.sort(random.uniform(2, 9, types))
    damages = (
        np.exp(random.normal(0, 2, n))[:, None]
        * 4.0**-bits
        * np.exp(random.normal(0, 0.3, (n, types)))
    )
    rows = [weights[:, None] * bits / 8 // 32 * 32]
    rows += [weights[:, None] * random.uniform(0.5, 2, types) for _ in range(2)]
    for price in (1e-6, 1e-7):
        closest = (damages + price * rows[0]).argmin(axis=1)
        at_most = [row[np.arange(n), closest].sum() for row in rows]
        at_most = [
            at_most[0],
            *(
                0.95 * a + 0.05 * r.min(axis=1).sum()
                for r, a in zip(rows[1:], at_most[1:], strict=True)
            ),
        ]
        limits = [
            Limit(f"limit {i}", list(row), float(a))
            for i, (row, a) in enumerate(zip(rows, at_most, strict=True))
        ]
        solution = solve(list(damages), limits)
        assert solution.gap <= 1e-4
        for limit in limits:
            used = sum(row[c] for row, c in zip(limit.costs, solution.choice, strict=True))
            assert used <= limit.at_most
        greedy = best_of_subgradient(damages, np.array(rows), np.array(at_most))
        assert greedy < np.inf
        assert solution.objective <= greedy * (1 + 1e-4)
        # The bound that was proven is one.
        assert solution.objective * (1 - solution.gap) <= greedy


def best_of_subgradient(costs: np.ndarray, rows: np.ndarray, at_most: np.ndarray) -> float:  # type: ignore[type-arg]
    """The best choice within the limits among those that Lagrangian prices lead to.

    Prices rise where a limit is passed and fall where there is room, in ever smaller steps.
    """
    best = np.inf
    items = np.arange(len(costs))
    for aim in (0.99, 0.998, 0.9995):
        for start in np.geomspace(1e-3, 10, 5):
            prices = start * costs.mean() * len(costs) / at_most
            for step in np.geomspace(5, 0.05, 300):
                choice = (costs + np.tensordot(prices, rows, 1)).argmin(axis=1)
                used = rows[:, items, choice].sum(axis=1)
                if (used <= at_most).all():
                    best = min(best, float(costs[items, choice].sum()))
                prices = prices * np.exp(np.clip(step * (used / at_most - aim), -1, 1))
    return best


def test_items_that_are_all_alike_are_split_between_two_options() -> None:
    # At the prices of the relaxation all their options cost the same.
    costs = [np.array([4.0, 1.0, 0.0])] * 1000
    sizes = [np.array([1.0, 2.0, 4.0])] * 1000
    seconds = [np.array([1.0, 3.0, 2.0])] * 1000
    solution = solve(costs, [Limit("size", sizes, 1500.0), Limit("seconds", seconds, 2000.0)])
    assert solution.gap <= 1e-4
    counts = np.bincount(solution.choice, minlength=3)
    assert counts @ [1, 2, 4] <= 1500 and counts @ [1, 3, 2] <= 2000
