"""The stages joined: a work folder that holds what was measured, and runs what is missing.

Each step reuses its artifact where that was made in the same way for the same model, and makes it
anew otherwise. One apreqel at a time works in a folder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from apreqel import artifacts, calibration, llama, quantize
from apreqel import imatrix as imatrices
from apreqel import plan as planning
from apreqel import profile as profiling
from apreqel import sensitivity as sensitivities
from apreqel import verify as verification
from apreqel.calibration import Text
from apreqel.device import detect
from apreqel.errors import ApreqelError, ArtifactError, ModelFileError, OutputError, UsageError
from apreqel.imatrix import Imatrix
from apreqel.inventory import DEMO, Inventory, find_model, read_inventory, require_float_source
from apreqel.plan import Plan, PlanRequest
from apreqel.profile import DeviceProfile
from apreqel.sensitivity import ProbeSettings, Sensitivity
from apreqel.verify import VerificationReport, VerifySettings

# (what is being done, steps done, steps in all)
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Workspace:
    """A model and the folder for everything measured on it."""

    inventory: Inventory
    sha256: str
    folder: Path
    n_threads: int
    allow_requantize: bool
    on_progress: Progress

    @property
    def model(self) -> Path:
        return self.inventory.files[0]


@contextmanager
def open_workspace(
    name: str,
    *,
    workdir: Path | None,
    n_threads: int,
    allow_requantize: bool,
    on_progress: Progress,
) -> Iterator[Workspace]:
    """Read the model, take its work folder and lock it.

    Raises ModelFileError, UnsupportedModelError, LockedError, OutputError.
    """
    model = find_model(name)
    inventory = read_inventory(model)
    require_float_source(inventory, allow_requantize)
    if not inventory.quantizable:
        raise UsageError(f"{model}: holds no tensor that can be quantised")
    beside = Path.cwd() if name == DEMO else model.parent
    folder = workdir or beside / f"{model.name}.apreqel"
    with artifacts.lock(folder / ".lock"):
        sha256 = artifacts.model_sha256(inventory.files, folder / "model-hash.json")
        yield Workspace(inventory, sha256, folder, n_threads, allow_requantize, on_progress)


# --- the steps -----------------------------------------------------------------------------------


def profile(space: Workspace, *, again: bool = False) -> DeviceProfile:
    """The device profile for this model's shapes: the saved one where it is of this device."""
    path = space.folder / profiling.PROFILE_FILE
    fingerprint = detect().fingerprint(space.n_threads, llama.build_info())
    if path.exists() and not again:
        saved = DeviceProfile.load(path, space.sha256)
        if saved.fingerprint == fingerprint:
            return saved
    measured = profiling.measure_profile(
        space.inventory,
        space.sha256,
        space.folder,
        n_threads=space.n_threads,
        on_progress=space.on_progress,
    )
    measured.save(path)
    return measured


def probe(
    space: Workspace,
    *,
    settings: ProbeSettings,
    texts: Sequence[Text],
    imatrix_file: Path | None = None,
) -> tuple[Sensitivity, Imatrix]:
    """The sensitivity and its imatrix, measured or taken up where they were left."""
    state = sensitivities.measure(
        space.inventory,
        space.sha256,
        space.folder,
        texts=texts,
        settings=settings,
        n_threads=space.n_threads,
        imatrix_file=imatrix_file,
        on_progress=space.on_progress,
    )
    return state, load_imatrix(space)


def load_imatrix(space: Workspace) -> Imatrix:
    path = space.folder / sensitivities.IMATRIX_FILE
    if not path.exists():
        raise ArtifactError(f"{path}: no such file; run apreqel probe first")
    return imatrices.read_imatrix(path, space.inventory)


def measured(space: Workspace) -> tuple[Sensitivity, Imatrix] | None:
    """What an earlier probe left complete, in whatever settings; None where there is none."""
    path = space.folder / sensitivities.SENSITIVITY_FILE
    if not path.exists():
        return None
    state = Sensitivity.load(path, space.sha256)
    imatrix = space.folder / sensitivities.IMATRIX_FILE
    if not state.complete or not imatrix.exists():
        return None
    if artifacts.file_sha256(imatrix) != state.imatrix_sha256:
        raise ArtifactError(
            f"{imatrix}: is not the imatrix that was probed with; run apreqel probe"
        )
    return state, load_imatrix(space)


def saved_profile(space: Workspace) -> DeviceProfile | None:
    path = space.folder / profiling.PROFILE_FILE
    return DeviceProfile.load(path, space.sha256) if path.exists() else None


def plan(
    space: Workspace,
    request: PlanRequest,
    state: Sensitivity,
    imatrix: Imatrix,
    device_profile: DeviceProfile | None,
    output: Path | None = None,
) -> tuple[Plan, Path]:
    """Make the plan; write it and its --tensor-type-file. Returns it with its path."""
    made = planning.make_plan(
        space.inventory, state, imatrix, request, space.folder, profile=device_profile
    )
    path = output or space.folder / planning.PLAN_FILE
    made.save(path)
    lines = planning.tensor_type_lines(made.types, space.inventory)
    artifacts.write_atomically(path.with_suffix(".tensor-types.txt"), lines.encode())
    return made, path


def load_plan(path: Path) -> tuple[Plan, Inventory]:
    """A plan and the model it was made for. Raises ArtifactError, ModelFileError."""
    made = Plan.load(path)
    model = Path(made.model_files[0])
    if not model.exists():
        raise ModelFileError(
            f"{path}: its model {model} is gone; plan again where the model is now"
        )
    return made, read_inventory(model)


