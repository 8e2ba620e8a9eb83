"""Exchanges around a plan: what a tensor's other type does when all others are as planned.

Damages are probed one tensor at a time, from the original. Near a plan they interact, below 4 bits
most. Here the planned model is put under llama.cpp, single exchanges are probed from there, and the
plan is made again with what they showed, until it no longer changes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from apreqel import llama, probing
from apreqel.calibration import TokenSet
from apreqel.damage import Exchange, expected_gain
from apreqel.errors import ArtifactError
from apreqel.metrics import Comparison, estimate
from apreqel.qtypes import lookup
from apreqel.sensitivity import SENSITIVITY_FILE

if TYPE_CHECKING:
    from apreqel.plan import Planner, Solved

Progress = Callable[[str, int, int], None]

_EXCHANGES_PER_ROUND = 24
_ROUNDS = 3
# Of the probe text; exchanges are compared on the same positions, so that less will do.
_CHUNKS = 16


def refine(
    planner: Planner,
    ease: float,
    folder: Path,
    n_threads: int,
    on_progress: Progress = lambda what, done, total: None,
) -> int:
    """Probe exchanges around what `planner` solves, and again around what it solves then.

    Leaves them in the sensitivity; returns how many were probed. Raises EngineError,
    InfeasiblePlanError where limits can no longer be met.
    """
    inventory, sensitivity = planner.inventory, planner.sensitivity
    if not sensitivity.probe_tokens:
        raise ArtifactError(
            f"{folder / SENSITIVITY_FILE}: written before exchanges were probed; run apreqel probe "
            "in another --workdir"
        )
    tokens = np.array(sensitivity.probe_tokens, np.int32)[:_CHUNKS]
    text = TokenSet.scored_from(tokens.shape[1] // 16, "probe", tokens, "")
    kind = lookup(sensitivity.scratch) if sensitivity.scratch else None
    found: dict[tuple[str, str, str], Exchange] = {}
    last: dict[str, str] = {}
    with (
        probing.scratch_copy(inventory, folder, n_threads, kind) as scratch,
        llama.LoadedModel(scratch, patchable=True) as model,
    ):
        n = probing.sequences_at_once(text.n_ctx, model.n_vocab, text.n_chunks)
        with model.context(text.n_ctx, n, n_threads) as context:
            bench = probing.ProbeBench(inventory, scratch, context, n_threads)
            bench.imatrix = planner.imatrix
            try:
                reference = bench.reference(text, scratch.parent)
                for _ in range(_ROUNDS):
                    solved = planner.solve(ease)
                    types = solved.options.types_of(solved.solution)
                    wanted = [e for e in open_exchanges(solved) if e not in found]
                    if types == last or not wanted:
                        break
                    last = types
                    planned = {
                        name: lookup(types[name])
                        for name in sensitivity.tensors
                        if types[name] != inventory.by_name[name].qtype.name
                    }
                    with bench.installed(planned):
                        before = bench.compare(reference)
                        for i, (name, chosen, other) in enumerate(wanted[:_EXCHANGES_PER_ROUND]):
                            on_progress(
                                "probing exchanges around the plan", i, _EXCHANGES_PER_ROUND
                            )
                            after = bench.probe(name, lookup(other), reference)
                            if after.is_finite:
                                found[name, chosen, other] = _exchange(
                                    name, chosen, other, before, after, text.n_chunks
                                )
                    sensitivity.exchanges = list(found.values())
                    sensitivity.renew_model()
            finally:
                bench.close()
    return len(found)


def _exchange(
    name: str, chosen: str, other: str, before: Comparison, after: Comparison, n_chunks: int
) -> Exchange:
    difference = estimate(after.kld_nats - before.kld_nats, n_chunks)
    return Exchange(name, chosen, other, difference.mean, difference.standard_error)


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
