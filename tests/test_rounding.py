"""Rounding by second moments: alone, through the C program, and in plans of tiny models."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support import (
    LITTLE,
    SHORT,
    data_bytes,
    divergences_of_files,
    measure,
    tensor_bytes,
    texts,
    uniform,
    workspace,
)

from apreqel import pipeline, quantize
from apreqel.arrays import Floats
from apreqel.errors import ArtifactError
from apreqel.evaluate.real_files import measured_files
from apreqel.llama.quants import fake_quantize
from apreqel.model.inventory import read_inventory
from apreqel.model.qtypes import lookup
from apreqel.plan.plan import Plan
from apreqel.plan.request import PlanRequest
from apreqel.sensitivity import moments as second_moments
from apreqel.sensitivity.damage import damage_model
from apreqel.sensitivity.measurement import ProbedModel
from apreqel.sensitivity.moments import _Sums
from apreqel.sensitivity.rounding import Rounding
from apreqel.sensitivity.texts import check_set


@pytest.fixture(scope="module", params=["llama", "moe"])
def probed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ProbedModel:
    inventory = read_inventory(request.getfixturevalue(f"{request.param}_model"))
    return measure(inventory, tmp_path_factory.mktemp(f"rounding-{request.param}"))


def correlated(random: np.random.Generator, n: int) -> Floats:
    """Activations [4096, n] that a few directions make most of, and one huge column."""
    x = random.normal(size=(4096, n // 8)) @ random.normal(size=(n // 8, n))
    x += 0.3 * random.normal(size=x.shape)
    x[:, 5] *= 100
    return x.astype(np.float32)


def moments_of(x: Floats, path: Path) -> Path:
    sums = _Sums(x.shape[1])
    sums.add(x)
    path.write_bytes(sums.damped(1.0))
    return path


@pytest.mark.parametrize("kind", quantize.ROUNDED_TYPES)
def test_rows_come_nearer_in_the_outputs_that_they_give(kind: str, tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    x = correlated(random, 768)
    fitted, held_out = x[::2], x[1::2]
    weights = random.normal(size=(45, 768)).astype(np.float32)
    weights[7] = 0
    importance = np.square(fitted).mean(axis=0)
    path, qtype = moments_of(fitted, tmp_path / "moments"), lookup(kind)
    found = {
        n: quantize.rounded_rows(weights, [qtype], importance, path, tmp_path, n)[kind]
        for n in (1, 3)
    }
    assert np.array_equal(found[1], found[3])  # whatever the number of threads
    before = fake_quantize(weights, qtype, importance)

    def errors(rows: Floats, x: Floats) -> Floats:
        return np.square((weights - rows) @ x.T).mean(axis=1)

    assert errors(found[1], held_out).sum() < 0.8 * errors(before, held_out).sum()
    moments = np.fromfile(path, np.float32).reshape(768, 768).astype(np.float64)
    after, was = (
        np.einsum("ri,ij,rj->r", weights - rows, moments, weights - rows)
        for rows in (found[1], before)
    )
    assert (after <= was * (1 + 1e-4)).all()  # row by row, in what it is rounded for
    # What ggml itself reads is what the program meant: written again it stays as it is.
    assert not found[1][7].any()


@pytest.mark.parametrize("kind", quantize.ROUNDED_TYPES)
def test_blocks_are_put_together_as_they_were(kind: str, tmp_path: Path) -> None:
    """Columns that are independent, and weights that the type holds exactly: nothing to change."""
    random = np.random.default_rng(3)
    rows = fake_quantize(random.normal(size=(16, 512)).astype(np.float32), lookup(kind), None)
    np.eye(512, dtype=np.float32).tofile(tmp_path / "moments")
    again = fake_quantize(rows, lookup(kind), None)
    found = quantize.rounded_rows(rows, [lookup(kind)], None, tmp_path / "moments", tmp_path, 1)
    error, before = (float(np.square(r - rows).sum()) for r in (found[kind], again))
    assert error <= before
    exact = (again == rows).all(axis=1)
    assert np.array_equal(found[kind][exact], rows[exact])


def test_what_is_the_same_at_every_token_counts_as_told() -> None:
    x = np.random.default_rng(4).normal(size=(512, 64)).astype(np.float32) + 3
    sums = _Sums(64)
    sums.add(x)
    whole, quarter = (
        np.frombuffer(sums.damped(b), np.float32).reshape(64, 64) for b in (1.0, 0.25)
    )
    mean = x.mean(axis=0)
    np.testing.assert_allclose(whole - quarter, 0.75 * np.outer(mean, mean), rtol=1e-3)
    assert np.linalg.eigvalsh(quarter.astype(np.float64)).min() > 0
    for nothing in (np.zeros((8, 64)), np.full((8, 64), np.nan)):
        sums = _Sums(64)
        sums.add(nothing.astype(np.float32))
        assert sums.damped(1.0) == b""


def test_columns_that_are_alike_and_have_all_the_energy(tmp_path: Path) -> None:
    """As massive activations do."""
    random = np.random.default_rng(2)
    x = random.normal(size=(512, 64)).astype(np.float32)
    x[:, 0] *= 1e6
    x[:, 1] = x[:, 0]
    weights = random.normal(size=(8, 64)).astype(np.float32)
    path = moments_of(x, tmp_path / "moments")
    found = quantize.rounded_rows(weights, [lookup("Q4_0")], None, path, tmp_path, 1)["Q4_0"]
    before = fake_quantize(weights, lookup("Q4_0"), None)
    assert np.isfinite(found).all()
    errors = [float(np.square((weights - rows) @ x.T).sum()) for rows in (found, before)]
    assert errors[0] < 0.1 * errors[1]


@pytest.mark.parametrize("damage", ["short", "long", "gone"])
def test_second_moments_that_do_not_fit_are_told(
    damage: str, llama_model: Path, tmp_path: Path
) -> None:
    inventory = read_inventory(llama_model)
    name, path = "blk.0.attn_q.weight", tmp_path / "moments"
    n_bytes = 4 * inventory.by_name[name].row_length ** 2
    if damage != "gone":
        path.write_bytes(b"\0" * (n_bytes + (4 if damage == "long" else -4)))
    types = uniform(inventory, "Q4_0")
    with pytest.raises(Exception, match=r"second moments|cannot open") as caught:
        quantize.quantize_model(inventory, types, tmp_path / "o.gguf", moments={name: path})
    assert str(path) in str(caught.value)
    assert not (tmp_path / "o.gguf").exists()


def test_the_file_is_as_planned_but_closer_rounded(probed: ProbedModel, tmp_path: Path) -> None:
    inventory, imatrix = probed.inventory, probed.imatrix
    request = PlanRequest("accuracy", target_bpw=5.0)
    made, path = pipeline.plan(probed, request, None)
    plain, _ = pipeline.plan(probed, replace(request, plain=True), None)
    most = 5.0 * inventory.n_weights / 8
    assert max(data_bytes(inventory, p.types) for p in (made, plain)) <= most
    assert made.metadata["apreqel.plan"] != plain.metadata["apreqel.plan"]
    klds = [next(f.kld.mean for f in p.files if f.label == "plan") for p in (made, plain)]
    assert klds[0] != klds[1]
    # It is counted where it is asked for: in predictions, and in what real files tell of totals.
    files = measured_files(probed).own
    assert {f.kld.mean: f.is_rounded for f in files} == {klds[0]: True, klds[1]: False}
    without = damage_model(probed.sensitivity)
    ratios = Rounding(probed).ratios().ratios
    with_it = replace(without, rounding_ratios=ratios, files=[f for f in files if f.is_rounded])
    assert with_it.damage_sum(made.types) < without.damage_sum(made.types)
    # Those files are all that was known by then.
    assert made.damage_nats == pytest.approx(with_it.predicted(made.types).nats)
    made.save(path)
    written = {}
    for threads in (1, 2):
        output = tmp_path / f"{threads}.gguf"
        moments = Rounding(with_threads(probed, threads)).moments(made.types)
        quantize.quantize_model(
            inventory, made.types, output, imatrix=imatrix,
            extra_metadata=made.extra_metadata(), n_threads=threads, moments=moments,
        )  # fmt: skip
        written[threads] = output.read_bytes()
        assert output.stat().st_size == made.size_bytes == Plan.load(path).size_bytes
    assert written[1] == written[2]
    quantize.quantize_model(
        inventory, made.types, tmp_path / "plain.gguf", imatrix=imatrix,
        extra_metadata=made.extra_metadata(),
    )  # fmt: skip
    # The same map is closer to the original rounded anew, on text that was not fitted.
    found = probed.sensitivity
    text = check_set([*found.check_tokens, *found.probe_tokens])
    anew, plainly = (
        divergences_of_files(inventory.files[0], tmp_path / f"{name}.gguf", text).mean()
        for name in ("1", "plain")
    )
    assert anew < plainly
    ours, theirs = (tensor_bytes(tmp_path / f"{n}.gguf") for n in ("1", "plain"))
    changed = {name for name in ours if ours[name] != theirs[name]}
    assert changed == set(Rounding(probed).moments(made.types))
    assert not {n for n in changed if "exps" in n}


def test_ratios_are_measured_once(probed: ProbedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    found = Rounding(probed).ratios()
    for name, row in found.ratios.items():
        tensor = probed.inventory.by_name[name]
        assert tensor.n_experts == 1
        assert row.keys() <= probed.sensitivity.tensors[name].errors.weights.keys()
        assert all(0 < ratio < 1.2 for ratio in row.values())
        assert row or tensor.role == "token_embd"  # where it is looked up only
    assert np.median([r for row in found.ratios.values() for r in row.values()]) < 0.95
    monkeypatch.setattr(Rounding, "_measured_ratios", lambda *_: pytest.fail("measured again"))
    assert Rounding(with_threads(probed, 1)).ratios() == found
    # What is known better does for a quick plan, too; a quick one's own is kept apart.
    quick = replace(probed, sensitivity=replace(probed.sensitivity, effort="quick"))
    assert Rounding(quick).ratios() == found
    kept = Rounding(probed)._moments.folder / "ratios.json"
    kept.rename(kept.with_suffix(".away"))
    monkeypatch.undo()
    fewer = Rounding(quick).ratios()
    assert not kept.exists() and fewer != found
    for name, row in fewer.ratios.items():
        assert list(row.values()) == pytest.approx(list(found.ratios[name].values()), abs=0.3)
    kept.with_suffix(".away").rename(kept)


def test_tensors_without_second_moments_are_left_to_ggml(
    llama_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a note, and the others rounded anew; damaged files are told."""
    real, names = _Sums.damped, ["blk.1.ffn_down.weight"]

    def nothing(sums: _Sums, bias_counts: float) -> bytes:
        if len(sums._squares) == 512 and names:  # the first of the two down projections
            names.pop()
            return b""
        return real(sums, bias_counts)

    monkeypatch.setattr(_Sums, "damped", nothing)
    for old in ("gptq-0123456789ab", "moments-0123456789ab", "moments"):
        (tmp_path / old).mkdir()
    probed = measure(read_inventory(llama_model), tmp_path)
    made, _ = pipeline.plan(probed, PlanRequest(target_bpw=5.0), None, check=False)
    ratios = Rounding(probed).ratios().ratios
    left = next(name for name, row in ratios.items() if not row and "ffn_down" in name)
    assert any("are rounded by ggml alone" in note for note in made.notes)
    types = uniform(probed.inventory, "Q4_0")
    paths = Rounding(probed).moments(types)
    folders = {path.name for path in probed.space.folder.iterdir() if path.is_dir()}
    assert folders == {"moments", paths["blk.0.attn_q.weight"].parent.name}
    assert left not in paths and "blk.0.attn_q.weight" in paths
    paths["blk.0.attn_q.weight"].write_bytes(b"x")
    with pytest.raises(ArtifactError, match="has 1 bytes, not"):
        Rounding(probed).moments(types)


