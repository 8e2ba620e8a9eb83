"""GPTQ: weights compensated for rounding, alone and through llama.cpp on tiny models."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support import data_bytes, divergences_of_files, measure, tensor_bytes, uniform

from apreqel import pipeline, quantize
from apreqel.errors import EngineError
from apreqel.evaluate.real_files import measured_files
from apreqel.llama.quants import fake_quantize
from apreqel.model.inventory import read_inventory
from apreqel.model.qtypes import lookup
from apreqel.plan.plan import Plan
from apreqel.plan.request import PlanRequest
from apreqel.sensitivity import gptq
from apreqel.sensitivity.bench import read_weights
from apreqel.sensitivity.damage import damage_model
from apreqel.sensitivity.gptq import Gptq
from apreqel.sensitivity.measurement import ProbedModel
from apreqel.sensitivity.texts import check_set


@pytest.fixture(scope="module", params=["llama", "moe"])
def probed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ProbedModel:
    inventory = read_inventory(request.getfixturevalue(f"{request.param}_model"))
    return measure(inventory, tmp_path_factory.mktemp(f"gptq-{request.param}"))


def correlated(random: np.random.Generator, n: int) -> np.ndarray:  # type: ignore[type-arg]
    """Activations [4096, n] that a few directions make most of, and one huge column."""
    x = random.normal(size=(4096, n // 8)) @ random.normal(size=(n // 8, n))
    x += 0.3 * random.normal(size=x.shape)
    x[:, 5] *= 100
    return x.astype(np.float32)


def test_the_factor_is_of_the_inverse() -> None:
    x = correlated(np.random.default_rng(0), 64)
    moments = (x.T @ x).astype(np.float64)
    upper = gptq.factor_of(moments).astype(np.float64)
    assert np.array_equal(upper, np.triu(upper))
    damped = moments + np.diag(np.full(64, 0.1 * np.median(np.diag(moments))))
    wanted = np.linalg.inv(damped.astype(np.float64))
    np.testing.assert_allclose(upper.T @ upper, wanted, atol=5e-3 * wanted.max())


@pytest.mark.parametrize("kind", ["Q4_0", "IQ4_NL", "Q5_1", "Q4_K", "Q3_K"])
def test_compensated_weights_give_less_output_error(kind: str) -> None:
    random = np.random.default_rng(1)
    x = correlated(random, 768)
    fitted, held_out = x[::2], x[1::2]
    weights = random.normal(size=(64, 768)).astype(np.float32)
    importance = np.square(fitted).mean(axis=0)
    factor = gptq.factor_of((fitted.T @ fitted).astype(np.float64))
    own = gptq.own_inverses(factor, lookup(kind).block_size)
    moved = gptq.compensated_rows(weights, factor, own, lookup(kind), importance)

    def error(values: np.ndarray) -> float:  # type: ignore[type-arg]
        back = fake_quantize(values, lookup(kind), importance)
        return float(np.square((weights - back) @ held_out.T).mean())

    assert error(moved) < 0.8 * error(weights)
    # The first block is rounded as it is; only those after it are moved.
    first = lookup(kind).block_size
    assert np.array_equal(moved[:, :first], weights[:, :first])
    assert not np.array_equal(moved[:, first:], weights[:, first:])


def test_columns_that_are_alike_and_have_all_the_energy() -> None:
    """As massive activations do: the matrix is singular but for the damping."""
    x = np.random.default_rng(2).normal(size=(512, 64)).astype(np.float32)
    x[:, 0] *= 1e6
    x[:, 1] = x[:, 0]
    factor = gptq.factor_of((x.T @ x).astype(np.float64))
    assert np.isfinite(factor).all() and (np.diag(factor) > 0).all()
    with pytest.raises(EngineError, match="not finite"):
        gptq.factor_of(np.full((4, 4), np.nan))


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "IQ4_NL", "Q8_0", "Q4_K"])
def test_a_block_is_rounded_as_in_its_row(kind: str) -> None:
    """Where the energy of a row is uneven too: what is compensated is what will be written."""
    random = np.random.default_rng(3)
    rows = random.normal(size=(32, 1024)).astype(np.float32)
    rows *= np.repeat(random.uniform(0.5, 1.5, size=(32, 4)), 256, axis=1).astype(np.float32)
    importance = random.uniform(0.1, 10, size=1024).astype(np.float32)
    whole = fake_quantize(rows, lookup(kind), importance)
    step = lookup(kind).block_size
    alone = [
        gptq._rounded(rows, first, first + step, lookup(kind), importance)
        for first in range(0, 1024, step)
    ]
    # A search for the best scale may end elsewhere by a last digit of the mean square.
    assert (np.concatenate(alone, axis=1) == whole).mean() > 0.99


def test_the_file_is_as_planned_but_closer_rounded(probed: ProbedModel, tmp_path: Path) -> None:
    inventory, imatrix = probed.inventory, probed.imatrix
    request = PlanRequest("accuracy", target_bpw=5.0, gptq=True)
    made, path = pipeline.plan(probed, request, None)
    plain, _ = pipeline.plan(probed, replace(request, gptq=False), None)
    most = 5.0 * inventory.n_weights / 8
    assert max(data_bytes(inventory, p.types) for p in (made, plain)) <= most
    assert made.metadata["apreqel.plan"] != plain.metadata["apreqel.plan"]
    assert any("GPTQ compensates weights" in note for note in made.notes)
    klds = [next(f.kld.mean for f in p.files if f.label == "plan") for p in (made, plain)]
    assert klds[0] != klds[1]
    # It is counted where it is asked for: in predictions, and in what real files tell of totals.
    files = measured_files(probed).own
    assert {f.kld.mean: f.gptq for f in files} == {klds[0]: True, klds[1]: False}
    without = damage_model(probed.sensitivity)
    ratios = Gptq(probed).ratios().ratios
    with_it = replace(without, gptq_ratios=ratios, files=[f for f in files if f.gptq])
    assert with_it.damage_sum(made.types) < without.damage_sum(made.types)
    # Those files are all that was known by then.
    assert made.damage_nats == pytest.approx(with_it.predicted(made.types).nats)
    made.save(path)
    written = {}
    for threads in (1, 2):
        output = tmp_path / f"{threads}.gguf"
        with Gptq(with_threads(probed, threads)).compensated(made.types) as source:
            quantize.quantize_model(
                source, made.types, output, imatrix=imatrix,
                extra_metadata=made.extra_metadata(), n_threads=threads,
            )  # fmt: skip
        written[threads] = output.read_bytes()
        assert output.stat().st_size == made.size_bytes == Plan.load(path).size_bytes
    assert written[1] == written[2]
    quantize.quantize_model(
        inventory, made.types, tmp_path / "plain.gguf", imatrix=imatrix,
        extra_metadata=made.extra_metadata(),
    )  # fmt: skip
    # The same map is closer to the original with weights compensated, on text that was not fitted.
    found = probed.sensitivity
    text = check_set([*found.check_tokens, *found.probe_tokens])
    compensated, rounded = (
        divergences_of_files(inventory.files[0], tmp_path / f"{name}.gguf", text).mean()
        for name in ("1", "plain")
    )
    assert compensated < rounded
    ours, theirs = (tensor_bytes(tmp_path / f"{n}.gguf") for n in ("1", "plain"))
    changed = {name for name in ours if ours[name] != theirs[name]}
    assert changed and not {n for n in changed if "exps" in n or "embd" in n}


def test_ratios_are_measured_once(probed: ProbedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    found = Gptq(probed).ratios()
    for name, row in found.ratios.items():
        tensor = probed.inventory.by_name[name]
        assert (tensor.layer is not None or tensor.role == "output") and tensor.n_experts == 1
        assert row.keys() <= probed.sensitivity.tensors[name].errors.weights.keys()
        assert row and all(0 < ratio < 1.2 for ratio in row.values())
    assert np.median([r for row in found.ratios.values() for r in row.values()]) < 0.95
    monkeypatch.setattr(Gptq, "_measured_ratios", lambda self: pytest.fail("measured again"))
    assert Gptq(with_threads(probed, 1)).ratios() == found


def test_moments_that_cannot_be_inverted_leave_their_tensor_as_it_is(
    llama_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a note, and the others compensated."""
    probed = measure(read_inventory(llama_model), tmp_path)
    real, names = gptq.factor_of, ["blk.1.ffn_down.weight"]

    def singular(moments: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
        if len(moments) == 512 and names:  # the first of the two down projections
            names.pop()
            raise EngineError("second moments of activations cannot be inverted")
        return real(moments)

    monkeypatch.setattr(gptq, "factor_of", singular)
    made, _ = pipeline.plan(probed, PlanRequest(target_bpw=5.0, gptq=True), None, check=False)
    ratios = Gptq(probed).ratios().ratios
    (left,) = [name for name, row in ratios.items() if not row]
    assert left.endswith("ffn_down.weight")
    assert any(f"GPTQ leaves 1 tensors as they are (first {left})" in n for n in made.notes)
    types = uniform(probed.inventory, "Q4_0")
    with Gptq(probed).compensated(types) as source:
        same = [
            np.array_equal(read_weights(source, n), read_weights(probed.inventory, n))
            for n in (left, "blk.0.attn_q.weight")
        ]
    assert same == [True, False]


def with_threads(probed: ProbedModel, n_threads: int) -> ProbedModel:
    return replace(probed, space=replace(probed.space, n_threads=n_threads))