def run_plan(
    path: Path,
    *,
    output: Path | None,
    n_threads: int,
    force: bool,
    allow_requantize: bool,
    on_progress: Progress,
) -> quantize.QuantizedModel:
    """Quantise as planned in `path`, with the imatrix of the folder it was made in."""
    made, inventory = load_plan(path)
    folder = Path(made.workdir)
    digest = artifacts.model_sha256(inventory.files, folder / "model-hash.json")
    if digest != made.provenance.model_sha256:
        raise ArtifactError(
            f"{path}: made for the model with SHA-256 {made.provenance.model_sha256[:12]}, "
            f"{inventory.files[0]} now has {digest[:12]}; plan again"
        )
    imatrix_path = folder / sensitivities.IMATRIX_FILE
    if not imatrix_path.exists() or artifacts.file_sha256(imatrix_path) != made.imatrix_sha256:
        raise ArtifactError(f"{imatrix_path}: is not the imatrix of {path.name}; plan again")
    imatrix = imatrices.read_imatrix(imatrix_path, inventory)
    result = quantize.quantize_model(
        inventory,
        made.types,
        output or default_output(inventory, folder, made.prefer),
        imatrix=imatrix,
        extra_metadata=made.extra_metadata(),
        n_threads=n_threads,
        force=force,
        allow_requantize=allow_requantize,
        on_progress=lambda done, total, tensor: on_progress("quantising", done, total),
    )
    if result.size_bytes != made.size_bytes:
        raise ApreqelError(
            f"{result.path}: has {result.size_bytes} bytes, the plan said {made.size_bytes}"
        )
    return result


def default_output(inventory: Inventory, folder: Path, prefer: str) -> Path:
    """Beside the work folder: MODEL-apreqel-accuracy.gguf."""
    stem = inventory.files[0].stem
    return folder.absolute().parent / f"{stem}-apreqel-{prefer}.gguf"


def verify(
    space: Workspace,
    path: Path,
    *,
    text: Text,
    against: Sequence[str],
    settings: VerifySettings,
    expected: Plan | None = None,
) -> VerificationReport:
    """Measure `path` beside the original and the stock presets `against`."""
    planning.require_presets(against)
    if expected is not None:
        verification.check_types(path, expected.types)
    files = {"apreqel": path}
    used = {t.sha256 for t in calibration.bundled_texts()}
    state = space.folder / sensitivities.SENSITIVITY_FILE
    if state.exists():
        used |= set(Sensitivity.load(state, space.sha256).provenance.settings["texts"].values())
    if against:
        imatrix = load_imatrix(space)
        for i, preset in enumerate(against):
            space.on_progress(f"building stock {preset.upper()}", i, len(against))
            files[f"stock {preset.upper()}"] = verification.build_preset(
                space.inventory, preset, imatrix, space.folder, space.n_threads
            )
    report = verification.verify(
        space.inventory,
        space.sha256,
        files,
        text=text,
        calibration_sha256=used,
        settings=settings,
        n_threads=space.n_threads,
        folder=space.folder,
        predicted_kld_nats=expected.kld_nats if expected else None,
        on_progress=space.on_progress,
    )
    report.save(space.folder / verification.VERIFICATION_FILE)
    return report


# --- all of it -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Everything:
    """What `auto` gives: the profile, the plan, the file and its report."""

    profile: DeviceProfile
    plan: Plan
    output: Path
    report: VerificationReport


def auto(
    space: Workspace,
    request: PlanRequest,
    *,
    settings: ProbeSettings,
    texts: Sequence[Text],
    text: Text,
    against: Sequence[str],
    verify_settings: VerifySettings,
    output: Path | None,
    force: bool,
) -> Everything:
    """Profile, probe, plan, quantise, verify: each only where it is missing or stale."""
    planning.require_presets(against)
    output = output or default_output(space.inventory, space.folder, request.prefer)
    quantize.check_output(space.inventory, output, force or _is_ours(output))
    device_profile = profile(space)
    state, imatrix = probe(space, settings=settings, texts=texts)
    made, plan_path = plan(space, request, state, imatrix, device_profile)
    if not _holds(output, made):
        run_plan(
            plan_path,
            output=output,
            n_threads=space.n_threads,
            force=force or _is_ours(output),
            allow_requantize=space.allow_requantize,
            on_progress=space.on_progress,
        )
    report_path = space.folder / verification.VERIFICATION_FILE
    mark = space.folder / "verified.json"
    wanted = _verification_key(made, text, against, verify_settings)
    if mark.exists() and report_path.exists() and mark.read_text() == wanted:
        return Everything(device_profile, made, output, VerificationReport.load(report_path))
    report = verify(
        space, output, text=text, against=against, settings=verify_settings, expected=made
    )
    artifacts.write_atomically(mark, wanted.encode())
    return Everything(device_profile, made, output, report)


def _is_ours(path: Path) -> bool:
    """Whether `path` is a file that apreqel wrote: `auto` may replace its own."""
    try:
        return path.exists() and bool(read_inventory(path).headers[0].get("apreqel.version"))
    except (ModelFileError, OutputError):
        return False


def _holds(path: Path, made: Plan) -> bool:
    """Whether `path` is already what the plan makes."""
    if not path.exists() or path.stat().st_size != made.size_bytes:
        return False
    try:
        found = read_inventory(path)
    except ModelFileError:
        return False
    same = {t.name: t.qtype.name for t in found.tensors} == dict(made.types)
    return same and found.headers[0].get("apreqel.plan") == made.metadata["apreqel.plan"]


def _verification_key(
    made: Plan, text: Text, against: Sequence[str], settings: VerifySettings
) -> str:
    facts = [made.metadata["apreqel.plan"], text.sha256, list(against), asdict(settings)]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()
