"""A plan that real files confirm: measured beside the best stock and uniform maps, the best kept.

Predictions choose what is tried; files decide. A limit on damage is held as measured: where the
plan's file lies beyond it, or could come closer to it, the plan is made again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from apreqel.knapsack import Limit, solve
from apreqel.options import Options, build_options
from apreqel.plan import (
    DEFAULT_PRESET,
    Plan,
    PlanRequest,
    TrialResult,
    encode_metadata,
    plan_of_map,
    stock_map,
)
from apreqel.qtypes import lookup

if TYPE_CHECKING:
    from apreqel.inventory import Inventory
    from apreqel.sensitivity import Sensitivity
    from apreqel.trial import Trial, Trials

STOCK = (
    "Q2_K", "Q3_K_S", "Q3_K_M", "Q3_K_L", "IQ4_XS", "IQ4_NL", "Q4_0", "Q4_1", "Q4_K_S", "Q4_K_M",
    "Q5_0", "Q5_1", "Q5_K_S", "Q5_K_M", "Q6_K", "Q8_0",
)  # fmt: skip

# Plans whose real files tell how damages add up, in bits per weight of the quantised tensors.
_LADDER_BITS = 3.5, 8.0

# Plans made again for a limit on damage; each time the limit is moved by what was measured.
_ROUNDS = 5
# As near below a limit on damage a plan has to come before it is left as it is.
_NEAR = 0.97


def confirmed_plan(
    make: Callable[[float], Plan],
    request: PlanRequest,
    inventory: Inventory,
    sensitivity: Sensitivity,
    trials: Trials,
) -> Plan:
    """`make(ease)` plans; the answer is the best of what was measured, with the trials in it.

    Raises what `make` raises, EngineError, OutputError.
    """
    target = _target(make, request, inventory, sensitivity, trials)
    if target is None:
        made, trial = _tried(make, 1.0, trials)
    else:
        made, trial = _within(make, target, trials)
    sensitivity.knots = trials.knots
    sensitivity.renew_model()
    rivals = [
        trials.measure(label, types)
        for label, types in rival_maps(made, request, inventory, sensitivity)
    ]
    limit = target if target is not None and trial.kld.mean > target else None
    better = [r for r in rivals if r.kld.mean < trial.kld.mean]
    notes = list(made.notes)
    if limit is not None:
        notes.append(
            f"as a real file it measures {trial.kld.mean:.5f} nats, beyond the limit of "
            f"{limit:.5f}; a little more room (--max-size, --max-ram) helps"
        )
    chosen = trial
    if better and request.prefer in ("accuracy", "balanced"):
        chosen = min(better, key=lambda r: r.kld.mean)
        made = plan_of_map(made, inventory, sensitivity, chosen.types)
        notes.append(f"{chosen.label} measured better than the planned map and was taken instead")
    predicted = sensitivity.model.total(chosen.types)
    return replace(
        made,
        kld_nats=predicted.nats + made.beside_nats,
        kld_interval=tuple(bound + made.beside_nats for bound in predicted.interval),
        notes=notes,
        trials=[_result(t, chosen) for t in (trial, *rivals)],
    )


def better(plan: Plan, refined: Plan) -> Plan:
    """Which of two measured plans serves the priority better; with a note on what refining did."""
    a, b = (_merit(p) for p in (plan, refined))
    changed = sum(plan.types[name] != kind for name, kind in refined.types.items())
    n = len(refined.exchanges)
    klds = [next(t.kld.mean for t in p.trials if t.ratio == 1.0) for p in (plan, refined)]
    what = f"{n} exchanges around the plan were probed"
    if not changed:
        return replace(plan, notes=[*plan.notes, f"{what}; they change nothing"])
    tried = f"{changed} other types: {klds[1]:.5f} nats as a real file against {klds[0]:.5f}"
    if b < a:
        return replace(refined, notes=[*refined.notes, f"{what} and led to {tried}"])
    return replace(plan, notes=[*plan.notes, f"{what} and led to {tried}; not taken"])


def _merit(plan: Plan) -> float:
    """What the priority wants least of."""
    if plan.prefer == "memory":
        return float(plan.size_bytes)
    if plan.prefer == "latency" and plan.speed is not None:
        n_prompt, n_generated = plan.provenance.settings["workload"]
        return float(n_prompt / plan.speed.prefill.value + n_generated / plan.speed.decode.value)
    return next(t.kld.mean for t in plan.trials if t.ratio == 1.0)


def try_ladder(
    inventory: Inventory,
    sensitivity: Sensitivity,
    records: Sequence[bytes],
    trials: Trials,
    count: int,
) -> None:
    """Measure `count` plans along the ladder of sizes as real files, for the totals of others.

    Leaves their results in the sensitivity. Raises EngineError, OutputError.
    """
    options = build_options(inventory, sensitivity, records)
    own = {t.name: t.qtype.name for t in inventory.tensors}
    n_weights = sum(t.n_elements for t in inventory.quantizable)
    least = sum(float(row.min()) for row in options.sizes)
    bits = np.linspace(_LADDER_BITS[0], _LADDER_BITS[1], count + 2)[1:-1]
    budgets = [b * n_weights / 8 for b in bits if b * n_weights / 8 > least]
    for budget in budgets[len(trials.knots) :]:
        solution = solve(options.damages, [Limit("size", options.sizes, budget)])
        trials.measure("plan", own | options.types_of(solution))
    sensitivity.knots = trials.knots
    sensitivity.renew_model()


def _tried(make: Callable[[float], Plan], ease: float, trials: Trials) -> tuple[Plan, Trial]:
    made = make(ease)
    return made, trials.measure("plan", made.types)


def _within(make: Callable[[float], Plan], target: float, trials: Trials) -> tuple[Plan, Trial]:
    """The plan that comes closest to `target` nats from below, as measured."""
    ease = 1.0
    found: list[tuple[float, float, Plan, Trial]] = []
    for _ in range(_ROUNDS):
        made, trial = _tried(make, ease, trials)
        found.append((trial.kld.mean / target, ease, made, trial))
        if _NEAR <= found[-1][0] <= 1:
            break
        ease = _next_ease([(ratio, tried) for ratio, tried, *_ in found])
    below = [row for row in found if row[0] <= 1]
    best = max(below, key=lambda row: row[0]) if below else min(found, key=lambda row: row[0])
    return best[2], best[3]


def _next_ease(found: Sequence[tuple[float, float]]) -> float:
    """Where to look for a ratio just below 1, from (ratio, ease) so far: a secant, or a step."""
    below = max((row for row in found if row[0] <= 1), default=None)
    above = min((row for row in found if row[0] > 1), default=None)
    aim = (_NEAR + 1) / 2
    if below and above:
        part = np.log(aim / below[0]) / np.log(above[0] / below[0])
        return float(below[1] * (above[1] / below[1]) ** np.clip(part, 0.1, 0.9))
    ratio, ease = found[-1]
    return float(ease * np.clip(aim / ratio, 0.5, 2.0))


def _target(
    make: Callable[[float], Plan],
    request: PlanRequest,
    inventory: Inventory,
    sensitivity: Sensitivity,
    trials: Trials,
) -> float | None:
    """The weights' damage that must not be passed, as real files measure it; None for no limit."""
    if request.max_kld_nats is not None:
        return request.max_kld_nats - make(1.0).beside_nats
    if request.prefer in ("memory", "latency") and not request.weights:
        types = stock_map(inventory, sensitivity, DEFAULT_PRESET)
        return trials.measure(f"stock {DEFAULT_PRESET}", types).kld.mean
    return None


