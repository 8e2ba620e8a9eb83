"""The stages joined: a work folder that holds what was measured, and runs what is missing.

Each step reuses its artifact where that was made in the same way for the same model, and makes it
anew otherwise. One apreqel at a time works in a folder.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from apreqel import artifacts, quantize
from apreqel.device import profile as profiling
from apreqel.device import timing
from apreqel.device.machine import default_threads
from apreqel.device.profile import DeviceProfile
from apreqel.errors import (
    ApreqelError,
    ArtifactError,
    InfeasiblePlanError,
    ModelFileError,
    OutputError,
    UsageError,
)
from apreqel.evaluate import confirm as candidates
from apreqel.evaluate import real_files as trying
from apreqel.evaluate import refine as refining
from apreqel.evaluate import strategies as comparing
from apreqel.evaluate import verify as verification
from apreqel.evaluate.real_files import Trials
from apreqel.evaluate.verify import VerificationReport, VerifySettings
from apreqel.model import imatrix as imatrices
from apreqel.model import recipes
from apreqel.model.imatrix import Imatrix
from apreqel.model.inventory import (
    DEMO,
    Inventory,
    find_model,
    read_inventory,
    require_float_source,
)
from apreqel.plan import front as fronts
from apreqel.plan.front import Front
from apreqel.plan.plan import PLAN_FILE, Plan, encode_metadata, output_records
from apreqel.plan.planner import Planner, Solved, solve_request, with_longest_context
from apreqel.plan.request import PlanRequest, request_from, require_presets
from apreqel.sensitivity import calibration, kv_cache
from apreqel.sensitivity import measure as sensitivities
from apreqel.sensitivity.calibration import Text
from apreqel.sensitivity.experts import ExpertUse, measure_experts
from apreqel.sensitivity.gptq import Feedback
from apreqel.sensitivity.kv_cache import KvSensitivity
from apreqel.sensitivity.measure import Effort, ProbeSettings, Sensitivity

# (what is being done, steps done, steps in all)
Progress = Callable[[str, int, int], None]

# Plans along a ladder that probing tries as real files.
_LADDER_TRIALS = {"quick": 0, "normal": 4, "thorough": 6}


@dataclass(frozen=True)
class Workspace:
    """A model and the folder for everything measured on it."""

    inventory: Inventory
    sha256: str
    folder: Path
    n_threads: int
    tune_threads: bool
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
    n_threads: int | None = None,
    allow_requantize: bool,
    on_progress: Progress,
) -> Iterator[Workspace]:
    """Read the model, take its work folder and lock it.

    Without `n_threads` the number is what a profile of this device was tuned to, if there is one.

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
        yield Workspace(
            inventory,
            sha256,
            folder,
            n_threads or usual_threads(),
            n_threads is None,
            allow_requantize,
            on_progress,
        )


# --- the steps -----------------------------------------------------------------------------------


def usual_threads() -> int:
    """Threads that this device was tuned to, or else one a physical core."""
    tuned = tuned_profile()
    return tuned.n_threads if tuned else default_threads()


def tuned_profile() -> DeviceProfile | None:
    """The stored profile of this device whose number of threads was tuned, not given."""
    if not any(profiling.store_folder().glob("*.json")):
        return None
    _, fingerprint = profiling.this_device()
    for path in sorted(profiling.store_folder().glob(f"*-{fingerprint[:6]}.json")):
        found = DeviceProfile.load(path)
        if found.fingerprint == fingerprint and found.thread_seconds:
            return found
    return None


def profile(space: Workspace, *, again: bool = False) -> DeviceProfile:
    """This device's profile with this model in it: the stored one, completed where it lacks."""
    threads = None if space.tune_threads else space.n_threads
    return device_profile(
        space.inventory, space.folder, threads, again=again, on_progress=space.on_progress
    )


