"""What a report's parts are made of, and how numbers are written in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from apreqel.estimates import Estimate, Range
from apreqel.report.charts import Plot
from apreqel.report.facts import Missing


@dataclass(frozen=True)
class Table:
    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Section:
    """`text` are paragraphs; what is missing is said with a command."""

    title: str
    text: Sequence[str] = ()
    plots: Sequence[Plot] = ()
    tables: Sequence[Table] = ()
    missing: Sequence[Missing] = ()


def number(value: float) -> str:
    """Four digits that matter."""
    return f"{value:,.0f}" if abs(value) >= 9999.5 else f"{value:.4g}"


def between(interval: tuple[float, float]) -> str:
    return f"{number(interval[0])} to {number(interval[1])}"


def estimated(found: Estimate) -> str:
    return f"{number(found.mean)} ({between(found.interval)})"


def ranged(found: Range) -> str:
    return f"{number(found.value)} ({between((found.low, found.high))})"


def megabytes(n_bytes: float) -> str:
    return f"{n_bytes / 1e6:,.1f} MB"


def missing_of(*parts: object) -> list[Missing]:
    """What of these is missing, each command once."""
    found = {part.command: part for part in parts if isinstance(part, Missing)}
    return list(found.values())
