"""Exchanges around a plan: what a tensor's other type does when all others are as planned.

Damages are probed one tensor at a time, from the original. Near a plan they interact, below 4 bits
most. Here the planned model is put under llama.cpp, single exchanges are probed from there, and the
plan is made again with what they showed, until it no longer changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from apreqel import artifacts, llama
from apreqel.errors import ArtifactError
from apreqel.evaluate.real_files import map_key
from apreqel.model.qtypes import lookup
from apreqel.sensitivity import bench as probing
from apreqel.sensitivity.calibration import probe_set
from apreqel.sensitivity.damage import Exchange, expected_gain
from apreqel.sensitivity.measure import SENSITIVITY_FILE, measured_before, provenance_of
from apreqel.sensitivity.metrics import estimate

if TYPE_CHECKING:
    from apreqel.plan.plan import Plan
    from apreqel.plan.planner import Planner, Solved
    from apreqel.sensitivity.bench import ReferenceRun
    from apreqel.sensitivity.measure import Sensitivity

Progress = Callable[[str, int, int], None]

EXCHANGES_FILE = "exchanges.json"

# Damages of single tensors add up above this many bits per weight; below, they interact.
_INTERACTING_BITS = 4.0
_EXCHANGES_PER_ROUND = 24
_ROUNDS = 3
# Of the probe text; exchanges are compared on the same positions, so that less will do.
_CHUNKS = 16


def is_worthwhile(planner: Planner, plan: Plan) -> bool:
    """Whether `plan` is to be refined unasked: so few bits that damages no longer add up.

    Not where little time was to be taken, and where real files could not decide.
    """
    request, state = planner.request, planner.sensitivity
    sizes = [
        (lookup(plan.types[t.name]).size_bytes(t.shape), t.n_elements)
        for t in planner.inventory.quantizable
    ]
    n_bytes, n_weights = map(sum, zip(*sizes, strict=True))
    return (
        8 * n_bytes / n_weights < _INTERACTING_BITS
        and request.has_one_measure
        and state.metric == "kld"
        and state.effort != "quick"
        and not state.cut_short
        and bool(state.probe_tokens)
        and not probing.paging_note(planner.inventory)
    )


def refine(
    planner: Planner,
    ease: float,
    folder: Path,
    n_threads: int,
    on_progress: Progress = lambda what, done, total: None,
) -> int:
    """Probe exchanges around what `planner` solves, and again around what it solves then.

    Leaves them in the sensitivity, and in `folder` for another time; returns how many there are.
    Raises InfeasiblePlanError where limits can no longer be met, ArtifactError, EngineError,
    ModelFileError, OutputError.
    """
    sensitivity = planner.sensitivity
    if not sensitivity.probe_tokens:
        raise ArtifactError(
            f"{folder / SENSITIVITY_FILE}: written before exchanges were probed; run apreqel probe "
            "in another --workdir"
        )
    files = planner.inventory.files
    marks, known = artifacts.file_marks(files), read_exchanges(folder, sensitivity)
    found: dict[tuple[str, str, str], Exchange] = {}
    last: Mapping[str, str] = {}
    sensitivity.learn_exchanges(())
    with ExitStack() as stack:
        bench: _PlannedBench | None = None
        for _ in range(_ROUNDS):
            solved = planner.solve(ease)
            types = solved.options.types_of(solved.solution)
            wanted = [e for e in open_exchanges(solved) if e not in found][:_EXCHANGES_PER_ROUND]
            if types == last or not wanted:
                break
            last, around = types, known.setdefault(map_key(types), {})
            missing = [e for e in wanted if e not in around]
            if missing:
                bench = bench or stack.enter_context(_planned_bench(planner, folder, n_threads))
                for exchange in bench.probes(types, missing, on_progress):
                    around[_pair(exchange)] = exchange
                    artifacts.source_is_unchanged(files, marks)
                    _save(folder, sensitivity, known)
            found |= {e: around[e] for e in wanted if e in around}
            sensitivity.learn_exchanges(list(found.values()))
    return len(found)


@dataclass(frozen=True)
class _PlannedBench:
    """The original under llama.cpp, into which plans are written to probe from there."""

    planner: Planner
    bench: probing.ProbeBench
    reference: ReferenceRun

    def probes(
        self,
        types: Mapping[str, str],
        exchanges: Sequence[tuple[str, str, str]],
        on_progress: Progress,
    ) -> Iterator[Exchange]:
        """Each as soon as it was probed; those that give NaN are left out."""
        own = self.planner.inventory.types
        planned = {
            name: lookup(types[name])
            for name in self.planner.sensitivity.tensors
            if types[name] != own[name]
        }
        with self.bench.installed(planned):
            before = self.bench.compare(self.reference)
            for i, (name, chosen, other) in enumerate(exchanges):
                on_progress("probing exchanges around the plan", i, len(exchanges))
                after = self.bench.probe(name, lookup(other), self.reference)
                if after.is_finite:
                    n_chunks = self.reference.tokens.n_chunks
                    change = estimate(after.kld_nats - before.kld_nats, n_chunks)
                    yield Exchange(name, chosen, other, change.mean, change.standard_error)


@contextmanager
def _planned_bench(planner: Planner, folder: Path, n_threads: int) -> Iterator[_PlannedBench]:
    inventory = planner.inventory
    text = probe_set(planner.sensitivity.probe_tokens[:_CHUNKS])
    with (
        probing.scratch_copy(inventory, folder, n_threads) as scratch,
        llama.LoadedModel(scratch, patchable=True) as model,
        probing.opened_bench(inventory, scratch, model, text, planner.imatrix, n_threads) as bench,
    ):
        yield _PlannedBench(planner, bench, bench.reference(text, scratch.parent))


def read_exchanges(
    folder: Path, state: Sensitivity
) -> dict[str, dict[tuple[str, str, str], Exchange]]:
    """What was probed before, by the digest of the map around which. Raises ArtifactError."""
    path = folder / EXCHANGES_FILE
    if (data := measured_before(path, "exchanges", state)) is None:
        return {}
    with artifacts.understood(f"{path}"):
        return {
            key: {_pair(e): e for e in (Exchange(**row) for row in rows)}
            for key, rows in data["around"].items()
        }


def _save(
    folder: Path,
    state: Sensitivity,
    known: Mapping[str, Mapping[tuple[str, str, str], Exchange]],
) -> None:
    rows = {key: [asdict(e) for e in around.values()] for key, around in known.items()}
    artifacts.save(folder / EXCHANGES_FILE, "exchanges", provenance_of(state), {"around": rows})


def _pair(exchange: Exchange) -> tuple[str, str, str]:
    return exchange.tensor, exchange.chosen, exchange.other


def open_exchanges(solved: Solved) -> Sequence[tuple[str, str, str]]:
    """(tensor, chosen, other), those first whose probing is expected to gain most.

    At the limits' prices the other type lies a certain regret behind the chosen one; it gains
    where the difference of their damages is less than thought by more than that.
    """
    options, model = solved.options, solved.options.model
    gains: dict[tuple[str, str, str], float] = {}
    for i, name in enumerate(options.names):
        if name not in model.errors:
            continue
        chosen = solved.solution.choice[i]
        table = [model.damage(name, t) for t in options.types[i]]
        deviation = np.array([d.nats * min(d.log_deviation, 1.0) for d in table])
        total = solved.costs[i].copy()
        for limit, price in zip(solved.limits, solved.solution.prices, strict=True):
            total += price * limit.costs[i]
        regret = np.maximum(0.0, total - total[chosen])
        expected = expected_gain(regret, np.hypot(deviation, deviation[chosen]))
        for j, t in enumerate(options.types[i]):
            if j != chosen and t in model.errors[name].weights:  # its own type is no question
                gains[name, options.types[i][chosen], t] = float(expected[j])
    return sorted((e for e in gains if gains[e] > 0), key=lambda e: -gains[e])
