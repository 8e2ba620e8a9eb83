"""Work files: versioned JSON with provenance, hashing, atomic writing, locks.

Every stage leaves one JSON file in the work folder: `{"kind", "schema_version", "provenance",
"data"}`. A file of another kind, a newer version or another model is refused by name.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, ClassVar, get_args, get_origin, get_type_hints

from apreqel import __version__
from apreqel.errors import ArtifactError, LockedError, ModelFileError, OutputError, printable

if TYPE_CHECKING:
    from typing_extensions import Self

# Raised by one whenever a reader of the old layout would misread the new one.
SCHEMA_VERSIONS = {
    "device-profile": 3,
    "sensitivity": 3,
    "plan": 5,
    "verification": 3,
    "model-hash": 1,
    "cache-sensitivity": 1,
    "measured-files": 2,
    "swaps": 1,
    "rounding-ratios": 1,
    "equalised": 1,
    "experts": 2,
    "conversion": 1,
}

_HASH_BLOCK_BYTES = 1 << 22
_LONGEST_NAME = 255  # bytes, in nearly all file systems


class OldLayoutError(ArtifactError):
    """A file that an older apreqel wrote, in a layout that is no longer read."""


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


@dataclass(frozen=True)
class Record:
    """What a step measured or decided, kept as an artifact of the kind that the class names."""

    provenance: Provenance

    KIND: ClassVar[str]
    ADVICE: ClassVar[str] = "delete it"  # where the file is damaged

    def save(self, path: Path) -> None:
        """Write it atomically. Raises OutputError."""
        text = json.dumps(self.document, indent=1, allow_nan=False) + "\n"
        write_atomically(path, text.encode())

    @property
    def document(self) -> dict[str, Any]:
        """The whole of its file."""
        data = plain(self)
        return {
            "kind": f"apreqel {self.KIND}",
            "schema_version": SCHEMA_VERSIONS[self.KIND],
            "provenance": data.pop("provenance"),
            "data": data,
        }

    @classmethod
    def check_output(cls, path: Path) -> None:
        """Raise OutputError where `path` is there and no file of this kind, which alone may go."""
        try:
            if not path.exists() or cls.is_kept_at(path):
                return
        except OSError as error:
            raise output_error(path, error) from error
        raise OutputError(f"{path}: exists and is no {cls.KIND} file; choose another output")

    @classmethod
    def is_kept_at(cls, path: Path) -> bool:
        """Whether `path` is a file of this kind, by its first bytes. Raises OSError."""
        start = f'{{\n "kind": "apreqel {cls.KIND}"'.encode()
        return path.is_file() and _starts_with(path, start)

    @classmethod
    def load(cls, path: Path, model_sha256: str | None = None) -> Self:
        """Read it back. Raises ArtifactError; `model_sha256` refuses another model's."""
        kind = cls.KIND
        try:
            if _starts_with(path, b"GGUF"):
                raise ArtifactError(f"{path}: is a GGUF model, expected a {kind} file")
            document = json.loads(path.read_bytes())
        except FileNotFoundError:
            raise ArtifactError(f"{path}: no such {kind} file") from None
        except (ValueError, OSError) as error:
            message = f"{path}: not a readable {kind} file ({error}); delete it"
            raise ArtifactError(message) from error
        found = document.get("kind") if isinstance(document, dict) else type(document).__name__
        if found != f"apreqel {kind}":
            raise ArtifactError(f"{path}: field kind is {found!r}, expected 'apreqel {kind}'")
        version = document.get("schema_version")
        if version != SCHEMA_VERSIONS[kind]:
            is_old = type(version) is int and version < SCHEMA_VERSIONS[kind]
            raise (OldLayoutError if is_old else ArtifactError)(
                f"{path}: schema_version {version!r}; this apreqel reads {SCHEMA_VERSIONS[kind]}; "
                "measure again or use the apreqel that wrote it"
            )
        try:
            provenance, data = Provenance(**document["provenance"]), document["data"]
        except (KeyError, TypeError) as error:
            raise ArtifactError(f"{path}: field provenance or data is damaged ({error})") from error
        if model_sha256 is not None and provenance.model_sha256 != model_sha256:
            raise ArtifactError(
                f"{path}: made for the model with SHA-256 {provenance.model_sha256[:12]}, "
                f"this model has {model_sha256[:12]}; use another --workdir or delete the file"
            )
        with understood(f"{path}: {kind}", cls.ADVICE):
            hints = _hints(cls)
            return cls(provenance, **{n: from_json(hints[n], v, n) for n, v in data.items()})

    @classmethod
    def load_current(cls, path: Path, model_sha256: str) -> Self | None:
        """What is kept at `path`; None for nothing, or an older layout. Raises ArtifactError."""
        if not path.exists():
            return None
        try:
            return cls.load(path, model_sha256)
        except OldLayoutError:
            return None

    @classmethod
    def load_same(cls, path: Path, provenance: Provenance) -> Self | None:
        """What is kept at `path`, if it was measured in this way; None where there is none.

        Whichever version of apreqel wrote it; one in an older layout is measured again. Raises
        ArtifactError.
        """
        found = cls.load_current(path, provenance.model_sha256)
        if found is None:
            return None
        same = replace(found.provenance, apreqel_version=provenance.apreqel_version) == provenance
        return found if same else None