def device_profile(
    inventory: Inventory | None,
    folder: Path,
    n_threads: int | None,
    *,
    again: bool = False,
    on_progress: Progress,
) -> DeviceProfile:
    """The profile of this device, completed for a model (or standard shapes), and stored.

    Raises LockedError where another apreqel is timing: two would disturb each other.
    """
    tuned = tuned_profile() if n_threads is None else None
    n_threads = tuned.n_threads if tuned else n_threads
    with artifacts.lock(profiling.store_folder() / ".lock"):
        known = stored_profile(n_threads) if n_threads else None
        if known and not again and inventory and known.is_complete(inventory):
            return known
        measured = timing.measure_profile(
            inventory,
            folder,
            n_threads=n_threads,
            known=None if again else known,
            on_progress=on_progress,
        )
        if known:
            measured = profiling.merged(known, measured)
        measured.save(profiling.stored_path(measured.name))
    return measured


def profile_model(
    model: str | None,
    workdir: Path | None,
    n_threads: int | None,
    *,
    again: bool,
    on_progress: Progress,
) -> tuple[DeviceProfile, Inventory]:
    """This device's profile with `model` in it, or with shapes of common small models."""
    if model is not None:
        with open_workspace(
            model,
            workdir=workdir,
            n_threads=n_threads,
            allow_requantize=True,
            on_progress=on_progress,
        ) as space:
            return profile(space, again=again), space.inventory
    with tempfile.TemporaryDirectory(prefix="apreqel-") as folder:
        inventory = timing.standard_model(Path(folder) / "standard.gguf")
        made = device_profile(
            inventory, Path(folder), n_threads, again=again, on_progress=on_progress
        )
        return made, inventory


def named_profile(name: str, model: str | None) -> tuple[DeviceProfile, Inventory]:
    """A profile at hand and the model to predict for: standard shapes where none is given."""
    found = profiling.load_named(name)
    if model is not None:
        return found, read_inventory(find_model(model))
    with tempfile.TemporaryDirectory(prefix="apreqel-") as folder:
        return found, timing.standard_model(Path(folder) / "standard.gguf")


def list_profiles() -> list[tuple[str, Path]]:
    return list(profiling.list_profiles())


def import_profile(path: Path) -> tuple[str, Path]:
    """Check another device's profile and keep it under its own name. Raises ArtifactError."""
    found = DeviceProfile.load(path)
    target = profiling.stored_path(profiling.safe_name(found.name))
    found.save(target)
    return target.stem, target


def stored_profile(n_threads: int) -> DeviceProfile | None:
    """What was measured on this very device with so many threads."""
    device, fingerprint = profiling.this_device()
    path = profiling.stored_path(profiling.default_name(device, n_threads, fingerprint))
    if not path.exists():
        return None
    found = DeviceProfile.load(path)
    return found if found.fingerprint == fingerprint else None


def probe(
    space: Workspace,
    *,
    effort: Effort,
    texts: Sequence[Text],
    imatrix_file: Path | None = None,
    settings: ProbeSettings | None = None,
) -> tuple[Sensitivity, Imatrix]:
    """The sensitivity and its imatrix, measured or taken up where they were left.

    Plans along a ladder of sizes are tried as real files, so that totals are predicted as such
    files measure.
    """
    state = sensitivities.measure(
        space.inventory,
        space.sha256,
        space.folder,
        texts=texts,
        settings=settings or ProbeSettings(),
        effort=effort,
        n_threads=space.n_threads,
        imatrix_file=imatrix_file,
        on_progress=space.on_progress,
    )
    imatrix = load_imatrix(space)
    with trials_of(space, state, imatrix) as trials:
        records = output_records(imatrix)
        # Where --minutes cut probing short there is no time for files either.
        count = 0 if state.cut_short else _LADDER_TRIALS[effort.name]
        candidates.try_ladder(space.inventory, state, records, trials, count)
    return state, imatrix


def trials_of(
    space: Workspace, state: Sensitivity, imatrix: Imatrix, feedback: Feedback | None = None
) -> Trials:
    """Whole maps as real files, on the part of the calibration text that is kept for them."""
    return Trials(
        space.inventory,
        imatrix,
        state,
        space.folder,
        space.n_threads,
        space.on_progress,
        feedback,
    )


