"""From measurements and wishes to a quant type for every tensor.

Options come from the sensitivity (damage in nats), the registry (exact bytes) and, where a device
profile is given, its timings (seconds per token) and layouts (memory). One knapsack decides.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from apreqel import llama
from apreqel.artifacts import Provenance
from apreqel.device.memory import cache_bytes, memory_use, rest_bytes, usable_context
from apreqel.errors import ArtifactError, InfeasiblePlanError, UsageError
from apreqel.model.qtypes import USUAL_CACHES, lookup
from apreqel.plan.options import CACHES, Options, build_options, with_caches
from apreqel.plan.plan import Binding, Plan, encode_metadata, map_digest, output_metadata
from apreqel.plan.request import PRIORITIES, PlanRequest
from apreqel.sensitivity.experts import ExpertUse, with_experts
from apreqel.sensitivity.kv_cache import USUAL, KvSensitivity
from apreqel.sensitivity.measure import Sensitivity
from apreqel.solver.knapsack import Limit, Solution, solve

if TYPE_CHECKING:
    from apreqel.device.profile import DeviceProfile
    from apreqel.model.imatrix import Imatrix
    from apreqel.model.inventory import Inventory

Doubles = npt.NDArray[np.float64]

# The preset that most people use today: what a plan has to beat when nothing else is said.
DEFAULT_PRESET = "Q4_K_M"

# Points of the front from which `balanced` takes the knee; it ends where every tensor has its best
# type below this part of its own size: against F16 that is Q8_0, beyond which nothing is gained.
_FRONT_POINTS = 24
NEAR_LOSSLESS = 0.6

_CACHE_NOTE = (
    "speeds are predicted for an F16 cache (this device profile has no other): attention over "
    "another one is slower, in long contexts and prompts much slower"
)

_FEEDBACK_NOTE = (
    "error feedback moves weights against their neighbours' rounding when the file is written"
)

# Contexts are tried in steps of this many tokens.
_CONTEXT_STEP = 256


@dataclass(frozen=True)
class Solved:
    """A request as a knapsack: what could be chosen, under which limits, and what was."""

    options: Options
    limits: Sequence[Limit]
    costs: Sequence[Doubles]
    unit: str
    solution: Solution
    depth: int  # tokens of context that decode is reckoned at
    n_ctx: int
    ease: float = 1.0

    def allows(self, types: Mapping[str, str]) -> bool:
        """Whether a map of the weights' types meets every limit but those on damage.

        Beside it the KV cache stays as it was chosen.
        """
        options = self.options
        choice = [
            options.types[i].index(types[name]) if types[name] in options.types[i] else -1
            for i, name in enumerate(options.names)
            if name != CACHES
        ]
        if -1 in choice:
            return False
        choice += self.solution.choice[len(choice) :]
        return all(
            sum(float(row[j]) for row, j in zip(limit.costs, choice, strict=True)) <= limit.at_most
            for limit in self.limits
            if limit.costs is not options.damages
        )

    def with_types(self, types: Mapping[str, str]) -> Solved:
        """The same, with the choice that a map of types is. Raises ArtifactError."""
        choice = list(self.solution.choice)
        for i, (name, kinds) in enumerate(zip(self.options.names, self.options.types, strict=True)):
            if name in types:
                if types[name] not in kinds:
                    raise ArtifactError(
                        f"tensor {name}: {types[name]} is no longer an option; plan again"
                    )
                choice[i] = kinds.index(types[name])
        return replace(self, solution=replace(self.solution, choice=tuple(choice)))

    def binding(self) -> Iterator[Binding]:
        total, scale = self.solution.objective, 1.0
        if self.unit == "nats" and total > 0:
            scale = self.options.model.nats(total) / total
        for limit, price in zip(self.limits, self.solution.prices, strict=True):
            if price > 0:
                more, text = limit.one_more
                buys = price * more * scale
                yield Binding(limit.name, limit.show(limit.at_most), text, buys, self.unit)


def solve_request(
    inventory: Inventory,
    sensitivity: Sensitivity,
    request: PlanRequest,
    records: Sequence[bytes],
    profile: DeviceProfile | None,
    kv: KvSensitivity | None = None,
    experts: ExpertUse | None = None,
    ease: float = 1.0,
) -> Solved:
    """With `kv` and a limit on memory the KV cache's types are chosen together with the weights'.

    `ease` is what a limit on damage is multiplied by, for plans that were measured and could come
    closer to it, or went beyond it. With `experts` their damage counts, in the quality of stock
    Q4_K_M too, and their speed.

    Raises UsageError, InfeasiblePlanError, CalibrationError.
    """
    if request.prefer not in PRIORITIES:
        raise UsageError(f"--prefer {request.prefer!r}: choose one of {', '.join(PRIORITIES)}")
    if request.needs_profile and profile is None:
        raise UsageError(
            "--prefer latency, --max-ram and --min-*-tps need a device profile; run "
            "apreqel profile MODEL first"
        )
    n_ctx = usable_context(inventory, request.n_ctx)
    n_prompt, depth = request.workload[0], request.depth
    timed = profile if request.needs_profile else None
    options = build_options(
        inventory, sensitivity, records, timed, depth, request.constraints, experts, n_prompt
    )
    if kv is not None and timed is not None and request.max_ram_bytes is not None:

        def rest(caches: Sequence[str], decode: bool) -> float:
            return timed.rest_seconds(
                inventory, decode=decode, n_context=depth, n_prompt=n_prompt, caches=caches
            )

        options = with_caches(options, kv, *cache_bytes(inventory, n_ctx), rest)
    stock = stock_map(inventory, sensitivity, DEFAULT_PRESET)
    limits = hard_limits(inventory, options, request, timed, n_ctx, ease)
    asked = {limit.name for limit in limits}
    if request.max_type_changes is not None:
        limits.append(options.change_limit(stock, request.max_type_changes))
    usual = ease * sensitivity.model.raw_total(stock, feedback=False)
    if request.weights:
        costs, unit = objective(options, request, stock)
        solution = solve(costs, limits)
    elif request.prefer == "balanced":
        asked_raw = (
            None if request.max_kld_nats is None else options.raw_damage(request.max_kld_nats)
        )
        worst = usual if asked_raw is None else ease * asked_raw
        costs, unit = options.damages, "nats"
        solution, limits = knee(options, size_budget(inventory, options, request), limits, worst)
    else:
        if request.prefer == "accuracy" and not asked & {"--max-size", "--max-ram"}:
            name = f"the size of stock {DEFAULT_PRESET} (--max-size)"
            limits.append(options.size_limit(stock_size(inventory, stock), name))
        if request.prefer != "accuracy" and "--max-kld" not in asked:
            name = f"the quality of stock {DEFAULT_PRESET} (--max-kld)"
            limits.append(options.damage_limit(usual, name))
        costs, unit = objective(options, request, stock)
        solution = solve(costs, limits)
    return Solved(options, limits, costs, unit, solution, depth, n_ctx, ease)


def with_longest_context(
    inventory: Inventory,
    sensitivity: Sensitivity,
    request: PlanRequest,
    profile: DeviceProfile | None,
    kv: KvSensitivity | None,
    records: Sequence[bytes],
    experts: ExpertUse | None = None,
) -> PlanRequest:
    """The request with the longest context at which its limits and its quality can be met.

    The quality is `--max-kld`, or else that of stock Q4_K_M. In steps of 256 tokens. Raises
    UsageError, InfeasiblePlanError where not even one step fits.
    """
    if request.max_ram_bytes is None:
        raise UsageError("--ctx max: how much memory may it take? give --max-ram or --fit")
    floor = request.max_kld_nats
    if floor is None:
        stock = stock_map(inventory, sensitivity, DEFAULT_PRESET)
        floor = sensitivity.model.total(stock, feedback=False).nats
        floor += experts.damage_nats if experts else 0.0
    wanted = replace(request, max_kld_nats=floor, longest_context=False)

    def attempt(n_ctx: int) -> bool:
        step = replace(wanted, n_ctx=n_ctx, prefer="memory", weights={})
        try:
            solve_request(inventory, sensitivity, step, records, profile, kv, experts)
        except InfeasiblePlanError:
            return False
        return True

    trained = usable_context(inventory, inventory.context_length or None)
    steps = max(1, trained // _CONTEXT_STEP)
    low, high = 0, steps
    while low < high:
        middle = (low + high + 1) // 2
        if attempt(min(trained, middle * _CONTEXT_STEP)):
            low = middle
        else:
            high = middle - 1
    if low == 0:
        step = replace(wanted, n_ctx=_CONTEXT_STEP)
        solve_request(inventory, sensitivity, step, records, profile, kv, experts)
    return replace(wanted, n_ctx=min(trained, max(1, low) * _CONTEXT_STEP))


@dataclass(frozen=True)
class Planner:
    """A request with everything that it is solved from and a plan is made of."""

    inventory: Inventory
    sensitivity: Sensitivity
    imatrix: Imatrix
    request: PlanRequest
    workdir: Path
    profile: DeviceProfile | None = None
    kv: KvSensitivity | None = None
    experts: ExpertUse | None = None

    @property
    def metadata(self) -> dict[str, str | int]:
        """What the file will say of itself, but for the plan's digest."""
        metadata = output_metadata(self.imatrix)
        if self.experts is not None:
            # In place of the source's own.
            metadata[self.inventory.experts_used_key] = self.experts.used
        return metadata

    def solve(self, ease: float = 1.0) -> Solved:
        """See `solve_request`."""
        return solve_request(
            self.inventory,
            self.sensitivity,
            self.request,
            encode_metadata(self.metadata),
            self.profile,
            self.kv,
            self.experts,
            ease,
        )

    def plan(self, solved: Solved | None = None, types: Mapping[str, str] | None = None) -> Plan:
        """The plan of what was solved, now if it was not; with `types` of another map."""
        solved = solved or self.solve()
        inventory, profile, experts = self.inventory, self.profile, self.experts
        options, solution = solved.options, solved.solution
        picked_types = options.types_of(solution)
        cache_types = picked_types.pop(CACHES, "/".join(USUAL_CACHES)).split("/")
        own = inventory.types
        chosen = own | (dict(types) if types else picked_types)
        feedback = self.request.feedback and not types
        metadata = self.metadata
        metadata["apreqel.plan"] = map_digest(
            chosen, self.sensitivity.imatrix_sha256, experts.used if experts else None, feedback
        )
        caches = range(len(inventory.quantizable), len(options.names))
        beside = options.fixed_damage + options.cache_scale * sum(
            float(options.damages[i][solution.choice[i]]) for i in caches
        )
        predicted = self.sensitivity.model.total(chosen, feedback)
        tensor_bytes = sum(lookup(chosen[t.name]).size_bytes(t.shape) for t in inventory.tensors)
        size_bytes = inventory.output_size(chosen, encode_metadata(metadata))
        known = profile is not None and profile.covers(inventory)
        speed = own_speed = None
        if profile is not None:
            speed, own_speed = (
                profile.predict(
                    running,
                    chosen,
                    solved.depth,
                    n_prompt=self.request.workload[0],
                    caches=cache_types,
                )
                for running in (with_experts(inventory, experts), inventory)
            )
        return Plan(
            provenance=Provenance(
                self.sensitivity.provenance.model_sha256,
                self.sensitivity.provenance.llama_build,
                profile.fingerprint if profile else "",
                asdict(self.request),
            ),
            types=chosen,
            prefer=self.request.prefer,
            limits={limit.name: limit.at_most for limit in solved.limits},
            binding=list(solved.binding()),
            size_bytes=size_bytes,
            bits_per_weight=8 * tensor_bytes / inventory.n_weights,
            kld_nats=predicted.nats + beside,
            kld_interval=tuple(bound + beside for bound in predicted.interval),
            beside_nats=beside,
            ease=solved.ease,
            exchanges=self.sensitivity.exchanges,
            metric=self.sensitivity.metric,
            feedback=feedback,
            gap=solution.gap,
            solver_seconds=solution.seconds,
            imatrix_sha256=self.sensitivity.imatrix_sha256,
            metadata=metadata,
            model_files=[str(f.resolve()) for f in inventory.files],
            workdir=str(self.workdir.resolve()),
            cache_types=cache_types,
            n_threads=profile.n_threads if profile else None,
            device=profile.name if profile else "",
            speed=speed,
            memory=(
                memory_use(profile, inventory, chosen, size_bytes, solved.n_ctx, cache_types)
                if profile and known
                else None
            ),
            experts=experts,
            speed_with_own_experts=own_speed if experts else None,
            notes=(
                *plan_notes(self.sensitivity, chosen),
                *([_FEEDBACK_NOTE] if feedback else []),
                *cache_notes(inventory, profile, chosen, cache_types, solved.n_ctx),
            ),
        )


