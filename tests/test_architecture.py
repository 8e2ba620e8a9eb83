"""Rooms and floors: dependencies point down, heavy imports stay lazy, printing stays in its room.

A folder is a room; rooms, and the files in a room, are listed from the ground up. Whatever is
imported, also inside a function or for type checking only, must stand lower.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "apreqel"

# From the ground up; a room's files likewise.
ROOMS: dict[str, list[str]] = {
    "apreqel": [],
    "arrays": [],
    "estimates": [],
    "errors": [],
    "progress": [],
    "last_words": [],
    "artifacts": [],
    "model": ["qtypes", "gguf_header", "legal_types", "inventory", "imatrix", "recipes"],
    "checkpoint": [
        "weights",
        "process",
        "converter",
        "hub",
        "conversion",
        "source",
        "run_converter",
        "run_hub",
    ],
    "llama": [
        "flags",
        "library",
        "quants",
        "activations",
        "engine",
        "footprint",
        "stock",
        "graphs",
        "kernels",
        "serving",
    ],
    "workspace": [],
    "solver": ["local_search", "knapsack"],
    "quantize": [],
    "device": [
        "machine",
        "shapes",
        "profile",
        "memory",
        "rounds",
        "real_runs",
        "store",
        "threads",
        "timing",
        "profiling",
    ],
    "sensitivity": [
        "texts",
        "metrics",
        "measurement",
        "imatrix_collection",
        "bench",
        "output_errors",
        "damage",
        "effort",
        "next_probes",
        "moments",
        "measure",
        "report",
        "rounding",
        "equalise",
        "kv_cache",
        "experts",
    ],
    "plan": [
        "wishes",
        "constraints",
        "request",
        "options",
        "cache_types",
        "plan",
        "planner",
        "solve",
        "make_plan",
        "explain",
        "front",
    ],
    "evaluate": [
        "text_run",
        "presets",
        "verify",
        "real_files",
        "confirm",
        "refine",
        "strategies",
    ],
    "from_plan": [],
    "forecast": [],
    "pipeline": [],
    "report": [
        "facts",
        "gather",
        "charts",
        "sections",
        "file_sections",
        "plan_sections",
        "page",
    ],
    "publish": [
        "naming",
        "records",
        "front_matter",
        "modelfile",
        "request_command",
        "card",
        "folder",
        "ladder",
    ],
    "running": [],
    "doctor": [],
    "console": [
        "terminal",
        "forecast",
        "inspect",
        "profile",
        "probe",
        "plan",
        "explain",
        "verify",
        "publishing",
        "report",
    ],
    "arguments": [],
    "commands": ["given", "measuring", "planning", "files", "publishing"],
    "cli": [],
    "__main__": [],
}
MAY_PRINT = {"console", "cli", "__main__"}
MAY_USE_CTYPES = {"llama"}
MAY_BE_PROCESSES = {"llama", "checkpoint"}
FILES = sorted(PACKAGE.rglob("*.py"))


def place_of(parts: list[str]) -> tuple[str, ...]:
    """('device', 'timing') of ['device', 'timing']; the room alone for its __init__."""
    kept = [part for part in parts if part != "__init__"]
    return tuple(kept) or ("apreqel",)


def rank(place: tuple[str, ...]) -> tuple[int, int]:
    files = ROOMS[place[0]]
    return list(ROOMS).index(place[0]), files.index(place[1]) if len(place) > 1 else -1


def imported(path: Path) -> set[tuple[str, ...]]:
    """Places in apreqel that `path` imports, wherever in it that stands."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[list[str]] = []
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            module = node.module.split(".")
            names = [[*module, alias.name] for alias in node.names]
        for name in names:
            if name[0] != "apreqel":
                continue
            inside = [part for part in name[1:3] if is_module(name[1:], part)]
            found.add(place_of(inside))
    return found


def is_module(parts: list[str], part: str) -> bool:
    """Whether a part of a dotted name is a module, or something defined in one."""
    path = PACKAGE.joinpath(*parts[: parts.index(part) + 1])
    return path.is_dir() or path.with_suffix(".py").exists()


def calls(path: Path, name: str) -> bool:
    nodes = ast.walk(ast.parse(path.read_text()))
    return any(isinstance(n, ast.Call) and getattr(n.func, "id", "") == name for n in nodes)


def place(path: Path) -> tuple[str, ...]:
    return place_of(list(path.relative_to(PACKAGE).with_suffix("").parts))


def test_every_file_has_its_place() -> None:
    listed = {(room,) for room in ROOMS} | {(r, f) for r, files in ROOMS.items() for f in files}
    assert {place(path) for path in FILES} == listed


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_dependencies_point_down(path: Path) -> None:
    own = place(path)
    for other in imported(path) - {own, ("apreqel",)}:
        assert rank(other) < rank(own), f"{own} imports {other}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_printing_and_ctypes_stay_in_their_rooms(path: Path) -> None:
    room, text = place(path)[0], path.read_text()
    # A file run as a process of its own answers on its stdout.
    is_process = '__name__ == "__main__"' in text and room in MAY_BE_PROCESSES
    assert room in MAY_PRINT or is_process or not calls(path, "print")
    for word in ("import ctypes", "from ctypes", "import llama_cpp", "from llama_cpp"):
        assert room in MAY_USE_CTYPES or word not in text, word


def test_no_file_is_too_long_and_no_function() -> None:
    for path in FILES:
        lines = path.read_text().count("\n")
        assert lines <= 450, f"{path}: {lines} lines"
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                length = (node.end_lineno or 0) - node.lineno + 1
                assert length <= 60, f"{path}: {node.name} has {length} lines"


def test_test_files_stand_alone() -> None:
    files = sorted(Path(__file__).parent.glob("test_*.py"))
    others = {path.stem for path in files}
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                # Also `from . import test_x` and `from tests import test_x`.
                names = [node.module or "", *(alias.name for alias in node.names)]
            for name in names:
                assert name.split(".")[-1] not in others, f"{path.name} imports {name}"


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom apreqel import cli\n"
        "heavy = {'numpy', 'scipy', 'gguf', 'llama_cpp', 'psutil', 'rich.table'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