def learn_feedback(
    space: Workspace, request: PlanRequest, state: Sensitivity, imatrix: Imatrix
) -> Feedback | None:
    """Where the request asks for error feedback: it, with its gains left in the sensitivity."""
    if not request.feedback:
        state.learn_gains({})
        return None
    feedback = Feedback(
        space.inventory, imatrix, state, space.folder, space.n_threads, space.on_progress
    )
    state.learn_gains(feedback.gains())
    return feedback


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
    state.learn_totals(trying.knots(trying.read_trials(space.folder, state)))
    return state, load_imatrix(space)


def require_measured(space: Workspace) -> tuple[Sensitivity, Imatrix]:
    """What an earlier probe left complete. Raises ArtifactError where there is none."""
    known = measured(space)
    if known is None:
        raise ArtifactError(f"{space.folder}: not probed yet; run apreqel probe first")
    return known


def use_metric(state: Sensitivity, metric: str) -> None:
    """What plans call damage: KL divergence, or the change of perplexity's logarithm."""
    state.metric = metric
    state.renew_model()


def kv_sensitivity(space: Workspace) -> KvSensitivity:
    """What quantising the KV cache costs: the saved measurement, or a new one."""
    path = space.folder / kv_cache.KV_FILE
    if path.exists():
        return KvSensitivity.load(path, space.sha256)
    measured = kv_cache.measure_kv(
        space.inventory,
        space.sha256,
        calibration.bundled_texts(),
        space.n_threads,
        space.on_progress,
    )
    measured.save(path)
    return measured


def expert_use(space: Workspace, request: PlanRequest) -> ExpertUse | None:
    """What the wanted number of active experts costs; None where the model's own is wanted."""
    if request.experts_used is None:
        return None
    return measure_experts(
        space.inventory,
        space.sha256,
        space.folder,
        request.experts_used,
        texts=calibration.bundled_texts(),
        n_threads=space.n_threads,
        on_progress=space.on_progress,
    )


def profile_for(space: Workspace, request: PlanRequest, device: str | None) -> DeviceProfile | None:
    """The profile to plan with: a named device's, this one's, or none where none is needed."""
    if device is not None:
        return profiling.load_named(device)
    if request.needs_profile:
        return profile(space)
    known = stored_profile(space.n_threads)
    return known if known and known.covers(space.inventory) else None


def plan(
    space: Workspace,
    request: PlanRequest,
    state: Sensitivity,
    imatrix: Imatrix,
    device_profile: DeviceProfile | None,
    output: Path | None = None,
    check: bool = True,
    refine: bool | None = None,
) -> tuple[Plan, Path]:
    """Make the plan; write it and its --tensor-type-file. Returns it with its path.

    With `check` it is measured as a real file beside its rivals, and the best is kept. With
    `refine` exchanges around it are probed too, and a plan made from them is tried; None: where
    it has so few bits that tensors' damages interact.
    """
    feedback = learn_feedback(space, request, state, imatrix)
    with trials_of(space, state, imatrix, feedback) if check else nullcontext() as trials:
        return _plan(space, request, state, imatrix, device_profile, output, trials, refine)


def _plan(
    space: Workspace,
    request: PlanRequest,
    state: Sensitivity,
    imatrix: Imatrix,
    device_profile: DeviceProfile | None,
    output: Path | None,
    trials: Trials | None,
    refine: bool | None = False,
) -> tuple[Plan, Path]:
    kv = kv_sensitivity(space) if request.max_ram_bytes is not None else None
    experts = expert_use(space, request)
    if request.longest_context:
        records = output_records(imatrix)
        request = with_longest_context(
            space.inventory, state, request, device_profile, kv, records, experts
        )

    planner = Planner(
        space.inventory, state, imatrix, request, space.folder, device_profile, kv, experts
    )
    path = output or space.folder / PLAN_FILE
    if trials is None:
        made = planner.plan()
    else:
        made = candidates.confirmed_plan(planner, trials)
        if refine or (refine is None and refining.is_worthwhile(planner, made)):
            _write_plan(made, path, space.inventory)
            made = _refined(space, planner, made, trials, asked=bool(refine))
    _write_plan(made, path, space.inventory)
    return made, path