def objective(
    options: Options, request: PlanRequest, stock: Mapping[str, str]
) -> tuple[Sequence[Doubles], str]:
    """What is made small, per option, and its unit.

    With weights: the weighted sum of bytes, seconds and nats, each as a part of what stock Q4_K_M
    takes, so that equal weights mean equal percentages.
    """
    seconds = options.timings.workload_seconds(*request.workload) if options.timings else None
    if request.weights:
        parts = {"memory": options.sizes, "latency": seconds, "accuracy": options.damages}
        total = [np.zeros(len(row)) for row in options.sizes]
        for name, weight in request.weights.items():
            rows = parts[name]
            if weight > 0 and rows is not None:
                usual = options.sum_of(rows, stock)
                total = [t + weight * row / usual for t, row in zip(total, rows, strict=True)]
        return total, "of stock Q4_K_M's costs, weighted"
    if request.prefer == "memory":
        return options.sizes, "bytes"
    if request.prefer == "latency":
        assert seconds is not None
        return seconds, "seconds"
    return options.damages, "nats"


def hard_limits(
    inventory: Inventory,
    options: Options,
    request: PlanRequest,
    profile: DeviceProfile | None,
    n_ctx: int,
    ease: float = 1.0,
) -> list[Limit]:
    """What the user asked a plan to keep to, whatever is preferred. Raises UsageError."""
    limits = []
    budget = size_budget(inventory, options, request)
    if budget is not None:
        limits.append(options.size_limit(budget))
    if request.max_kld_nats is not None:
        raw = ease * options.raw_damage(request.max_kld_nats)
        limits.append(options.damage_limit(raw, "--max-kld"))
    if request.max_ram_bytes is not None:
        assert profile is not None
        outside = rest_bytes(profile, inventory, n_ctx)
        if CACHES not in options.names:
            outside += int(sum(cache_bytes(inventory, n_ctx)))
        limits.append(options.memory_limit(request.max_ram_bytes, outside))
    for name, least, decode in (
        ("--min-decode-tps", request.min_decode_tps, True),
        ("--min-prefill-tps", request.min_prefill_tps, False),
    ):
        if least is not None:
            assert options.timings is not None
            limits.append(options.timings.speed_limit(name, least, decode=decode))
    return limits


