"""Imatrix, probes, plans, profiles and verification through the real llama.cpp on tiny models."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import gguf
import models
import numpy as np
import pytest
from support import (
    SHA,
    SHORT,
    Measured,
    divergences,
    load_imatrix,
    log_probabilities,
    measure,
    tensor_bytes,
    texts,
    uniform,
)

from apreqel import llama, quantize
from apreqel.artifacts import Provenance
from apreqel.device import machine as device
from apreqel.errors import (
    ArtifactError,
    CalibrationError,
    InfeasiblePlanError,
    Interrupted,
    ModelFileError,
    UnsupportedModelError,
    UsageError,
    VerificationError,
)
from apreqel.evaluate import verify
from apreqel.model import imatrix, qtypes, recipes
from apreqel.model.inventory import Inventory, read_inventory
from apreqel.model.qtypes import lookup
from apreqel.plan import options, plan, planner
from apreqel.plan.request import PlanRequest, parse_size
from apreqel.sensitivity import bench as probing
from apreqel.sensitivity import calibration, imatrix_collection, kv_cache
from apreqel.sensitivity import measure as sensitivity
from apreqel.sensitivity.measure import Effort, Sensitivity


@pytest.fixture(scope="module", params=["llama", "rows_576", "moe", "split"])
def probed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Measured:
    """A tiny model of each kind with its measurements."""
    model = request.getfixturevalue(f"{request.param}_model")
    inventory = read_inventory(model[0] if isinstance(model, list) else model)
    folder = tmp_path_factory.mktemp(request.param)
    return inventory, folder, measure(inventory, folder)


# --- probing -------------------------------------------------------------------------------------


def test_every_tensor_is_probed(probed: Measured) -> None:
    inventory, folder, state = probed
    assert state.complete and not state.excluded
    assert set(state.tensors) == {t.name for t in inventory.quantizable}
    assert all(t.probes for t in state.tensors.values())
    assert len(state.tensors) < state.n_probes <= 1.5 * len(state.tensors) + 1
    assert all(len(p.kld) in (2, 4) for t in state.tensors.values() for p in t.probes.values())
    assert abs(state.self_kld_nats) < 1e-7
    assert not list(folder.glob("scratch-*"))
    for known in state.tensors.values():
        errors = known.errors.weights
        assert errors["Q8_0"] < errors["Q5_0"] < errors["Q4_0"]
        assert 0.5 < known.errors.half_text < 2
    assert set(state.kernels) >= {"Q8_0", "Q5_1"}
    assert all(loss.real_nats > 0 for loss in state.kernels.values())
    assert len(state.layer_cosines) > 0 and all(-1 <= c <= 1 for c in state.layer_cosines)


def test_a_probe_is_what_the_quantised_file_gives(llama_model: Path, tmp_path: Path) -> None:
    """Hot-swapping is another way to what reloading a dequantised file gives: the same."""
    inventory = read_inventory(llama_model)
    names = ["blk.0.ffn_down.weight", "blk.1.attn_v.weight"]
    with llama.LoadedModel(llama_model) as model:
        tokens = calibration.split_for_calibration(
            model, texts(), fitting_chunks=4, n_ctx=64, probe_chunks=4, probe_ctx=64
        ).probe
        with model.context(64, 2, 2) as context:
            halves = [tokens.part(slice(0, 2)), tokens.part(slice(2, 4))]
            plain = [context.evaluate(t.tokens, t.positions).copy() for t in halves]
    with probing.scratch_copy(inventory, tmp_path, 2) as scratch:
        with (
            llama.LoadedModel(scratch, patchable=True) as model,
            model.context(64, 2, 2) as context,
        ):
            bench = probing.ProbeBench(inventory, scratch, context, 2)
            reference = bench.reference(tokens, tmp_path, informative_part=1.0)
            np.testing.assert_allclose(reference.rows.logits, np.concatenate(plain), atol=2e-2)
            with bench.installed({n: lookup("Q4_0") for n in names}):
                swapped = bench.compare(reference)
            again = bench.compare(reference)
            bench.close()
        assert np.abs(again.kld_nats).max() == 0  # everything was put back
        quantised = tmp_path / "q.gguf"
        types = inventory.types | dict.fromkeys(names, "Q4_0")
        quantize.quantize_model(inventory, types, quantised)
        back = read_inventory(quantised)
        dequantised = tmp_path / "d.gguf"
        # F32, so that nothing is rounded again; llama.cpp itself does the dequantising.
        llama.stock_quantize(
            quantised,
            dequantised,
            "Q8_0",
            imatrix={},
            n_threads=2,
            allow_requantize=True,
            tensor_types=[(f"^{t.name}$", 1) for t in back.quantizable],
        )
        with (
            llama.LoadedModel(dequantised, patchable=True) as model,
            model.context(64, 2, 2) as context,
        ):
            bench = probing.ProbeBench(inventory, scratch, context, 2)
            reloaded = bench.compare(reference)
            bench.close()
    assert swapped.kld_nats.mean() > 1e-5
    np.testing.assert_allclose(swapped.kld_nats, reloaded.kld_nats, rtol=1e-3, atol=1e-7)


def test_memory_that_does_not_hold_the_model(
    llama_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inventory = read_inventory(llama_model)
    assert probing.paging_note(inventory) == ""
    monkeypatch.setattr(probing, "detect", lambda: replace(device.detect(), available_bytes=1000))
    note = probing.paging_note(inventory)
    assert "GB are more than the 0.0 GB of memory that are free" in note and "from disk" in note


def test_a_model_cut_while_it_is_probed(llama_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(llama_model.read_bytes())
    inventory = read_inventory(path)
    last = inventory.quantizable[-1]
    whole = probing.read_weights(inventory, last.name)
    some = probing.read_weights(inventory, last.name, np.array([3, 1]))
    assert np.array_equal(some, whole[[3, 1]])
    with open(path, "r+b") as file:
        file.truncate(last.offset + last.size_bytes // 2)
    with pytest.raises(ModelFileError, match=f"ends inside tensor {last.name}; it was changed"):
        probing.read_weights(inventory, last.name)


def test_resumes_after_ctrl_c(llama_model: Path, tmp_path: Path) -> None:
    inventory, seen = read_inventory(llama_model), []

    def interrupt(what: str, done: int, total: int) -> None:
        if what == "probing tensors" and done == 7 and not seen:
            seen.append(done)
            raise KeyboardInterrupt

    with pytest.raises(Interrupted, match="7 probes done; run the same command"):
        measure(inventory, tmp_path, on_progress=interrupt)
    kept = Sensitivity.load(tmp_path / "sensitivity.json", SHA)
    assert kept.n_probes == 7 and not kept.complete
    done: list[int] = []
    state = measure(
        inventory,
        tmp_path,
        on_progress=lambda what, n, _: done.append(n) if what == "probing tensors" else None,
    )
    assert done[0] == 7
    whole = measure(inventory, tmp_path / "whole")
    for name, known in whole.tensors.items():
        again = state.tensors[name]
        assert again.errors.weights == pytest.approx(known.errors.weights, rel=1e-5)
        first = next(iter(known.probes))
        assert again.probes[first].kld[:2] == pytest.approx(known.probes[first].kld[:2], rel=1e-3)
    assert (
        sensitivity.resumable(
            tmp_path / "sensitivity.json",
            replace(state.provenance, settings={**state.provenance.settings, "probe_chunks": 2}),
            tmp_path / "imatrix.gguf",
        )
        is None
    )
    with pytest.raises(ArtifactError, match="made for the model with SHA-256"):
        Sensitivity.load(tmp_path / "sensitivity.json", "1" * 64)


def test_probe_that_gives_nan_is_left_out(
    llama_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = probing.ProbeBench.compare
    calls: list[str] = []

    def broken(self, reference):  # type: ignore[no-untyped-def]
        result = real(self, reference)
        name = "blk.0.attn_k.weight"
        if not np.array_equal(self._stored(name), self.weights(name)):
            calls.append("tried")
            result.kld_nats[3] = np.nan
        return result

    monkeypatch.setattr(probing.ProbeBench, "compare", broken)
    inventory = read_inventory(llama_model)
    state = measure(inventory, tmp_path)
    assert len(calls) == 2 * len([pair for pair in state.excluded if "attn_k" in pair]) + sum(
        "all tensors" in pair for pair in state.excluded
    )
    assert "the probe gave NaN or Inf twice" in state.excluded.values()
    assert {pair.split()[0] for pair in state.excluded} == {"blk.0.attn_k.weight", "all"}
    assert not state.tensors["blk.0.attn_k.weight"].probes
    # What was left out is no option; the tensor's other types are told from the other layer.
    found = options.build_options(inventory, state, [])
    kinds = found.types[list(found.names).index("blk.0.attn_k.weight")]
    assert kinds and not {pair.split()[1] for pair in state.excluded} & set(kinds)
    assert not state.model.damage("blk.0.attn_k.weight", "Q5_0").is_probed


def test_more_effort_builds_on_less(llama_model: Path, tmp_path: Path) -> None:
    inventory = read_inventory(llama_model)
    less = measure(inventory, tmp_path)
    before = {(n, t): p.kld for n, k in less.tensors.items() for t, p in k.probes.items()}
    counted: list[str] = []
    more = measure(
        inventory,
        tmp_path,
        Effort("normal", 4, 1.0, 2),
        on_progress=lambda what, done, total: counted.append(what),
    )
    assert "collecting the imatrix" not in counted and "measuring output errors" not in counted
    for (name, kind), kld in before.items():
        assert list(more.tensors[name].probes[kind].kld[: len(kld)]) == list(kld)
    assert all(len(next(iter(t.probes.values())).kld) == 4 for t in more.tensors.values())
    same = measure(inventory, tmp_path, on_progress=fail)
    assert same.n_probes == more.n_probes and same.effort == "normal"


def fail(what: str, done: int, total: int) -> None:
    raise AssertionError(f"nothing is left to do, but: {what}")


def test_time_runs_out_and_the_rest_is_told_from_neighbours(
    llama_model: Path, tmp_path: Path
) -> None:
    inventory = read_inventory(llama_model)
    state = measure(inventory, tmp_path, Effort("normal", 4, 1.0, 2, minutes=1e-6))
    assert state.complete and state.n_probes == 0
    with pytest.raises(CalibrationError, match=r"neither it nor its like was probed"):
        sensitivity.require_probed(state)


# --- the imatrix ---------------------------------------------------------------------------------


def test_imatrix_equals_sums_taken_from_numpy(tmp_path: Path) -> None:
    """The attention input of layer 0 can be computed by hand: the normed embedding."""
    path = models.build(tmp_path / "m.gguf", kind="F32")
    inventory = read_inventory(path)
    reader = {t.name: t.data for t in gguf.GGUFReader(path).tensors}
    collector = imatrix_collection.ImatrixCollector(imatrix_collection.n_matrices(inventory))
    tokens = np.arange(128, dtype=np.int32).reshape(2, 64) % 250
    token_set = calibration.TokenSet.scored_from(0, "t", tokens)
    with llama.LoadedModel(path) as model, model.context(64, 1, 2, collector) as context:
        collected = imatrix_collection.collect(context, collector, token_set)
    x = reader["token_embd.weight"].reshape(-1, 256)[tokens.reshape(-1)].astype(np.float64)
    x /= np.sqrt((x**2).mean(axis=1, keepdims=True) + 1e-5)
    x *= reader["blk.0.attn_norm.weight"]
    entry = collected.entries["blk.0.attn_q.weight"]
    np.testing.assert_allclose(entry.sums[0], (x**2).sum(axis=0), rtol=1e-4)
    assert entry.counts.tolist() == [128]
    assert set(collected.entries) == {t.name for t in inventory.quantizable} - {"token_embd.weight"}


def test_tied_head_is_in_the_imatrix(probed: Measured) -> None:
    inventory, folder, _ = probed
    entries = load_imatrix(folder, inventory).entries
    assert ("token_embd.weight" if inventory.tied_embeddings else "output.weight") in entries


def test_experts_are_counted_apart(moe_model: Path, tmp_path: Path) -> None:
    inventory = read_inventory(moe_model)
    measure(inventory, tmp_path)
    entries = load_imatrix(tmp_path, inventory).entries
    counts = entries["blk.0.ffn_up_exps.weight"].counts
    assert counts.shape == (4,) and counts.sum() == 2 * 4 * 128  # two of four, 4 chunks of 128
    assert len(set(counts.tolist())) > 1
    assert entries["blk.0.ffn_down_exps.weight"].sums.shape == (4, 256)


def test_llama_cpps_layout_of_the_file(probed: Measured) -> None:
    """As tools/imatrix writes it and common_imatrix_load reads it."""
    inventory, folder, _ = probed
    reader = gguf.GGUFReader(folder / "imatrix.gguf")
    assert reader.fields["general.type"].contents() == "imatrix"
    assert reader.fields["imatrix.chunk_count"].contents() == SHORT.fitting_chunks
    assert reader.fields["imatrix.chunk_size"].contents() == SHORT.n_ctx
    names = {t.name: t for t in reader.tensors}
    for tensor in inventory.quantizable:
        sums = names.get(f"{tensor.name}.in_sum2")
        if sums is not None:
            assert sums.shape.tolist() == [tensor.row_length, tensor.n_experts]
            assert names[f"{tensor.name}.counts"].shape.tolist() == [1, tensor.n_experts]


def test_bad_imatrix_files(llama_model: Path, rows_576_model: Path, tmp_path: Path) -> None:
    inventory = read_inventory(llama_model)
    name = "blk.0.attn_q.weight"

    def write(name: str, sums: np.ndarray) -> Path:
        entry = imatrix.ImatrixEntry(sums.astype(np.float32), np.ones(len(sums), np.float32))
        imatrix.write_imatrix(tmp_path / "i.gguf", imatrix.Imatrix({name: entry}, ["x"], 1))
        return tmp_path / "i.gguf"

    assert imatrix.read_imatrix(write(name, np.ones((1, 256))), inventory).datasets == ("x",)
    bad = np.ones((1, 256))
    bad[0, 9] = np.nan
    for sums, tensor, reason in (
        (bad, name, "NaN or Inf"),
        (-np.ones((1, 256)), name, "damaged sums"),
        (np.ones((1, 128)), name, "needs 1 x 256"),
        (np.ones((1, 256)), "blk.99.attn_q.weight", "another model's"),
    ):
        with pytest.raises(CalibrationError, match=reason):
            imatrix.read_imatrix(write(tensor, sums), inventory)
    with pytest.raises(CalibrationError, match="not 'imatrix'"):
        imatrix.read_imatrix(rows_576_model, inventory)


def test_zero_columns_and_unseen_experts_are_substituted_and_counted() -> None:
    sums = np.array([[0, 4, 8, 0], [0, 0, 0, 0]], np.float32)
    made = imatrix.Imatrix({"e": imatrix.ImatrixEntry(sums, np.array([2, 0], np.float32))})
    assert made.weights("e").tolist() == [2, 2, 4, 2, 1, 1, 1, 1]
    assert (made.coverage.n_zero_columns, made.coverage.n_unseen_experts) == (2, 1)
    assert made.weights("absent") is None


# --- texts ---------------------------------------------------------------------------------------


def test_calibration_and_probe_text_share_no_chunk(llama_model: Path) -> None:
    with llama.LoadedModel(llama_model) as model:
        split = calibration.split_for_calibration(
            model, texts(), fitting_chunks=10**6, probe_chunks=9, n_ctx=128, probe_ctx=64
        )
    sets = [split.fitting, split.probe, split.check]
    assert [s.n_chunks for s in sets][1:] == [9, 8]
    # Any 32 tokens in a row at an even place tell where in the text they come from.
    seen = [
        {row[i : i + 32].tobytes() for row in s.tokens for i in range(0, s.n_ctx - 31, 32)}
        for s in sets
    ]
    for a, b in itertools.combinations(seen, 2):
        assert not a & b


def test_texts_that_cannot_be_used(llama_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_bytes(b"good line\nbad \xff line")
    with pytest.raises(CalibrationError, match=r"not UTF-8 at byte 14 \(line 2, value 0xff\)"):
        calibration.read_text(path)
    path.write_text("Too short.")
    with llama.LoadedModel(llama_model) as model:
        with pytest.raises(CalibrationError, match=r"0 tokens; at least 1536 are needed"):
            calibration.split_for_calibration(
                model,
                [calibration.read_text(path)],
                n_ctx=128,
                probe_ctx=64,
            )
        with pytest.raises(CalibrationError, match=r"scoring 1000 needs"):
            calibration.verification_set(model, calibration.read_text(path), 512, 1000)


# --- plans ---------------------------------------------------------------------------------------


def make(inventory: Inventory, folder: Path, state: Sensitivity, **wishes: object) -> plan.Plan:
    request = PlanRequest(**wishes)  # type: ignore[arg-type]
    imatrix = load_imatrix(folder, inventory)
    return planner.Planner(inventory, state, imatrix, request, folder).plan()


def test_predicted_size_is_the_files(probed: Measured, tmp_path: Path) -> None:
    inventory, folder, state = probed
    weights = load_imatrix(folder, inventory)
    for wishes in ({"prefer": "memory"}, {"target_bpw": 6.0}, {"prefer": "balanced"}):
        made = make(inventory, folder, state, **wishes)
        output = tmp_path / f"{len(list(tmp_path.iterdir()))}.gguf"
        quantize.quantize_model(
            inventory, made.types, output, imatrix=weights, extra_metadata=made.extra_metadata()
        )
        assert output.stat().st_size == made.size_bytes
        if "target_bpw" in wishes:
            assert made.bits_per_weight <= 6.0


def test_limits_hold_and_more_room_is_never_worse(
    probed: Measured,
) -> None:
    inventory, folder, state = probed
    last = np.inf
    smallest = make(inventory, folder, state, prefer="memory", max_kld_nats=1e9).size_bytes
    for size in np.linspace(smallest, inventory.size_bytes, 6).astype(int).tolist():
        made = make(inventory, folder, state, max_size_bytes=size)
        assert made.size_bytes <= size and made.gap <= 1e-4
        assert made.kld_nats <= last * (1 + 1e-4)
        last = made.kld_nats
    with pytest.raises(InfeasiblePlanError, match=rf"the nearest possible is {smallest} bytes"):
        make(inventory, folder, state, max_size_bytes=smallest - 1)
    floor = make(inventory, folder, state, prefer="memory", max_kld_nats=0.05)
    assert floor.kld_nats <= 0.05


def test_our_plan_beats_the_stock_map_in_prediction(
    probed: Measured,
) -> None:
    inventory, folder, state = probed
    for preset in ("Q3_K_M", "Q4_K_M", "Q6_K"):
        types = planner.stock_map(inventory, state, preset)
        made = make(
            inventory, folder, state, max_size_bytes=planner.stock_size(inventory, types) + 400
        )
        assert made.kld_nats <= state.model.total(types).nats * (1 + 1e-4)


def test_llama_quantize_makes_the_same_tensors_from_the_type_file(
    probed: Measured, tmp_path: Path
) -> None:
    inventory, folder, state = probed
    weights = load_imatrix(folder, inventory)
    made = make(inventory, folder, state, target_bpw=6.5)
    lines = recipes.tensor_type_lines(made.types, inventory).splitlines()
    pairs = [line.split("=") for line in lines]
    assert all(re.fullmatch(r"\^[a-z0-9_\\.]+\$=[a-z0-9_]+", line) for line in lines)
    ours, theirs = tmp_path / "ours.gguf", tmp_path / "theirs.gguf"
    quantize.quantize_model(inventory, made.types, ours, imatrix=weights)
    llama.stock_quantize(
        inventory.files[0],
        theirs,
        "Q8_0",
        n_threads=2,
        imatrix={n: weights.weights(n) for n in weights.entries},
        tensor_types=[(pattern, lookup(kind).ggml_id) for pattern, kind in pairs],
    )
    assert read_inventory(theirs).types == dict(made.types)
    assert tensor_bytes(ours) == tensor_bytes(theirs)


def test_plan_file_round_trip(probed: Measured, tmp_path: Path) -> None:
    inventory, folder, state = probed
    made = make(inventory, folder, state, target_bpw=6.0)
    made.save(tmp_path / "plan.json")
    assert plan.Plan.load(tmp_path / "plan.json", SHA).types == made.types
    document = json.loads((tmp_path / "plan.json").read_text())
    for change, reason in (
        ({"schema_version": 99}, "schema_version 99"),
        ({"kind": "apreqel sensitivity"}, "field kind"),
        ({"data": {"types": {}}}, "plan is damaged"),
    ):
        (tmp_path / "bad.json").write_text(json.dumps(document | change))
        with pytest.raises(ArtifactError, match=reason):
            plan.Plan.load(tmp_path / "bad.json")


@pytest.mark.parametrize(
    ("text", "expected"),
    [("95MB", 95_000_000), ("1.5GiB", 1610612736), ("102400", 102400), ("2 kib", 2048)],
)
def test_sizes_people_write(text: str, expected: int) -> None:
    assert parse_size(text) == expected


def test_sizes_nobody_means() -> None:
    for text in ("", "MB", "1.2.3", "-5", "12 parsecs"):
        with pytest.raises(UsageError):
            parse_size(text)


# --- the KV cache --------------------------------------------------------------------------------


def test_kv_cache_types_are_probed(llama_model: Path, tmp_path: Path) -> None:
    inventory = read_inventory(llama_model)
    found = kv_cache.measure_kv(inventory, SHA, texts(), 2)
    assert set(found.k) == set(found.v) == set(qtypes.KV_TYPES) - {"F16"} and not found.excluded
    for probes in (found.k, found.v):
        assert 0 <= probes["Q8_0"].mean < probes["Q4_0"].mean
        assert probes["Q5_1"].mean < probes["Q4_1"].mean
    found.save(tmp_path / "kv.json")
    assert kv_cache.KvSensitivity.load(tmp_path / "kv.json", SHA) == found


# --- verification --------------------------------------------------------------------------------


def verified(inventory: Inventory, folder: Path, files: dict[str, Path], **options: object):  # type: ignore[no-untyped-def]
    settings = verify.VerifySettings(n_ctx=128, n_scored=500, n_prompt=16, repetitions=2)
    return verify.verify(
        inventory,
        SHA,
        files,
        text=options.pop("text", calibration.heldout_text()),
        calibration_sha256={t.sha256 for t in texts()},
        settings=settings,
        n_threads=2,
        folder=folder,
    )


def test_verification_measures_what_numpy_measures(llama_model: Path, tmp_path: Path) -> None:
    inventory = read_inventory(llama_model)
    files = {}
    for kind in ("Q8_0", "Q4_0"):
        files[kind] = tmp_path / f"{kind}.gguf"
        quantize.quantize_model(inventory, uniform(inventory, kind), files[kind])
    report = verified(inventory, tmp_path, files)
    original, good, poor = report.files
    assert abs(original.kld.mean) < 1e-7 and original.top1.mean == 1
    assert 0 < good.kld.mean < poor.kld.mean
    assert good.kld_median <= good.kld_p999
    assert report.versus[0].kld_ratio == pytest.approx(good.kld.mean / poor.kld.mean)
    assert "closer to the original" in report.versus[0].verdict
    assert original.speed is not None and original.speed.decode > 0
    # The same perplexity and divergence, computed plainly.
    nll, kld = [], []
    with llama.LoadedModel(llama_model) as a, llama.LoadedModel(files["Q4_0"]) as b:
        tokens = calibration.verification_set(a, calibration.heldout_text(), 128, 500)
        with a.context(128, 1, 2) as p_context, b.context(128, 1, 2) as q_context:
            for chunk in tokens.tokens:
                p = log_probabilities(p_context.evaluate(chunk[None], tokens.positions[:1]))
                q = log_probabilities(q_context.evaluate(chunk[None], tokens.positions[:1]))
                kld += divergences(p, q).tolist()
                nll += (-q[np.arange(len(q)), chunk[65:]]).tolist()
    assert report.n_scored == len(kld)
    assert poor.kld.mean == pytest.approx(np.mean(kld), rel=2e-3)
    assert poor.perplexity == pytest.approx(np.exp(np.mean(nll)), rel=1e-4)
    report.save(tmp_path / "report.json")
    loaded = verify.VerificationReport.load(tmp_path / "report.json")
    assert [f.kld for f in loaded.files] == [f.kld for f in report.files]


def test_verification_refuses_calibration_text(llama_model: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="was used for calibration"):
        verified(read_inventory(llama_model), tmp_path, {}, text=texts()[0])


def test_verification_refuses_another_model(
    llama_model: Path, rows_576_model: Path, tmp_path: Path
) -> None:
    types = read_inventory(llama_model).types
    with pytest.raises(VerificationError, match="the plan says"):
        verify.check_types(rows_576_model, types)


def test_presets_are_built_once(llama_model: Path, tmp_path: Path) -> None:
    source = Path(shutil.copy(llama_model, tmp_path / "m.gguf"))
    inventory = read_inventory(source)
    path = verify.build_preset(inventory, "q4_k_m", imatrix.Imatrix({}), tmp_path, 2)
    changed = path.stat().st_mtime_ns
    assert verify.build_preset(inventory, "Q4_K_M", imatrix.Imatrix({}), tmp_path, 2) == path
    assert path.stat().st_mtime_ns == changed
    assert Provenance(SHA).seed == 0
