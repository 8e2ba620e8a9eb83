"""From a work folder to a report's facts: what is there is read, what is not is named.

Nothing is measured. llama.cpp is asked for the types of its presets and for the size of a KV cache,
which it tells from the model's header.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from apreqel import workspace
from apreqel.device.memory import DEFAULT_CONTEXT, MemoryUse, memory_use
from apreqel.device.profile import DeviceProfile, dominated, type_speeds
from apreqel.device.profiling import profile_for
from apreqel.device.store import load_named
from apreqel.device.threads import with_threads
from apreqel.errors import (
    ArtifactError,
    EngineError,
    InfeasiblePlanError,
    UsageError,
    printable,
)
from apreqel.evaluate.confirm import uniform_maps
from apreqel.evaluate.real_files import FileMeasurement, file_key, measured_files
from apreqel.evaluate.verify import VerificationReport
from apreqel.model.inventory import Inventory, find_model, read_inventory
from apreqel.model.qtypes import TYPICAL_ERRORS, lookup
from apreqel.pipeline import was_equalised
from apreqel.plan.cache_types import CACHES, without_caches
from apreqel.plan.explain import shares_by_role
from apreqel.plan.front import pareto_front
from apreqel.plan.options import Options
from apreqel.plan.plan import Plan
from apreqel.plan.planner import Planner
from apreqel.plan.request import PlanRequest, request_from
from apreqel.progress import Progress
from apreqel.report.facts import (
    DeviceFacts,
    KernelFacts,
    Kernels,
    MeasuredOnCheck,
    Missing,
    ModelFacts,
    ModelReport,
    PlanFacts,
    PlanParts,
    PredictedFile,
    TensorFacts,
    Verified,
)
from apreqel.sensitivity.damage import Damage, damage_model
from apreqel.sensitivity.equalise import kept_model
from apreqel.sensitivity.kv_cache import KV_FILE, CacheSensitivity
from apreqel.sensitivity.measurement import ProbedModel, probed_model
from apreqel.sensitivity.rounding import Rounding, RoundingRatios
from apreqel.workspace import PLAN_FILE, VERIFICATION_FILE, Workspace

_LEAST_CONTEXT = 512
# Each takes a second or less to solve; their line needs no more.
_FRONT_POINTS = 16


# --- opening -------------------------------------------------------------------------------------


@contextmanager
def opened(target: str, folder: Path | None, progress: Progress) -> Iterator[Source]:
    """What was measured of a model, which is given by its file or by a plan for it (NAME.json).

    Of the rescaled model where that was probed. Raises ArtifactError where there is no work folder
    or a work file is damaged, UsageError for a file that apreqel wrote, and what `workspace.opened`
    raises.
    """
    made, name = None, target
    if target.endswith(".json"):
        made = Plan.load(Path(target))
        name, place = (*made.original_files, *made.model_files)[0], Path(made.workdir)
        folder = folder or (place.parent if made.is_equalised else place)
    model = find_model(name)
    folder = folder or workspace.folder_of(name, model)
    if not folder.is_dir():
        if read_inventory(model).headers[0].get("apreqel.plan"):
            raise UsageError(
                f"{model}: is a file that apreqel wrote; give the model that it was made from, or "
                "its plan.json"
            )
        raise ArtifactError(
            f"{folder}: no such work folder, nothing was measured yet; run apreqel auto {model}"
        )
    with (
        workspace.opened(name, folder, allow_requantize=True, progress=progress) as given,
        _measured(given, was_equalised(given) if made is None else made.is_equalised) as sp,
    ):
        space = with_threads(sp, None)
        if made is None:
            made = Plan.load_current(space.folder / PLAN_FILE, space.sha256)
        elif made.provenance.model_sha256 != space.sha256:
            raise ArtifactError(f"{target}: made for another model than {model} is now; plan again")
        yield Source(space, made)


@contextmanager
def _measured(given: Workspace, is_equalised: bool) -> Iterator[Workspace]:
    """`given`, or the workspace of its rescaled copy within."""
    if not is_equalised:
        yield given
        return
    path = kept_model(given)
    if path is None:
        raise ArtifactError(
            f"{given.folder}: its copy of the model with channels rescaled is gone; "
            f"apreqel probe {given.model} writes it again"
        )
    with workspace.opened(str(path), path.parent, allow_requantize=True) as inner:
        yield replace(inner, progress=given.progress, original=given.inventory)


# --- reading -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """A workspace and a plan, if there is one: everything a report is taken from."""

    space: Workspace
    made: Plan | None

    def report(self) -> ModelReport:
        """Raises ArtifactError for a work file that is damaged."""
        request = self.request
        return ModelReport(
            self._model(),
            self._device(),
            self._plan(),
            self._verified(),
            self._predicted(),
            self._without_rounding(),
            request.workload,
            self._checked(),
            self._parts(),
            self._kernels(),
            self._memory(),
            self.made.cache_types if self.made else ("F16", "F16"),
        )

    def inputs(self, target: str) -> list[Path]:
        """Files that are not to be written over."""
        return [Path(target), *self.space.inventory.files, *self.space.given.files]

    # -- what there is --

    @cached_property
    def request(self) -> PlanRequest:
        return request_from(self.made.provenance.settings) if self.made else PlanRequest()

    @cached_property
    def profile(self) -> DeviceProfile | None:
        if self.made is None or not self.made.device:
            return profile_for(self.space, None, needed=False)
        with suppress(UsageError):
            return load_named(self.made.device)
        return None

    @cached_property
    def probed(self) -> ProbedModel | None:
        return probed_model(self.space)

    @cached_property
    def ratios(self) -> RoundingRatios | None:
        """What rounding anew gives, where plans are rounded so and it was measured."""
        if self.probed is None or self.request.plain:
            return None
        return Rounding(self.probed).known_ratios()

    @cached_property
    def planner(self) -> Planner | None:
        """With all that is known of totals; in KL divergence, whatever the plan made small.

        None where the model was not probed.
        """
        if self.probed is None:
            return None
        damage = replace(
            damage_model(self.probed.sensitivity),
            files=measured_files(self.probed).own,
            rounding_ratios=self.ratios.ratios if self.ratios else {},
        )
        path = self.space.folder / KV_FILE
        caches = CacheSensitivity.load(path, self.space.sha256) if path.exists() else None
        experts = self.made.experts if self.made else None
        return Planner(self.probed, damage, self.request, self.profile, caches, experts)

    @cached_property
    def options(self) -> Options | None:
        return self.planner.options(self.profile) if self.planner else None

    def _missing(self, why: str, command: str) -> Missing:
        """`command` is of the model as the user has it, wherever that is."""
        return Missing(why, f"apreqel {command} {shlex.quote(self._name)}")

    @property
    def _name(self) -> str:
        return printable(self.space.given.files[0].name, 200)

    @property
    def _not_probed(self) -> Missing:
        return self._missing("The model was not probed.", "probe")

    @property
    def _not_profiled(self) -> Missing:
        return self._missing("The device's profile does not hold this model.", "profile")

    @property
    def _not_planned(self) -> Missing:
        return self._missing("There is no plan.", "plan")

    # -- head --

    def _model(self) -> ModelFacts:
        given = self.space.given
        types = sorted({t.qtype.name for t in given.quantizable})
        facts = given.name, printable(given.architecture), given.n_layers, given.n_weights
        size = given.size_bytes, given.bits_per_weight
        return ModelFacts(*facts, *size, types, self.space.original is not None)

    def _device(self) -> DeviceFacts | Missing:
        if self.profile is None:
            return self._not_profiled
        device, n_threads = self.profile.device, self.profile.n_threads
        return DeviceFacts(
            printable(self.profile.name),
            printable(device.cpu),
            printable(device.gpu),
            printable(device.system),
            device.usable_cores,
            device.memory_bytes,
            n_threads,
        )

    def _plan(self) -> PlanFacts | Missing:
        made = self.made
        if made is None:
            return self._not_planned
        return PlanFacts(
            made.prefer,
            made.size_bytes,
            made.bits_per_weight,
            made.counts,
            made.damage_nats,
            made.damage_interval,
            made.metric,
            [f"{b.limit} {b.at_most}" for b in made.binding],
        )

    def _verified(self) -> Verified | Missing:
        verify = f"verify FILE.gguf --plan {PLAN_FILE} --against Q4_K_M --model"
        path = self.space.folder / VERIFICATION_FILE
        if self.made is None or not path.exists():
            return self._missing("The file was not verified.", verify)
        found = VerificationReport.load_current(path, self.space.sha256)
        if found is None:
            return self._missing("The verification is an older apreqel's.", verify)
        if found.provenance.settings.get("plan") != self.made.metadata["apreqel.plan"]:
            return self._missing("The verification is of another plan's file.", verify)
        verdicts = [versus.verdict for versus in found.versus]
        ours = printable(Path(found.files[1].path).name, 200)
        return Verified(ours, printable(found.text), found.n_scored, verdicts, found.files)

    # -- whole files --

    def _predicted(self) -> Sequence[PredictedFile] | Missing:
        planner, options = self.planner, self.options
        if planner is None or options is None:
            return self._not_probed
        found: list[PredictedFile] = []
        try:
            front = pareto_front(planner, _FRONT_POINTS)
        except InfeasiblePlanError as error:
            return self._missing(f"No plan meets the limits: {error}.", "plan")
        for kind, points in (("", front.points), ("stock", front.stock)):
            for p in points:
                damage = planner.damage.predicted(p.types, plain=bool(kind))
                row = p.size_bytes, p.damage_nats, _moved(damage, p.damage_nats), p.speed
                found.append(PredictedFile(p.label, kind or p.label, *row))
        for name, types in uniform_maps(without_caches(options)).items():
            if share := _share_in(name, types, planner.inventory):
                whole = planner.inventory.types | types
                damage = planner.damage.predicted(whole, plain=True)
                size, speed = (
                    planner.inventory.output_size(whole),
                    planner.speed(planner.running, whole),
                )
                row = size, damage.nats, damage.interval, speed
                found.append(PredictedFile(name, "uniform", *row, share))
        if (made := self.made) is not None and made.metric == "kld":
            # By the profile as it is now, as all others.
            speed = planner.speed(planner.running, made.types, made.cache_types)
            row = made.size_bytes, made.damage_nats, made.damage_interval, speed
            found.insert(0, PredictedFile("the plan", "plan", *row))
        return found

    def _without_rounding(self) -> Missing | None:
        if self.probed is None or self.request.plain or self.ratios is not None:
            return None
        why = (
            "What rounding anew gives was not measured: predictions are for weights as ggml rounds."
        )
        return self._missing(why, "plan")

    def _checked(self) -> Sequence[MeasuredOnCheck] | Missing:
        if self.probed is None:
            return self._not_probed
        files = measured_files(self.probed).files
        if not files:
            return self._missing("No real file was measured while planning.", "plan")
        ours = file_key(self.made.types, self.made.is_rounded) if self.made else ""
        rows = [_checked(f, key == ours, files.get(ours)) for key, f in files.items()]
        return sorted(rows, key=lambda row: (row.size_bytes, row.label))

    # -- the plan's parts --

    def _parts(self) -> PlanParts | Missing:
        made, planner, options = self.made, self.planner, self.options
        if planner is None or options is None:
            return self._not_probed
        if made is None:
            return self._not_planned
        files = [f for f in planner.damage.files if f.key in made.measured_files]
        known = planner.probed.sensitivity.digest, len(files)
        is_of_plan = known == (made.sensitivity_digest, len(made.measured_files))
        is_of_plan &= not made.is_rounded or self._without_rounding() is None
        # As it was planned: swaps around the plan tell what tensors do within it.
        damage = replace(planner.damage, files=files, swaps=made.swaps, metric=made.metric)
        if not made.is_rounded:
            damage = replace(damage, rounding_ratios={})
        options = replace(planner, damage=damage).options(self.profile)
        types = {**made.types, CACHES: "/".join(made.cache_types)}
        choice = tuple(j for j in options.choice_of(types) if j is not None)
        if len(choice) < len(options.names):
            return self._missing("A planned type is no longer an option.", "plan")
        tensors = []
        for i, (name, j) in enumerate(zip(options.names, choice, strict=True)):
            if (tensor := planner.inventory.by_name.get(name)) is None:
                continue  # the KV cache
            nats, kind = float(options.damages[i][j]), options.types[i][j]
            known_damage = damage.table(name).get(kind) if name in damage.tensors else None
            found = known_damage if known_damage and nats else Damage(nats, 0.0, True)
            place = printable(name), printable(tensor.role), tensor.layer
            size = lookup(kind).bits_per_weight, int(options.sizes[i][j])
            tensors.append(TensorFacts(*place, kind, *size, nats, found.interval, found.is_probed))
        return PlanParts(tensors, shares_by_role(options, choice, planner.inventory), is_of_plan)

    # -- the device --

    def _kernels(self) -> Kernels | Missing:
        profile, inventory = self.profile, self.space.inventory
        speeds = type_speeds(profile, inventory) if profile else {}
        if profile is None or not speeds:
            return self._not_profiled
        damages = self._damages(profile, list(speeds))
        nats = {name: damage.nats for name, damage in damages.items()}
        beaten = dominated(speeds, nats or TYPICAL_ERRORS)
        rows = []
        for name in sorted(speeds, key=lambda n: (lookup(n).bits_per_weight, n)):
            (speed, share), kernels = speeds[name], profile.kernels[name].values()
            damage = damages.get(name)
            rows.append(
                KernelFacts(
                    name,
                    lookup(name).bits_per_weight,
                    share,
                    speed,
                    damage.nats if damage else None,
                    damage.interval if damage else None,
                    beaten.get(name),
                    any("unsteady" in kernel.flags for kernel in kernels),
                )
            )
        readings = [k.decode.count for name in speeds for k in profile.kernels[name].values()]
        return Kernels(rows, profile.n_prompt, min(readings), bool(nats))

    def _damages(self, profile: DeviceProfile, names: Sequence[str]) -> dict[str, Damage]:
        """Of the whole model in each type, where it was measured in that type."""
        found: dict[str, Damage] = {}
        if self.planner is None:
            return found
        tensors = self.planner.probed.sensitivity.tensors
        own = self.space.inventory.types
        for name in names:
            pair = profile.nearest_types(self.space.inventory, name)
            types = pair[0] if pair else {}
            if types and all(
                types[n] == own[n] or types[n] in t.errors.weights for n, t in tensors.items()
            ):
                found[name] = self.planner.damage.predicted(types, plain=True)
        return found

    def _memory(self) -> Sequence[MemoryUse] | Missing:
        made, profile, inventory = self.made, self.profile, self.space.inventory
        if made is None:
            return self._not_planned
        if profile is None or not profile.covers(inventory):
            return self._not_profiled
        longest = inventory.context_length or DEFAULT_CONTEXT
        steps = [_LEAST_CONTEXT * 2**i for i in range(24)]
        contexts = sorted({n for n in steps if n < longest} | {longest})
        try:
            return [
                memory_use(profile, inventory, made.types, made.size_bytes, n_ctx, made.cache_types)
                for n_ctx in contexts
            ]
        except EngineError as error:
            return self._missing(f"llama.cpp tells no KV cache ({error}).", "plan --ctx N")


def _moved(damage: Damage, nats: float) -> tuple[float, float]:
    """The interval of the weights' damage, with what is beside it (active experts)."""
    low, high = damage.interval
    return low + nats - damage.nats, high + nats - damage.nats


def _share_in(name: str, types: Mapping[str, str], inventory: Inventory) -> float:
    """The part of the weights that a map has in this very type."""
    sizes = {t: inventory.by_name[t].n_elements for t in types}
    return sum(n for t, n in sizes.items() if types[t] == name) / sum(sizes.values())


def _checked(file: FileMeasurement, is_plan: bool, plan: FileMeasurement | None) -> MeasuredOnCheck:
    word = file.label.split()[0]
    kind = "plan" if is_plan else word if word in ("stock", "uniform") else "other"
    kind = "ours" if word in ("plan", "ladder") and not is_plan else kind
    label = {"ladder": "apreqel, a step of the ladder", "plan": "apreqel, another plan"}.get(
        word, printable(file.label)
    )
    ratio = plan.ratio(file) if plan is not None and not is_plan else None
    name = "apreqel, the plan" if is_plan else label
    return MeasuredOnCheck(name, kind, file.size_bytes, file.kld, file.kld_p999, ratio)
