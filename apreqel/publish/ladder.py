"""A ladder of plans as one folder: files are written where they are missing, all measured once."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from apreqel.errors import ArtifactError, ModelFileError
from apreqel.evaluate import verify as verification
from apreqel.evaluate.verify import Trial, VerificationReport
from apreqel.from_plan import run_plan
from apreqel.model.gguf_header import read_header
from apreqel.model.inventory import read_inventory
from apreqel.plan.plan import Plan
from apreqel.publish.card import Published
from apreqel.publish.folder import Exported, Publishing, write_folder
from apreqel.publish.naming import FileName, distinct, encoding_of, model_stem
from apreqel.publish.records import DIGEST_KEY, PlannedFile
from apreqel.workspace import Workspace

LADDER_VERIFICATION = "verification-ladder.json"
_LADDER_PLAN = re.compile(r"plan-ladder-(\d+)\.json")
_FILES_FOLDER = "ladder"


@dataclass(frozen=True)
class _Step:
    plan: Plan
    path: Path

    @property
    def digest(self) -> str:
        return str(self.plan.metadata[DIGEST_KEY])


def export_ladder(space: Workspace, asked: Publishing, trial: Trial) -> Exported:
    """Write the folder of `plan-ladder-1.json` and so on, which are in the work folder.

    Files that are not found beside the model or in the folder are written into the work folder.
    Raises ArtifactError where there is no ladder, and whatever quantising and verifying raise.
    """
    steps = _steps(space)
    known = _written_files(
        [space.given.files[0].parent, asked.folder, space.folder / _FILES_FOLDER]
    )
    paths = [known.get(step.digest) or _write(space, step) for step in steps]
    found = [
        PlannedFile(read_inventory(path), step.plan, step.path, None)
        for step, path in zip(steps, paths, strict=True)
    ]
    encodings = distinct([encoding_of(file.inventory) for file in found])
    stem = model_stem(found[0].inventory, asked.name)
    files = [
        Published(file, FileName(stem, encoding), recipe=file.plan_path.stem)
        for file, encoding in zip(found, encodings, strict=True)
    ]
    return write_folder(files, _report(space, steps, files, trial), asked)


def _steps(space: Workspace) -> list[_Step]:
    """The ladder's plans of this model, each map of types once, smallest first."""
    numbered = {
        int(match[1]): path
        for path in space.folder.iterdir()
        if (match := _LADDER_PLAN.fullmatch(path.name))
    }
    loaded = (_Step(Plan.load(path, space.sha256), path) for _, path in sorted(numbered.items()))
    steps = {step.digest: step for step in loaded}
    if not steps:
        raise ArtifactError(f"{space.folder}: holds no ladder; run apreqel plan MODEL --ladder N")
    return sorted(steps.values(), key=lambda step: step.plan.size_bytes)


def _written_files(folders: Sequence[Path]) -> Mapping[str, Path]:
    """Whole files that apreqel wrote, by the digest of their plan."""
    return {digest: path for folder in folders for digest, path in _digests(folder)}


def _digests(folder: Path) -> Iterator[tuple[str, Path]]:
    for path in sorted(folder.glob("*.gguf")):
        with suppress(ModelFileError, OSError):
            if digest := read_header(path).text(DIGEST_KEY):
                yield digest, path


def _write(space: Workspace, step: _Step) -> Path:
    folder = space.folder / _FILES_FOLDER
    folder.mkdir(exist_ok=True)
    output = folder / f"{step.path.stem}.gguf"
    run_plan(
        step.path,
        output=output,
        n_threads=space.n_threads,
        force=True,  # of another plan of that name: the folder is apreqel's own
        allow_requantize=space.allow_requantize,
        progress=space.progress,
    )
    return output


def _report(
    space: Workspace, steps: Sequence[_Step], files: Sequence[Published], trial: Trial
) -> VerificationReport:
    """All files measured beside the original, in one run, kept in the work folder."""
    made = verification.provenance_of(space, trial.settings, trial.text)
    digests = [step.digest for step in steps]
    made = replace(made, settings={**made.settings, "plans": digests})
    place = space.folder / LADDER_VERIFICATION
    if kept := VerificationReport.load_same(place, made):
        names = ["original", *(file.name.file for file in files)]
        rows = [replace(r, label=name) for r, name in zip(kept.files, names, strict=True)]
        return replace(kept, files=rows)
    paths = {file.name.file: file.found.path for file in files}
    report = verification.verify(space, paths, text=trial.text, settings=trial.settings)
    report = replace(report, provenance=made, versus=())
    report.save(place)
    return report
