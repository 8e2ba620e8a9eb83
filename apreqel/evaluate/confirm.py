"""A plan that real files confirm: measured beside the best stock and uniform maps, the best kept.

Predictions choose what is tried; files decide. A limit on damage is held as measured: where the
plan's file lies beyond it, or could come closer to it, the plan is made again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from apreqel.errors import InfeasiblePlanError
from apreqel.model.qtypes import lookup
from apreqel.plan.options import CACHES, Options, build_options
from apreqel.plan.plan import Plan, TrialResult
from apreqel.plan.planner import DEFAULT_PRESET, Planner, Solved, stock_map
from apreqel.solver.knapsack import Limit, solve

if TYPE_CHECKING:
    from apreqel.evaluate.real_files import Trial, Trials
    from apreqel.model.inventory import Inventory
    from apreqel.sensitivity.measure import Sensitivity

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


def confirmed_plan(planner: Planner, trials: Trials) -> Plan:
    """The plan that real files bear out, with the trials in it.

    Where bytes decide, the least KLD of the plan and its rivals, if these meet all limits, too.
    Where there is a limit on damage, the best plan that keeps to it as measured; if none was
    found the nearest, with `beyond_limit` set. Raises what `Planner.solve` raises, EngineError,
    OutputError.
    """
    state, request = planner.sensitivity, planner.request
    target = _target(planner, trials)
    solved, trial, loss = _within(planner, target, trials)
    state.learn_totals(trials.knots)
    made, chosen = planner.plan(solved), trial
    rivals = [trials.measure(label, types) for label, types in rival_maps(planner, solved)]
    notes = list(made.notes)
    beyond = target is not None and loss > target
    if beyond:
        notes.append(
            f"as a real file it measures {loss:.5f} nats, beyond the limit of {target:.5f}; no "
            "plan was found that keeps to it and to the other limits"
        )
    better = [r for r in rivals if r.kld.mean < trial.kld.mean and solved.allows(r.types)]
    by_closeness = request.prefer in ("accuracy", "balanced") and not request.weights
    if better and by_closeness and state.metric == "kld":
        chosen = min(better, key=lambda r: r.kld.mean)
        made = planner.plan(solved, chosen.types)
        notes.append(
            f"{chosen.label} measured better than the planned map and was taken instead"
            + (", without error feedback" if request.feedback else "")
        )
    return replace(
        made,
        notes=notes,
        beyond_limit=beyond,
        trials=[_result(t, chosen) for t in (trial, *rivals)],
    )


def better(plan: Plan, refined: Plan) -> Plan:
    """Which of two measured plans serves the priority better; with a note on what refining did."""
    changed = sum(plan.types[name] != kind for name, kind in refined.types.items())
    what = f"{len(refined.exchanges)} exchanges around the plan were probed"
    if not changed:
        return replace(plan, notes=[*plan.notes, f"{what}; they change nothing"])
    before, after = (_measured(p) for p in (plan, refined))
    tried = f"{changed} other types: {after:.5f} nats as a real file against {before:.5f}"
    if _merit(refined) < _merit(plan):
        return replace(refined, notes=[*refined.notes, f"{what} and led to {tried}"])
    return replace(plan, notes=[*plan.notes, f"{what} and led to {tried}; not taken"])


def _measured(plan: Plan) -> float:
    return next(t.kld.mean for t in plan.trials if t.is_taken)


def _merit(plan: Plan) -> tuple[bool, float]:
    """What the priority wants least of; first of all that limits are kept."""
    if plan.prefer == "memory":
        return plan.beyond_limit, float(plan.size_bytes)
    if plan.prefer == "latency" and plan.speed is not None:
        n_prompt, n_generated = plan.provenance.settings["workload"]
        seconds = n_prompt / plan.speed.prefill.value + n_generated / plan.speed.decode.value
        return plan.beyond_limit, float(seconds)
    return plan.beyond_limit, _measured(plan)


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
    own = inventory.types
    n_weights = sum(t.n_elements for t in inventory.quantizable)
    least = sum(float(row.min()) for row in options.sizes)
    bits = np.linspace(_LADDER_BITS[0], _LADDER_BITS[1], count + 2)[1:-1]
    budgets = [b * n_weights / 8 for b in bits if b * n_weights / 8 > least]
    for budget in budgets:
        solution = solve(options.damages, [Limit("size", options.sizes, budget)])
        trials.measure("ladder", own | options.types_of(solution))
    sensitivity.learn_totals(trials.knots)


def _within(planner: Planner, target: float | None, trials: Trials) -> tuple[Solved, Trial, float]:
    """The plan as solved or, with a target, the one that comes closest to it from below.

    With its real file, and what a run would lose with that: as measured, and beside the weights as
    predicted. Where damage is not what is traded for size or speed, a plan below the target is left
    alone.
    """
    request = planner.request
    uses_room = request.prefer in ("memory", "latency") and not request.weights
    ease = 1.0
    found: list[tuple[float, float, tuple[Solved, Trial, float]]] = []
    for _ in range(_ROUNDS):
        try:
            solved = planner.solve(ease)
        except InfeasiblePlanError:
            if not found:
                raise
            break
        made = planner.plan(solved)
        trial = trials.measure("plan", made.types)
        loss = trial.kld.mean + made.beside_nats
        if target is None:
            return solved, trial, loss
        ratio = loss / target if target > 0 else math.inf
        found.append((ratio, ease, (solved, trial, loss)))
        if (_NEAR <= ratio <= 1) or (ratio <= 1 and not uses_room) or not 0 < ratio < math.inf:
            break
        ease = _next_ease([row[:2] for row in found])
    below = [row for row in found if row[0] <= 1]
    best = max(below, key=lambda row: row[0]) if below else min(found, key=lambda row: row[0])
    return best[2]


def _next_ease(found: Sequence[tuple[float, float]]) -> float:
    """Where to look for a ratio just below 1, from (ratio, ease) so far: a secant in logarithms."""
    below = max((row for row in found if row[0] <= 1), default=None)
    above = min((row for row in found if row[0] > 1), default=None)
    aim = (_NEAR + 1) / 2
    if below and above:
        part = np.log(aim / below[0]) / np.log(above[0] / below[0])
        return float(below[1] * (above[1] / below[1]) ** np.clip(part, 0.1, 0.9))
    ratio, ease = found[-1]
    # Files answer less than the limit is moved by: step farther the longer it takes.
    step = (aim / ratio) ** len(found)
    return float(ease * np.clip(step, 0.4, 2.5))


def _target(planner: Planner, trials: Trials) -> float | None:
    """The damage that must not be passed, in nats of a real run; None for no such limit."""
    request, state = planner.request, planner.sensitivity
    if state.metric != "kld":
        return None  # real files are measured in KLD
    if request.max_kld_nats is not None:
        return request.max_kld_nats
    if request.prefer in ("memory", "latency") and not request.weights:
        types = stock_map(planner.inventory, state, DEFAULT_PRESET)
        experts = planner.experts.damage_nats if planner.experts else 0.0
        return trials.measure(f"stock {DEFAULT_PRESET}", types).kld.mean + experts
    return None


def _result(trial: Trial, chosen: Trial) -> TrialResult:
    ratio, low, high = chosen.ratio(trial)
    return TrialResult(
        trial.label,
        trial.size_bytes,
        trial.kld,
        trial.kld_p999,
        ratio,
        (low, high),
        trial is chosen,
    )


def rival_maps(planner: Planner, solved: Solved) -> Iterator[tuple[str, dict[str, str]]]:
    """The stock map and the uniform one of least predicted damage at no more bytes.

    Without error feedback, as they are then written.
    """
    inventory, sensitivity = planner.inventory, planner.sensitivity
    whole = solved.options
    n = len(whole.names) - (CACHES in whole.names)  # the KV cache comes last
    options = replace(
        whole,
        names=whole.names[:n],
        types=whole.types[:n],
        sizes=whole.sizes[:n],
        damages=whole.damages[:n],
    )
    without = options.rows(lambda name, kind: whole.model.damage(name, kind, False).nats)
    options = replace(options, damages=without)
    chosen = zip(options.sizes, solved.solution.choice, strict=False)
    data_bytes = sum(float(row[c]) for row, c in chosen)
    own = inventory.types
    groups: Sequence[Mapping[str, dict[str, str]]] = (
        {f"stock {name}": stock_map(inventory, sensitivity, name) for name in STOCK},
        {f"uniform {k}": own | types for k, types in uniform_maps(options).items()},
    )
    for group in groups:
        best = best_fitting(group, options, data_bytes)
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
