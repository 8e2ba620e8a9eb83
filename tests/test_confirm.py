"""Plans that real files confirm, through llama.cpp on a tiny model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support import (
    SHORT,
    divergences_of_files,
    measure,
    planner_of,
    texts,
    uniform,
)

from apreqel import pipeline, quantize
from apreqel.errors import ArtifactError, OutputError
from apreqel.evaluate import confirm, refine
from apreqel.evaluate.confirm import better, confirmed_plan, measure_ladder, rival_maps
from apreqel.evaluate.real_files import FileBench, measured_files
from apreqel.llama.engine import LoadedModel
from apreqel.model.inventory import read_inventory
from apreqel.model.qtypes import lookup
from apreqel.plan.make_plan import make_plan
from apreqel.plan.plan import Plan
from apreqel.plan.planner import Planner
from apreqel.plan.request import PlanRequest
from apreqel.plan.solve import Solved, solve_request
from apreqel.sensitivity.bench import ProbeBench, scratch_copy
from apreqel.sensitivity.damage import damage_model
from apreqel.sensitivity.measurement import ProbedModel
from apreqel.sensitivity.texts import TokenSet, check_set, heldout_text, verification_set
from apreqel.solver import knapsack
from apreqel.solver.knapsack import Limit, total


@pytest.fixture(scope="module")
def probed(llama_model: Path, tmp_path_factory: pytest.TempPathFactory) -> ProbedModel:
    return measure(read_inventory(llama_model), tmp_path_factory.mktemp("confirm"))


def confirmed(probed: ProbedModel, request: PlanRequest) -> Plan:
    with FileBench(probed) as bench:
        return confirmed_plan(planner_of(probed, request=request), bench)


def planned(planner: Planner) -> Plan:
    return make_plan(planner, solve_request(planner))


def test_a_measured_file_is_what_llama_cpp_gives(probed: ProbedModel, tmp_path: Path) -> None:
    inventory, folder = probed.inventory, probed.space.folder
    types = uniform(inventory, "Q4_0")
    with FileBench(probed) as bench:
        found = bench.measure("uniform Q4_0", types)
    path = tmp_path / "q.gguf"
    quantize.quantize_model(inventory, types, path, imatrix=probed.imatrix)
    text = check_set(probed.sensitivity.check_tokens)
    klds = divergences_of_files(inventory.files[0], path, text).mean(axis=1).tolist()
    assert found.kld_by_chunk == pytest.approx(klds, rel=2e-3)
    assert not list(folder.glob("measured-*/")) and not list(folder.glob("text-*"))
    # Measured once: another one neither evaluates nor writes a model.
    with FileBench(probed) as again:
        assert again.measure("x", types) == replace(found, label="x") and again._text is None
    other = replace(probed.sensitivity, imatrix_sha256="1" * 64)
    assert measured_files(probed).files
    assert not measured_files(replace(probed, sensitivity=other)).files


def test_text_for_files_is_kept_apart(probed: ProbedModel) -> None:
    inventory = probed.inventory
    with LoadedModel(inventory.files[0]) as model:
        split = SHORT.split(model, texts())
        heldout = verification_set(model, heldout_text(), 128, 500)
    assert probed.sensitivity.check_tokens == split.check.tokens.tolist()
    checked = {bytes(np.array(row[:64], np.int32)) for row in probed.sensitivity.check_tokens}
    for tokens in (split.fitting.tokens, split.probe.tokens, heldout.tokens):
        assert not checked & {row[:64].tobytes() for row in tokens}


def test_a_plan_is_measured_beside_its_rivals(probed: ProbedModel) -> None:
    made = confirmed(probed, PlanRequest("accuracy", target_bpw=5.5))
    labels = [f.label for f in made.files]
    assert labels[:2] == ["plan", "least output error"] and labels[2].startswith("stock ")
    assert labels[3].startswith("uniform ")
    assert all(f.size_bytes <= made.size_bytes for f in made.files[1:])
    low, high = made.damage_interval
    assert low < made.files[0].kld.mean < high
    best = min(made.files, key=lambda f: f.kld.mean)
    assert best.is_taken and best.ratio == 1.0 and all(f.ratio <= 1 for f in made.files)


def mislead(monkeypatch: pytest.MonkeyPatch, least_bytes: float) -> None:
    """Requests are solved with the damages the wrong way round, at no less than so many bytes."""

    def misled(planner: Planner, limit_factor: float = 1.0) -> Solved:
        solved = solve_request(planner, limit_factor)
        wrong = [row.max() - row for row in solved.options.damages]
        limits = [*solved.limits, Limit("least", [-s for s in solved.options.sizes], -least_bytes)]
        choice = knapsack.solve(wrong, limits).choice
        return replace(solved, solution=replace(solved.solution, choice=choice))

    monkeypatch.setattr(confirm, "solve_request", misled)


def test_a_bad_plan_gives_way_to_a_better_map(
    probed: ProbedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = PlanRequest("accuracy", target_bpw=6.0)
    planner = planner_of(probed, request=request)
    solved = solve_request(planner)
    mislead(monkeypatch, 0.97 * total(solved.options.sizes, solved.solution.choice))
    worse = make_plan(planner, confirm.solve_request(planner))
    made = confirmed(probed, request)
    assert dict(made.types) != dict(worse.types) and made.size_bytes <= worse.size_bytes
    assert "measured better than the planned map" in made.notes[-1]
    taken = next(f for f in made.files if f.is_taken)
    assert taken.kld.mean == min(f.kld.mean for f in made.files) < made.files[0].kld.mean
    # Its gap is its own: how far its damages lie above what was proven to be the least.
    best = solved.solution.objective * (1 - solved.solution.gap)
    choice = [j for j in solved.options.choice_of(made.types) if j is not None]
    assert made.gap == pytest.approx(1 - best / total(solved.options.damages, choice))
    assert made.gap > solved.solution.gap
    path = probed.space.folder / "better.gguf"
    quantize.quantize_model(
        probed.inventory,
        made.types,
        path,
        imatrix=probed.imatrix,
        extra_metadata=made.extra_metadata(),
    )
    assert path.stat().st_size == made.size_bytes
    # Where the user's own limits rule the rivals out, the plan stays.
    mislead(monkeypatch, 0.0)
    kept = confirmed(probed, replace(request, max_type_changes=0))
    stock = probed.stock_types("Q4_K_M")
    assert all(kept.types[t.name] == stock[t.name] for t in probed.inventory.quantizable)


def test_a_rival_that_is_closer_by_chance_is_not_taken(
    probed: ProbedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two chunks, one closer and one farther: the mean is less, the paired interval is not."""
    real = FileBench.measure

    def lucky(self, label, types):  # type: ignore[no-untyped-def]
        found = real(self, label, types)
        plan = (0.010, 0.020)
        klds = {"stock": (0.001, 0.028), "uniform": (0.009, 0.018), "least": (0.02, 0.04)}
        return replace(found, kld_by_chunk=klds.get(label.split()[0], plan))

    monkeypatch.setattr(FileBench, "measure", lucky)
    made = confirmed(probed, PlanRequest("accuracy", target_bpw=5.5))
    plan, _, stock, uniform_one = made.files
    assert stock.kld.mean < plan.kld.mean and not stock.is_taken
    assert uniform_one.is_taken  # a tenth closer on both


