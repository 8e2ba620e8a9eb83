"""Plans that real files confirm, through llama.cpp on a tiny model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support import (
    SHORT,
    Measured,
    divergences,
    load_imatrix,
    log_probabilities,
    measure,
    texts,
    uniform,
    workspace,
)

from apreqel import llama, pipeline, quantize
from apreqel.errors import OutputError
from apreqel.evaluate import confirm as candidates
from apreqel.evaluate import real_files as trial
from apreqel.evaluate import refine
from apreqel.evaluate.real_files import Trials
from apreqel.model.inventory import read_inventory
from apreqel.model.qtypes import lookup
from apreqel.plan import plan
from apreqel.plan.plan import Plan
from apreqel.plan.planner import Planner, Solved, stock_map
from apreqel.plan.request import PlanRequest
from apreqel.sensitivity import bench as probing
from apreqel.sensitivity import calibration
from apreqel.solver import knapsack
from apreqel.solver.knapsack import Limit


@pytest.fixture(scope="module")
def measured(llama_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Measured:
    inventory, folder = read_inventory(llama_model), tmp_path_factory.mktemp("candidates")
    return inventory, folder, measure(inventory, folder)


def trials_in(measured: Measured) -> Trials:
    inventory, folder, state = measured
    return Trials(inventory, load_imatrix(folder, inventory), state, folder, 2)


def planner(measured: Measured, request: PlanRequest) -> Planner:
    inventory, folder, state = measured
    return Planner(inventory, state, load_imatrix(folder, inventory), request, folder)


def test_a_trial_is_what_llama_cpp_gives(measured: Measured, tmp_path: Path) -> None:
    inventory, folder, state = measured
    types = uniform(inventory, "Q4_0")
    with trials_in(measured) as trials:
        found = trials.measure("uniform Q4_0", types)
    path = tmp_path / "q.gguf"
    quantize.quantize_model(inventory, types, path, imatrix=load_imatrix(folder, inventory))
    tokens = np.array(state.check_tokens, np.int32)
    scored = np.arange(64, 127, dtype=np.int32)[None]
    klds = []
    with (
        llama.LoadedModel(inventory.files[0]) as a,
        llama.LoadedModel(path) as b,
        a.context(128, 1, 2) as p_context,
        b.context(128, 1, 2) as q_context,
    ):
        for chunk in tokens:
            p = log_probabilities(p_context.evaluate(chunk[None], scored))
            q = log_probabilities(q_context.evaluate(chunk[None], scored))
            klds.append(float(divergences(p, q).mean()))
    assert found.kld_by_chunk == pytest.approx(klds, rel=2e-3)
    assert not list(folder.glob("trial-*")) and not list(folder.glob("text-*"))
    # Measured once: another one neither evaluates nor writes a model.
    with trials_in(measured) as again:
        assert again.measure("x", types) == replace(found, label="x") and again._text is None
    other = replace(state, imatrix_sha256="1" * 64)
    assert trial.read_trials(folder, state) and not trial.read_trials(folder, other)


def test_text_for_trials_is_kept_apart(measured: Measured) -> None:
    inventory, _, state = measured
    with llama.LoadedModel(inventory.files[0]) as model:
        split = SHORT.split(model, texts())
        heldout = calibration.verification_set(model, calibration.heldout_text(), 128, 500)
    assert state.check_tokens == split.check.tokens.tolist()
    checked = {bytes(np.array(row[:64], np.int32)) for row in state.check_tokens}
    for tokens in (split.fitting.tokens, split.probe.tokens, heldout.tokens):
        assert not checked & {row[:64].tobytes() for row in tokens}


def test_a_plan_is_measured_beside_its_rivals(measured: Measured) -> None:
    request = PlanRequest("accuracy", target_bpw=5.5)
    with trials_in(measured) as trials:
        made = candidates.confirmed_plan(planner(measured, request), trials)
    labels = [t.label for t in made.trials]
    assert labels[0] == "plan" and labels[1].startswith("stock ")
    assert labels[2].startswith("uniform ")
    assert all(t.size_bytes <= made.size_bytes for t in made.trials[1:])
    assert made.kld_interval[0] < made.trials[0].kld.mean < made.kld_interval[1]
    best = min(made.trials, key=lambda t: t.kld.mean)
    assert best.is_taken and best.ratio == 1.0 and all(t.ratio <= 1 for t in made.trials)


class Misled(Planner):
    """Solves with the damages the wrong way round."""

    def solve(self, ease: float = 1.0) -> Solved:
        solved = super().solve(ease)
        wrong = [row.max() - row for row in solved.options.damages]
        limits = [*solved.limits, Limit("least", [-s for s in solved.options.sizes], -self.least)]
        choice = knapsack.solve(wrong, limits).choice
        return replace(solved, solution=replace(solved.solution, choice=choice))

    least = 0.0


def test_a_bad_plan_gives_way_to_a_better_map(measured: Measured) -> None:
    inventory, folder, state = measured
    request = PlanRequest("accuracy", target_bpw=6.0)
    good = planner(measured, request)
    solved = good.solve()
    misled = Misled(inventory, state, good.imatrix, request, folder)
    Misled.least = 0.97 * sum(
        row[c] for row, c in zip(solved.options.sizes, solved.solution.choice, strict=True)
    )
    worse = misled.plan(misled.solve())
    with trials_in(measured) as trials:
        made = candidates.confirmed_plan(misled, trials)
    assert dict(made.types) != dict(worse.types) and made.size_bytes <= worse.size_bytes
    assert "measured better than the planned map" in made.notes[-1]
    taken = next(t for t in made.trials if t.is_taken)
    assert taken.kld.mean == min(t.kld.mean for t in made.trials) < made.trials[0].kld.mean
    path = folder / "better.gguf"
    quantize.quantize_model(
        inventory,
        made.types,
        path,
        imatrix=good.imatrix,
        extra_metadata=made.extra_metadata(),
    )
    assert path.stat().st_size == made.size_bytes
    # Where the user's own limits rule the rivals out, the plan stays.
    limited = replace(request, max_type_changes=0)
    stays = Misled(inventory, state, good.imatrix, limited, folder)
    Misled.least = 0.0
    with trials_in(measured) as trials:
        kept = candidates.confirmed_plan(stays, trials)
    stock = stock_map(inventory, state, "Q4_K_M")
    assert all(kept.types[t.name] == stock[t.name] for t in inventory.quantizable)


def test_the_source_itself_as_a_plan(measured: Measured) -> None:
    """More room than it takes: nothing is lost, and no ratio is divided by that."""
    inventory, folder, _ = measured
    for request in (
        PlanRequest("accuracy", max_size_bytes=2 * inventory.size_bytes),
        PlanRequest("memory", max_kld_nats=0.0),
    ):
        with trials_in(measured) as trials:
            made = candidates.confirmed_plan(planner(measured, request), trials)
        assert made.kld_nats == 0 and dict(made.types) == inventory.types
        made.save(folder / "exact.json")
        assert plan.Plan.load(folder / "exact.json").trials[0].ratio == 1.0


def test_limits_on_damage_are_held_as_measured(measured: Measured) -> None:
    inventory, _, state = measured
    stock = stock_map(inventory, state, "Q4_K_M")
    for request in (PlanRequest("memory"), PlanRequest("memory", max_kld_nats=0.004)):
        with trials_in(measured) as trials:
            floor = request.max_kld_nats or trials.measure("stock Q4_K_M", stock).kld.mean
            made = candidates.confirmed_plan(planner(measured, request), trials)
        ours = made.trials[0].kld.mean
        assert ours <= floor and not made.beyond_limit
        assert ours > 0.6 * floor  # what is allowed is used


def test_exchanges_start_from_the_plan(measured: Measured) -> None:
    """Probed from the planned model, an exchange gives what probing all of it at once gives."""
    inventory, folder, state = measured
    kinds = {t.name: lookup("Q4_0") for t in inventory.quantizable}
    tokens = np.array(state.probe_tokens, np.int32)
    text = calibration.TokenSet.scored_from(4, "probe", tokens)
    with (
        probing.scratch_copy(inventory, folder, 2) as scratch,
        llama.LoadedModel(scratch, patchable=True) as model,
        model.context(64, 4, 2) as context,
    ):
        bench = probing.ProbeBench(inventory, scratch, context, 2)
        reference = bench.reference(text, scratch.parent)
        name = "blk.1.ffn_down.weight"
        with bench.installed({**kinds, name: lookup("Q8_0")}):
            whole = bench.compare(reference).kld_nats
        with bench.installed(kinds):
            exchanged = bench.probe(name, lookup("Q8_0"), reference).kld_nats
            planned = bench.compare(reference).kld_nats
        others = {n: kind for n, kind in kinds.items() if n != name}
        with bench.installed(others):
            assert np.array_equal(bench.probe(name, kinds[name], reference).kld_nats, planned)
        assert np.abs(bench.compare(reference).kld_nats).max() == 0
        bench.close()
    assert np.array_equal(exchanged, whole) and exchanged.mean() < planned.mean()


def test_refining_is_never_worse(measured: Measured, monkeypatch: pytest.MonkeyPatch) -> None:
    _, folder, state = measured
    request = PlanRequest("accuracy", target_bpw=4.5)
    wanted = planner(measured, request)
    with trials_in(measured) as trials:
        first = candidates.confirmed_plan(wanted, trials)
        count = refine.refine(wanted, 1.0, folder, 2)
        assert len(refine.read_exchanges(folder, state)) in (1, 2, 3)
        # What is known is not probed again: nothing is run.
        with monkeypatch.context() as patched:
            patched.setattr(refine, "_planned_bench", None)
            assert refine.refine(wanted, 1.0, folder, 2) == count
        again = candidates.confirmed_plan(wanted, trials)
    state.exchanges = ()
    state.renew_model()
    assert count == len(again.exchanges) > 0
    for exchange in again.exchanges:
        assert exchange.standard_error > 0 and exchange.chosen != exchange.other
    kept = candidates.better(first, again)
    klds = [next(t.kld.mean for t in p.trials if t.is_taken) for p in (first, again)]
    best = next(t.kld.mean for t in kept.trials if t.is_taken)
    assert best == min(klds) and "exchanges around the plan" in kept.notes[-1]


def test_few_bits_are_refined_unasked(measured: Measured, monkeypatch: pytest.MonkeyPatch) -> None:
    inventory, folder, state = measured
    monkeypatch.setattr(state, "effort", "normal")
    few, many = (planner(measured, PlanRequest(target_bpw=bits)) for bits in (3.5, 6.0))
    assert refine.is_worthwhile(few, few.plan()) and not refine.is_worthwhile(many, many.plan())
    knee = planner(measured, PlanRequest("balanced", target_bpw=3.5))
    assert not refine.is_worthwhile(knee, few.plan())
    space = workspace(inventory, folder)
    imatrix = pipeline.load_imatrix(space)
    made, path = pipeline.plan(space, few.request, state, imatrix, None)
    assert any("exchanges around the plan were probed" in note for note in made.notes)
    assert state.exchanges == () and Plan.load(path).notes == list(made.notes)

    def full(*_: object) -> int:
        raise OutputError("the disk is full")

    monkeypatch.setattr(refine, "refine", full)
    made, _ = pipeline.plan(space, few.request, state, imatrix, None)
    assert any("could not be probed (the disk is full)" in note for note in made.notes)
    with pytest.raises(OutputError):
        pipeline.plan(space, few.request, state, imatrix, None, refine=True)
    monkeypatch.setattr(state, "effort", "quick")
    assert not refine.is_worthwhile(few, few.plan())


def test_ladder_tells_how_damages_add_up(measured: Measured) -> None:
    inventory, folder, state = measured
    (folder / "trials.json").unlink(missing_ok=True)
    with trials_in(measured) as trials:
        candidates.try_ladder(inventory, state, [], trials, 3)
        assert len(trials.knots) == len(state.knots) == 3
        for knot in state.knots:
            total = state.model.total(knot.types)
            assert total.interval[0] < knot.kld.mean < total.interval[1]
