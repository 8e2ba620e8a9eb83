"""What is said before the first slow step: how long it will take, and how much room."""

from __future__ import annotations

from apreqel.console.terminal import duration, remark, size
from apreqel.forecast import Forecast

# Shorter ones are over before they are read.
_WORTH_SAYING_SECONDS = 90.0


def show(coming: Forecast, quick: Forecast | None) -> None:
    """On stderr, beside what `--effort quick` would take."""
    if coming.total_seconds < _WORTH_SAYING_SECONDS:
        return
    steps = ", ".join(f"{step} {duration(seconds)}" for step, seconds in coming.seconds.items())
    less = f"; with --effort quick about {duration(quick.total_seconds)}" if quick else ""
    remark(
        f"this will take about {duration(coming.total_seconds)} here ({steps}){less}; "
        f"{size(coming.disk_bytes)} of disk, {size(coming.memory_bytes)} of memory; Ctrl-C keeps "
        "what is done"
    )
