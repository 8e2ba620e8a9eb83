"""Results of the benches: kept as JSON, shown as one page of tables.

    python tools/bench/results.py

makes RESULTS.md anew from results/*.json.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

from apreqel import __version__
from apreqel.device.machine import detect

HERE = Path(__file__).parent
FOLDER, PAGE = HERE / "results", HERE / "RESULTS.md"


def keep(path: Path | None, rows: Sequence[Any], says: str = "") -> None:
    """Write the rows of this run, dataclasses of one kind, and what they come to as a whole."""
    if path is None:
        return
    main = sys.modules["__main__"]
    words = [Path(word).name if "/" in word and "=" not in word else word for word in sys.argv[1:]]
    words = [f"{w.split('=')[0]}=FOLDER" if "=/" in w else w for w in words]
    result = {
        "title": (main.__doc__ or "").splitlines()[0],
        "command": f"python tools/bench/{Path(sys.argv[0]).name} {' '.join(words)}",
        "date": date.today().isoformat(),
        "apreqel": __version__,
        "device": f"{detect().cpu}, {detect().usable_cores} cores",
        "says": says,
        "rows": [asdict(row) for row in rows],
    }
    path.write_text(json.dumps(result, indent=1) + "\n")


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        first, *interval = map(_shown, value)
        return (
            f"{first} ({' to '.join(interval)})"
            if len(interval) == 2
            else " to ".join([first, *interval])
        )
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return "" if value is None else str(value)


def _table(rows: Sequence[dict[str, Any]]) -> list[str]:
    columns = [name for name in rows[0] if any(row[name] is not None for row in rows)]
    flat = []
    for row in rows:
        cells: dict[str, str] = {}
        for name in columns:
            inner = row[name] if isinstance(row[name], dict) else {"": row[name]}
            cells |= {f"{name} {key}".strip(): _shown(value) for key, value in inner.items()}
        flat.append(cells)
    head = list(flat[0])
    lines = [" | ".join(name.replace("_", " ") for name in head), " | ".join("---" for _ in head)]
    lines += [" | ".join(cells.get(name, "") for name in head) for cells in flat]
    return [f"| {line} |" for line in lines]


def main() -> None:
    lines = ["# Results of the benches", "", "Made by `python tools/bench/results.py`."]
    for path in sorted(FOLDER.glob("*.json")):
        result = json.loads(path.read_text())
        lines += ["", f"## {path.stem}", "", result["title"], ""]
        lines += [f"    {result['command']}", ""]
        lines += [f"{result['date']}, apreqel {result['apreqel']}, {result['device']}.", ""]
        lines += [*_table(result["rows"]), *(["", result["says"]] if result["says"] else [])]
    PAGE.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
