"""A checkpoint's GGUF: made by llama.cpp's converter in the weights' own precision, and kept."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path

from apreqel import artifacts
from apreqel.artifacts import FileMarks, Provenance, Record
from apreqel.checkpoint.converter import GGUF_PACKAGE, SCRIPT, converter_folder, llama_version
from apreqel.checkpoint.process import Ended, require_packages, run_python
from apreqel.checkpoint.weights import READ_FILES, Weights, read_weights
from apreqel.errors import (
    ApreqelError,
    ArtifactError,
    EngineError,
    ModelFileError,
    OutputError,
    UnsupportedModelError,
    UsageError,
)
from apreqel.model.inventory import read_inventory
from apreqel.progress import Progress

CONVERSION_FILE = "conversion.json"
Marks = tuple[str, int, int, int]


@dataclass(frozen=True)
class Conversion(Record):
    """What was converted and what came of it: name, size, time of change and inode of each file."""

    KIND = "conversion"

    files: Sequence[Marks]
    gguf: Marks
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Converted:
    """`notes` are lines that the user should see."""

    file: Path
    notes: tuple[str, ...] = ()


def converted(source: Path, name: str, folder: Path, progress: Progress) -> Converted:
    """The GGUF in `folder` of the checkpoint `source`, made anew where that has changed.

    Raises EngineError, LockedError, ModelFileError, OutputError, UnsupportedModelError, UsageError
    and what `converter_folder` raises.
    """
    weights = read_weights(source)
    files = sorted(p for p in source.iterdir() if p.is_file() and _is_read(p.name))
    marks = [_marks(path) for path in files]
    if kept := kept_gguf(folder, marks):
        return kept
    require_packages("transformers", "torch", "sentencepiece")
    with artifacts.lock(folder / ".lock") as held:
        if kept := kept_gguf(folder, marks):  # by whoever held the lock
            return kept
        known = _known(folder)
        target = folder / f"{name}-{weights.gguf_type.upper()}.gguf"
        if known is None and target.exists():
            raise OutputError(f"{target}: is not apreqel's, and would be lost; move it elsewhere")
        purpose = f"converting {name} to a GGUF of its own precision"
        artifacts.require_space(folder, weights.gguf_bytes, purpose)
        script = converter_folder(progress) / SCRIPT
        with tempfile.TemporaryDirectory(prefix="scratch-", dir=folder) as scratch:
            unchanged = FileMarks(files)
            made = _run(script, _view(files, Path(scratch), name), weights, held, progress)
            unchanged.check()
            notes = _notes(name, weights)
            with artifacts.new_file(target) as part:
                os.replace(made, part)  # noqa: PTH105
                gguf = (target.name, *_marks(part)[1:])
                # First: the GGUF is ours as soon as it is there.
                made_by = Provenance("", llama_build=llama_version())
                Conversion(made_by, marks, gguf, notes).save(folder / CONVERSION_FILE)
        if known and known.gguf[0] != target.name:
            (folder / known.gguf[0]).unlink(missing_ok=True)
    return Converted(target, tuple(notes))


def kept_gguf(folder: Path, marks: Sequence[Marks] | None = None) -> Converted | None:
    """The GGUF in `folder` as the conversion left it: of files with these marks, or of any."""
    known = _known(folder)
    if known is None or (marks is not None and known.files != marks):
        return None
    path = folder / known.gguf[0]
    is_whole = path.exists() and _marks(path) == known.gguf
    return Converted(path, tuple(known.notes)) if is_whole else None


def _known(folder: Path) -> Conversion | None:
    try:
        found = Conversion.load(folder / CONVERSION_FILE)
    except ArtifactError:
        return None
    return found if Path(found.gguf[0]).name == found.gguf[0] else None


def _is_read(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in READ_FILES)


def _marks(path: Path) -> Marks:
    found = path.stat()
    return path.name, found.st_size, found.st_mtime_ns, found.st_ino


def _notes(name: str, weights: Weights) -> list[str]:
    total, to = sum(weights.n_matrix.values()), weights.gguf_type.upper()
    return [
        f"{name}: {100 * n / total:.2g}% of the weights in matrices are {kind}, written as {to}; "
        "what that may lose is not counted"
        for kind, n in weights.rounded.items()
    ]


# --- the converter -------------------------------------------------------------------------------


def _view(files: Sequence[Path], scratch: Path, name: str) -> Path:
    """A folder with links to what is read: no code, no pickles, and the model's own name."""
    view = scratch / "checkpoint" / name
    view.mkdir(parents=True)
    for path in files:
        (view / path.name).symlink_to(path.resolve())
    return view


def _run(script: Path, view: Path, weights: Weights, held: int, progress: Progress) -> Path:
    """The GGUF that the converter makes of `view`."""
    scratch, what = view.parent.parent, f"converting {view.name} to {weights.gguf_type.upper()}"
    made, packages = scratch / "model.gguf", str(script.parent / GGUF_PACKAGE)

    def watch() -> None:
        if not made.exists():
            progress("starting llama.cpp's converter", 0, 1)
        elif total := weights.gguf_bytes:
            progress(what, min(made.stat().st_size, total - 1), total)

    watch()
    ended = run_python(
        "llama.cpp's converter",
        *(Path(__file__).with_name("run_converter.py"), script),
        # The converter fills in a name with braces: it gets one without.
        *("--outfile", made.name, "--outtype", weights.gguf_type, view),
        folder=scratch,
        environment={
            "PYTHONPATH": os.pathsep.join(filter(None, [packages, os.environ.get("PYTHONPATH")])),
            "HF_HUB_OFFLINE": "1",  # all that it needs is there
            "TRANSFORMERS_OFFLINE": "1",
            "HF_TOKEN": None,
        },
        watch=watch,
        held=held,
    )
    if ended.code or not made.exists():
        raise _failure(view.name, ended)
    try:
        read_inventory(made)
    except ModelFileError as error:
        raise EngineError(f"{view.name}: the converter's GGUF cannot be read: {error}") from error
    return made


def _failure(name: str, ended: Ended) -> ApreqelError:
    """What the converter's end means."""
    words = ended.last_words()
    with_what = f"llama.cpp's converter of llama-cpp-python {llama_version()}"
    if "No space left on device" in words:
        return OutputError(f"{name}: the disk is full; free some space or use --workdir")
    if "No module named" in words:
        return UsageError(f"{name}: {with_what} needs a package more: {words}; install it with pip")
    if re.search("not supported|NotImplementedError|Can not map|custom code", words):
        return UnsupportedModelError(f"{name}: {with_what} cannot convert it: {words}")
    how = f"ended with {ended.code}" if ended.code >= 0 else f"died of signal {-ended.code}"
    using = f"transformers {version('transformers')}"
    return EngineError(f"{name}: {with_what} {how} (with {using}): {words}")
