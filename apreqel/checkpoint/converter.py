"""llama.cpp's own converter, of the very version that is installed, fetched once and kept.

It is no part of llama-cpp-python's wheel, but of its source package, with the `gguf` that it was
written for. pip fetches that package as it would to install it: from the user's index, through
the user's proxy, with the hash checked that the index gives. Only the converter is unpacked.
"""

from __future__ import annotations

import os
import shutil
import sys
import tarfile
import tempfile
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path, PurePosixPath

from apreqel import artifacts
from apreqel.checkpoint.process import run_python
from apreqel.errors import DownloadError, EngineError, OutputError, UsageError
from apreqel.progress import Progress

SCRIPT, GGUF_PACKAGE = "convert_hf_to_gguf.py", "gguf-py"
_PACKAGE = "llama-cpp-python"
_SOURCE = PurePosixPath("vendor/llama.cpp")
_NEEDED = (SCRIPT, "LICENSE", "conversion", "gguf-py/gguf", "gguf-py/LICENSE", "models/templates")
# 77 MB packed and 4 MB unpacked in version 0.3.36, and what pip needs to look into it.
_NEEDED_BYTES = 300_000_000


def cache_folder() -> Path:
    """What can be fetched or made anew, by the system's custom."""
    base = Path.home() / "Library" / "Caches"
    if sys.platform != "darwin":
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "apreqel"


def llama_version() -> str:
    """That of the installed llama-cpp-python, without a local part such as +cu121.

    Raises EngineError.
    """
    try:
        return version(_PACKAGE).partition("+")[0]
    except PackageNotFoundError as error:
        raise EngineError("llama-cpp-python is not installed; install apreqel again") from error


def converter_folder(progress: Progress) -> Path:
    """The folder with the converter, fetched where it is not there yet.

    Raises DownloadError, EngineError, LockedError, OutputError, UsageError.
    """
    number = llama_version()
    kept = cache_folder() / "converter" / f"{_PACKAGE}-{number}"
    if kept.is_dir():
        return kept
    artifacts.require_space(
        kept.parent, _NEEDED_BYTES, "fetching the converter", "free some, or set XDG_CACHE_HOME"
    )
    with artifacts.lock(kept.parent / ".lock"), tempfile.TemporaryDirectory(dir=kept.parent) as t:
        if not kept.is_dir():
            progress(f"fetching llama.cpp's converter ({_PACKAGE} {number}, once)", 0, 1)
            unpacked = _unpacked(_fetched(number, Path(t)), Path(t) / "unpacked")
            os.replace(unpacked, kept)  # noqa: PTH105
    return kept


def _fetched(number: str, folder: Path) -> Path:
    """The source package, as pip saves it."""
    if find_spec("pip") is None:
        raise UsageError("pip is missing here and fetches the converter: python -m ensurepip")
    wanted = f"{_PACKAGE}=={number}"
    done = run_python(
        "pip",
        *("-m", "pip", "download", wanted, "--no-deps", "--no-binary", _PACKAGE, "--no-input"),
        *("--dest", folder),
        folder=folder,
    )
    found = [*folder.glob("*.tar.gz")]
    if done.code or len(found) != 1:
        raise DownloadError(
            f"{wanted}: pip could not fetch its source package, which holds llama.cpp's converter: "
            f"{done.last_words()}"
        )
    return found[0]


def _unpacked(package: Path, target: Path) -> Path:
    """The converter's files only: nothing but plain files, none outside `target`."""
    try:
        with tarfile.open(package) as archive:
            for member in archive:
                inside = PurePosixPath(*PurePosixPath(member.name).parts[1:])
                if not member.isreg() or not inside.is_relative_to(_SOURCE):
                    continue
                path = inside.relative_to(_SOURCE)
                needed = any(path.is_relative_to(name) for name in _NEEDED)
                if needed and ".." not in path.parts and (file := archive.extractfile(member)):
                    (target / path).parent.mkdir(parents=True, exist_ok=True)
                    with file, open(target / path, "xb") as out:
                        shutil.copyfileobj(file, out)
    except (tarfile.TarError, EOFError) as error:
        raise DownloadError(f"{package.name}: cannot be unpacked ({error})") from error
    except OSError as error:
        raise artifacts.output_error(target, error) from error
    if not (target / SCRIPT).exists() or not (target / GGUF_PACKAGE).is_dir():
        raise OutputError(f"{package.name}: holds no {SCRIPT}; convert the model by hand")
    return target
