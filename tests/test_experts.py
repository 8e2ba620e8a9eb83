"""Another number of active experts: measured in llama.cpp, planned with, carried by the file."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import (
    apreqel,
    divergences_of_files,
    expect,
    made_up,
    measure,
    planner_of,
    texts,
    workspace,
)

from apreqel import quantize
from apreqel.device.shapes import matrix_shape
from apreqel.errors import (
    ArtifactError,
    InfeasiblePlanError,
    UnsupportedModelError,
    UsageError,
)
from apreqel.estimates import Estimate
from apreqel.llama import engine
from apreqel.model.gguf_header import UINT32, encode_kv
from apreqel.model.inventory import Inventory, read_inventory
from apreqel.plan.front import pareto_front
from apreqel.plan.make_plan import make_plan
from apreqel.plan.plan import Plan
from apreqel.plan.planner import Planner
from apreqel.plan.request import PlanRequest
from apreqel.plan.solve import Solved, solve_request
from apreqel.progress import Progress, silent
from apreqel.sensitivity import experts, kv_cache
from apreqel.sensitivity.experts import ExpertUse, expert_use
from apreqel.sensitivity.measurement import ProbedModel
from apreqel.sensitivity.metrics import Reference, compare
from apreqel.sensitivity.texts import chunks_of
from apreqel.solver.knapsack import total

KEY = "llama.expert_used_count"


@pytest.fixture(scope="module")
def probed(moe_model: Path, tmp_path_factory: pytest.TempPathFactory) -> ProbedModel:
    return measure(read_inventory(moe_model), tmp_path_factory.mktemp("experts"))


def measured(
    inventory: Inventory, folder: Path, used: int, progress: Progress = silent
) -> ExpertUse:
    return expert_use(workspace(inventory, folder, progress), used, texts())


def logits(path: Path, overrides: dict[str, int] | None = None) -> np.ndarray:
    with (
        engine.LoadedModel(path, overrides=overrides) as model,
        model.context(128, 1, 1) as context,
    ):
        tokens = chunks_of(model, texts(), 128)[:1]
        return context.evaluate(tokens, np.arange(8, 127, dtype=np.int32)[None]).copy()


def divergence(found: np.ndarray, reference: np.ndarray) -> float:
    with ThreadPoolExecutor(1) as pool:
        following = np.zeros(len(found), np.int32)
        return float(compare(found, Reference.of(reference, pool), following, pool).kld_nats.mean())


# --- the measurement -----------------------------------------------------------------------------


def test_damage_is_that_of_the_count(moe_model: Path, tmp_path: Path) -> None:
    inventory = read_inventory(moe_model)
    same = measured(inventory, tmp_path, 2)
    assert abs(same.kld.mean) < 1e-7 and (same.used, same.own, same.n_experts) == (2, 2, 4)
    fewer, more = measured(inventory, tmp_path, 1), measured(inventory, tmp_path, 4)
    # By the definition, from a model that llama.cpp loads with that count.
    with engine.LoadedModel(moe_model) as model:
        text = kv_cache.probe_tokens(model, texts())
    for use in (fewer, more):
        klds = divergences_of_files(moe_model, moe_model, text, {KEY: use.used})
        assert use.damage_nats == use.kld.mean == pytest.approx(np.mean(klds), rel=5e-3)
        assert use.kld.is_resolved


def test_counts_are_kept_and_not_measured_twice(
    moe_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inventory = read_inventory(moe_model)
    first = measured(inventory, tmp_path, 1)

    def interrupt(what: str, done: int, total: int) -> None:
        assert (what, total) == ("probing 3 active experts", 4)
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measured(inventory, tmp_path, 3, interrupt)
    assert [p.name for p in tmp_path.iterdir()] == [experts.EXPERTS_FILE]
    third = measured(inventory, tmp_path, 3)
    with monkeypatch.context() as patch:
        patch.setattr(experts, "LoadedModel", None)
        assert measured(inventory, tmp_path, 1) == first
        assert measured(inventory, tmp_path, 3) == third
    # Another llama.cpp gives other numbers: none of its predecessor's are mixed in.
    path = tmp_path / experts.EXPERTS_FILE
    document = json.loads(path.read_text())
    assert set(document["data"]["kld_by_count"]) == {"1", "3"}
    document["provenance"]["llama_build"] = "another"
    path.write_text(json.dumps(document))
    measured(inventory, tmp_path, 3)
    assert set(json.loads(path.read_text())["data"]["kld_by_count"]) == {"3"}
    document = json.loads(path.read_text())
    document["data"]["kld_by_count"]["3"] = {"mean": 1.0}
    path.write_text(json.dumps(document))
    with pytest.raises(ArtifactError, match=r"experts\.json: experts is damaged"):
        measured(inventory, tmp_path, 3)


def test_counts_that_cannot_be(moe_model: Path, llama_model: Path, tmp_path: Path) -> None:
    inventory = read_inventory(moe_model)
    for count in (-1, 0, 5):
        with pytest.raises(UsageError, match=rf"--experts {count}: tiny has 4 experts; give 1 to"):
            measured(inventory, tmp_path, count)
    with pytest.raises(UsageError, match="--experts 1: tiny is dense; it has no experts"):
        measured(read_inventory(llama_model), tmp_path, 1)
    content = moe_model.read_bytes()
    assert content.count(KEY.encode()) == 1
    other = tmp_path / "layers.gguf"
    other.write_bytes(content.replace(KEY.encode(), KEY.encode()[:-1] + b"s"))
    with pytest.raises(UnsupportedModelError, match="have counts of their own"):
        experts.require_count(read_inventory(other), 1)


# --- plans ---------------------------------------------------------------------------------------


def planned(planner: Planner) -> Plan:
    return make_plan(planner, solve_request(planner))


def test_the_file_runs_as_planned(probed: ProbedModel, tmp_path: Path) -> None:
    inventory, weights = probed.inventory, probed.imatrix
    use = measured(inventory, probed.space.folder, 1)
    request = PlanRequest(target_bpw=9.0, experts_used=1)
    made = planned(planner_of(probed, request=request, experts=use))
    plain = planned(planner_of(probed, request=replace(request, experts_used=None)))
    assert made.types == plain.types and made.size_bytes == plain.size_bytes
    assert made.damage_nats == pytest.approx(plain.damage_nats + use.damage_nats)
    assert made.metadata["apreqel.plan"] != plain.metadata["apreqel.plan"]
    assert "override" not in made.run_flags
    made.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json").experts == use
    output = tmp_path / "planned.gguf"
    quantize.quantize_model(
        inventory, made.types, output, imatrix=weights, extra_metadata=made.extra_metadata()
    )
    assert output.stat().st_size == made.size_bytes
    assert read_inventory(output).n_experts_used == 1
    # Close to the original with so many experts, farther from the original as it is.
    original = inventory.files[0]
    found, own, fewer = logits(output), logits(original), logits(original, {KEY: 1})
    assert divergence(found, fewer) < 0.5 * divergence(found, own)
    # With the weights untouched it is that very model.
    untouched = tmp_path / "untouched.gguf"
    types = inventory.types
    record = encode_kv(KEY, UINT32, 1)
    quantize.quantize_model(inventory, types, untouched, extra_metadata=[record])
    assert np.array_equal(logits(untouched), fewer) and not np.array_equal(own, fewer)


def test_damage_counts_in_limits(probed: ProbedModel) -> None:
    use = ExpertUse(1, 2, 4, Estimate(0.2, 0.01, 100))

    def solved(**wishes: Any) -> Solved:
        request = PlanRequest("memory", experts_used=1, **wishes)
        return solve_request(planner_of(probed, request=request, experts=use))

    found = solved(max_kld_nats=0.25)
    assert found.solution.choice
    assert 0 < total(found.options.damages, found.solution.choice) <= 0.05
    assert all(binding.at_most == "0.25000 nats" for binding in found.binding())
    with pytest.raises(
        InfeasiblePlanError, match=r"--max-kld 0\.10000 nats: cannot be met; .*0\.2"
    ):
        solved(max_kld_nats=0.1)
    # The usual limit, stock's quality, is that of stock with so many experts.
    without = solve_request(planner_of(probed, request=PlanRequest("memory")))
    assert solved().solution.choice == without.solution.choice
    shown = pareto_front(planner_of(probed, experts=use), 6)
    assert all(point.damage_nats >= 0.2 for point in shown.points)
    assert all(point.damage_nats < 0.2 for point in shown.stock if point.label == "Q8_0")


def test_speed_is_of_the_count(probed: ProbedModel) -> None:
    inventory = probed.inventory
    profile = made_up(inventory, dict.fromkeys(("F16", "Q8_0", "Q4_K", "Q6_K"), (4.0, 1.0)))
    use = ExpertUse(1, 2, 4, Estimate(0.2, 0.01, 100))
    fewer = experts.with_experts(inventory, use)
    assert fewer.shape_digest == inventory.shape_digest and profile.covers(fewer)
    request = PlanRequest(min_decode_tps=1e-3, experts_used=1, workload=(0, 1))
    made = planned(planner_of(probed, request=request, profile=profile, experts=use))
    assert made.speed is not None and made.speed_with_own_experts is not None

    def seconds(model: Inventory) -> float:
        read = sum(
            matrix_shape(t, model).weights_read for t in model.quantizable if t.role != "token_embd"
        )
        return 2 * 4 * read / 1e6 + 0.5

    assert 1 / made.speed.decode.value == pytest.approx(seconds(fewer))
    assert 1 / made.speed_with_own_experts.decode.value == pytest.approx(seconds(inventory))
    # A limit that only fewer experts can meet.
    between = 2 / (seconds(fewer) + seconds(inventory))
    tight = PlanRequest(min_decode_tps=between, experts_used=1, workload=(0, 1))
    solve_request(planner_of(probed, request=tight, profile=profile, experts=use))
    with pytest.raises(InfeasiblePlanError, match="--min-decode-tps"):
        solve_request(planner_of(probed, request=tight, profile=profile))


# --- the command ---------------------------------------------------------------------------------


def test_the_command(moe_model: Path, llama_model: Path, tmp_path: Path) -> None:
    model = Path(shutil.copy(moe_model, tmp_path / "moe.gguf"))
    assert "2 layers, 4 experts (2 active a token)" in apreqel("inspect", model).stdout
    assert json.loads(apreqel("inspect", model, "--json").stdout)["n_experts_used"] == 2
    for command in ("plan", "auto"):
        for count in ("0", "-1", "5"):
            message = f"--experts {count}: tiny has 4 experts; give 1 to 4"
            expect(2, message, command, model, "--experts", count)
    message = "--experts 1: tiny is dense; it has no experts"
    expect(2, message, "plan", llama_model, "--experts", "1", "--workdir", tmp_path / "w")
    folder = tmp_path / "moe.gguf.apreqel"
    assert not [
        *folder.rglob("sensitivity.json"),
        *folder.rglob("equalised"),
    ]  # refused before anything was measured
    assert apreqel("probe", model, "--effort", "quick", "-t", "1", "--no-equalise").returncode == 0
    wishes = ["--target-bpw", "6", "--experts", "1", "-t", "1", "--plain"]
    done = apreqel("plan", model, *wishes)
    assert done.returncode == 0, done.stderr
    assert "probing 1 active experts" in done.stderr
    assert "experts: 1 of 4 active a token (the model's own count: 2), 0." in done.stdout
    output, plan = tmp_path / "out.gguf", next(folder.rglob("plan.json"))
    assert apreqel("quantize", plan, "-o", output).returncode == 0
    assert "4 experts (1 active a token)" in apreqel("inspect", output).stdout
    again = apreqel("plan", model, *wishes)
    assert again.returncode == 0 and "probing" not in again.stderr
    assert apreqel("explain", plan).returncode == 0
    for more in (["--front"], ["--ladder", "2"]):
        done = apreqel("plan", model, *wishes[2:], *more)
        assert done.returncode == 0, done.stderr
