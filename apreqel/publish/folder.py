"""A folder ready for `hf upload` and `ollama create`: the file, its card, all that remakes it.

Nothing in it depends on the machine or the hour: the same records give the same bytes.
apreqel.sha256 lists what was written; by it a later export knows its own files from the user's.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from apreqel import artifacts
from apreqel.errors import ApreqelError, OutputError, printable
from apreqel.evaluate.verify import VerificationReport
from apreqel.model import recipes
from apreqel.progress import silent
from apreqel.publish.card import RECIPE_END, Published, card
from apreqel.publish.front_matter import as_yaml, front_matter
from apreqel.publish.modelfile import modelfile
from apreqel.publish.naming import FileName, encoding_of, model_stem
from apreqel.publish.records import (
    PlannedFile,
    paths_of,
    published,
    without_paths,
)
from apreqel.report.gather import opened
from apreqel.report.page import page, require_extra
from apreqel.workspace import HASH_FILE, IMATRIX_FILE, VERIFICATION_FILE

CARD, MODELFILE, SUMS, REPORT = "README.md", "Modelfile", "apreqel.sha256", "report.html"
# linux/fs.h: _IOW(0x94, 9, int)
_FICLONE = 0x40049409
_CARD_LINES = {
    MODELFILE: "for `ollama create`",
    IMATRIX_FILE: "the importance matrix, for `llama-quantize --imatrix`",
    VERIFICATION_FILE: "all that was measured",
    REPORT: "the plan in pictures",
}


@dataclass(frozen=True)
class Publishing:
    """What the user says of a folder to publish; None is what the file says of itself."""

    folder: Path
    name: str | None = None
    base_model: str | None = None
    quantized_by: str | None = None
    force: bool = False


@dataclass(frozen=True)
class Exported:
    """`how` the models came into the folder, by file: reflink, hard link or copy."""

    folder: Path
    files: Sequence[str]
    how: Mapping[str, str]
    measured: bool
    remarks: Sequence[str]


def export(found: PlannedFile, asked: Publishing) -> Exported:
    """Write the folder of one file.

    Raises UsageError, ArtifactError, EngineError, OutputError (something there is not its own).
    """
    inventory = found.inventory
    name = FileName(model_stem(inventory, asked.name), encoding_of(inventory))
    report = found.report
    return write_folder([Published(found, name)], report, asked)


def write_folder(
    files: Sequence[Published], report: VerificationReport | None, asked: Publishing
) -> Exported:
    """Write the folder of these files, of one model, smallest first. Raises what `export` does."""
    header, folder = files[0].found.inventory.headers[0], asked.folder
    front = front_matter(header, asked.base_model, asked.quantized_by)
    texts = _texts_of(files, report)
    if (page_of_report := report_page(files)) is not None:
        texts[REPORT] = page_of_report
    extra = [f"`{name}`: {words}" for name, words in _CARD_LINES.items() if name in texts]
    texts[CARD] = (as_yaml(front) + "\n" + card(files, report, extra)).encode()
    models = {file.name.file: file.found.path.resolve() for file in files}
    inputs = [path for f in files for path in _inputs(f.found)]
    _check_folder(folder, [*texts, *models, SUMS], models, inputs, asked.force)
    how = {name: _bring(source, folder / name) for name, source in models.items()}
    for name, content in texts.items():
        artifacts.write_atomically(folder / name, content)
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in texts.items()}
    digests |= {name: artifacts.file_sha256(folder / name) for name in models}
    lines = (f"{digest}  {name}\n" for name, digest in sorted(digests.items()))
    artifacts.write_atomically(folder / SUMS, "".join(lines).encode())
    remarks = [*_remarks(files, front, report), *_strangers(folder, [*digests, SUMS])]
    return Exported(folder, sorted([*digests, SUMS]), how, report is not None, remarks)


def report_page(files: Sequence[Published]) -> bytes | None:
    """report.html of one file; None where its work folder or the extra `report` is missing."""
    if len(files) != 1:
        return None
    with suppress(ApreqelError):
        require_extra()
        with opened(str(files[0].found.plan_path), None, silent) as source:
            return page(source.report()).encode()
    return None


# --- what is in it -------------------------------------------------------------------------------


def _texts_of(files: Sequence[Published], report: VerificationReport | None) -> dict[str, bytes]:
    """By name, all but the models and the card."""
    renamed = paths_of([file.found for file in files])
    renamed |= {str(file.found.path): file.name.file for file in files}
    renamed |= {str(file.found.path.absolute()): file.name.file for file in files}
    texts: dict[str, bytes] = {}
    for file in files:
        made, inventory = file.found.plan, file.found.inventory
        texts[f"{file.recipe}.json"] = published(made, renamed)
        lines = recipes.tensor_type_lines(made.types, inventory)
        texts[f"{file.recipe}{RECIPE_END}"] = lines.encode()
        texts[f"{file.recipe}.custom-q.txt"] = recipes.custom_q(made.types, inventory).encode()
    if report:
        named = dict(zip((row.path for row in report.files[1:]), files, strict=False))
        rows = [
            replace(row, path=named[row.path].name.file) if row.path in named else row
            for row in report.files
        ]
        texts[VERIFICATION_FILE] = published(replace(report, files=rows), renamed)
    if (imatrix := _imatrix(files[0].found)) is not None:
        texts[IMATRIX_FILE] = imatrix
    if len(files) == 1:
        file = files[0]
        lines = modelfile(file.name.file, file.found.inventory, file.settings)
        texts[MODELFILE] = lines.encode()
    return texts


def _imatrix(found: PlannedFile) -> bytes | None:
    """The one that the plan was made with, where it still is."""
    for folder in (Path(found.plan.workdir), found.plan_path.parent):
        with suppress(OSError):
            content = (folder / IMATRIX_FILE).read_bytes()
            if hashlib.sha256(content).hexdigest() == found.plan.imatrix_sha256:
                return content
    return None


def _inputs(found: PlannedFile) -> list[Path]:
    made = found.plan
    records = [found.plan_path.parent / name for name in (IMATRIX_FILE, VERIFICATION_FILE)]
    models = map(Path, [*made.model_files, *made.original_files])
    return [found.path, found.plan_path, *records, *models]


def _remarks(
    files: Sequence[Published], front: Mapping[str, object], report: VerificationReport | None
) -> list[str]:
    found, remarks = files[0].found, list[str]()
    if report is None:
        remarks.append(
            "no verification of this file was found: the card has the plan's predictions; "
            "apreqel verify FILE --plan PLAN measures it"
        )
    if "base_model" not in front:
        remarks.append(
            "the file does not say which model it was made from; --base-model ORGANISATION/NAME "
            "puts that into the card"
        )
    if "license" not in front:
        remarks.append("the file names no licence, so the card has none")
    if _imatrix(found) is None:
        remarks.append("the plan's imatrix is not there any more and was left out")
    data = str(found.plan.metadata.get("quantize.imatrix.dataset", ""))
    if without_paths(data) != data:
        remarks.append(f"the files' metadata name a path of this machine: {printable(data, 200)}")
    return remarks


def _strangers(folder: Path, ours: Iterable[str]) -> list[str]:
    others = sorted({path.name for path in folder.iterdir()} - {*ours})
    shown = ", ".join(printable(name) for name in others[:5])
    return (
        [f"{folder} holds other files, too ({shown}): an upload takes them along"] if others else []
    )


# --- how it gets there ---------------------------------------------------------------------------


def _check_folder(
    folder: Path,
    names: Iterable[str],
    models: Mapping[str, Path],
    inputs: Sequence[Path],
    force: bool,
) -> None:
    """Raise OutputError where a file in the way is an input, or not apreqel's own."""
    try:
        if folder.exists() and not folder.is_dir():
            raise OutputError(f"{folder}: is not a folder; choose another --to")
        if (folder / HASH_FILE).exists():
            raise OutputError(f"{folder}: is a work folder; choose another --to")
        known = _known_sums(folder)
        for name in names:
            path = folder / name
            if not os.path.lexists(path):
                continue
            if name in models and path.exists() and path.samefile(models[name]):
                continue
            if any(path.exists() and i.exists() and path.samefile(i) for i in inputs):
                raise OutputError(f"{path}: is an input; choose another --to")
            own = name == SUMS or (path.is_file() and _is_known(path, known.get(name)))
            if not own and not force:
                raise OutputError(
                    f"{path}: exists and is not as apreqel wrote it; use --force to replace it, or "
                    "choose another --to"
                )
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise artifacts.output_error(folder, error) from error


