"""The plan of what was solved: its types, what is predicted of its file, and what to know of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace

from apreqel.artifacts import Provenance
from apreqel.device.memory import memory_use
from apreqel.device.profile import DeviceProfile
from apreqel.model.qtypes import USUAL_CACHES, lookup
from apreqel.plan.cache_types import CACHES
from apreqel.plan.plan import Plan, encode_metadata, map_digest
from apreqel.plan.planner import Planner
from apreqel.plan.solve import Solved, solve_request
from apreqel.sensitivity.kv_cache import USUAL

_CACHE_NOTE = (
    "speeds are predicted for an F16 cache (this device profile has no other): attention over "
    "another one is slower, in long contexts and prompts much slower"
)


def make_plan(planner: Planner, solved: Solved, types: Mapping[str, str] | None = None) -> Plan:
    """The plan of what was solved; with `types`, of that map instead, written as ggml rounds."""
    probed, inventory, experts = planner.probed, planner.inventory, planner.experts
    found, request, damage = probed.sensitivity, planner.request, planner.damage
    solved = solved.with_types(types) if types else solved
    original = probed.space.original
    options, choice = solved.options, solved.solution.choice
    picked = options.types_of(solved.solution)
    cache_types = picked.pop(CACHES, "/".join(USUAL_CACHES)).split("/")
    chosen, is_rounded = inventory.types | picked, not request.plain and not types
    digest = map_digest(chosen, found.imatrix_sha256, experts.used if experts else None, is_rounded)
    metadata = planner.metadata | {"apreqel.plan": digest}
    tensor_bytes = sum(lookup(chosen[t.name]).size_bytes(t.shape) for t in inventory.tensors)
    beside = planner.experts_nats
    if CACHES in options.names:
        beside += options.cache_scale * float(options.damages[-1][choice[-1]])
    predicted = damage.predicted(chosen, plain=not is_rounded)
    low, high = predicted.interval
    build, settings = found.provenance.llama_build, asdict(request)
    made = Plan(
        provenance=Provenance(probed.space.sha256, build, settings=settings),
        types=chosen,
        prefer=request.prefer,
        limits={limit.name: limit.at_most for limit in solved.limits},
        binding=list(solved.binding()),
        size_bytes=inventory.output_size(chosen, encode_metadata(metadata)),
        bits_per_weight=8 * tensor_bytes / inventory.n_weights,
        damage_nats=predicted.nats + beside,
        damage_interval=(low + beside, high + beside),
        cache_and_experts_nats=beside,
        limit_factor=solved.limit_factor,
        sensitivity_digest=found.digest,
        measured_files=[file.key for file in options.damage.files],
        swaps=list(damage.swaps),
        metric=damage.metric,
        is_rounded=is_rounded,
        gap=solved.solution.gap,
        solver_seconds=solved.solution.seconds,
        imatrix_sha256=found.imatrix_sha256,
        metadata=metadata,
        model_files=[str(f.resolve()) for f in inventory.files],
        workdir=str(probed.space.folder.resolve()),
        original_files=[str(f.resolve()) for f in original.files] if original else [],
        cache_types=cache_types,
        experts=experts,
        notes=[
            *_measurement_notes(planner, chosen),
            *(_rounding_notes(planner) if is_rounded else []),
        ],
    )
    return made if planner.profile is None else _on_device(made, planner, planner.profile)


def _on_device(made: Plan, planner: Planner, profile: DeviceProfile) -> Plan:
    """The plan with its speed and memory, as the device's profile predicts them."""
    inventory, types, caches = planner.inventory, made.types, made.cache_types
    memory = None
    if profile.covers(inventory):
        memory = memory_use(profile, inventory, types, made.size_bytes, planner.n_ctx, caches)
    own_speed = planner.speed(inventory, types, caches) if planner.experts else None
    return replace(
        made,
        provenance=replace(made.provenance, device_fingerprint=profile.fingerprint),
        device=profile.name,
        n_threads=profile.n_threads,
        speed=planner.speed(planner.running, types, caches),
        speed_with_own_experts=own_speed,
        memory=memory,
        notes=[*made.notes, *_cache_notes(planner, profile, types, caches)],
    )