def size_budget(inventory: Inventory, options: Options, request: PlanRequest) -> int | None:
    """Bytes of the whole file that --max-size and --target-bpw allow, the stricter of both."""
    budgets = []
    if request.max_size_bytes is not None:
        budgets.append(request.max_size_bytes)
    if request.target_bpw is not None:
        # Bits per weight count tensor data, without header and padding.
        kept = [t for t in inventory.tensors if t.keep_reason is not None]
        data = request.target_bpw * inventory.n_weights / 8 - sum(t.size_bytes for t in kept)
        budgets.append(int(data) + options.fixed_bytes)
    return min(budgets, default=None)


def knee(
    options: Options, budget: int | None, limits: Sequence[Limit], worst: float
) -> tuple[Solution, list[Limit]]:
    """The point of the size/damage front farthest below its chord (Satopaa et al. 2011).

    The front is taken from the smallest plan whose damages sum to at most `worst` up: below that
    every byte saved is dear, and the knee would be a ruin. With the limits it was solved under.
    """
    first = [options.damage_limit(worst, "the quality floor"), *limits]
    start = solve(options.sizes, first)
    least = options.fixed_bytes + start.objective
    most = options.fixed_bytes + sum(
        float(row[np.argmin(np.where(row < NEAR_LOSSLESS * row.max(), damage, np.inf))])
        for row, damage in zip(options.sizes, options.damages, strict=True)
    )
    if budget is not None:
        least, most = min(least, budget), min(most, budget)
    points = []
    for size in np.linspace(least, most, _FRONT_POINTS):
        within = [options.size_limit(size), *limits]
        try:
            points.append((float(size), solve(options.damages, within), within))
        except InfeasiblePlanError:
            continue
    if not points:
        return start, first
    x = np.array([size for size, *_ in points])
    y = np.array([s.objective for _, s, _ in points])
    if len(points) < 3 or y[0] <= y[-1]:
        return points[-1][1:]
    below = (x - x[0]) / (x[-1] - x[0]) + (y - y[-1]) / (y[0] - y[-1])
    return points[int(np.argmin(below))][1:]