def _known_sums(folder: Path) -> dict[str, str]:
    """SHA-256 of what an earlier export wrote, by name."""
    try:
        lines = (folder / SUMS).read_text(encoding="utf-8").splitlines()
    except (FileNotFoundError, UnicodeDecodeError):
        return {}
    return {name: digest for digest, _, name in (line.partition("  ") for line in lines)}


def _is_known(path: Path, digest: str | None) -> bool:
    return digest is not None and artifacts.file_sha256(path) == digest


def _bring(source: Path, target: Path) -> str:
    """Put `source` there too, never moving it: as a reflink, a hard link or a copy."""
    if target.exists() and target.samefile(source):
        return "there already"
    try:
        with artifacts.new_file(target) as part:
            if _reflinked(source, part):
                return "reflink"
            with suppress(OSError):
                os.link(source, part)
                return "hard link"
            artifacts.require_space(target.parent, source.stat().st_size, "a copy of the model")
            shutil.copyfile(source, part)
            return "copy"
    except OSError as error:
        raise artifacts.output_error(target, error) from error


def _reflinked(source: Path, part: Path) -> bool:
    """Whether the file system made a copy that shares its blocks until one is written (Linux)."""
    import fcntl

    try:
        with open(source, "rb") as old, open(part, "xb") as new:
            fcntl.ioctl(new.fileno(), _FICLONE, old.fileno())
        return True
    except OSError as error:
        part.unlink(missing_ok=True)
        if error.errno in (errno.ENOSPC, errno.EROFS, errno.EACCES):
            raise
        return False