def test_the_source_itself_as_a_plan(probed: ProbedModel) -> None:
    """More room than it takes: nothing is lost, and no ratio is divided by that."""
    inventory, path = probed.inventory, probed.space.folder / "exact.json"
    for request in (
        PlanRequest("accuracy", max_size_bytes=2 * inventory.size_bytes),
        PlanRequest("memory", max_kld_nats=0.0),
    ):
        made = confirmed(probed, request)
        assert made.damage_nats == 0 and dict(made.types) == inventory.types
        made.save(path)
        assert Plan.load(path).files[0].ratio == 1.0


def test_limits_on_damage_are_held_as_measured(probed: ProbedModel) -> None:
    for request in (PlanRequest("memory"), PlanRequest("memory", max_kld_nats=0.004)):
        with FileBench(probed) as bench:
            stock = bench.measure("stock Q4_K_M", probed.stock_types("Q4_K_M")).kld.mean
        floor = request.max_kld_nats or stock
        made = confirmed(probed, request)
        ours = made.files[0].kld.mean
        assert ours <= floor and not made.beyond_limit
        assert ours > 0.6 * floor  # what is allowed is used


def test_swaps_start_from_the_plan(probed: ProbedModel) -> None:
    """Probed from the planned model, a swap gives what probing all of it at once gives."""
    inventory = probed.inventory
    qtypes = {t.name: lookup("Q4_0") for t in inventory.quantizable}
    tokens = np.array(probed.sensitivity.probe_tokens, np.int32)
    text = TokenSet.scored_from(4, "probe", tokens)
    with (
        scratch_copy(probed.space) as scratch,
        LoadedModel(scratch, patchable=True) as model,
        model.context(text.n_ctx, 4, 2) as context,
    ):
        bench = ProbeBench(inventory, scratch, context, 2)
        reference = bench.reference(text, scratch.parent)
        name = "blk.1.ffn_down.weight"
        with bench.installed({**qtypes, name: lookup("Q8_0")}):
            whole = bench.compare(reference).kld_nats
        with bench.installed(qtypes):
            swapped = bench.probe(name, lookup("Q8_0"), reference).kld_nats
            planned = bench.compare(reference).kld_nats
        others = {n: qtype for n, qtype in qtypes.items() if n != name}
        with bench.installed(others):
            assert np.array_equal(bench.probe(name, qtypes[name], reference).kld_nats, planned)
        assert np.abs(bench.compare(reference).kld_nats).max() == 0
        bench.close()
    assert np.array_equal(swapped, whole) and swapped.mean() < planned.mean()


