"""Whether all that apreqel needs is in order here, item by item, and how to mend what is not.

Nothing is written, and nothing of a model is read but its header.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from apreqel import artifacts
from apreqel.artifacts import OldLayoutError, Record
from apreqel.device.machine import clusters, cpu_features, detect, usable_cores
from apreqel.device.profile import DeviceProfile
from apreqel.device.store import list_profiles, own_profiles, store_folder
from apreqel.device.threads import default_threads, threads_for
from apreqel.errors import ApreqelError, ArtifactError, LockedError, printable
from apreqel.evaluate.verify import VerificationReport
from apreqel.llama.library import build_info, gpu_name
from apreqel.model.inventory import DEMO, Inventory, find_model, read_inventory
from apreqel.plan.plan import Plan
from apreqel.quantize import check_program
from apreqel.sensitivity.bench import require_next_tokens
from apreqel.sensitivity.measurement import SENSITIVITY_FILE, Sensitivity, probed_model
from apreqel.workspace import (
    EQUALISED_FOLDER,
    HASH_FILE,
    PLAN_FILE,
    VERIFICATION_FILE,
    Workspace,
)

_LEAST_PYTHON = (3, 10)
# Of pyproject.toml's dependencies those that read and run models.
_PACKAGES = {"llama-cpp-python": (0, 3, 36), "gguf": (0, 17), "numpy": (1, 26), "scipy": (1, 11)}
_SERVER = ("uvicorn", "fastapi", "sse_starlette", "starlette_context", "pydantic_settings")
# What the whole way takes of disk, in sizes of the model: the rescaled and the scratch copy, files
# that are tried, second moments (SmolLM2-135M: 1.4 GB with a model of 0.27 GB).
_DISK_SIZES = 5
_LEAST_DISK_BYTES, _LEAST_MEMORY_BYTES = 10**9, 5 * 10**8
# Instructions that llama.cpp must be built for where the processor has them, or it runs at a part
# of its speed; and those that only help.
_NEEDED_FEATURES, _HELPFUL_FEATURES = (
    ("AVX2", "FMA", "F16C", "NEON"),
    ("AVX512", "AMX_INT8", "DOTPROD"),
)
_REBUILD = (
    "build it for this machine: pip install --force-reinstall --no-binary llama-cpp-python "
    "llama-cpp-python"
)


@dataclass(frozen=True)
class Finding:
    """One item; `mend` says what to do where it is not in order."""

    item: str
    ok: bool
    found: str
    mend: str = ""


def examine(model: str | None = None, workdir: Path | None = None) -> list[Finding]:
    """All items, with those of a model and its work folder where one is given."""
    items: dict[str, Callable[[], Iterator[Finding]]] = {
        "Python": _python,
        "packages": _packages,
        "llama.cpp": _llama,
        "C quantiser": _quantiser,
        "threads": _threads,
        "device profiles": _profiles,
    }
    if model is None:
        items["memory"] = _memory
        items["disk"] = lambda: _disk(Path.cwd(), _LEAST_DISK_BYTES)
    else:
        items["model"] = lambda: _model(model, workdir)
    return [finding for item, look in items.items() for finding in _looked(item, look)]


def _looked(item: str, look: Callable[[], Iterator[Finding]]) -> list[Finding]:
    """What was found; a failure is a finding, too."""
    found: list[Finding] = []
    try:
        found.extend(look())
    except (ApreqelError, OSError) as error:
        message, _, mend = printable(str(error), 400).partition("; ")
        found.append(Finding(item, False, message, mend))
    return found


# --- this machine --------------------------------------------------------------------------------


def _python() -> Iterator[Finding]:
    ok = sys.version_info[:2] >= _LEAST_PYTHON
    least = ".".join(map(str, _LEAST_PYTHON))
    yield Finding("Python", ok, f"{platform.python_version()}, {sys.executable}", f"use {least}")


def _packages() -> Iterator[Finding]:
    for name, least in _PACKAGES.items():
        install = f"pip install '{name}>={'.'.join(map(str, least))}'"
        try:
            has = version(name)
        except PackageNotFoundError:
            yield Finding(name, False, "is not installed", install)
            continue
        numbers = tuple(int(n) for n in re.findall(r"\d+", has)[: len(least)])
        yield Finding(name, numbers >= least, has, install)
    missing = [name for name in _SERVER if importlib.util.find_spec(name) is None]
    told = "; not installed, apreqel run needs it: pip install 'apreqel[server]'"
    yield Finding("server", True, f"{missing[0]}{told}" if missing else "is installed")


def _llama() -> Iterator[Finding]:
    build = build_info()
    built = set(re.findall(r"(\w+) = [1-9]", build))
    lacking, helpful = (
        sorted(name for name in names if name in cpu_features() and name not in built)
        for names in (_NEEDED_FEATURES, _HELPFUL_FEATURES)
    )
    told = build.partition("; ")[2].strip(" |")
    if lacking:
        told += f"; not built for {', '.join(lacking)}, which this processor has"
    elif helpful:
        told += f"; this processor also has {', '.join(helpful)}"
    yield Finding("llama.cpp", not lacking, told, _REBUILD)
    yield Finding("GPU", True, gpu_name() or "none that llama.cpp was built for; all on the CPU")


def _quantiser() -> Iterator[Finding]:
    yield Finding("C quantiser", True, str(check_program()))


def _threads() -> Iterator[Finding]:
    kinds = clusters()
    cores = f"{usable_cores()} usable cores" + (f" of {len(kinds)} kinds" if len(kinds) > 1 else "")
    yield Finding("threads", True, f"{default_threads()} unless tuned, {cores}; {detect().cpu}")


def _memory(needed: int = _LEAST_MEMORY_BYTES) -> Iterator[Finding]:
    device = detect()
    told = f"{_gb(device.available_bytes)} free of {_gb(device.memory_bytes)}"
    mend = (
        f"{_gb(needed)} keep a copy in memory; close other programs, or every probe reads the disk"
    )
    yield Finding("memory", device.available_bytes >= needed, told, mend)


def _disk(folder: Path, needed: int) -> Iterator[Finding]:
    """`folder` may not be there yet. Raises OSError."""
    place = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    free = shutil.disk_usage(place).free
    told = f"{_gb(free)} free in {place}"
    mend = f"the whole way may take {_gb(needed)}; free some space, or use --workdir"
    yield Finding("disk", free >= needed, told, mend)
    for name, path in (("work folder's place", place), ("temporary files", tempfile.gettempdir())):
        if not os.access(path, os.W_OK | os.X_OK):
            yield Finding(name, False, f"{path}: not writable", "use --workdir, or set TMPDIR")


def _profiles() -> Iterator[Finding]:
    folder = store_folder()
    place = next(p for p in (folder, *folder.parents) if p.exists())
    if not os.access(place, os.W_OK | os.X_OK):
        yield Finding("device profiles", False, f"{place}: not writable", "set XDG_DATA_HOME")
    at_hand = list_profiles()
    for name, path in at_hand:
        yield from _record(f"profile {name}", path, DeviceProfile)
    own = ", ".join(profile.name for profile in own_profiles())
    told = own or "none of this device with this llama.cpp; apreqel profile measures it"
    yield Finding("device profiles", True, f"{len(at_hand)} at hand; {told}")


def _record(
    item: str, path: Path, kind: type[Record], sha256: str | None = None
) -> Iterator[Finding]:
    """A finding only where a record cannot be used; one in an old layout is measured again."""
    try:
        kind.load(path, sha256)
    except OldLayoutError as error:
        message, _, advice = str(error).partition("; ")
        yield Finding(item, True, f"{message}; {advice}")
    except ArtifactError as error:
        message, _, advice = str(error).rpartition("; ")
        yield Finding(item, False, message or advice, advice)


def _gb(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:.1f} GB"


# --- a model and its work folder -----------------------------------------------------------------


def _model(name: str, workdir: Path | None) -> Iterator[Finding]:
    path = find_model(name)
    inventory = read_inventory(path)
    told = f"{path}: {inventory.architecture}, {_gb(inventory.size_bytes)}"
    if inventory.is_quantized_source:
        told += "; quantised already: --allow-requantize, and what that lost stays lost"
    yield Finding("model", bool(inventory.quantizable), told, "it holds nothing to quantise")
    yield from _looked("model in llama.cpp", lambda: _runs(inventory))
    n, why = threads_for(inventory)
    yield Finding("threads of the model", True, f"{n}, {why}")
    yield from _memory(inventory.size_bytes)
    beside = Path.cwd() if name == DEMO else path.parent
    folder = workdir or beside / f"{path.name}.apreqel"
    yield from _disk(folder, _DISK_SIZES * inventory.size_bytes)
    if not folder.is_dir():
        yield Finding("work folder", True, f"{folder}: not there yet; apreqel auto makes it")
        return
    yield from _work_folder("work folder", folder, inventory)
    inner = folder / EQUALISED_FOLDER
    if (copy := inner / path.name).exists():
        yield from _looked(
            "rescaled model", lambda: _work_folder("rescaled model", inner, read_inventory(copy))
        )


def _runs(inventory: Inventory) -> Iterator[Finding]:
    require_next_tokens(inventory)
    yield Finding("model in llama.cpp", True, "it can be run and measured")


def _work_folder(item: str, folder: Path, inventory: Inventory) -> Iterator[Finding]:
    """Its records, as far as they are there, and whether they are this model's."""
    sha256 = artifacts.known_sha256(inventory.files, folder / HASH_FILE)
    told = f"{folder}{'' if sha256 else ': the model is new here, or changed: it is hashed anew'}"
    if (lock := folder / ".lock").exists():
        try:
            with artifacts.lock(lock):
                pass
        except LockedError:
            told += "; another apreqel is at work there now"
    yield Finding(item, True, told)
    bad = 0
    kinds: Sequence[tuple[str, type[Record]]] = (
        (SENSITIVITY_FILE, Sensitivity),
        (PLAN_FILE, Plan),
        (VERIFICATION_FILE, VerificationReport),
    )
    for name, kind in kinds:
        if (folder / name).exists():
            for finding in _record(f"{item}: {name}", folder / name, kind, sha256):
                bad += not finding.ok
                yield finding
    if sha256 and not bad:
        found = probed_model(Workspace(inventory, sha256, folder))
        told = f"{found.sensitivity.n_probes} probes" if found else "not there, or not complete yet"
        yield Finding(f"{item}: probes", True, told)