def speed_notes(planner: Planner, made: Plan) -> Iterator[str]:
    """What it costs to be as fast as the stock preset, where nobody asked for that or against it.

    Raises InfeasiblePlanError.
    """
    if not planner.request.is_as_fast_as_stock or made.speed is None:
        return
    if not any("speed of stock" in name for name in made.limits):
        yield "no map within the limits is as fast as the stock preset of its size"
        return
    free = replace(planner, request=replace(planner.request, any_speed=True))
    solved = solve_request(free)
    types = planner.inventory.types | solved.options.types_of(solved.solution)
    speed = planner.speed(planner.running, types)
    here, there = (
        planner.damage.predicted(t, plain=not made.is_rounded).nats for t in (made.types, types)
    )
    if speed is not None and there < here:
        decode = speed.decode.value / made.speed.decode.value
        prefill = speed.prefill.value / made.speed.prefill.value
        yield (
            "as fast as the stock preset of its size; with --any-speed "
            f"{1 - there / here:.0%} less KL divergence is predicted, at {decode:.2f} x its decode "
            f"and {prefill:.2f} x its prefill speed"
        )


def _rounding_notes(planner: Planner) -> Iterator[str]:
    left = [name for name, ratios in planner.damage.rounding_ratios.items() if not ratios]
    if left:
        yield (
            f"{len(left)} tensors (first {left[0]}) are rounded by ggml alone: they are only "
            "looked up, or never run, or their activations are not finite"
        )


def _measurement_notes(planner: Planner, types: Mapping[str, str]) -> Iterator[str]:
    """What the reader of a plan should know about the measurements behind it."""
    found = planner.probed.sensitivity
    if planner.probed.space.original:
        yield (
            "channels are rescaled, the model's function stays the same; LoRA adapters made for "
            f"the original do not fit, and the lists of types are for {planner.probed.space.model} "
            "(--no-equalise)"
        )
    damages = (planner.damage.damage(name, types.get(name, "")) for name in found.tensors)
    if unresolved := sum(not damage.is_resolved for damage in damages):
        yield (
            f"the damage of {unresolved} of {len(types)} tensors is not resolved (known to worse "
            "than a factor of three); apreqel probe --effort thorough measures more"
        )
    idle = [name for name, tensor in found.tensors.items() if not tensor.errors.is_run]
    if idle:
        yield (
            f"{len(idle)} tensors that llama.cpp does not run (first {idle[0]}) were not measured; "
            f"they are kept, in {types[idle[0]]}"
        )
    if found.excluded:
        yield f"{len(found.excluded)} probes failed and were left out"
    coverage = found.coverage
    if coverage and coverage.n_unseen_experts:
        yield (
            f"{coverage.n_unseen_experts} of {coverage.n_experts} experts were never chosen by the "
            "calibration text; they weigh 1"
        )
    if coverage and coverage.n_zero_columns:
        yield f"{coverage.n_zero_columns} imatrix columns were zero and were substituted"


def _cache_notes(
    planner: Planner, profile: DeviceProfile, types: Mapping[str, str], cache_types: Sequence[str]
) -> Iterator[str]:
    """How fast a cache in other types than the usual is when the whole context is used."""
    inventory, n_ctx = planner.inventory, planner.n_ctx
    if set(cache_types) == {USUAL}:
        return
    here, usual = (
        profile.predict(inventory, types, n_ctx, n_prompt=n_ctx, caches=caches)
        for caches in (cache_types, USUAL_CACHES)
    )
    if not profile.times_caches(inventory, cache_types):
        yield _CACHE_NOTE
    elif here and usual:
        yield (
            f"at the whole context of {n_ctx} tokens this KV cache decodes "
            f"{here.decode.value:.1f} tokens/s and prefills {here.prefill.value:.1f}; one in F16 "
            f"{usual.decode.value:.1f} and {usual.prefill.value:.1f}"
        )