def test_refining_is_never_worse(probed: ProbedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    planner = planner_of(probed, request=PlanRequest("accuracy", target_bpw=4.5))
    with FileBench(probed) as bench:
        first = confirmed_plan(planner, bench)
        found = refine.refined(planner, 1.0)
        assert len(refine.probed_swaps(probed).around) in (1, 2, 3)
        # What is known is not probed again: nothing is run.
        with monkeypatch.context() as patched:
            patched.setattr(refine, "_planned_bench", None)
            assert refine.refined(planner, 1.0).damage.swaps == found.damage.swaps
        again = confirmed_plan(found, bench)
    assert not planner.damage.swaps  # nothing is learned into what it was made from
    assert len(found.damage.swaps) == len(again.swaps) > 0
    for swap in again.swaps:
        assert swap.standard_error > 0 and swap.chosen != swap.other
    kept = better(first, again)
    klds = [next(f.kld.mean for f in p.files if f.is_taken) for p in (first, again)]
    best = next(f.kld.mean for f in kept.files if f.is_taken)
    assert best == min(klds) and "swaps around the plan" in kept.notes[-1]


def with_effort(probed: ProbedModel, effort: str) -> ProbedModel:
    return replace(probed, sensitivity=replace(probed.sensitivity, effort=effort))


def test_few_bits_are_refined_unasked(probed: ProbedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    probed = with_effort(probed, "normal")
    few, many = (planner_of(probed, request=PlanRequest(target_bpw=b)) for b in (3.5, 6.0))
    assert refine.is_worthwhile(few, planned(few))
    assert not refine.is_worthwhile(many, planned(many))
    knee = planner_of(probed, request=PlanRequest("balanced", target_bpw=3.5))
    assert not refine.is_worthwhile(knee, planned(few))
    made, path = pipeline.plan(probed, few.request, None)
    assert any("swaps around the plan were probed" in note for note in made.notes)
    assert Plan.load(path).notes == list(made.notes)

    def full(*_: object) -> Planner:
        raise OutputError("the disk is full")

    monkeypatch.setattr(pipeline, "refined", full)
    made, _ = pipeline.plan(probed, few.request, None)
    assert any("could not be probed (the disk is full)" in note for note in made.notes)
    with pytest.raises(OutputError):
        pipeline.plan(probed, few.request, None, refine=True)
    quick = planner_of(with_effort(probed, "quick"), request=few.request)
    assert not refine.is_worthwhile(quick, planned(few))
    labels = [label for label, _ in rival_maps(quick, solve_request(quick))]
    assert labels == ["least output error"]


def test_ladder_tells_how_damages_add_up(probed: ProbedModel) -> None:
    (probed.space.folder / "measured-files.json").unlink(missing_ok=True)
    with FileBench(probed) as bench:
        measure_ladder(planner_of(probed), bench, 3)
        files = bench.known.own
    assert len(files) == len(measured_files(probed).own) == 3
    model = replace(damage_model(probed.sensitivity), files=files)
    for file in files:
        low, high = model.predicted(file.types).interval
        assert low < file.kld.mean < high


def test_explaining_goes_by_what_the_plan_was_chosen_from(probed: ProbedModel) -> None:
    """Files measured since do not matter; probes made since are another problem."""
    probed.sensitivity.save(probed.space.folder / "sensitivity.json")
    made, path = pipeline.plan(probed, PlanRequest("memory"), None)
    solved, _, _ = pipeline.explained(path)
    with FileBench(probed) as bench:
        bench.measure("plan", uniform(probed.inventory, "Q5_0"))
    again, _, _ = pipeline.explained(path)
    assert again.solution.choice == solved.solution.choice
    assert [limit.at_most for limit in again.limits] == [limit.at_most for limit in solved.limits]
    own = probed.inventory.types
    assert own | solved.options.types_of(solved.solution) == dict(made.types)
    name, tensor = next(iter(probed.sensitivity.tensors.items()))
    type_name, probe = next(iter(tensor.probes.items()))
    more = replace(probe, kld=[2 * k for k in probe.kld])
    changed = probed.sensitivity.with_probe(name, type_name, more)
    changed.save(probed.space.folder / "sensitivity.json")
    with pytest.raises(ArtifactError, match="was measured anew since; plan again to explain it"):
        pipeline.explained(path)
    probed.sensitivity.save(probed.space.folder / "sensitivity.json")
