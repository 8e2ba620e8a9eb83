"""`apreqel report`: where the page is, and what could not be shown in it."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

from apreqel.console.terminal import size, write
from apreqel.report.facts import Missing, ModelReport


def show(report: ModelReport, path: Path) -> None:
    if not isinstance(report.verified, Missing):
        for verdict in report.verified.verdicts:
            write(verdict)
    parts = [getattr(report, f.name) for f in fields(report)]
    missing = {part.command: part.why for part in parts if isinstance(part, Missing)}
    for command, why in missing.items():
        write(f"not in the report: {why} {command}")
    write(f"written: {path} ({size(path.stat().st_size)})")
