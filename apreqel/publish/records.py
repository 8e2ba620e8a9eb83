"""What is known of a written file: the plan whose digest it carries, and its verification.

Both are looked for where apreqel leaves them, or beside the file, and leave this machine without
its paths.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apreqel.errors import ArtifactError, ModelFileError, printable
from apreqel.evaluate.verify import VerificationReport
from apreqel.model.inventory import Inventory, read_inventory
from apreqel.plan.plan import Plan
from apreqel.workspace import EQUALISED_FOLDER, PLAN_FILE, VERIFICATION_FILE

DIGEST_KEY = "apreqel.plan"
# A path into a work folder, or an absolute one: not a part of an address, not a fraction.
_INTO_WORK = re.compile(r"[^\s'\"]*\.apreqel/(?:[^\s'\"/]+/)*")
_PATH = re.compile(r"(?<![\w.:/~\\-])(?:~|[A-Za-z]:)?(?:[/\\][^\s/\\,;:'\"()]+){2,}")


@dataclass(frozen=True)
class PlannedFile:
    """A file with its plan, where that was found, and what was measured of it, if it was."""

    inventory: Inventory
    plan: Plan
    plan_path: Path
    report: VerificationReport | None

    @property
    def path(self) -> Path:
        return self.inventory.files[0]


def planned_file(path: Path, plan: Path | None = None, workdir: Path | None = None) -> PlannedFile:
    """`path` with the plan that it was made from: `plan`, one in `workdir`, or one found nearby.

    Raises ModelFileError, ArtifactError where there is no such plan.
    """
    inventory = read_inventory(path)
    digest = digest_of(inventory)
    if not digest:
        raise ModelFileError(f"{path}: apreqel did not write it (no {DIGEST_KEY} in its metadata)")
    places = [plan] if plan else filter(Plan.is_kept_at, _plans_near(path, workdir))
    for place in places:
        with suppress(*([] if plan else [ArtifactError])):
            made = Plan.load(place)
            if made.metadata.get(DIGEST_KEY) == digest and made.types == inventory.types:
                report = verification_of(place.parent, digest)
                if report and report.files[1].size_bytes != inventory.size_bytes:
                    report = None
                return PlannedFile(inventory, made, place, report)
    if plan:
        raise ArtifactError(f"{plan}: is not the plan of {path}; give the one it was made from")
    raise ArtifactError(
        f"{path}: its plan {digest[:12]} is neither beside it nor in a work folder there; give "
        "--plan or --workdir"
    )


def digest_of(inventory: Inventory) -> str:
    """Of the plan that a file was made from; '' where apreqel did not write it."""
    return printable(inventory.headers[0].text(DIGEST_KEY), 64)


def verification_of(folder: Path, digest: str) -> VerificationReport | None:
    """What was last measured in a folder, if that was the file of this plan."""
    with suppress(ArtifactError):
        report = VerificationReport.load(folder / VERIFICATION_FILE)
        if report.provenance.settings.get("plan") == digest and len(report.files) > 1:
            return report
    return None


def _plans_near(path: Path, workdir: Path | None) -> Iterator[Path]:
    """Files that may be plans: in `workdir`, or in work folders beside the file, or beside it."""
    here = path.absolute().parent
    folders = [workdir] if workdir else [here, *sorted(here.glob("*.apreqel"))]
    for folder in folders:
        for inner in (folder, folder / EQUALISED_FOLDER):
            with suppress(OSError):
                found = sorted(inner.glob("*.json"))
                # Of plans of the same digest plan.json, then those of a ladder.
                yield from sorted(found, key=lambda p: (p.name != PLAN_FILE, p.name))


# --- to be published -----------------------------------------------------------------------------


def published(record: Plan | VerificationReport, renamed: dict[str, str]) -> bytes:
    """The record's file without this machine's paths: names of files only.

    `renamed` are names that files have in public, by the paths they have here.
    """
    return (json.dumps(_pathless(record.document, renamed), indent=1) + "\n").encode()


def _pathless(value: Any, renamed: dict[str, str]) -> Any:
    if isinstance(value, dict):
        return {without_paths(k, renamed): _pathless(v, renamed) for k, v in value.items()}
    if isinstance(value, list):
        return [_pathless(v, renamed) for v in value]
    return without_paths(value, renamed) if isinstance(value, str) else value


def without_paths(text: str, renamed: dict[str, str] | None = None) -> str:
    """`text` with the last part of each absolute path, or its public name."""
    for path in sorted(renamed or {}, key=len, reverse=True):
        text = text.replace(path, (renamed or {})[path])
    text = _INTO_WORK.sub("", text)
    return _PATH.sub(lambda found: re.split(r"[/\\]", found[0])[-1], text)


def paths_of(found: Sequence[PlannedFile]) -> dict[str, str]:
    """The paths that records of these files hold, with what to call them."""
    known: dict[str, str] = {}
    for file in found:
        given = [*file.plan.model_files, *file.plan.original_files, file.plan.workdir]
        given += [row.path for row in file.report.files] if file.report else []
        known |= {path: Path(path).name for path in given if Path(path).is_absolute()}
    return known
