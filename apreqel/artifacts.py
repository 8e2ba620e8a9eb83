"""Work files: versioned JSON with provenance, hashing, atomic writing, locks.

Every stage leaves one JSON file in the work folder: `{"kind", "schema_version", "provenance",
"data"}`. A file of another kind, a newer version or another model is refused by name.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import IO, TYPE_CHECKING, Any, ClassVar, get_args, get_origin, get_type_hints

from apreqel import __version__
from apreqel.errors import ArtifactError, LockedError, OutputError, printable

if TYPE_CHECKING:
    from typing_extensions import Self

# Raised by one whenever a reader of the old layout would misread the new one.
SCHEMA_VERSIONS = {
    "device-profile": 2,
    "sensitivity": 2,
    "plan": 3,
    "verification": 1,
    "model-hash": 1,
    "kv-cache": 1,
    "trials": 1,
    "exchanges": 1,
    "feedback-gains": 1,
    "experts": 1,
}

_HASH_BLOCK_BYTES = 1 << 22


@dataclass(frozen=True)
class Provenance:
    """Where a result comes from; equal provenance means an equal measurement."""

    model_sha256: str
    llama_build: str = ""
    device_fingerprint: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    apreqel_version: str = __version__


# --- JSON files ----------------------------------------------------------------------------------


def save(path: Path, kind: str, provenance: Provenance, data: Mapping[str, Any]) -> None:
    """Write an artifact atomically. Raises OutputError."""
    document = {
        "kind": f"apreqel {kind}",
        "schema_version": SCHEMA_VERSIONS[kind],
        "provenance": asdict(provenance),
        "data": data,
    }
    text = json.dumps(document, indent=1, allow_nan=False) + "\n"
    write_atomically(path, text.encode())


def load(path: Path, kind: str, model_sha256: str | None = None) -> tuple[Provenance, Any]:
    """Read an artifact back. Raises ArtifactError; `model_sha256` refuses another model's."""
    try:
        document = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ArtifactError(f"{path}: no such {kind} file") from None
    except (ValueError, OSError) as error:
        raise ArtifactError(f"{path}: not a readable {kind} file ({error}); delete it") from error
    if not isinstance(document, dict) or document.get("kind") != f"apreqel {kind}":
        found = document.get("kind") if isinstance(document, dict) else type(document).__name__
        raise ArtifactError(f"{path}: field kind is {found!r}, expected 'apreqel {kind}'")
    version = document.get("schema_version")
    if version != SCHEMA_VERSIONS[kind]:
        raise ArtifactError(
            f"{path}: schema_version {version!r}; this apreqel reads {SCHEMA_VERSIONS[kind]}; "
            "measure again or use the apreqel that wrote it"
        )
    try:
        provenance = Provenance(**document["provenance"])
        data = document["data"]
    except (KeyError, TypeError) as error:
        raise ArtifactError(f"{path}: field provenance or data is damaged ({error})") from error
    if model_sha256 is not None and provenance.model_sha256 != model_sha256:
        raise ArtifactError(
            f"{path}: made for the model with SHA-256 {provenance.model_sha256[:12]}, "
            f"this model has {model_sha256[:12]}; use another --workdir or delete the file"
        )
    return provenance, data


@dataclass(frozen=True)
class Record:
    """What a step measured or decided, kept as an artifact of the kind that the class names."""

    provenance: Provenance

    KIND: ClassVar[str]

    def save(self, path: Path) -> None:
        """Raises OutputError."""
        data = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "provenance"}
        save(path, self.KIND, self.provenance, {name: plain(v) for name, v in data.items()})

    @classmethod
    def load(cls, path: Path, model_sha256: str | None = None) -> Self:
        """Raises ArtifactError; `model_sha256` refuses another model's."""
        provenance, data = load(path, cls.KIND, model_sha256)
        with understood(f"{path}: {cls.KIND}"):
            hints = get_type_hints(cls)
            return cls(provenance, **{n: from_json(hints[n], v, n) for n, v in data.items()})


