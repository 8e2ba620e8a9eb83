"""A plan that real files confirm: measured beside the best stock and uniform maps, the best kept.

Predictions choose what is tried; files decide. A limit on damage is held as measured: where the
plan's file lies beyond it, or could come closer to it, the plan is made again. A rival is taken
only where the paired interval says that it is closer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from apreqel.errors import InfeasiblePlanError
from apreqel.evaluate.real_files import FileBench, FileMeasurement
from apreqel.model.qtypes import lookup, nearest
from apreqel.plan.cache_types import CACHES, without_caches
from apreqel.plan.make_plan import make_plan
from apreqel.plan.options import Options
from apreqel.plan.plan import FileResult, Plan
from apreqel.plan.planner import Planner
from apreqel.plan.solve import Solved, solve_request
from apreqel.solver.knapsack import Limit, solve, total

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


@dataclass(frozen=True)
class _Attempt:
    """A plan as solved, its real file, and what a run would lose with that.

    `nats` are as measured, and beside the weights as predicted.
    """

    solved: Solved
    file: FileMeasurement
    nats: float


def confirmed_plan(planner: Planner, bench: FileBench) -> Plan:
    """The plan that real files bear out, with their results in it.

    Where bytes decide, the plan or a rival that is closer by its whole paired interval, if that
    meets all limits, too. Where there is a limit on damage, the best plan that keeps to it as
    measured; if none was found the nearest, with `beyond_limit` set. Raises what `solve_request`
    raises, EngineError, OutputError.
    """
    request, most = planner.request, _most_nats(planner, bench)
    attempt = _within(planner, most, bench)
    solved, chosen = attempt.solved, attempt.file
    rivals = [bench.measure(label, types) for label, types in rival_maps(planner, solved)]
    # What these files tell of totals counts in the plan's prediction.
    planner = replace(planner, damage=replace(planner.damage, files=bench.known.own))
    closer = [r for r in rivals if r.is_closer_than(chosen) and solved.allows(r.types)]
    by_closeness = request.prefer in ("accuracy", "balanced") and not request.weights
    notes, beyond = [], most is not None and attempt.nats > most
    if beyond:
        notes.append(
            f"as a real file it measures {attempt.nats:.5f} nats, beyond the limit of {most:.5f}; "
            "no plan was found that keeps to it and to the other limits"
        )
    if closer and by_closeness and planner.damage.metric == "kld":
        chosen = min(closer, key=lambda r: r.kld.mean)
        notes.append(
            f"{chosen.label} measured better than the planned map and was taken instead"
            + ("" if request.plain else ", as ggml rounds it")
        )
    made = make_plan(planner, solved, None if chosen is attempt.file else chosen.types)
    results = []
    for file in (attempt.file, *rivals):
        ratio, *interval = chosen.ratio(file)
        facts = file.label, file.size_bytes, file.kld, file.kld_p999
        results.append(FileResult(*facts, ratio, (interval[0], interval[1]), file is chosen))
    return replace(made, notes=[*made.notes, *notes], beyond_limit=beyond, files=results)


def better(plan: Plan, refined: Plan) -> Plan:
    """Which of two measured plans serves the priority better; with a note on what refining did."""
    changed = sum(plan.types[name] != t for name, t in refined.types.items())
    what = f"{len(refined.swaps)} swaps around the plan were probed"
    if not changed:
        return replace(plan, notes=[*plan.notes, f"{what}; they change nothing"])
    before, after = (_measured_nats(p) for p in (plan, refined))
    tried = f"{changed} other types: {after:.5f} nats as a real file against {before:.5f}"
    if _merit(refined) < _merit(plan):
        return replace(refined, notes=[*refined.notes, f"{what} and led to {tried}"])
    return replace(plan, notes=[*plan.notes, f"{what} and led to {tried}; not taken"])


def _measured_nats(plan: Plan) -> float:
    return next(f.kld.mean for f in plan.files if f.is_taken)


def _merit(plan: Plan) -> tuple[bool, float]:
    """What the priority wants least of; first of all that limits are kept."""
    cost = _measured_nats(plan)
    if plan.prefer == "memory":
        cost = plan.size_bytes
    elif plan.prefer == "latency" and plan.speed is not None:
        n_prompt, n_generated = plan.provenance.settings["workload"]
        cost = n_prompt / plan.speed.prefill.value + n_generated / plan.speed.decode.value
    return plan.beyond_limit, cost


def measure_ladder(planner: Planner, bench: FileBench, count: int) -> None:
    """Measure `count` plans along the ladder of sizes as real files, for the totals of others.

    The bench keeps them. Raises EngineError, OutputError.
    """
    options, inventory = planner.options(None), planner.inventory
    n_weights = sum(t.n_elements for t in inventory.quantizable)
    least = sum(float(row.min()) for row in options.sizes)
    for n_bytes in np.linspace(*_LADDER_BITS, count + 2)[1:-1] * n_weights / 8:
        if n_bytes > least:
            solution = solve(options.damages, [Limit("size", options.sizes, float(n_bytes))])
            bench.measure("ladder", inventory.types | options.types_of(solution), plain=True)


# --- limits on damage ----------------------------------------------------------------------------


def _within(planner: Planner, most: float | None, bench: FileBench) -> _Attempt:
    """The plan as solved or, with a limit of `most` nats, the one that comes closest from below.

    Where damage is not what is traded for size or speed, a plan below the limit is left alone.
    """
    nearest_enough = _NEAR if planner.request.trades_damage else 0.0
    factor = 1.0
    found: list[tuple[float, float, _Attempt]] = []  # nats over the limit, factor, attempt
    for _ in range(_ROUNDS):
        try:
            solved = solve_request(planner, factor)
        except InfeasiblePlanError:
            if not found:
                raise
            break
        made = make_plan(planner, solved)
        file = bench.measure("plan", made.types)
        attempt = _Attempt(solved, file, file.kld.mean + made.cache_and_experts_nats)
        if most is None:
            return attempt
        ratio = attempt.nats / most if most > 0 else math.inf
        found.append((ratio, factor, attempt))
        if nearest_enough <= ratio <= 1 or not 0 < ratio < math.inf:
            break
        factor = _next_factor([row[:2] for row in found])
    below = [row for row in found if row[0] <= 1]
    best = max(below, key=lambda row: row[0]) if below else min(found, key=lambda row: row[0])
    return best[2]


def _next_factor(found: Sequence[tuple[float, float]]) -> float:
    """Where to look for a ratio just below 1, from (ratio, factor) so far: a secant of logs."""
    below = max((row for row in found if row[0] <= 1), default=None)
    above = min((row for row in found if row[0] > 1), default=None)
    aim = (_NEAR + 1) / 2
    if below and above:
        part = np.log(aim / below[0]) / np.log(above[0] / below[0])
        return float(below[1] * (above[1] / below[1]) ** np.clip(part, 0.1, 0.9))
    ratio, factor = found[-1]
    # Files answer less than the limit is moved by: step farther the longer it takes.
    return float(factor * np.clip((aim / ratio) ** len(found), 0.4, 2.5))


def _most_nats(planner: Planner, bench: FileBench) -> float | None:
    """The damage that must not be passed, in nats of a real run; None for no such limit."""
    most = planner.request.max_kld_nats
    if planner.damage.metric != "kld":
        return None  # real files are measured in KLD
    if most is None and planner.request.trades_damage:
        stock = bench.measure(f"stock {planner.probed.default_preset}", planner.stock)
        return stock.kld.mean + planner.experts_nats
    return most


# --- rivals --------------------------------------------------------------------------------------


def rival_maps(planner: Planner, solved: Solved) -> Iterator[tuple[str, dict[str, str]]]:
    """Maps of no more bytes: of least output error, the best stock one, the best uniform one.

    Best by predicted damage, of weights as ggml rounds them. After quick probing only the first.
    """
    options = without_caches(solved.options)
    as_they_are = options.rows(lambda name, t: planner.damage.damage(name, t, plain=True).nats)
    options = replace(options, damages=as_they_are)
    data_bytes = total(options.sizes, solved.solution.choice[: len(options.names)])
    limits = [Limit("size", options.sizes, data_bytes)]
    if CACHES not in solved.options.names:
        limits += [li for li in solved.limits if li.costs is not solved.options.damages]
    yield "least output error", planner.inventory.types | least_error(planner, options, limits)
    if planner.probed.sensitivity.effort == "quick":
        return
    for kind, maps in stock_and_uniform(planner, options).items():
        if best := best_fitting(maps, options, data_bytes):
            yield f"{kind} {best}", planner.inventory.types | maps[best]


def least_error(planner: Planner, options: Options, limits: Sequence[Limit]) -> dict[str, str]:
    """The map of least relative output error, summed over all rows, as other tools choose.

    It needs no probe, and is a strong rival where these mislead. Raises InfeasiblePlanError.
    """
    tensors, by_name = planner.probed.sensitivity.tensors, planner.inventory.by_name
    costs = options.rows(lambda name, t: by_name[name].n_rows * tensors[name].errors.weights[t])
    return options.types_of(solve(costs, limits))


def stock_and_uniform(planner: Planner, options: Options) -> dict[str, dict[str, dict[str, str]]]:
    """The maps of all stock presets and of all single types, by name."""
    stock = {preset: planner.probed.stock_types(preset) for preset in STOCK}
    return {"stock": stock, "uniform": uniform_maps(options)}


def best_fitting(
    maps: Mapping[str, Mapping[str, str]], options: Options, data_bytes: float
) -> str | None:
    """Of the maps whose types were all measured and take at most `data_bytes`, the closest one."""
    nats = {}
    for label, types in maps.items():
        choice = [j for j in options.choice_of(types) if j is not None]
        if len(choice) == len(options.names) and total(options.sizes, choice) <= data_bytes:
            nats[label] = total(options.damages, choice)
    return min(nats, key=lambda label: nats[label]) if nats else None


def uniform_maps(options: Options) -> dict[str, dict[str, str]]:
    """One type for all tensors; where rows do not hold it the nearest in bits."""
    return {
        name: {
            tensor: name if name in row else nearest(row, lookup(name).bits_per_weight)
            for tensor, row in zip(options.names, options.types, strict=True)
        }
        for name in sorted({t for row in options.types for t in row})
    }
