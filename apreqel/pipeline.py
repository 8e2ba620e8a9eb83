"""The commands' steps joined: each reuses what the work folder holds, and makes what is missing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from apreqel import artifacts, last_words, quantize, workspace
from apreqel.artifacts import Provenance
from apreqel.device.profile import DeviceProfile
from apreqel.device.profiling import profile_of
from apreqel.device.store import load_named
from apreqel.device.threads import with_threads
from apreqel.errors import (
    ApreqelError,
    ArtifactError,
    InfeasiblePlanError,
    ModelFileError,
    OutputError,
    UsageError,
)
from apreqel.evaluate import verify as verification
from apreqel.evaluate.confirm import better, confirmed_plan, measure_ladder
from apreqel.evaluate.presets import build_preset
from apreqel.evaluate.real_files import FileBench, measured_files
from apreqel.evaluate.refine import is_worthwhile, refined
from apreqel.evaluate.verify import Trial, VerificationReport
from apreqel.from_plan import default_output, load_plan, run_plan
from apreqel.model import recipes
from apreqel.model.inventory import Inventory, read_inventory
from apreqel.plan.cache_types import CACHES
from apreqel.plan.front import Front, ladder_sizes, pareto_front
from apreqel.plan.make_plan import make_plan, speed_notes
from apreqel.plan.plan import Plan
from apreqel.plan.planner import Planner
from apreqel.plan.request import PlanRequest, request_from, require_presets
from apreqel.plan.solve import Solved, solve_request, with_longest_context
from apreqel.progress import Progress
from apreqel.sensitivity.bench import require_next_tokens
from apreqel.sensitivity.damage import damage_model
from apreqel.sensitivity.effort import Effort
from apreqel.sensitivity.equalise import equalised_model, probed_at
from apreqel.sensitivity.experts import expert_use
from apreqel.sensitivity.kv_cache import KV_FILE, CacheSensitivity, cache_sensitivity
from apreqel.sensitivity.measure import ProbeSettings, measure
from apreqel.sensitivity.measurement import ProbedModel, require_probed_model
from apreqel.sensitivity.rounding import Rounding
from apreqel.sensitivity.texts import Text, bundled_texts
from apreqel.workspace import PLAN_FILE, VERIFICATION_FILE, Workspace

# Plans along a ladder that probing tries as real files.
_LADDER_FILES = {"quick": 0, "normal": 4, "thorough": 6}


@contextmanager
def open_workspace(
    name: str,
    *,
    folder: Path | None,
    n_threads: int | None = None,
    allow_requantize: bool,
    progress: Progress,
) -> Iterator[Workspace]:
    """`workspace.opened`, of a model that predicts next tokens, as all that is measured here needs.

    Without `n_threads` as many as a profile of this device was tuned to. Raises what
    `require_next_tokens` raises.
    """
    with workspace.opened(
        name, folder, allow_requantize=allow_requantize, progress=progress
    ) as space:
        require_next_tokens(space.inventory)
        yield with_threads(space, n_threads)


def was_equalised(space: Workspace) -> bool:
    """Whether the model was last probed with its channels rescaled."""
    return probed_at(space.folder, True) > probed_at(space.folder, False)


@contextmanager
def equalised(space: Workspace, wanted: bool | None = None) -> Iterator[Workspace]:
    """Of the same model with its channels rescaled, in a folder within; or `space` itself.

    None: where that can be done, unless it was last probed as it is. Raises what `equalised_model`
    raises, UsageError where it is wanted and cannot be done.
    """
    is_kept = wanted is None and probed_at(space.folder, False) and not was_equalised(space)
    if wanted is False or is_kept:
        yield space
        return
    path, reason = equalised_model(space)
    if path is None:
        if wanted:
            raise UsageError(f"{space.model}: cannot be equalised: {reason}")
        yield space
        return
    with workspace.opened(
        str(path), path.parent, allow_requantize=space.allow_requantize, progress=space.progress
    ) as inner:
        last_words.note(model=space.model)
        yield replace(space, inventory=inner.inventory, sha256=inner.sha256, folder=inner.folder,
                      original=space.inventory)  # fmt: skip


# --- probing -------------------------------------------------------------------------------------


def probe(
    space: Workspace,
    *,
    effort: Effort,
    texts: Sequence[Text],
    imatrix_file: Path | None = None,
    settings: ProbeSettings | None = None,
    plain: bool = False,
) -> ProbedModel:
    """The sensitivity and its imatrix, measured or taken up where they were left.

    Plans along a ladder of sizes are tried as real files, so that totals are predicted as such
    files measure. Second moments come with the imatrix unless plans will be `plain`.
    """
    probed = measure(
        space,
        texts=texts,
        settings=settings,
        effort=effort,
        imatrix_file=imatrix_file,
        with_moments=not plain,
    )
    with FileBench(probed) as bench:
        _try_ladder(probed, effort, bench)
    return probed


def _try_ladder(probed: ProbedModel, effort: Effort, bench: FileBench) -> None:
    """As real files; where --minutes cut probing short there is no time for them either."""
    found, count = probed.sensitivity, _LADDER_FILES[effort.name]
    if count and not found.cut_short:
        measure_ladder(Planner(probed, damage_model(found)), bench, count)


# --- planning ------------------------------------------------------------------------------------


def planner_of(
    probed: ProbedModel, request: PlanRequest, profile: DeviceProfile | None, metric: str = "kld"
) -> Planner:
    """The planner with what is known of the model, measured where the request needs more.

    `metric` is what damage is: KL divergence, or (perplexity) the change of the loss.
    """
    damage = replace(
        damage_model(probed.sensitivity),
        files=measured_files(probed).own,
        rounding_ratios={} if request.plain else Rounding(probed).ratios().ratios,
        metric=metric,
    )
    n = request.experts_used
    experts = None if n is None else expert_use(probed.space, n, bundled_texts())
    return Planner(probed, damage, request, profile, experts=experts)


def plan(
    probed: ProbedModel,
    request: PlanRequest,
    profile: DeviceProfile | None,
    *,
    output: Path | None = None,
    check: bool = True,
    refine: bool | None = None,
    metric: str = "kld",
) -> tuple[Plan, Path]:
    """Make the plan; write it and its --tensor-type-file. Returns it with its path.

    With `check` it is measured as a real file beside its rivals, and the best is kept. With
    `refine` swaps around it are probed too, and a plan made from them is tried; None: where it has
    so few bits that tensors' damages interact.
    """
    with _file_bench(probed, request) if check else nullcontext() as bench:
        planner, path = (
            planner_of(probed, request, profile, metric),
            output or probed.space.folder / PLAN_FILE,
        )
        return _plan(planner, bench, path, refine), path


def _file_bench(probed: ProbedModel, request: PlanRequest) -> FileBench:
    return FileBench(probed, None if request.plain else Rounding(probed))


def _plan(planner: Planner, bench: FileBench | None, path: Path, refine: bool | None) -> Plan:
    space, request = planner.probed.space, planner.request
    if request.max_ram_bytes is not None:
        planner = replace(planner, caches=cache_sensitivity(space, bundled_texts()))
    if request.longest_context:
        planner = with_longest_context(planner)
    made = confirmed_plan(planner, bench) if bench else make_plan(planner, solve_request(planner))
    if bench and (refine or (refine is None and is_worthwhile(planner, made))):
        _write_plan(made, path, space.inventory)  # to be had if refining is broken off
        made = _refined(planner, made, bench, asked=bool(refine))
    made = replace(made, notes=[*made.notes, *speed_notes(planner, made)])
    _write_plan(made, path, space.inventory)
    return made


def _refined(planner: Planner, made: Plan, bench: FileBench, *, asked: bool) -> Plan:
    """`made`, or a plan from what swaps around it showed, if that is better."""
    damage = replace(planner.damage, files=bench.known.own)
    try:
        planner = refined(replace(planner, damage=damage), made.limit_factor)
        return better(made, confirmed_plan(planner, bench))
    except InfeasiblePlanError as error:
        note = f"refining led to no plan ({error})"
    except ApreqelError as error:
        if asked:
            raise
        note = f"swaps around the plan could not be probed ({error})"
    return replace(made, notes=[*made.notes, note])


def _write_plan(made: Plan, path: Path, inventory: Inventory) -> None:
    """The plan and its type map for other tools. Raises OutputError."""
    made.check_output(path)
    made.save(path)
    for suffix, text in (
        (".tensor-types.txt", recipes.tensor_type_lines(made.types, inventory)),
        (".custom-q.txt", recipes.custom_q(made.types, inventory)),
    ):
        artifacts.write_atomically(path.with_suffix(suffix), text.encode())


def front(
    probed: ProbedModel, request: PlanRequest, profile: DeviceProfile | None, metric: str = "kld"
) -> Front:
    """What can be had of size, closeness and speed."""
    return pareto_front(planner_of(probed, request, profile, metric))


def ladder(
    probed: ProbedModel,
    request: PlanRequest,
    profile: DeviceProfile | None,
    count: int,
    *,
    check: bool = True,
    metric: str = "kld",
) -> list[tuple[Plan, Path]]:
    """`count` plans from small to nearly lossless, each written as `plan-ladder-N.json`."""
    space, made = probed.space, []
    planner = planner_of(probed, request, profile, metric)
    with _file_bench(probed, request) if check else nullcontext() as bench:  # one for all
        for i, size in enumerate(ladder_sizes(planner, count), 1):
            space.progress("planning", i - 1, count)
            if bench:
                planner = replace(planner, damage=replace(planner.damage, files=bench.known.own))
            step = replace(request, prefer="accuracy", weights={}, max_size_bytes=int(size))
            planner = replace(planner, request=step)
            path = space.folder / f"plan-ladder-{i}.json"
            made.append((_plan(planner, bench, path, False), path))
    return made


def explained(path: Path) -> tuple[Solved, Plan, Inventory]:
    """A plan solved again, from the very measurements that it was chosen from.

    Raises ArtifactError where these were changed since.
    """
    made, inventory = load_plan(path)
    folder, sha256 = Path(made.workdir), made.provenance.model_sha256
    probed = require_probed_model(Workspace(inventory, sha256, folder))
    files = [f for f in measured_files(probed).own if f.key in made.measured_files]
    known = probed.sensitivity.digest, len(files)
    if known != (made.sensitivity_digest, len(made.measured_files)):
        raise ArtifactError(
            f"{path}: what it was chosen from was measured anew since; plan again to explain it"
        )
    request, kept = request_from(made.provenance.settings), folder / KV_FILE
    profile = load_named(made.device) if made.device else None
    planner = planner_of(probed, request, profile, made.metric)
    damage = replace(planner.damage, files=files, swaps=made.swaps)
    caches = CacheSensitivity.load(kept, sha256) if kept.exists() else None
    planner = replace(planner, damage=damage, caches=caches, experts=made.experts)
    solved = solve_request(planner, made.limit_factor)
    types = {CACHES: "/".join(made.cache_types)} if made.memory else {}
    return solved.with_types({**made.types, **types}), made, inventory  # as files decided


# --- measuring files -----------------------------------------------------------------------------


def verify(
    space: Workspace, path: Path, trial: Trial, expected: Plan | None = None
) -> VerificationReport:
    """Measure `path` beside the original and stock presets; the report is kept."""
    require_presets(trial.against)
    if expected is not None:
        verification.check_types(path, expected.types)
    files = {"apreqel": path}
    for i, preset in enumerate(trial.against):
        label = f"stock {preset.upper()}"
        space.progress(f"building {label}", i, len(trial.against))
        files[label] = build_preset(space, preset, require_probed_model(space).imatrix)
    report = verification.verify(space, files, text=trial.text, settings=trial.settings)
    if expected is not None:
        made, nats = _verified_as(space, path, trial, expected), expected.damage_nats
        report = replace(report, provenance=made, predicted_nats=nats)
    report.save(space.folder / VERIFICATION_FILE)
    return report


def _verified_as(space: Workspace, path: Path, trial: Trial, made: Plan) -> Provenance:
    """Equal where verifying a plan's file would give the same again."""
    digest, against = made.metadata["apreqel.plan"], list(trial.against)
    known = verification.provenance_of(space, trial.settings, trial.text)
    facts = {**known.settings, "file": str(path), "plan": digest, "against": against}
    return replace(known, settings=facts)


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
    trial: Trial,
    output: Path | None,
    force: bool,
    device: str | None = None,
) -> Everything:
    """Profile, probe, plan, quantise, verify: each only where it is missing or stale."""
    require_presets(trial.against)
    output = output or default_output(space, request.prefer)
    quantize.check_output(space.given, output, force or _ours(output) is not None)
    profile = load_named(device) if device else profile_of(space, quick=effort.name == "quick")
    probed = measure(space, texts=texts, effort=effort, with_moments=not request.plain)
    with _file_bench(probed, request) as bench:  # the original is evaluated once
        _try_ladder(probed, effort, bench)
        made = _plan(planner_of(probed, request, profile), bench, space.folder / PLAN_FILE, None)
    if not trial.against:
        of_size = None if request.trades_damage else made.size_bytes
        trial = replace(trial, against=[probed.preset_of_size(of_size)])
    found = _ours(output)
    if found is None or not _is_made_of(found, made):
        run_plan(
            space.folder / PLAN_FILE,
            output=output,
            n_threads=space.n_threads,
            force=force or found is not None,
            allow_requantize=space.allow_requantize,
            progress=space.progress,
        )
    report = VerificationReport.load_same(
        space.folder / VERIFICATION_FILE, _verified_as(space, output, trial, made)
    )
    return Everything(profile, made, output, report or verify(space, output, trial, made))


def _ours(path: Path) -> Inventory | None:
    """The file at `path` if apreqel wrote it: `auto` may replace its own."""
    with suppress(ModelFileError, OutputError):
        if path.exists() and (found := read_inventory(path)).headers[0].get("apreqel.version"):
            return found
    return None


def _is_made_of(found: Inventory, made: Plan) -> bool:
    """Whether a file is already what the plan makes."""
    is_whole = found.files[0].stat().st_size == made.size_bytes
    digest = found.headers[0].get("apreqel.plan")
    return is_whole and found.types == made.types and digest == made.metadata["apreqel.plan"]