def _refined(
    space: Workspace, planner: Planner, made: Plan, trials: Trials, *, asked: bool
) -> Plan:
    """`made`, or a plan from what exchanges around it showed, if that is better."""
    try:
        refining.refine(planner, made.ease, space.folder, space.n_threads, space.on_progress)
        return candidates.better(made, candidates.confirmed_plan(planner, trials))
    except InfeasiblePlanError as error:
        return replace(made, notes=[*made.notes, f"refining led to no plan ({error})"])
    except ApreqelError as error:
        if asked:
            raise
        note = f"exchanges around the plan could not be probed ({error})"
        return replace(made, notes=[*made.notes, note])
    finally:
        planner.sensitivity.learn_exchanges(())


def _write_plan(made: Plan, path: Path, inventory: Inventory) -> None:
    """The plan and its map for other tools."""
    made.save(path)
    lines = recipes.tensor_type_lines(made.types, inventory)
    artifacts.write_atomically(path.with_suffix(".tensor-types.txt"), lines.encode())
    joined = recipes.custom_q(made.types, inventory)
    artifacts.write_atomically(path.with_suffix(".custom-q.txt"), joined.encode())


def front(
    space: Workspace,
    request: PlanRequest,
    state: Sensitivity,
    imatrix: Imatrix,
    device_profile: DeviceProfile | None,
) -> Front:
    """What can be had of size, closeness and speed."""
    learn_feedback(space, request, state, imatrix)
    records = output_records(imatrix)
    experts = expert_use(space, request)
    return fronts.pareto_front(
        space.inventory, state, request, records, device_profile, experts=experts
    )


def ladder(
    space: Workspace,
    request: PlanRequest,
    state: Sensitivity,
    imatrix: Imatrix,
    device_profile: DeviceProfile | None,
    count: int,
    check: bool = True,
) -> list[tuple[Plan, Path]]:
    """`count` plans from small to nearly lossless, each written as `plan-ladder-N.json`."""
    feedback = learn_feedback(space, request, state, imatrix)
    records = output_records(imatrix)
    sizes = fronts.ladder_sizes(
        space.inventory, state, request, records, device_profile, count, expert_use(space, request)
    )
    made = []
    with trials_of(space, state, imatrix, feedback) if check else nullcontext() as trials:
        for i, size in enumerate(sizes, 1):
            space.on_progress("planning", i - 1, count)
            step = replace(request, prefer="accuracy", weights={}, max_size_bytes=int(size))
            output = space.folder / f"plan-ladder-{i}.json"
            made.append(_plan(space, step, state, imatrix, device_profile, output, trials))
    return made


def explained(path: Path) -> tuple[Solved, Sensitivity, Plan, Inventory]:
    """A plan solved again, with everything that it was chosen from."""
    made, inventory = load_plan(path)
    folder = Path(made.workdir)
    state = Sensitivity.load(folder / sensitivities.SENSITIVITY_FILE, made.provenance.model_sha256)
    state.knots = trying.knots(trying.read_trials(folder, state))
    state.exchanges, state.metric = made.exchanges, made.metric
    request = request_from(made.provenance.settings)
    if request.feedback:
        imatrix = imatrices.read_imatrix(folder / sensitivities.IMATRIX_FILE, inventory)
        state.learn_gains(Feedback(inventory, imatrix, state, folder, usual_threads()).gains())
    timed = profiling.load_named(made.device) if made.device else None
    kv_path = folder / kv_cache.KV_FILE
    kv = KvSensitivity.load(kv_path, made.provenance.model_sha256) if kv_path.exists() else None
    solved = solve_request(
        inventory,
        state,
        request,
        encode_metadata(made.metadata),
        timed,
        kv,
        made.experts,
        made.ease,
    )
    solved = solved.with_types(made.types)  # where files decided otherwise
    return solved, state, made, inventory


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
    target = output or default_output(inventory, folder, made.prefer)
    quantize.check_job(inventory, made.types, target, imatrix, force, allow_requantize)
    with _source(made, inventory, imatrix, folder, n_threads, on_progress) as source:
        result = quantize.quantize_model(
            source,
            made.types,
            target,
            imatrix=imatrix,
            extra_metadata=made.extra_metadata(),
            n_threads=n_threads,
            force=force,
            allow_requantize=True,  # as was checked above
            on_progress=lambda done, total, tensor: on_progress("quantising", done, total),
        )
    if result.size_bytes != made.size_bytes:
        raise ApreqelError(
            f"{result.path}: has {result.size_bytes} bytes, the plan said {made.size_bytes}"
        )
    return result


