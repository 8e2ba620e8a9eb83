"""Error feedback: weights moved against rounding, alone and through llama.cpp on tiny models."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support import Measured, data_bytes, load_imatrix, measure, tensor_bytes, workspace

from apreqel import llama, pipeline, quantize
from apreqel.errors import ArtifactError, EngineError
from apreqel.model.inventory import read_inventory
from apreqel.model.qtypes import lookup
from apreqel.plan.plan import Plan
from apreqel.plan.request import PlanRequest
from apreqel.sensitivity import gptq as feedback
from apreqel.sensitivity.gptq import Feedback


@pytest.fixture(scope="module", params=["llama", "moe"])
def measured(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Measured:
    inventory = read_inventory(request.getfixturevalue(f"{request.param}_model"))
    folder = tmp_path_factory.mktemp(f"feedback-{request.param}")
    return inventory, folder, measure(inventory, folder)


def correlated(random: np.random.Generator, n: int) -> np.ndarray:  # type: ignore[type-arg]
    """Activations [4096, n] that a few directions make most of, and one huge column."""
    x = random.normal(size=(4096, n // 8)) @ random.normal(size=(n // 8, n))
    x += 0.3 * random.normal(size=x.shape)
    x[:, 5] *= 100
    return x.astype(np.float32)


def test_the_factor_is_of_the_inverse() -> None:
    x = correlated(np.random.default_rng(0), 64)
    moments = (x.T @ x).astype(np.float64)
    upper = feedback.factor_of(moments).astype(np.float64)
    assert np.array_equal(upper, np.triu(upper))
    damped = moments + np.diag(np.full(64, 0.1 * np.median(np.diag(moments))))
    wanted = np.linalg.inv(damped.astype(np.float64))
    np.testing.assert_allclose(upper.T @ upper, wanted, atol=5e-3 * wanted.max())


@pytest.mark.parametrize("kind", ["Q4_0", "IQ4_NL", "Q5_1", "Q4_K", "Q3_K"])
def test_moved_weights_give_less_output_error(kind: str) -> None:
    random = np.random.default_rng(1)
    x = correlated(random, 768)
    fitted, held_out = x[::2], x[1::2]
    weights = random.normal(size=(64, 768)).astype(np.float32)
    importance = np.square(fitted).mean(axis=0)
    factor = feedback.factor_of((fitted.T @ fitted).astype(np.float64))
    own = feedback.own_inverses(factor, lookup(kind).block_size)
    moved = feedback.moved_rows(weights, factor, own, lookup(kind), importance)

    def error(values: np.ndarray) -> float:  # type: ignore[type-arg]
        back = llama.fake_quantize(values, lookup(kind), importance)
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
    factor = feedback.factor_of((x.T @ x).astype(np.float64))
    assert np.isfinite(factor).all() and (np.diag(factor) > 0).all()
    with pytest.raises(EngineError, match="not finite"):
        feedback.factor_of(np.full((4, 4), np.nan))


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "IQ4_NL", "Q8_0", "Q4_K"])
def test_a_block_is_rounded_as_in_its_row(kind: str) -> None:
    """Where the energy of a row is uneven too: what is made good is what will be written."""
    random = np.random.default_rng(3)
    rows = random.normal(size=(32, 1024)).astype(np.float32)
    rows *= np.repeat(random.uniform(0.5, 1.5, size=(32, 4)), 256, axis=1).astype(np.float32)
    importance = random.uniform(0.1, 10, size=1024).astype(np.float32)
    whole = llama.fake_quantize(rows, lookup(kind), importance)
    step = lookup(kind).block_size
    alone = [
        feedback._rounded(rows, first, first + step, lookup(kind), importance)
        for first in range(0, 1024, step)
    ]
    # A search for the best scale may end elsewhere by a last digit of the mean square.
    assert (np.concatenate(alone, axis=1) == whole).mean() > 0.99


def test_the_file_is_as_planned_but_closer_rounded(measured: Measured, tmp_path: Path) -> None:
    inventory, folder, state = measured
    space = workspace(inventory, folder)
    imatrix = pipeline.load_imatrix(space)
    request = PlanRequest("accuracy", target_bpw=5.0, feedback=True)
    made, path = pipeline.plan(space, request, state, imatrix, None)
    plain, _ = pipeline.plan(space, replace(request, feedback=False), state, imatrix, None)
    most = 5.0 * inventory.n_weights / 8
    assert max(data_bytes(inventory, p.types) for p in (made, plain)) <= most
    assert made.metadata["apreqel.plan"] != plain.metadata["apreqel.plan"]
    assert any("error feedback moves weights" in note for note in made.notes)
    klds = [next(t.kld.mean for t in p.trials if t.label == "plan") for p in (made, plain)]
    assert klds[0] != klds[1]
    # It is counted where it is asked for: in predictions, and in what real files tell of totals.
    assert {k.kld.mean: k.feedback for k in state.knots} == {klds[0]: True, klds[1]: False}
    assert not state.gains
    without = state.model.raw_total(made.types)
    state.learn_gains(feedback_of(measured, 2).gains())
    assert state.model.raw_total(made.types) < without
    knots = state.knots
    state.learn_totals([knot for knot in knots if knot.feedback])  # all that was known by then
    assert made.kld_nats == pytest.approx(state.model.total(made.types).nats)
    state.learn_totals(knots)
    state.learn_gains({})
    made.save(path)
    tensors = {}
    for threads in (1, 2):
        output = tmp_path / f"{threads}.gguf"
        with feedback_of(measured, threads).moved(made.types) as source:
            quantize.quantize_model(
                source, made.types, output, imatrix=imatrix,
                extra_metadata=made.extra_metadata(), n_threads=threads,
            )  # fmt: skip
        tensors[threads] = output.read_bytes()
        assert output.stat().st_size == made.size_bytes == Plan.load(path).size_bytes
    assert tensors[1] == tensors[2]
    quantize.quantize_model(
        inventory, made.types, tmp_path / "plain.gguf", imatrix=imatrix,
        extra_metadata=made.extra_metadata(),
    )  # fmt: skip
    ours, theirs = (tensor_bytes(tmp_path / f"{n}.gguf") for n in ("1", "plain"))
    changed = {name for name in ours if ours[name] != theirs[name]}
    assert changed and not {n for n in changed if "exps" in n or "embd" in n}


def test_gains_are_measured_once(measured: Measured, monkeypatch: pytest.MonkeyPatch) -> None:
    inventory, _, state = measured
    found = feedback_of(measured, 2).gains()
    for name, row in found.items():
        tensor = inventory.by_name[name]
        assert (tensor.layer is not None or tensor.role == "output") and tensor.n_experts == 1
        assert row.keys() <= state.tensors[name].errors.weights.keys()
        assert all(0 < gain < 1.2 for gain in row.values())
    assert np.median([g for row in found.values() for g in row.values()]) < 0.95
    monkeypatch.setattr(Feedback, "_measured_gains", lambda self: pytest.fail("measured again"))
    assert feedback_of(measured, 1).gains() == found


def feedback_of(measured: Measured, n_threads: int) -> Feedback:
    inventory, folder, state = measured
    return Feedback(inventory, load_imatrix(folder, inventory), state, folder, n_threads)


def test_measured_before_there_was_feedback(measured: Measured) -> None:
    inventory, folder, state = measured
    old = replace(state, fitting_tokens=[])
    space = workspace(inventory, folder)
    with pytest.raises(ArtifactError, match="written before error feedback; for --feedback run"):
        pipeline.plan(space, PlanRequest(feedback=True), old, pipeline.load_imatrix(space), None)
