"""What MODEL means where it is no GGUF: a checkpoint's folder, or a repository on the hub."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from apreqel import artifacts
from apreqel.checkpoint.conversion import Converted, converted, kept_gguf
from apreqel.checkpoint.converter import cache_folder
from apreqel.checkpoint.hub import Repository, download, look_up, repository_named
from apreqel.checkpoint.weights import CONFIG
from apreqel.errors import ModelFileError, printable
from apreqel.progress import Progress


@dataclass(frozen=True)
class Source:
    """The GGUF of a checkpoint, and the folder for what is measured on it."""

    file: Path
    workdir: Path
    notes: tuple[str, ...] = ()


def checkpoint_source(name: str, workdir: Path | None, progress: Progress) -> Source | None:
    """The GGUF of the checkpoint `name`, converted where it was not; None where it is none.

    What is measured on a folder's model is kept beside the folder, with its GGUF; that of the
    hub's model where one works, its GGUF in the cache, by commit. Raises what `converted`,
    `look_up` and `download` raise.
    """
    path = Path(name)
    if path.exists():
        if not path.is_dir():
            _require_no_part(path)
            return None
        _require_checkpoint(path)
        place = path.resolve() if path.name in ("", "..") else path.absolute()
        own = place.name or "model"
        folder = workdir or place.with_name(f"{own}.apreqel")
        made = converted(path, own, folder, progress)
        return Source(made.file, folder, made.notes)
    repository = repository_named(name)
    if repository is None:
        return None
    made = _from_hub(repository, progress)
    folder = workdir or Path.cwd() / f"{repository.short_name}.apreqel"
    return Source(made.file, folder, made.notes)


def _require_no_part(path: Path) -> None:
    if path.suffix == ".safetensors" or path.name == CONFIG:
        raise ModelFileError(f"{path}: a part of a checkpoint; give its folder")


def _require_checkpoint(path: Path) -> None:
    """Raise ModelFileError for another kind of folder, with what to give instead."""
    if (path / CONFIG).exists():
        return
    if models := sorted(p.name for p in path.glob("*.gguf")):
        raise ModelFileError(f"{path}: is a folder; give the GGUF in it: {printable(models[0])}")
    raise ModelFileError(f"{path}: is a folder with neither a GGUF nor a checkpoint's {CONFIG}")


def _from_hub(repository: Repository, progress: Progress) -> Converted:
    found = look_up(repository, progress)
    place = cache_folder() / "checkpoints" / repository.name.replace("/", "--")
    kept = kept_gguf(place / found.commit)
    if kept is None:
        missing = found.weight_bytes
        if missing:
            artifacts.require_space(place, missing, f"the GGUF of {repository.title}", _ELSEWHERE)
        folder, commit = download(repository, found, progress)
        # By commit: a branch moves, what was measured on a model must not.
        kept = converted(folder, repository.short_name, place / commit, progress)
    if found.is_offline:
        kept = replace(
            kept, notes=(*kept.notes, f"{repository.title}: the hub is out of reach; as cached")
        )
    return kept


_ELSEWHERE = "free some, or move the cache with XDG_CACHE_HOME"
