"""The file that a plan is for, written from its model with the imatrix of its work folder."""

from __future__ import annotations

from pathlib import Path

from apreqel import artifacts, quantize
from apreqel.errors import ApreqelError, ArtifactError, ModelFileError
from apreqel.model.inventory import Inventory, read_inventory
from apreqel.plan.plan import Plan
from apreqel.progress import Progress
from apreqel.sensitivity.measurement import require_probed_model
from apreqel.sensitivity.rounding import Rounding
from apreqel.workspace import HASH_FILE, Workspace


def load_plan(path: Path) -> tuple[Plan, Inventory]:
    """A plan and the model it was made for. Raises ArtifactError, ModelFileError."""
    made = Plan.load(path)
    return made, _given(path, made.model_files[0])


def _given(plan: Path, model: str) -> Inventory:
    if not Path(model).exists():
        raise ModelFileError(
            f"{plan}: its model {model} is gone; plan again where the model is now"
        )
    return read_inventory(Path(model))


def run_plan(
    path: Path,
    *,
    output: Path | None,
    n_threads: int,
    force: bool,
    allow_requantize: bool,
    progress: Progress,
) -> quantize.QuantizedModel:
    """Quantise as planned in `path`, with the imatrix of the folder it was made in."""
    made, inventory = load_plan(path)
    folder, expected = Path(made.workdir), made.provenance.model_sha256
    digest = artifacts.model_sha256(inventory.files, folder / HASH_FILE)
    if digest != expected:
        raise ArtifactError(
            f"{path}: made for the model with SHA-256 {expected[:12]}, {inventory.files[0]} now "
            f"has {digest[:12]}; plan again"
        )
    original = _given(path, made.original_files[0]) if made.original_files else None
    space = Workspace(inventory, digest, folder, n_threads, progress=progress, original=original)
    probed = require_probed_model(space)
    if probed.sensitivity.imatrix_sha256 != made.imatrix_sha256:
        raise ArtifactError(f"{folder}: does not hold the imatrix of {path.name}; plan again")
    target = output or default_output(space, made.prefer)
    quantize.check_output(space.given, target, force)
    quantize.check_job(inventory, made.types, target, probed.imatrix, force, allow_requantize)
    result = quantize.quantize_model(
        inventory,
        made.types,
        target,
        imatrix=probed.imatrix,
        extra_metadata=made.extra_metadata(),
        n_threads=n_threads,
        force=force,
        allow_requantize=allow_requantize,
        moments=Rounding(probed).moments(made.types) if made.is_rounded else None,
        progress=progress,
    )
    if result.size_bytes != made.size_bytes:
        raise ApreqelError(
            f"{result.path}: has {result.size_bytes} bytes, the plan said {made.size_bytes}"
        )
    return result


def default_output(space: Workspace, prefer: str) -> Path:
    """Beside the work folder: MODEL-apreqel-accuracy.gguf."""
    folder = space.folder.absolute()
    place = folder.parent.parent if space.original else folder.parent
    return place / f"{space.given.files[0].stem}-apreqel-{prefer}.gguf"