def _result(trial: Trial, chosen: Trial) -> TrialResult:
    ratio, low, high = chosen.ratio(trial)
    return TrialResult(trial.label, trial.size_bytes, trial.kld, trial.kld_p999, ratio, (low, high))


def rival_maps(
    plan: Plan, request: PlanRequest, inventory: Inventory, sensitivity: Sensitivity
) -> Iterator[tuple[str, dict[str, str]]]:
    """The stock map and the uniform one of least predicted damage at no more bytes than `plan`."""
    records = encode_metadata(plan.metadata)
    options = build_options(inventory, sensitivity, records, constraints=request.constraints)
    own = {t.name: t.qtype.name for t in inventory.tensors}
    groups: Sequence[Mapping[str, dict[str, str]]] = (
        {f"stock {name}": stock_map(inventory, sensitivity, name) for name in STOCK},
        {f"uniform {k}": own | types for k, types in uniform_maps(options).items()},
    )
    for group in groups:
        best = best_fitting(group, options, plan.size_bytes - options.fixed_bytes)
        if best is not None:
            yield best, group[best]


def best_fitting(
    maps: Mapping[str, Mapping[str, str]], options: Options, data_bytes: float
) -> str | None:
    """Of the maps whose types were all measured and take at most `data_bytes`, the closest one."""
    totals = {}
    for label, types in maps.items():
        rows = zip(options.names, options.types, options.sizes, options.damages, strict=True)
        chosen = [(sizes, damages, kinds.index(t)) for name, kinds, sizes, damages in rows
                  if (t := types[name]) in kinds]  # fmt: skip
        if len(chosen) == len(options.names) and sum(s[j] for s, _, j in chosen) <= data_bytes:
            totals[label] = float(sum(d[j] for _, d, j in chosen))
    return min(totals, key=lambda label: totals[label]) if totals else None


def uniform_maps(options: Options) -> dict[str, dict[str, str]]:
    """One type for all tensors; where rows do not hold it the nearest in bits, the larger first."""
    made = {}
    for kind in sorted({kind for row in options.types for kind in row}):
        bits = lookup(kind).bits_per_weight
        made[kind] = {
            name: kind if kind in row else min(row, key=lambda t: _distance(t, bits))
            for name, row in zip(options.names, options.types, strict=True)
        }
    return made


def _distance(type_name: str, bits: float) -> tuple[float, float]:
    own = lookup(type_name).bits_per_weight
    return abs(own - bits), -own
