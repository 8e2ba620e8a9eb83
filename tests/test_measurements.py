"""Imatrix, probes, plans, profiles and verification through the real llama.cpp on tiny models."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import struct
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import models
import numpy as np
import pytest
from support import (
    SHA,
    SHORT,
    divergences,
    log_probabilities,
    measure,
    planner_of,
    tensor_bytes,
    texts,
    uniform,
    workspace,
)

from apreqel import pipeline, quantize
from apreqel.artifacts import plain
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
from apreqel.evaluate import presets, verify
from apreqel.llama import engine
from apreqel.llama.quants import fake_quantize
from apreqel.llama.stock import stock_quantize, stock_types
from apreqel.model import imatrix, qtypes, recipes
from apreqel.model.inventory import Inventory, read_inventory
from apreqel.model.qtypes import lookup
from apreqel.plan import plan
from apreqel.plan.constraints import Constraints
from apreqel.plan.make_plan import make_plan
from apreqel.plan.request import PlanRequest, parse_size
from apreqel.plan.solve import solve_request
from apreqel.sensitivity import bench as probing
from apreqel.sensitivity import imatrix_collection
from apreqel.sensitivity import measure as sensitivity
from apreqel.sensitivity.effort import Effort
from apreqel.sensitivity.kv_cache import cache_sensitivity
from apreqel.sensitivity.measure import first_pairs
from apreqel.sensitivity.measurement import (
    ProbedModel,
    Sensitivity,
    TensorErrors,
    TensorSensitivity,
)
from apreqel.sensitivity.output_errors import activations_by_expert, mean_cosine
from apreqel.sensitivity.texts import (
    TokenSet,
    chunks_of,
    heldout_text,
    read_text,
    split_for_calibration,
    verification_set,
)
from apreqel.workspace import opened

QUANT_TYPES = [name for name, qtype in qtypes.registry().items() if qtype.is_quantized]


@pytest.fixture(scope="module", params=["llama", "rows_576", "moe", "split"])
def probed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ProbedModel:
    """A tiny model of each kind with its measurements."""
    model = request.getfixturevalue(f"{request.param}_model")
    inventory = read_inventory(model[0] if isinstance(model, list) else model)
    folder = tmp_path_factory.mktemp(request.param)
    return measure(inventory, folder)


# --- probing -------------------------------------------------------------------------------------


def test_every_tensor_is_probed(probed: ProbedModel) -> None:
    inventory, folder, found = probed.inventory, probed.space.folder, probed.sensitivity
    assert found.complete and not found.excluded
    assert set(found.tensors) == {t.name for t in inventory.quantizable}
    assert all(t.probes for t in found.tensors.values())
    assert len(found.tensors) < found.n_probes <= 1.5 * len(found.tensors) + 1
    assert all(len(p.kld) in (2, 4) for t in found.tensors.values() for p in t.probes.values())
    assert abs(found.self_kld_nats) < 1e-7
    assert not list(folder.glob("scratch-*"))
    for known in found.tensors.values():
        errors = known.errors.weights
        assert errors["Q8_0"] < errors["Q5_0"] < errors["Q4_0"]
        assert 0.5 < known.errors.half_text_ratio < 2
    legal = {t for known in found.tensors.values() for t in known.errors.weights}
    assert "Q8_0" in found.kernels
    assert any(key.startswith("Q6_K ") for key in found.kernels) == ("Q6_K" in legal)
    assert all(loss.real_nats > 0 for loss in found.kernels.values())
    # The last layer goes on with the scored tokens only. Layers add to what goes into them.
    assert len(found.layer_cosines) == 1 and all(0.2 < c < 0.999 for c in found.layer_cosines)


def test_what_predicts_no_next_token_is_refused_before_any_work(tmp_path: Path) -> None:
    def start(path: Path) -> None:
        with pipeline.open_workspace(
            str(path), folder=tmp_path / "w", allow_requantize=True, progress=fail
        ):
            pass

    kinds = {
        "gives embeddings": models.build_bert(tmp_path / "bert.gguf"),
        "a diffusion model": models.build(
            tmp_path / "llada.gguf", architecture="llada", n_head_kv=4
        ),
    }
    for reason, path in kinds.items():
        with pytest.raises(UnsupportedModelError, match=f"{path.name}: {reason}"):
            start(path)
    # What is no model at all is named by the user's path, not by that of a copy.
    writer = gguf.GGUFWriter(str(tmp_path / "mmproj.gguf"), "clip")
    writer.add_type("mmproj")
    writer.add_tensor("v.blk.0.attn_q.weight", np.zeros((64, 64), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnsupportedModelError, match=r"mmproj.gguf: a mmproj for another model"):
        start(tmp_path / "mmproj.gguf")


def test_zeros_are_right_in_every_type_and_what_overflows_is_left_out(tmp_path: Path) -> None:
    def change(name: str, values: np.ndarray) -> np.ndarray:
        if name == "blk.0.attn_output.weight":
            return 0 * values
        if name == "blk.0.ffn_up.weight":
            values[3, 7] = 6e4 * 12  # in Q4_0 its scale is beyond F16
        return values

    path = models.build(tmp_path / "m.gguf", kind="F32", change=change)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = measure(read_inventory(path), tmp_path).sensitivity
    zeros = found.tensors["blk.0.attn_output.weight"].errors
    assert set(zeros.weights.values()) == {0.0}
    huge = found.tensors["blk.0.ffn_up.weight"].errors.weights
    assert huge and all(np.isfinite(list(huge.values())))


def test_cosines_are_of_rows() -> None:
    """Of angles of 60, 90 and 180 degrees, whatever the lengths."""
    a = np.array([[2.0, 0], [0, 3.0], [1.0, 1.0]])
    b = np.array([[0.5, 0.75**0.5], [5.0, 0], [-7.0, -7.0]])
    assert mean_cosine(a, b) == pytest.approx((0.5 + 0 - 1) / 3)


def test_a_probe_is_what_the_quantised_file_gives(llama_model: Path, tmp_path: Path) -> None:
    """Hot-swapping is another way to what reloading a dequantised file gives: the same."""
    inventory = read_inventory(llama_model)
    names = ["blk.0.ffn_down.weight", "blk.1.attn_v.weight"]
    with engine.LoadedModel(llama_model) as model:
        tokens = split_for_calibration(
            model, texts(), fitting_chunks=4, n_ctx=64, probe_chunks=4
        ).probe
        with model.context(64, 2, 2) as context:
            halves = [tokens.part(slice(0, 2)), tokens.part(slice(2, 4))]
            plain = [context.evaluate(t.tokens, t.positions).copy() for t in halves]
    with probing.scratch_copy(workspace(inventory, tmp_path)) as scratch:
        with (
            engine.LoadedModel(scratch, patchable=True) as model,
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
        stock_quantize(
            quantised,
            dequantised,
            "Q8_0",
            imatrix={},
            n_threads=2,
            allow_requantize=True,
            tensor_types=[(f"^{t.name}$", 1) for t in back.quantizable],
        )
        with (
            engine.LoadedModel(dequantised, patchable=True) as model,
            model.context(64, 2, 2) as context,
        ):
            bench = probing.ProbeBench(inventory, scratch, context, 2)
            reloaded = bench.compare(reference)
            bench.close()
    assert swapped.kld_nats.mean() > 1e-5
    np.testing.assert_allclose(swapped.kld_nats, reloaded.kld_nats, rtol=1e-3, atol=1e-7)


def test_what_killed_runs_left_is_swept_under_the_lock(llama_model: Path, tmp_path: Path) -> None:
    for name in (
        "scratch-a1b2c3d_",
        "text-00000000",
        "measured-abcdefgh",
        "profile-12345678",
        "my-notes",
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.gguf").write_bytes(b"left")
    (tmp_path / "scratch-elsewhere").symlink_to(tmp_path / "my-notes")
    with opened(str(llama_model), tmp_path, allow_requantize=False):
        left = {path.name for path in tmp_path.iterdir() if path.is_dir()}
    assert left == {"my-notes", "scratch-elsewhere"}


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
        measure(inventory, tmp_path, progress=interrupt)
    kept = Sensitivity.load(tmp_path / "sensitivity.json", SHA)
    assert kept.n_probes == 7 and not kept.complete
    done: list[int] = []

    def count(what: str, n: int, total: int) -> None:
        if what == "probing tensors":
            done.append(n)

    found = measure(inventory, tmp_path, progress=count).sensitivity
    assert done[0] == 7
    (tmp_path / "whole").mkdir()
    whole = measure(inventory, tmp_path / "whole").sensitivity
    for name, known in whole.tensors.items():
        again = found.tensors[name]
        assert again.errors.weights == pytest.approx(known.errors.weights, rel=1e-5)
        first = next(iter(known.probes))
        assert again.probes[first].kld[:2] == pytest.approx(known.probes[first].kld[:2], rel=1e-3)
    other = {**found.provenance.settings, "probe_chunks": 2}
    provenance = replace(found.provenance, settings=other)
    space = workspace(inventory, tmp_path)
    assert sensitivity.resumable(space, found.provenance) and not sensitivity.resumable(
        space, provenance
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
    probed = measure(inventory, tmp_path)
    found = probed.sensitivity
    single = [pair for pair in found.excluded if pair.startswith("blk.")]
    assert len(calls) == 2 * len(single) + len(found.excluded) - len(single)
    assert "the probe gave NaN or Inf twice" in found.excluded.values()
    assert {pair.split()[0] for pair in found.excluded} == {"blk.0.attn_k.weight", "all"}
    assert not found.tensors["blk.0.attn_k.weight"].probes
    # What was left out is no option; the tensor's other types are told from the other layer.
    planner = planner_of(probed)
    options = planner.options(None)
    types = options.types[list(options.names).index("blk.0.attn_k.weight")]
    assert types and not {pair.split()[1] for pair in found.excluded} & set(types)
    assert not planner.damage.damage("blk.0.attn_k.weight", "Q5_0").is_probed


def test_more_effort_builds_on_less(llama_model: Path, tmp_path: Path) -> None:
    inventory = read_inventory(llama_model)
    less = measure(inventory, tmp_path).sensitivity
    before = {(n, t): p.kld for n, k in less.tensors.items() for t, p in k.probes.items()}
    counted: list[str] = []

    def count(what: str, done: int, total: int) -> None:
        counted.append(what)

    more = measure(inventory, tmp_path, Effort("thorough", 4, 1.0), progress=count).sensitivity
    assert "collecting the imatrix" not in counted and "measuring output errors" not in counted
    for (name, type_name), kld in before.items():
        assert list(more.tensors[name].probes[type_name].kld[: len(kld)]) == list(kld)
    assert all(len(next(iter(t.probes.values())).kld) == 4 for t in more.tensors.values())
    same = measure(inventory, tmp_path, progress=fail).sensitivity
    assert same.n_probes == more.n_probes and same.effort == "thorough"


def fail(what: str, done: int, total: int) -> None:
    raise AssertionError(f"nothing is left to do, but: {what}")


def test_a_role_of_odd_layers_alone_is_probed_with_little_effort() -> None:
    """As mixtures have that are dense in every other layer."""
    errors = TensorErrors({"Q4_0": 0.01, "Q8_0": 1e-5}, {})
    tensors = {
        f"blk.{i}.{role}": TensorSensitivity(role, i, errors)
        for i in range(8)
        for role in ("attn_q", "ffn_up_exps" if i % 2 else "ffn_up")
    }
    idle = replace(errors, is_run=False)
    tensors["blk.8.nextn"] = TensorSensitivity("nextn", 8, idle)
    assert first_pairs(tensors, 1) == [(n, "Q4_0") for n in tensors if n != "blk.8.nextn"]
    half = [name for name, _ in first_pairs(tensors, 2)]
    assert [n for n in half if "exps" in n] == ["blk.1.ffn_up_exps", "blk.5.ffn_up_exps"]
    assert len(half) == 8


def test_time_runs_out_and_the_rest_is_told_from_neighbours(
    llama_model: Path, tmp_path: Path
) -> None:
    inventory = read_inventory(llama_model)
    found = measure(inventory, tmp_path, Effort("normal", 4, 1.0, minutes=1e-6)).sensitivity
    assert found.complete and found.n_probes == 0
    with pytest.raises(CalibrationError, match=r"neither it nor its like was probed"):
        found.require_probed()


# --- the imatrix ---------------------------------------------------------------------------------


def test_imatrix_equals_sums_taken_from_numpy(tmp_path: Path) -> None:
    """The attention input of layer 0 can be computed by hand: the normed embedding."""
    path = models.build(tmp_path / "m.gguf", kind="F32")
    inventory = read_inventory(path)
    reader = {t.name: t.data for t in gguf.GGUFReader(path).tensors}
    collector = imatrix_collection.ImatrixCollector(imatrix_collection.n_matrices(inventory))
    tokens = np.arange(128, dtype=np.int32).reshape(2, 64) % 250
    token_set = TokenSet.scored_from(0, "t", tokens)
    with engine.LoadedModel(path) as model, model.context(64, 1, 2, collector) as context:
        collected = imatrix_collection.collect(context, collector, token_set)
    x = reader["token_embd.weight"].reshape(-1, 256)[tokens.reshape(-1)].astype(np.float64)
    x /= np.sqrt((x**2).mean(axis=1, keepdims=True) + 1e-5)
    x *= reader["blk.0.attn_norm.weight"]
    entry = collected.entries["blk.0.attn_q.weight"]
    np.testing.assert_allclose(entry.sums[0], (x**2).sum(axis=0), rtol=1e-4)
    assert entry.counts.tolist() == [128]
    assert set(collected.entries) == {t.name for t in inventory.quantizable} - {"token_embd.weight"}


def test_tied_head_is_in_the_imatrix(probed: ProbedModel) -> None:
    inventory, entries = probed.inventory, probed.imatrix.entries
    assert ("token_embd.weight" if inventory.tied_embeddings else "output.weight") in entries


def test_experts_are_counted_apart(moe_model: Path, tmp_path: Path) -> None:
    inventory = read_inventory(moe_model)
    entries = measure(inventory, tmp_path).imatrix.entries
    counts = entries["blk.0.ffn_up_exps.weight"].counts
    assert counts.shape == (4,) and counts.sum() == 2 * 4 * 128  # two of four, 4 chunks of 128
    assert len(set(counts.tolist())) > 1
    assert entries["blk.0.ffn_down_exps.weight"].sums.shape == (4, 256)


def test_heads_side_by_side_have_sums_of_their_own() -> None:
    """As DeepSeek's latent attention has them: one matrix a head, each with its own activations."""
    values = np.random.default_rng(4).normal(size=(1, 3, 5, 8)).astype(np.float32)
    collector = imatrix_collection.ImatrixCollector({"attn_k_b.weight": 3})
    collector("attn_k_b.weight", values, None)
    entry = collector.result(["x"], 1, 5).entries["attn_k_b.weight"]
    np.testing.assert_allclose(entry.sums, np.square(values[0]).sum(axis=1), rtol=1e-6)
    assert entry.counts.tolist() == [5, 5, 5]
    for head, x in activations_by_expert(values, None, 3):
        np.testing.assert_array_equal(x, values[0, head])