def test_moments_come_with_the_imatrix_or_in_passes_of_their_own(
    llama_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inventory, passes = read_inventory(llama_model), list[str]()
    probed = measure(inventory, tmp_path / "whole")
    types = uniform(inventory, "Q4_0")
    [folder] = (tmp_path / "whole").glob("moments-*")
    at_once = {path.name: path.read_bytes() for path in folder.glob("*.f32")}
    assert {path.name for path in Rounding(probed).moments(types).values()} <= set(at_once)
    # With little memory some come with the imatrix, others later; the same numbers but for order.
    monkeypatch.setattr(second_moments, "_ROOM_BYTES", 4 * 300 * 1024)
    probed = measure(inventory, tmp_path / "parts", progress=lambda what, *_: passes.append(what))
    [folder] = (tmp_path / "parts").glob("moments-*")
    assert 0 < len(list(folder.glob("*.f32"))) < len(at_once)
    # For plans that are plain there are none.
    space = workspace(inventory, tmp_path / "plain")
    pipeline.probe(space, effort=LITTLE, texts=texts(), settings=SHORT, plain=True)
    assert not list((tmp_path / "plain").glob("moments-*"))
    assert "collecting second moments" not in passes
    for path in Rounding(probed).moments(types).values():
        assert path.parent == folder
        found, whole = np.fromfile(path, np.float32), np.frombuffer(at_once[path.name], np.float32)
        off = np.linalg.norm(found - whole) / np.linalg.norm(whole)
        # The imatrix asks for all logits: the last layer goes on with one token more of each chunk.
        assert off < (1e-5 if "blk.0" in path.name else 0.02)
    assert "collecting second moments" in passes


def with_threads(probed: ProbedModel, n_threads: int) -> ProbedModel:
    return replace(probed, space=replace(probed.space, n_threads=n_threads))
