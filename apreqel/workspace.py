"""A model, the folder for everything measured on it, and how work on it is done.

Nearly every step needs these together, so they travel as one value.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from apreqel import artifacts, last_words
from apreqel.errors import ApreqelError, OutputError, UsageError
from apreqel.model.inventory import (
    DEMO,
    Inventory,
    find_model,
    read_inventory,
    require_float_source,
)
from apreqel.progress import Progress, silent

# In a model's work folder, that of the model with its channels rescaled.
EQUALISED_FOLDER = "equalised"
IMATRIX_FILE, PLAN_FILE, VERIFICATION_FILE = "imatrix.gguf", "plan.json", "verification.json"
# What is replaced without being read first, in a folder that is known to be apreqel's by its hash.
HASH_FILE, _REPLACED = "model-hash.json", (IMATRIX_FILE, PLAN_FILE, VERIFICATION_FILE)

# Folders that hold files of a step, and go with it.
_SCRATCH = re.compile(r"(scratch|text|measured|compare|profile|threads|rounded)-[a-z0-9_]{8,}")


@dataclass(frozen=True)
class Workspace:
    """`sha256` is the model's; everything measured on it is kept in `folder`.

    The model may be `original` with its channels rescaled, a file of apreqel's own in `folder`.
    """

    inventory: Inventory
    sha256: str
    folder: Path
    n_threads: int = 1
    tune_threads: bool = False  # whether a device profile may find a better number of them
    allow_requantize: bool = False
    progress: Progress = silent
    original: Inventory | None = None

    @property
    def model(self) -> Path:
        return self.inventory.files[0]

    @property
    def given(self) -> Inventory:
        """The model as the user has it."""
        return self.original or self.inventory


@contextmanager
def opened(
    name: str, folder: Path | None, *, allow_requantize: bool, progress: Progress = silent
) -> Iterator[Workspace]:
    """Read the model, take its work folder (`MODEL.apreqel` beside it) and lock that.

    Raises ModelFileError, UnsupportedModelError, UsageError, LockedError, OutputError.
    """
    model = find_model(name)
    inventory = read_inventory(model)
    require_float_source(inventory, allow_requantize)
    if not inventory.quantizable:
        raise UsageError(f"{model}: holds no tensor that can be quantised")
    folder = folder or folder_of(name, model)
    _require_ours(folder)
    last_words.note(model=model, folder=folder.absolute())
    with _swept(folder):
        sha256 = artifacts.model_sha256(inventory.files, folder / HASH_FILE)
        yield Workspace(
            inventory, sha256, folder, allow_requantize=allow_requantize, progress=progress
        )


def folder_of(name: str, model: Path) -> Path:
    """The work folder where none is given; that of the demo is where the user is."""
    return (Path.cwd() if name == DEMO else model.parent) / f"{model.name}.apreqel"


@contextmanager
def _swept(folder: Path) -> Iterator[None]:
    """Hold its lock, so that no other run is at work, without what runs that were killed left."""
    with artifacts.lock(folder / ".lock"):
        for path in folder.iterdir():
            if _SCRATCH.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
        yield


def sweep(folder: Path) -> None:
    """Remove what a run that died left in its work folder, unless another is at work there."""
    with suppress(ApreqelError), _swept(folder):
        pass


def _require_ours(folder: Path) -> None:
    """Raise OutputError where files of another tool would be replaced."""
    names: set[str] = set()
    with suppress(OSError):  # not there yet; or closed, as its lock will tell
        names = {path.name for path in folder.iterdir()}
    if HASH_FILE not in names and (theirs := sorted(names.intersection(_REPLACED))):
        path = folder / theirs[0]
        raise OutputError(f"{path}: is not apreqel's, and would be lost; use another --workdir")