def test_llama_cpps_layout_of_the_file(probed: ProbedModel) -> None:
    """As tools/imatrix writes it and common_imatrix_load reads it."""
    inventory, folder = probed.inventory, probed.space.folder
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


def test_an_imatrix_of_before_it_was_gguf(moe_model: Path, tmp_path: Path) -> None:
    """As llama.cpp's save_imatrix_legacy lays it out: means times uses, and no shapes."""
    inventory, path = read_inventory(moe_model), tmp_path / "i.dat"
    means = {
        "blk.0.attn_q.weight": np.arange(1, 257, dtype="<f4"),
        "blk.0.ffn_up_exps.weight": np.arange(1, 4 * 256 + 1, dtype="<f4"),
        "blk.9.nextn.eh_proj.weight": np.ones(512, "<f4"),
    }
    written = struct.pack("<i", len(means))
    for name, mean in means.items():
        written += struct.pack("<i", len(name)) + name.encode()
        written += struct.pack("<ii", 7, mean.size) + (7 * mean).tobytes()
    ending = struct.pack("<ii", 42, 8) + b"wiki.raw"
    for content, chunks, datasets in (
        (written + ending, 42, ("wiki.raw",)),
        (written, 0, ()),
    ):
        path.write_bytes(content)
        found = imatrix.read_imatrix(path, inventory)
        assert (found.n_chunks, tuple(found.datasets)) == (chunks, datasets)
        assert sorted(found.entries) == sorted(means)[:2]
        for name in found.entries:
            weights = found.weights(name)
            assert weights is not None
            np.testing.assert_allclose(weights, means[name])
    for cut in range(8 + len("blk.0.attn_q.weight"), len(written), 501):
        path.write_bytes(written[:cut])
        with pytest.raises(CalibrationError, match="damaged at byte"):
            imatrix.read_imatrix(path, inventory)
    path.write_bytes(struct.pack("<ii", 1, 5) + b"some." + bytes(9))
    with pytest.raises(ModelFileError):
        imatrix.read_imatrix(path, inventory)


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
    # A layer or a vision tower more than this model has is of no account.
    entry = imatrix.ImatrixEntry(np.ones((1, 256), np.float32), np.ones(1, np.float32))
    both = imatrix.Imatrix({name: entry, "blk.9.nextn.eh_proj.weight": entry}, ["x"], 1)
    imatrix.write_imatrix(tmp_path / "more.gguf", both)
    assert set(imatrix.read_imatrix(tmp_path / "more.gguf", inventory).entries) == {name}