def _starts_with(path: Path, start: bytes) -> bool:
    with open(path, "rb") as file:
        return file.read(len(start)) == start


def plain(value: Any) -> Any:
    """Dataclasses as mappings, ready for JSON."""
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(v) for key, v in value.items()}
    if isinstance(value, list | tuple | set):
        return [plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value


# Once a class: a sensitivity holds thousands of values of few classes.
_hints: Callable[[Any], dict[str, Any]] = functools.cache(get_type_hints)


def from_json(kind: Any, value: Any, where: str) -> Any:
    """What `plain` made of a value of type `kind`, back. Raises TypeError, KeyError."""
    if kind is Any or (kind is float and type(value) is int) or type(value) is kind:
        return value
    origin, arguments = get_origin(kind), get_args(kind)
    if is_dataclass(kind) and isinstance(kind, type) and isinstance(value, dict):
        hints = _hints(kind)
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
    """Make `path`, whole and on disk or not at all. Raises OutputError."""
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with new_file(path, tag=f".{secrets.token_hex(4)}") as part, open(part, "xb") as file:
            file.write(content)


def beside(path: Path, ending: str) -> Path:
    """A hidden name in the same folder, short enough for any file system."""
    name = f".{path.name}{ending}"
    if len(os.fsencode(name)) > _LONGEST_NAME:
        name = f".{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]}{ending}"
    return path.with_name(name)


@contextmanager
def new_file(path: Path, *, replace: bool = True, tag: str = "") -> Iterator[Path]:
    """A name beside `path`; the file made there becomes `path`, on disk, if the block succeeds.

    What an earlier run left at that name is removed, so either a lock is held or `tag` is unique.
    The file is to be opened with O_EXCL, which refuses what appeared there since and follows no
    symlink. Raises OutputError, without `replace` also where there is something at `path` by then.
    """
    part = beside(path, f"{tag}.part")
    with _writing(part):
        part.unlink(missing_ok=True)
    try:
        yield part
        with _writing(path):
            _sync(part)
            if replace:
                os.replace(part, path)
            else:
                _move_where_nothing_is(part, path)
            _sync(path.parent)
    finally:
        part.unlink(missing_ok=True)


def _move_where_nothing_is(part: Path, path: Path) -> None:
    try:
        os.link(part, path)  # unlike a rename, it never replaces anything
    except OSError:  # something is there, or no links are (FAT): hold the name, or fail to, first
        path.touch(exist_ok=False)
        try:
            os.replace(part, path)
        except OSError:
            path.unlink()
            raise


def _sync(path: Path) -> None:
    """Bring a file, or the names in a folder, onto the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Raise OutputError where something within cannot be written."""
    try:
        yield
    except OSError as error:
        raise output_error(path, error) from error


def output_error(path: Path | str, error: OSError) -> OutputError:
    """The failure of a write, with what to do about it."""
    elsewhere = "choose another folder with --workdir or --output"
    no_locks = f"this file system has no locks, as network drives may not; {elsewhere}"
    advice = {
        errno.EEXIST: "use --force to replace it, or choose another output",
        errno.ENOSPC: f"free some space, or {elsewhere}",
        errno.EROFS: elsewhere,
        errno.EACCES: elsewhere,
        errno.ENOLCK: no_locks,
        errno.EOPNOTSUPP: no_locks,
        errno.EFBIG: "the file system cannot hold a file of this size (FAT32: 4 GiB)",
    }.get(error.errno or 0, "check the disk")
    return OutputError(f"{path}: {error.strerror or error}; {advice}")


def require_space(
    folder: Path, needed_bytes: int, purpose: str, advice: str = "free some space or use --workdir"
) -> None:
    """Raise OutputError where `folder` has less free space than `needed_bytes`."""
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise OutputError(
            f"{folder}: {purpose} needs {needed_bytes / 1e6:.0f} MB of disk, "
            f"{free / 1e6:.0f} MB are free; {advice}"
        )


@contextmanager
def lock(path: Path, *, remove: bool = False) -> Iterator[int]:
    """Hold the lock file `path`, and `remove` it in the end.

    Gives its descriptor: a child that inherits it holds the lock for as long as it lives. Raises
    LockedError where another process holds it, OutputError where the file system has no locks.
    """
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+b")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(file.fileno()), path.stat()):
                raise BlockingIOError("removed by its last holder, and made anew by another")
        except (BlockingIOError, FileNotFoundError) as error:  # held, or removed at this moment
            raise LockedError(
                f"{path}: another apreqel is at work here; wait for it or use another folder"
            ) from error
        except OSError as error:
            raise output_error(path, error) from error
        try:
            yield file.fileno()
        finally:
            if remove:
                path.unlink(missing_ok=True)


# --- hashing -------------------------------------------------------------------------------------


def file_sha256(path: Path) -> str:
    """Raises ModelFileError."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while block := file.read(_HASH_BLOCK_BYTES):
                digest.update(block)
    except OSError as error:
        raise ModelFileError(f"{path}: cannot be read: {error.strerror}") from error
    return digest.hexdigest()


@dataclass(frozen=True)
class _ModelHash(Record):
    KIND = "model-hash"

    files: Sequence[tuple[str, int, int, int]]
    sha256: str


def model_sha256(files: tuple[Path, ...], cache: Path) -> str:
    """SHA-256 of a model: of its one file, or of its shards' digests in order.

    Kept in `cache` and trusted as long as each file's size, time of change and inode stand.
    """
    if known := known_sha256(files, cache):
        return known
    marks = _marks_of(files)
    digests = [file_sha256(f) for f in files]
    joined = hashlib.sha256("".join(digests).encode()).hexdigest()
    digest = digests[0] if len(digests) == 1 else joined
    _ModelHash(Provenance(digest), marks, digest).save(cache)
    return digest


def known_sha256(files: tuple[Path, ...], cache: Path) -> str | None:
    """What `cache` says of these very files; None where it is not there, or they were changed."""
    with suppress(ArtifactError):
        known = _ModelHash.load(cache)
        if known.files == _marks_of(files):
            return known.sha256
    return None


def _marks_of(files: tuple[Path, ...]) -> list[tuple[str, int, int, int]]:
    stats = ((f, f.stat()) for f in files)
    return [(str(f.resolve()), s.st_size, s.st_mtime_ns, s.st_ino) for f, s in stats]


class FileMarks:
    """Size and time of change of each file, as they are when this is made."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._marks = {f: (s.st_size, s.st_mtime_ns) for f in files for s in (f.stat(),)}

    def check(self) -> None:
        """Raise ArtifactError where a file was cut or replaced since."""
        for path, mark in self._marks.items():
            try:
                now = path.stat()
            except OSError as error:
                raise ArtifactError(f"{path}: gone while in use ({error.strerror})") from error
            if (now.st_size, now.st_mtime_ns) != mark:
                raise ArtifactError(
                    f"{printable(str(path), 200)}: changed while in use; measure again on a stable "
                    "file"
                )
