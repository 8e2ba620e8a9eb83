"""Readings of a machine that drifts, taken in rounds, and a line through real runs.

Each round reads everything once. What a whole round was slower than usual is divided out, and a
value is the median over rounds.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from statistics import mean, median, stdev

import numpy as np

from apreqel.device.profile import Reading

# How far a real run's products may be from the timed ones (prior of the fit), and its own noise.
_SCALE_PRIOR, _RUN_NOISE = 0.10, 0.02


@dataclass
class Rounds:
    """Readings by what was read: one value a round, None where it was not read."""

    values: dict[Hashable, list[float | None]] = field(default_factory=dict)
    flags: dict[Hashable, set[str]] = field(default_factory=dict)
    count: int = 0

    def start(self) -> None:
        self.count += 1

    def add(self, key: Hashable, value: float, reasons: Sequence[str] = ()) -> None:
        """A reading in this round; `reasons` to doubt it become flags."""
        row = self.values.setdefault(key, [])
        row += [None] * (self.count - len(row))
        row[-1] = value
        self.flags.setdefault(key, set()).update(reasons)

    def factors(self) -> list[float]:
        """How much slower each round was than usual: the median over everything read in it."""
        ratios: list[list[float]] = [[] for _ in range(self.count)]
        for row in self.values.values():
            usual = median(v for v in row if v is not None)
            for of_round, value in zip(ratios, row, strict=False):
                if value is not None:
                    of_round.append(value / usual)
        return [median(of_round) if of_round else 1.0 for of_round in ratios]

    def level(self, key: Hashable) -> Reading:
        rows = zip(self.values[key], self.factors(), strict=False)
        values = [value / factor for value, factor in rows if value is not None]
        variation = stdev(values) / mean(values) if len(values) > 1 else 0.0
        return Reading(median(values), variation, len(values))


def fit_overhead(kernels: Sequence[float], runs: Sequence[float]) -> tuple[float, float, float]:
    """(scale, rest, relative error) of run = scale x kernels + rest, by weighted least squares.

    The scale is 1 but for `_SCALE_PRIOR` unless the runs say otherwise; the rest is not negative.
    """
    k, t = np.asarray(kernels), np.asarray(runs)
    weight = 1 / (_RUN_NOISE * t)
    rows = np.vstack([np.stack([k * weight, weight], axis=1), [1 / _SCALE_PRIOR, 0.0]])
    wanted = np.append(t * weight, 1 / _SCALE_PRIOR)
    (scale, rest), *_ = np.linalg.lstsq(rows, wanted, rcond=None)
    if rest < 0:
        scale, rest = (rows[:, 0] @ wanted) / (rows[:, 0] @ rows[:, 0]), 0.0
    off = (scale * k + rest) / t - 1
    return float(scale), float(rest), float(np.sqrt((off**2).sum() / max(1, len(t) - 1)))
