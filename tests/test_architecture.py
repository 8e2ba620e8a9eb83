"""Dependencies point one way, heavy imports stay lazy, and only two modules print."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "apreqel"

# A module may import modules of earlier lines only.
ORDER = [
    ["__init__"],
    ["errors", "exchange"],
    ["qtypes", "artifacts", "device", "metrics", "knapsack"],
    ["gguf_header"],
    ["inventory", "llama"],
    ["calibration", "imatrix"],
    ["quantize", "profile"],
    ["timing", "memory", "recipes"],
    ["probing"],
    ["damage"],
    ["sensitivity", "kv_cache"],
    ["feedback"],
    ["trial", "experts"],
    ["options"],
    ["request", "plan", "verify"],
    ["planner"],
    ["candidates", "refine"],
    ["front", "explain", "compare"],
    ["pipeline"],
    ["console"],
    ["cli"],
    ["__main__"],
]
RANK = {name: rank for rank, names in enumerate(ORDER) for name in names}


def imported(path: Path) -> set[str]:
    """Modules of apreqel that `path` imports at run time (type checking apart)."""
    tree = ast.parse(path.read_text())
    skipped = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.dump(block.test)
        for node in ast.walk(block)
    }
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and id(node) not in skipped and node.module:
            if node.module == "apreqel":
                found |= {a.name for a in node.names if a.name in RANK}
            elif node.module.startswith("apreqel."):
                found.add(node.module.split(".")[1])
    return found


def modules() -> dict[str, list[Path]]:
    """Files by module; those of a folder share its place."""
    found = {p.stem: [p] for p in PACKAGE.glob("*.py")}
    return found | {
        p.parent.name: list(p.parent.glob("*.py")) for p in PACKAGE.glob("*/__init__.py")
    }


def test_every_module_has_its_place() -> None:
    assert set(modules()) == set(RANK)


def test_dependencies_point_one_way() -> None:
    for module, paths in modules().items():
        for name in set().union(*(imported(path) for path in paths)) - {module}:
            assert RANK[name] < RANK[module], f"{module} imports {name}"


def test_only_console_and_cli_print() -> None:
    for path in PACKAGE.glob("*.py"):
        calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
        prints = any(isinstance(c.func, ast.Name) and c.func.id == "print" for c in calls)
        assert not prints or path.stem in ("console", "cli"), path


def test_only_llama_touches_llama_cpp() -> None:
    for path in PACKAGE.glob("*.py"):
        text = path.read_text()
        assert path.stem == "llama" or "import llama_cpp" not in text, path
        assert path.stem == "llama" or "import ctypes" not in text, path


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom apreqel import cli\n"
        "heavy = {'numpy', 'scipy', 'gguf', 'llama_cpp', 'psutil', 'rich.table'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
