"""Channels rescaled: the same function, rounded closer, the whole way through llama.cpp."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from families import FAMILIES, build_family
from support import (
    LITTLE,
    SHORT,
    apreqel,
    divergences_of_files,
    expect,
    tensor_bytes,
    texts,
    uniform,
    workspace,
)

from apreqel import pipeline, quantize
from apreqel.errors import OutputError
from apreqel.evaluate.presets import build_preset
from apreqel.llama.engine import LoadedModel
from apreqel.model.inventory import read_inventory
from apreqel.model.qtypes import lookup
from apreqel.plan.plan import Plan
from apreqel.sensitivity import equalise
from apreqel.sensitivity import measure as sensitivity
from apreqel.sensitivity.equalise import equalised_model, imatrix_of_original, sites
from apreqel.sensitivity.texts import TokenSet, split_for_calibration
from apreqel.workspace import Workspace


def with_outliers(model: Path, path: Path) -> Path:
    """The same function, written so that a few channels are huge: as large models come."""
    shutil.copy(model, path)
    inventory = read_inventory(path)
    stored = np.memmap(path, np.uint8, "r+")
    random = np.random.default_rng(5)
    for site in sites(inventory):
        n = int(site.channels.max()) + 1
        scales = np.ones(n, np.float32)
        scales[random.choice(n, max(1, n // 24), replace=False)] = 32
        for name, by in ((site.writer, scales), *((r, 1 / scales) for r in site.readers)):
            tensor = inventory.by_name[name]
            raw = stored[tensor.offset : tensor.offset + tensor.size_bytes]
            dtype = np.float16 if tensor.qtype.name == "F16" else np.float32
            rows = raw.view(dtype).reshape(-1, tensor.row_length)
            is_matrix = name == site.writer and tensor.n_rows > 1
            factor = by[:, None] if is_matrix else by if name == site.writer else by[site.channels]
            rows[:] = (rows.astype(np.float32) * factor).astype(rows.dtype)
    stored.flush()
    return path


def check_text(model: Path) -> TokenSet:
    with LoadedModel(model, simulated=True) as loaded:
        return split_for_calibration(loaded, texts()).check


def written(space: Workspace) -> Path:
    path, reason = equalised_model(space)
    assert path is not None, reason
    return path


def test_sites_of_known_wirings(llama_model: Path, moe_model: Path) -> None:
    dense, mixture = (read_inventory(m) for m in (llama_model, moe_model))
    writers = [s.writer.removeprefix("blk.0.") for s in sites(dense) if "blk.0." in s.writer]
    assert writers == ["attn_norm.weight", "ffn_norm.weight", "ffn_up.weight", "attn_v.weight"]
    heads = next(s for s in sites(dense) if s.writer == "blk.0.attn_v.weight")
    values, outputs = (dense.by_name[f"blk.0.attn_{r}.weight"] for r in ("v", "output"))
    assert len(heads.channels) == outputs.row_length
    assert int(heads.channels.max()) + 1 == values.n_rows
    readers = next(s for s in sites(mixture) if s.writer == "blk.0.ffn_norm.weight").readers
    assert {"blk.0.ffn_gate_inp.weight", "blk.0.ffn_up_exps.weight"} <= set(readers)
    assert not any("exps" in s.writer for s in sites(mixture))


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_keeps_its_function_or_is_left_alone(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_family(tmp_path / "m.gguf", name)
    space = workspace(read_inventory(model), tmp_path)
    path, reason = equalised_model(space)
    if not sites(space.inventory):
        assert path is None and "are not wired in a way that is known" in reason
        return
    if path is None:  # a rounding of 1e-7 chose another of two experts alike
        assert space.inventory.n_experts and "differs from itself by" in reason
        monkeypatch.setattr(equalise, "MEAN_NATS", 1.0)
        monkeypatch.setattr(equalise, "MOST_NATS", 1.0)
        path = written(replace(space, folder=tmp_path / "again"))
    klds = divergences_of_files(model, path, check_text(model))
    assert np.median(klds) < equalise.MEAN_NATS and np.mean(klds > 1e-3) < 0.02


def test_a_model_with_huge_channels_rounds_closer(llama_model: Path, tmp_path: Path) -> None:
    model = with_outliers(llama_model, tmp_path / "m.gguf")
    inventory, text = read_inventory(model), check_text(model)
    assert divergences_of_files(llama_model, model, text).mean() < 1e-4
    path = written(workspace(inventory, tmp_path))
    assert path.read_bytes() != model.read_bytes()
    for kind in ("Q8_0", "Q4_0"):
        klds = []
        for source in (inventory, read_inventory(path)):
            quantize.quantize_model(source, uniform(source, kind), tmp_path / "q.gguf", force=True)
            klds.append(divergences_of_files(model, tmp_path / "q.gguf", text).mean())
        assert klds[1] < 0.8 * klds[0], kind


def test_it_is_written_once_and_again_if_it_was_changed(
    llama_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    space = workspace(read_inventory(llama_model), tmp_path)
    path = written(space)
    made = path.stat().st_mtime_ns
    assert written(space) == path and path.stat().st_mtime_ns == made
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    assert written(space).read_bytes() == whole
    path.unlink()
    monkeypatch.setattr(equalise, "MEAN_NATS", -1.0)
    assert "differs from itself by" in equalised_model(space)[1]
    assert not path.exists() and not list(path.parent.glob("scratch-*"))
    monkeypatch.setattr(equalise, "chosen_scales", lambda *_: pytest.fail("tried again"))
    assert "differs from itself by" in equalised_model(space)[1]


def test_files_of_others_stay(llama_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "w" / "equalised"
    folder.mkdir(parents=True)
    model = Path(shutil.copy(llama_model, folder / "m.gguf"))
    space = workspace(read_inventory(model), tmp_path / "w")
    with pytest.raises(OutputError, match="is not apreqel's, and would be lost"):
        equalised_model(space)
    assert model.read_bytes() == llama_model.read_bytes()
    # One that is rescaled is not rescaled again.
    done = written(workspace(read_inventory(llama_model), tmp_path / "other"))
    again = workspace(read_inventory(done), tmp_path / "third")
    assert equalised_model(again) == (None, "its channels are rescaled already")


def test_stock_is_that_of_the_model_as_it_was_given(llama_model: Path, tmp_path: Path) -> None:
    model = with_outliers(llama_model, tmp_path / "m.gguf")
    given = workspace(read_inventory(model), tmp_path / "w")
    with pipeline.equalised(given, True) as space:
        assert space.given is given.inventory and space.model != model
        probed = sensitivity.measure(space, texts=texts(), settings=SHORT, effort=LITTLE)
    plain = sensitivity.measure(given, texts=texts(), settings=SHORT, effort=LITTLE)
    found = imatrix_of_original(space, probed.imatrix)
    for name in plain.imatrix.entries:
        ours, theirs = found.weights(name), plain.imatrix.weights(name)
        np.testing.assert_allclose(ours, theirs, rtol=0.05)
    rescaled = build_preset(space, "Q4_K_M", probed.imatrix)
    expected = build_preset(given, "Q4_K_M", found)
    assert tensor_bytes(rescaled) == tensor_bytes(expected)
    # Both are probed now; what was probed last is gone on with.
    with pipeline.equalised(given) as chosen:
        assert chosen.model == model


def test_what_must_stay_in_bf16_is_not_rescaled(llama_model: Path) -> None:
    inventory = read_inventory(llama_model)
    norm = inventory.by_name["blk.0.ffn_norm.weight"]
    coarse = replace(norm, qtype=lookup("BF16"))
    tensors = tuple(coarse if t is norm else t for t in inventory.tensors)
    writers = {s.writer for s in sites(replace(inventory, tensors=tensors))}
    assert norm.name not in writers and "blk.0.attn_norm.weight" in writers


def test_the_whole_way(llama_model: Path, tmp_path: Path) -> None:
    model = with_outliers(llama_model, tmp_path / "m.gguf")
    expect(2, "--prefer 'x'", "plan", model, "--prefer", "x")
    folder = tmp_path / "m.gguf.apreqel"
    assert not (folder / "equalised").exists()  # refused before anything was written
    options = ["--target-bpw", "6", "--any-speed", "--effort", "quick", "-q", "-t", "2"]
    done = apreqel("plan", model, *options)
    assert done.returncode == 0, done.stderr
    assert "channels are rescaled" in done.stdout
    assert not (folder / "sensitivity.json").exists()
    plan = folder / "equalised" / "plan.json"
    done = apreqel("quantize", plan, "-q")
    assert done.returncode == 0, done.stderr
    output = tmp_path / "m-apreqel-accuracy.gguf"
    assert read_inventory(output).types == Plan.load(plan).types
    found = divergences_of_files(model, output, check_text(model)).mean()
    assert found < 3 * Plan.load(plan).damage_nats
    # The model that was given is not to be written over, though another file was read.
    before = model.read_bytes()
    expect(7, "is the input", "quantize", plan, "--output", model, "--force")
    assert model.read_bytes() == before
    expect(2, "is of the model as it was", "probe", model, "--equalise", "--imatrix", output)
    # What was probed as it is stays so, unless it is asked for.
    command = ["probe", model, "--effort", "quick", "-q", "-t", "2"]
    assert apreqel(*command, "--no-equalise").returncode == 0
    assert (folder / "sensitivity.json").exists()
    shutil.rmtree(folder / "equalised")
    assert apreqel(*command).returncode == 0 and not (folder / "equalised").exists()
    message = "cannot be equalised: its channels are rescaled already"
    expect(2, message, "probe", output, "--equalise", "--allow-requantize", "-t", "2")