def _source(
    made: Plan,
    inventory: Inventory,
    imatrix: Imatrix,
    folder: Path,
    n_threads: int,
    on_progress: Progress,
) -> AbstractContextManager[Inventory]:
    """The model that is quantised: with its weights moved where the plan says so."""
    if not made.feedback:
        return nullcontext(inventory)
    path = folder / sensitivities.SENSITIVITY_FILE
    state = Sensitivity.load(path, made.provenance.model_sha256)
    return Feedback(inventory, imatrix, state, folder, n_threads, on_progress).moved(made.types)


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
    require_presets(against)
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


def compare(
    space: Workspace, file_bytes: int, *, text: Text, settings: VerifySettings
) -> VerificationReport:
    """Other ways to choose types, on the same measurements: real files, measured side by side."""
    state, imatrix = require_measured(space)
    timed = stored_profile(space.n_threads)
    records = output_records(imatrix)
    made = comparing.strategies(
        space.inventory,
        state,
        records,
        file_bytes,
        timed if timed and timed.covers(space.inventory) else None,
    )
    with tempfile.TemporaryDirectory(prefix="compare-", dir=space.folder) as folder:
        files = {}
        for i, label in enumerate(["apreqel", *(name for name in made if name != "apreqel")]):
            space.on_progress(f"writing {label}", i, len(made))
            files[label] = Path(folder) / f"{label.replace(' ', '-')}.gguf"
            quantize.quantize_model(
                space.inventory,
                made[label],
                files[label],
                imatrix=imatrix,
                extra_metadata=records,
                n_threads=space.n_threads,
                allow_requantize=space.allow_requantize,
            )
        return verification.verify(
            space.inventory,
            space.sha256,
            files,
            text=text,
            calibration_sha256={t.sha256 for t in calibration.bundled_texts()},
            settings=settings,
            n_threads=space.n_threads,
            folder=space.folder,
            on_progress=space.on_progress,
        )


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
    effort: Effort,
    texts: Sequence[Text],
    text: Text,
    against: Sequence[str],
    verify_settings: VerifySettings,
    output: Path | None,
    force: bool,
    device: str | None = None,
) -> Everything:
    """Profile, probe, plan, quantise, verify: each only where it is missing or stale."""
    require_presets(against)
    output = output or default_output(space.inventory, space.folder, request.prefer)
    quantize.check_output(space.inventory, output, force or _is_ours(output))
    timed = profiling.load_named(device) if device else profile(space)
    state, imatrix = probe(space, effort=effort, texts=texts)
    made, plan_path = plan(space, request, state, imatrix, timed)
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
        return Everything(timed, made, output, VerificationReport.load(report_path))
    report = verify(
        space, output, text=text, against=against, settings=verify_settings, expected=made
    )
    artifacts.write_atomically(mark, wanted.encode())
    return Everything(timed, made, output, report)


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
    same = found.types == dict(made.types)
    return same and found.headers[0].get("apreqel.plan") == made.metadata["apreqel.plan"]


def _verification_key(
    made: Plan, text: Text, against: Sequence[str], settings: VerifySettings
) -> str:
    facts = [made.metadata["apreqel.plan"], text.sha256, list(against), asdict(settings)]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()