def test_zero_columns_and_unseen_experts_are_substituted_and_counted() -> None:
    sums = np.array([[0, 4, 8, 0], [0, 0, 0, 0]], np.float32)
    made = imatrix.Imatrix({"e": imatrix.ImatrixEntry(sums, np.array([2, 0], np.float32))})
    assert made.weights("e").tolist() == [2, 2, 4, 2, 1, 1, 1, 1]
    assert (made.coverage.n_zero_columns, made.coverage.n_unseen_experts) == (2, 1)
    assert made.weights("absent") is None


# --- texts ---------------------------------------------------------------------------------------


def test_calibration_and_probe_text_share_no_chunk(llama_model: Path) -> None:
    with engine.LoadedModel(llama_model) as model:
        split = split_for_calibration(
            model, texts(), fitting_chunks=10**6, probe_chunks=9, check_chunks=8, n_ctx=128
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


def test_a_probe_chunk_shows_many_places_deep_in_a_context(llama_model: Path) -> None:
    with engine.LoadedModel(llama_model) as model:
        split = split_for_calibration(model, texts(), probe_chunks=12, n_ctx=256)
        stream = [bytes(chunk) for chunk in chunks_of(model, texts(), 256)]
    probe = split.probe
    assert (probe.n_chunks, probe.n_pieces, probe.n_draws) == (12, 3, 36)
    for row, positions in zip(probe.tokens, probe.positions, strict=True):
        places = {
            next(i for i, chunk in enumerate(stream) if bytes(row[start : start + 64]) in chunk)
            for start in range(0, 256, 64)
        }
        assert len(places) == 4
        # The first piece is context alone, and so is the first eighth of every other one.
        assert set(positions % 64) == set(range(8, 63)) and positions.min() == 64 + 8


def test_output_errors_count_what_is_wrong_at_every_token_by_role(
    llama_model: Path, tmp_path: Path
) -> None:
    """Against numpy, on all rows and all tokens but those of the first pieces."""
    inventory = read_inventory(llama_model)
    probed = measure(inventory, tmp_path)
    text, seen = probed.sensitivity.probe_text, dict[str, np.ndarray]()

    def listen(name: str, values: np.ndarray, experts: object) -> None:
        if name.startswith("blk.0."):  # the last layer sees the scored tokens only
            seen[name] = values.reshape(text.n_chunks, text.n_ctx, -1)[:, 64 + 8 :].copy()

    with (
        engine.LoadedModel(llama_model) as model,
        model.context(text.n_ctx, text.n_chunks, 2, listen) as context,
    ):
        context.evaluate(text.tokens, text.positions)
    for role, counts in (("attn_k", 0.25), ("attn_v", 4.0), ("attn_output", 1.0)):
        name = f"blk.0.{role}.weight"
        w, x = probing.read_weights(inventory, name), seen[name].reshape(-1, 256)
        assert len(w) <= 256
        y, e = x @ w.T, x @ (w - fake_quantize(w, lookup("Q4_0"), probed.imatrix.weights(name))).T
        bias = len(x) * np.square(e.mean(axis=0)).sum()
        wrong = np.square(e).sum() + (counts - 1) * bias
        errors = probed.sensitivity.tensors[name].errors
        rel = 1e-2 if len(w) <= 128 else 0.2  # of more rows a sample is taken
        assert errors.weights["Q4_0"] == pytest.approx(wrong / np.square(y).sum(), rel=rel)
        assert errors.power == pytest.approx(np.square(y).sum() / len(x), rel=max(rel, 1e-2))


def test_texts_that_cannot_be_used(llama_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_bytes(b"good line\nbad \xff line")
    with pytest.raises(CalibrationError, match=r"not UTF-8 at byte 14 \(line 2, value 0xff\)"):
        read_text(path)
    path.write_text("Too short.")
    with engine.LoadedModel(llama_model) as model:
        with pytest.raises(CalibrationError, match=r"10 tokens; at least 1024 are needed"):
            split_for_calibration(
                model,
                [read_text(path)],
                n_ctx=128,
            )
        with pytest.raises(CalibrationError, match=r"scoring 1000 needs"):
            verification_set(model, read_text(path), 512, 1000)


# --- plans ---------------------------------------------------------------------------------------


def make(probed: ProbedModel, **wishes: Any) -> plan.Plan:
    planner = planner_of(probed, request=PlanRequest(**wishes))
    return make_plan(planner, solve_request(planner))


def test_predicted_size_is_the_files(probed: ProbedModel, tmp_path: Path) -> None:
    inventory = probed.inventory
    weights = probed.imatrix
    for wishes in ({"prefer": "memory"}, {"target_bpw": 6.0}, {"prefer": "balanced"}):
        made = make(probed, **wishes)
        output = tmp_path / f"{len(list(tmp_path.iterdir()))}.gguf"
        quantize.quantize_model(
            inventory, made.types, output, imatrix=weights, extra_metadata=made.extra_metadata()
        )
        assert output.stat().st_size == made.size_bytes
        if "target_bpw" in wishes:
            assert made.bits_per_weight <= 6.0


def test_limits_hold_and_more_room_is_never_worse(
    probed: ProbedModel,
) -> None:
    inventory = probed.inventory
    last = np.inf
    smallest = make(probed, prefer="memory", max_kld_nats=1e9).size_bytes
    for size in np.linspace(smallest, inventory.size_bytes, 6).astype(int).tolist():
        made = make(probed, max_size_bytes=size)
        assert made.size_bytes <= size and made.gap <= 1e-4
        assert made.damage_nats <= last * (1 + 1e-4)
        last = made.damage_nats
    with pytest.raises(InfeasiblePlanError, match=rf"the nearest possible is {smallest} bytes"):
        make(probed, max_size_bytes=smallest - 1)
    floor = make(probed, prefer="memory", max_kld_nats=0.05)
    assert floor.damage_nats <= 0.05


def test_no_other_map_within_the_size_is_predicted_better(probed: ProbedModel) -> None:
    """All maps of three tensors, the others pinned: their real sizes, their damages added up."""
    inventory = probed.inventory
    names = ["blk.0.attn_v.weight", "blk.1.attn_q.weight"]
    names += [t.name for t in inventory.quantizable if t.name.startswith("blk.1.ffn_down")]
    pinned = {t.name: "Q8_0" for t in inventory.quantizable if t.name not in names}
    tensors, model = probed.sensitivity.tensors, planner_of(probed).damage
    types = [[*tensors[n].errors.weights, inventory.by_name[n].qtype.name] for n in names]
    maps = [
        inventory.types | pinned | dict(zip(names, choice, strict=True))
        for choice in itertools.product(*types)
    ]
    damages = {(n, t): model.damage(n, t).nats for n in tensors for t in QUANT_TYPES}
    totals = np.array([sum(damages.get((n, m[n]), 0.0) for n in tensors) for m in maps])
    sizes = np.array([inventory.output_size(m) for m in maps])
    pins = Constraints(pins=list(pinned.items()))
    free = make(probed, max_size_bytes=10**9, constraints=pins)
    sizes += free.size_bytes - inventory.output_size(free.types)  # the plan's own metadata
    found = []
    for part in (0.15, 0.4, 0.75):
        fitting = sizes <= sizes.min() + part * np.ptp(sizes)
        exact = int(sizes[fitting][totals[fitting].argmin()])
        for most in (exact, exact - 1):  # the best map just fits, and just does not
            own = make(probed, max_size_bytes=most, constraints=pins)
            best = float(totals[sizes <= most].min())
            assert own.size_bytes <= most and pinned.items() <= own.types.items()
            assert own.damage_nats == pytest.approx(best, rel=1e-4)
            found.append(best)
    assert found[0] > found[2] > found[4]  # the size did decide, to the byte
    assert all(a < b for a, b in zip(found[::2], found[1::2], strict=True))


def test_llama_quantize_makes_the_same_tensors_from_the_type_file(
    probed: ProbedModel, tmp_path: Path
) -> None:
    inventory = probed.inventory
    weights = probed.imatrix
    made = make(probed, target_bpw=6.5)
    lines = recipes.tensor_type_lines(made.types, inventory).splitlines()
    pairs = [line.split("=") for line in lines]
    assert all(re.fullmatch(r"\^[a-z0-9_\\.]+\$=[a-z0-9_]+", line) for line in lines)
    ours, theirs = tmp_path / "ours.gguf", tmp_path / "theirs.gguf"
    quantize.quantize_model(inventory, made.types, ours, imatrix=weights)
    stock_quantize(
        inventory.files[0],
        theirs,
        "Q8_0",
        n_threads=2,
        imatrix={n: weights.weights(n) for n in weights.entries},
        tensor_types=[(pattern, lookup(kind).ggml_id) for pattern, kind in pairs],
    )
    assert read_inventory(theirs).types == dict(made.types)
    assert tensor_bytes(ours) == tensor_bytes(theirs)


def test_plan_file_round_trip(probed: ProbedModel, tmp_path: Path) -> None:
    made = make(probed, target_bpw=6.0)
    made.save(tmp_path / "plan.json")
    assert plain(plan.Plan.load(tmp_path / "plan.json", SHA)) == plain(made)
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


def test_cache_types_are_probed(llama_model: Path, tmp_path: Path) -> None:
    inventory = read_inventory(llama_model)
    space = workspace(inventory, tmp_path)
    found = cache_sensitivity(space, texts())
    assert set(found.k) == set(found.v) == set(qtypes.KV_TYPES) - {"F16"} and not found.excluded
    for probes in (found.k, found.v):
        assert 0 <= probes["Q8_0"].mean < probes["Q4_0"].mean
        assert probes["Q5_1"].mean < probes["Q4_1"].mean
    # Kept, and measured again for another text or another llama.cpp.
    watched = replace(space, progress=fail)
    assert cache_sensitivity(watched, texts()) == found
    with pytest.raises(AssertionError, match="nothing is left to do"):
        cache_sensitivity(watched, texts()[:-1])
    path = tmp_path / "kv-cache.json"
    document = json.loads(path.read_text())
    document["provenance"]["llama_build"] = "another"
    path.write_text(json.dumps(document))
    with pytest.raises(AssertionError, match="nothing is left to do"):
        cache_sensitivity(watched, texts())


# --- verification --------------------------------------------------------------------------------


def verified(inventory: Inventory, folder: Path, files: dict[str, Path], **options: object):  # type: ignore[no-untyped-def]
    settings = verify.VerifySettings(n_ctx=128, n_scored=500, n_prompt=16, repetitions=2)
    return verify.verify(
        workspace(inventory, folder),
        files,
        text=options.pop("text", heldout_text()),
        settings=settings,
    )


def test_verification_measures_what_numpy_measures(llama_model: Path, tmp_path: Path) -> None:
    inventory = read_inventory(llama_model)
    files = {}
    for kind in ("Q8_0", "Q4_0"):
        files[kind] = tmp_path / f"{kind}.gguf"
        quantize.quantize_model(inventory, uniform(inventory, kind), files[kind])
    started = time.monotonic()
    report = verified(inventory, tmp_path, files)
    seconds = time.monotonic() - started
    original, good, poor = report.files
    assert abs(original.kld.mean) < 1e-7 and original.top1.mean == 1
    assert 0 < good.kld.mean < poor.kld.mean
    assert report.versus[0].kld_ratio == pytest.approx(good.kld.mean / poor.kld.mean)
    assert "closer to the original" in report.versus[0].verdict
    # Tokens/s: what was timed cannot have taken longer than all of it did, nor next to nothing.
    speeds = [file.speed for file in report.files if file.speed]
    prefill = sum(2 * 16 / speed.prefill for speed in speeds)
    decode = sum(2 * 32 / speed.decode for speed in speeds)
    assert len(speeds) == 3 and prefill + decode < 1.5 * seconds
    assert prefill > 1e-4 * seconds and decode > 1e-3 * seconds
    # The same perplexity and divergence, computed plainly.
    nll, kld, same = [], [], []
    with engine.LoadedModel(llama_model) as a, engine.LoadedModel(files["Q4_0"]) as b:
        tokens = verification_set(a, heldout_text(), 128, 500)
        with a.context(128, 1, 2) as p_context, b.context(128, 1, 2) as q_context:
            for chunk in tokens.tokens:
                p = log_probabilities(p_context.evaluate(chunk[None], tokens.positions[:1]))
                q = log_probabilities(q_context.evaluate(chunk[None], tokens.positions[:1]))
                kld += divergences(p, q).tolist()
                same += (p.argmax(axis=1) == q.argmax(axis=1)).tolist()
                nll += (-q[np.arange(len(q)), chunk[65:]]).tolist()
    assert report.n_scored == len(kld)
    assert poor.kld.mean == pytest.approx(np.mean(kld), rel=2e-3)
    assert poor.kld_median == pytest.approx(np.median(kld), rel=2e-3)
    assert poor.kld_p999 == pytest.approx(np.quantile(kld, 0.999), rel=2e-3)
    quantiles = np.quantile(kld, verify.KLD_PARTS)
    assert poor.kld_quantiles == pytest.approx(quantiles.tolist(), rel=5e-3)
    assert poor.top1.mean == np.mean(same) < 1
    assert poor.perplexity == pytest.approx(np.exp(np.mean(nll)), rel=1e-4)
    assert poor.perplexity_interval[0] < poor.perplexity < poor.perplexity_interval[1]
    report.save(tmp_path / "report.json")
    loaded = verify.VerificationReport.load(tmp_path / "report.json")
    assert plain(loaded) == plain(report)


def test_verification_refuses_calibration_text(llama_model: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="was used for calibration"):
        verified(read_inventory(llama_model), tmp_path, {}, text=texts()[0])


def test_verification_refuses_another_model(llama_model: Path, tmp_path: Path) -> None:
    other = models.build(tmp_path / "other.gguf", n_layer=1, more_tokens=32)
    with pytest.raises(
        VerificationError,
        match=r"other\.gguf: has 320 tokens in its vocabulary, the original 288; it is another",
    ):
        verified(read_inventory(llama_model), tmp_path, {"other": other})
    assert not list(tmp_path.glob("text-*"))


def test_a_file_of_other_types_than_planned_is_refused(llama_model: Path) -> None:
    types = read_inventory(llama_model).types
    verify.check_types(llama_model, types)
    name = "blk.0.attn_v.weight"
    fewer = {n: t for n, t in types.items() if n != name}
    for planned, message in (
        (types | {name: "Q4_0"}, f"{name} is F16, the plan says Q4_0"),
        (fewer, f"{name} is F16, the plan says absent"),
        (types | {"blk.9.x": "F16"}, "blk.9.x is absent, the plan says F16"),
    ):
        with pytest.raises(VerificationError, match=message):
            verify.check_types(llama_model, planned)


def test_presets_are_built_once_for_what_they_are_made_from(
    llama_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Path(shutil.copy(llama_model, tmp_path / "m.gguf"))
    inventory, folder = read_inventory(source), tmp_path / "work"
    folder.mkdir()
    space, nothing = workspace(inventory, folder), imatrix.Imatrix({})
    for old in ("stock-Q4_K_M.gguf", ".stock-Q4_K_M-0123456789ab.gguf.part"):
        (folder / old).write_bytes(b"of an earlier version, or killed")
    other = folder / "stock-Q4_K.gguf"
    other.write_bytes(b"another preset's")
    path = presets.build_preset(space, "q4_k_m", nothing)
    types = stock_types(source, "Q4_K_M", has_imatrix_for=[])
    assert read_inventory(path).types == types
    changed = path.stat().st_mtime_ns
    assert presets.build_preset(space, "Q4_K_M", nothing) == path
    assert path.stat().st_mtime_ns == changed
    assert {*folder.iterdir()} == {path, other}
    tensor = inventory.by_name["blk.0.ffn_up.weight"]
    sums = np.geomspace(1e-3, 1e3, tensor.row_length, dtype=np.float32)[None]
    entry = imatrix.ImatrixEntry(sums, np.ones(1, np.float32))
    known = imatrix.Imatrix({tensor.name: entry})
    weighed = presets.build_preset(space, "Q4_K_M", known)
    assert weighed != path and not path.exists() and weighed.exists()
    assert presets.build_preset(space, "Q4_K_M", imatrix.Imatrix({tensor.name: entry})) == weighed
    elsewhere = presets.build_preset(replace(space, sha256="1" * 64), "Q4_K_M", known)
    assert elsewhere != weighed
    monkeypatch.setattr(presets, "build_info", lambda: "a newer llama.cpp")
    assert presets.build_preset(space, "Q4_K_M", known) not in (weighed, elsewhere)
    assert len(list(folder.iterdir())) == 2 and other.read_bytes() == b"another preset's"


@pytest.mark.parametrize(("kind", "preset"), [("Q4_0", "Q3_K_M"), ("Q8_0", "Q4_K_M")])
def test_a_quantised_source_is_made_smaller_and_as_it_is_loses_nothing(
    kind: str, preset: str, tmp_path: Path
) -> None:
    inventory = read_inventory(models.build(tmp_path / "m.gguf", kind=kind))
    probed = measure(inventory, tmp_path)
    assert probed.default_preset == probed.preset_of_size(None) == preset
    planner = planner_of(probed)
    assert planner.damage.predicted(inventory.types).nats == 0
    made, _ = pipeline.plan(probed, PlanRequest(), None, check=False)
    assert made.size_bytes <= inventory.output_size(planner.stock) < 0.96 * inventory.size_bytes
    assert preset in made.binding[0].limit and made.damage_nats > 0
    kept, _ = pipeline.plan(
        probed, PlanRequest(max_size_bytes=2 * inventory.size_bytes), None, check=False
    )
    assert kept.types == inventory.types and kept.damage_nats == 0