def plain(value: Any) -> Any:
    """Dataclasses as mappings, ready for JSON."""
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(v) for key, v in value.items()}
    if isinstance(value, list | tuple | set):
        return [plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value


def from_json(kind: Any, value: Any, where: str) -> Any:
    """What `plain` made of a value of type `kind`, back. Raises TypeError, KeyError."""
    origin, arguments = get_origin(kind), get_args(kind)
    if is_dataclass(kind) and isinstance(kind, type) and isinstance(value, dict):
        hints = get_type_hints(kind)
        return kind(**{n: from_json(hints[n], v, f"{where}.{n}") for n, v in value.items()})
    if origin is UnionType:
        for one in arguments:
            with suppress(TypeError):
                return from_json(one, value, where)
    if origin is tuple and isinstance(value, list):
        kinds = arguments[:1] * len(value) if arguments[-1] is ... else arguments
        return tuple(from_json(k, v, where) for k, v in zip(kinds, value, strict=True))
    if origin in (list, Sequence) and isinstance(value, list):
        return [from_json(arguments[0], v, where) for v in value]
    if origin in (dict, Mapping) and isinstance(value, dict):
        return {key: from_json(arguments[1], v, f"{where}.{key}") for key, v in value.items()}
    if kind is Any or (kind is float and type(value) is int) or type(value) is kind:
        return value
    raise TypeError(f"{where} is {printable(repr(value))}")


@contextmanager
def understood(what: str, advice: str = "delete it") -> Iterator[None]:
    """Raise ArtifactError where fields that are read within are missing, or of another kind."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ArtifactError(f"{what} is damaged ({printable(str(error))}); {advice}") from error


# --- writing -------------------------------------------------------------------------------------


def write_atomically(path: Path, content: bytes) -> None:
    """Temp file beside the target, write, fsync, rename, fsync the folder. Raises OutputError."""
    with atomic_file(path) as file:
        file.write(content)


@contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """A binary file that appears at `path`, whole and on disk, only if the block succeeds."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    except OSError as error:
        raise output_error(path, error) from error
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
        fsync_folder(path.parent)
    except OSError as error:
        raise output_error(path, error) from error
    finally:
        Path(name).unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def fsync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def output_error(path: Path, error: OSError) -> OutputError:
    """The failure of a write, with what to do about it."""
    advice = {
        errno.ENOSPC: "free some space or choose another folder",
        errno.EROFS: "the file system is read-only; choose another folder",
        errno.EACCES: "no permission to write there; choose another folder",
        errno.EFBIG: "the file system cannot hold a file of this size (FAT32: 4 GiB)",
    }.get(error.errno or 0, "check the disk")
    return OutputError(f"{path}: {error.strerror or error}; {advice}")


def require_space(folder: Path, needed_bytes: int, purpose: str) -> None:
    """Raise OutputError where `folder` has less free space than `needed_bytes`."""
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise OutputError(
            f"{folder}: {purpose} needs {needed_bytes / 1e6:.0f} MB of disk, "
            f"{free / 1e6:.0f} MB are free; free some space or use --workdir"
        )


@contextmanager
def lock(path: Path) -> Iterator[None]:
    """Hold the lock file `path`. Raises LockedError where another process holds it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+b")
    except OSError as error:
        raise output_error(path, error) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise LockedError(
                f"{path}: another apreqel is at work here; wait for it or use another folder"
            ) from error
        yield


# --- hashing -------------------------------------------------------------------------------------


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_HASH_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def model_sha256(files: tuple[Path, ...], cache: Path) -> str:
    """SHA-256 of a model: of its one file, or of its shards' digests in order.

    Kept in `cache` and trusted as long as each file's size, time of change and inode stand.
    """
    marks = [
        [str(f.resolve()), s.st_size, s.st_mtime_ns, s.st_ino] for f in files for s in (f.stat(),)
    ]
    try:
        _, known = load(cache, "model-hash")
        if known["files"] == marks:
            return str(known["sha256"])
    except (ArtifactError, KeyError, TypeError):
        pass
    digests = [file_sha256(f) for f in files]
    joined = hashlib.sha256("".join(digests).encode()).hexdigest()
    digest = digests[0] if len(digests) == 1 else joined
    save(cache, "model-hash", Provenance(digest), {"files": marks, "sha256": digest})
    return digest


def source_is_unchanged(files: tuple[Path, ...], marks: list[tuple[int, int]]) -> None:
    """Raise ArtifactError where a model file was cut or replaced since `file_marks`."""
    for path, (size, changed) in zip(files, marks, strict=True):
        try:
            now = path.stat()
        except OSError as error:
            raise ArtifactError(f"{path}: gone while in use ({error.strerror})") from error
        if (now.st_size, now.st_mtime_ns) != (size, changed):
            raise ArtifactError(
                f"{printable(str(path), 200)}: changed while in use; measure again on a stable file"
            )


def file_marks(files: tuple[Path, ...]) -> list[tuple[int, int]]:
    """Size and time of change of each file, for `source_is_unchanged`."""
    return [(s.st_size, s.st_mtime_ns) for s in (f.stat() for f in files)]