def stock_map(inventory: Inventory, sensitivity: Sensitivity, preset: str) -> dict[str, str]:
    """What llama.cpp's preset would make of every tensor, for this model and imatrix."""
    return llama.stock_types(inventory.files[0], preset, has_imatrix_for=list(sensitivity.tensors))


def stock_size(inventory: Inventory, types: Mapping[str, str]) -> int:
    """Bytes of the file that llama.cpp itself writes for this map, from its header alone."""
    return inventory.output_size(types)


def plan_notes(sensitivity: Sensitivity, types: Mapping[str, str]) -> Iterator[str]:
    """What the reader of a plan should know about the measurements behind it."""
    unresolved = sum(
        not sensitivity.model.damage(name, types.get(name, "")).is_resolved
        for name in sensitivity.tensors
    )
    if unresolved:
        yield (
            f"the damage of {unresolved} of {len(types)} tensors is not resolved (known to worse "
            "than a factor of three); apreqel probe --effort thorough measures more"
        )
    if sensitivity.excluded:
        yield f"{len(sensitivity.excluded)} probes failed and were left out"
    coverage = sensitivity.coverage
    if coverage and coverage.n_unseen_experts:
        yield (
            f"{coverage.n_unseen_experts} of {coverage.n_experts} experts were never chosen by the "
            "calibration text; they weigh 1"
        )
    if coverage and coverage.n_zero_columns:
        yield f"{coverage.n_zero_columns} imatrix columns were zero and were substituted"


def cache_notes(
    inventory: Inventory,
    profile: DeviceProfile | None,
    types: Mapping[str, str],
    cache_types: Sequence[str],
    n_ctx: int,
) -> Iterator[str]:
    """How fast a cache in other types than the usual is when its `n_ctx` tokens are used."""
    if profile is None or set(cache_types) == {USUAL}:
        return
    if not profile.times_caches(inventory, cache_types):
        yield _CACHE_NOTE
        return
    here, usual = (
        profile.predict(inventory, types, n_ctx, n_prompt=n_ctx, caches=caches)
        for caches in (cache_types, USUAL_CACHES)
    )
    if here and usual:
        yield (
            f"at the whole context of {n_ctx} tokens this KV cache decodes "
            f"{here.decode.value:.1f} tokens/s and prefills {here.prefill.value:.1f}; one in F16 "
            f"{usual.decode.value:.1f} and {usual.prefill.value:.1f}"
        )
