"""Numbers that are not known exactly, with the intervals in which they are to be expected."""

from __future__ import annotations

import math
from dataclasses import dataclass

# Standard deviations to either side that hold 95% of a normal distribution.
Z95 = 1.959964


@dataclass(frozen=True)
class Estimate:
    """A mean over `count` positions with its standard error."""

    mean: float
    standard_error: float
    count: int

    @property
    def interval(self) -> tuple[float, float]:
        """The 95% interval of the mean."""
        return self.mean - Z95 * self.standard_error, self.mean + Z95 * self.standard_error

    @property
    def is_resolved(self) -> bool:
        """Whether the 95% interval stays clear of zero."""
        low, high = self.interval
        return low > 0 or high < 0


@dataclass(frozen=True)
class Range:
    """A predicted quantity with its 95% interval."""

    value: float
    low: float
    high: float

    @staticmethod
    def around(value: float, relative_error: float) -> Range:
        """Of a positive value, by the deviation of its logarithm: it stays positive, finite too."""
        factor = math.exp(min(Z95 * relative_error, 50.0))
        return Range(value, value / factor, value * factor)

    @property
    def inverse(self) -> Range:
        """Tokens/s of seconds per token."""
        return Range(1 / self.value, 1 / self.high, 1 / self.low)
