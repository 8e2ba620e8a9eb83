"""Swaps around a plan: what a tensor's other type does when all others are as planned.

Damages are probed one tensor at a time, from the original. Near a plan they interact, below 4 bits
most. Here the planned model is put under llama.cpp, single swaps of a type are probed from there,
and the plan is made again with what they showed, until it no longer changes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace

import numpy as np

from apreqel.artifacts import FileMarks, Record
from apreqel.evaluate.real_files import map_key
from apreqel.llama.engine import LoadedModel
from apreqel.model.qtypes import lookup
from apreqel.plan.plan import Plan
from apreqel.plan.planner import Planner
from apreqel.plan.solve import Solved, solve_request
from apreqel.sensitivity.bench import (
    ProbeBench,
    ReferenceRun,
    opened_bench,
    paging_note,
    scratch_copy,
)
from apreqel.sensitivity.damage import Swap, expected_gain
from apreqel.sensitivity.measurement import ProbedModel
from apreqel.sensitivity.metrics import estimate
from apreqel.solver.knapsack import priced

SWAPS_FILE = "swaps.json"

# Damages of single tensors add up above this many bits per weight; below, they interact.
_INTERACTING_BITS = 4.0
_SWAPS_PER_ROUND = 24
_ROUNDS = 3
# Of the probe text, the last, which hardly anything was probed on: what was chosen for having been
# lucky there is found out. Swaps are compared on the same positions, so that less will do.
_CHUNKS = 2

Pair = tuple[str, str, str]  # tensor, chosen type, other type


@dataclass(frozen=True)
class ProbedSwaps(Record):
    """By the digest of the type map around which they were probed."""

    KIND = "swaps"

    around: Mapping[str, Sequence[Swap]] = field(default_factory=dict)

    def of(self, types: Mapping[str, str]) -> dict[Pair, Swap]:
        return {(s.tensor, s.chosen, s.other): s for s in self.around.get(map_key(types), ())}

    def with_swap(self, types: Mapping[str, str], swap: Swap) -> ProbedSwaps:
        key = map_key(types)
        return replace(self, around={**self.around, key: [*self.around.get(key, ()), swap]})


def probed_swaps(probed: ProbedModel) -> ProbedSwaps:
    """What was probed before with the same text and imatrix. Raises ArtifactError."""
    found = ProbedSwaps.load_same(probed.space.folder / SWAPS_FILE, probed.provenance)
    return found or ProbedSwaps(probed.provenance)


def is_worthwhile(planner: Planner, plan: Plan) -> bool:
    """Whether `plan` is to be refined unasked: so few bits that damages no longer add up.

    Not where little time was to be taken, and where real files could not decide.
    """
    found, quantizable = planner.probed.sensitivity, planner.inventory.quantizable
    n_bytes = sum(lookup(plan.types[t.name]).size_bytes(t.shape) for t in quantizable)
    return (
        8 * n_bytes / sum(t.n_elements for t in quantizable) < _INTERACTING_BITS
        and planner.request.has_one_measure
        and planner.damage.metric == "kld"
        and found.effort != "quick"
        and not found.cut_short
        and not paging_note(planner.inventory)
    )


def refined(planner: Planner, limit_factor: float) -> Planner:
    """The planner with swaps probed around what it solves, and again around what it solves then.

    They are kept for another time. Raises InfeasiblePlanError where limits can no longer be met,
    ArtifactError, EngineError, ModelFileError, OutputError.
    """
    probed, known = planner.probed, probed_swaps(planner.probed)
    source = FileMarks(planner.inventory.files)
    found: dict[Pair, Swap] = {}
    last: Mapping[str, str] = {}
    with ExitStack() as stack:
        bench: tuple[ProbeBench, ReferenceRun] | None = None
        for _ in range(_ROUNDS):
            solved = solve_request(planner, limit_factor)
            types = solved.options.types_of(solved.solution)
            wanted = [s for s in open_swaps(solved) if s not in found][:_SWAPS_PER_ROUND]
            if types == last or not wanted:
                break
            last = types
            missing = [s for s in wanted if s not in known.of(types)]
            if missing:
                bench = bench or stack.enter_context(_planned_bench(probed))
                for swap in _probes(probed, *bench, types, missing):
                    known = known.with_swap(types, swap)
                    source.check()
                    known.save(probed.space.folder / SWAPS_FILE)
            around = known.of(types)
            found |= {s: around[s] for s in wanted if s in around}
            damage = replace(planner.damage, swaps=list(found.values()))
            planner = replace(planner, damage=damage)
    return planner


def _probes(
    probed: ProbedModel,
    bench: ProbeBench,
    reference: ReferenceRun,
    types: Mapping[str, str],
    pairs: Sequence[Pair],
) -> Iterator[Swap]:
    """Each as soon as it was probed; those that give NaN are left out."""
    own = probed.inventory.types
    planned = {n: lookup(types[n]) for n in probed.sensitivity.tensors if types[n] != own[n]}
    with bench.installed(planned):
        before = bench.compare(reference)
        for i, (name, chosen, other) in enumerate(pairs):
            probed.space.progress("probing swaps around the plan", i, len(pairs))
            after = bench.probe(name, lookup(other), reference)
            if after.is_finite:
                change = estimate(after.kld_nats - before.kld_nats, reference.tokens.n_draws)
                yield Swap(name, chosen, other, change.mean, change.standard_error)


@contextmanager
def _planned_bench(probed: ProbedModel) -> Iterator[tuple[ProbeBench, ReferenceRun]]:
    """The original under llama.cpp, into which plans are written to probe from there."""
    text = probed.sensitivity.probe_text.part(slice(-_CHUNKS, None))
    with (
        scratch_copy(probed.space) as scratch,
        LoadedModel(scratch, patchable=True, shown=str(probed.space.model)) as model,
        opened_bench(probed.space, scratch, model, text, probed.imatrix) as bench,
    ):
        yield bench, bench.reference(text, scratch.parent)


def open_swaps(solved: Solved) -> Sequence[Pair]:
    """Swaps of one tensor's type, those first whose probing is expected to gain most.

    At the limits' prices the other type lies a certain regret behind the chosen one; it gains
    where the difference of their damages is less than thought by more than that.
    """
    options, model = solved.options, solved.options.damage
    gains: dict[Pair, float] = {}
    for i, name in enumerate(options.names):
        if name not in model.tensors:
            continue
        chosen = solved.solution.choice[i]
        table = [model.damage(name, t) for t in options.types[i]]
        deviation = np.array([d.nats * min(d.log_deviation, 1.0) for d in table])
        cost = priced(i, solved.costs, solved.limits, solved.solution)
        regret = np.maximum(0.0, cost - cost[chosen])
        expected = expected_gain(regret, np.hypot(deviation, deviation[chosen]))
        for j, t in enumerate(options.types[i]):
            if j != chosen and t in model.tensors[name].errors.weights:  # its own is no question
                gains[name, options.types[i][chosen], t] = float(expected[j])
    return sorted((s for s in gains if gains[s] > 0), key=lambda s: -gains[s])
