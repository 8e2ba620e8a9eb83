"""The damage model against made-up models whose truth is known, and its totals."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace

import numpy as np
import pytest

from apreqel.sensitivity.damage import DamageModel, MeasuredFile, expected_gain
from apreqel.sensitivity.measurement import KernelLoss, Probe, TensorErrors, TensorSensitivity
from apreqel.sensitivity.metrics import Estimate

TYPES = {"Q8_0": 3e-5, "Q6_K": 2e-4, "Q5_0": 1e-3, "Q4_0": 5e-3, "Q4_K": 5.5e-3, "Q3_K": 3e-2}


def steady(nats: float, chunks: int = 8) -> Probe:
    return Probe([nats] * chunks, [nats] * chunks)


def model_of(probes: dict[str, dict[str, Probe]], **options: object) -> DamageModel:
    return DamageModel(tensors_of(probes), **options)  # type: ignore[arg-type]


def tensors_of(
    probes: dict[str, dict[str, Probe]], errors: TensorErrors | None = None
) -> dict[str, TensorSensitivity]:
    """Tensors of one role in layer after layer, all with the same errors."""
    errors = errors or TensorErrors(TYPES, {})
    return {
        name: TensorSensitivity("ffn_up", i, errors, known)
        for i, (name, known) in enumerate(probes.items())
    }


def test_a_sure_probe_is_its_own_answer_and_others_follow_it() -> None:
    model = model_of({"a": {"Q4_0": steady(0.02)}})
    assert model.damage("a", "Q4_0").nats == pytest.approx(0.02, rel=1e-3)
    assert model.damage("a", "Q4_0").is_probed and not model.damage("a", "Q8_0").is_probed
    near, far = model.damage("a", "Q4_K"), model.damage("a", "Q8_0")
    assert near.nats == pytest.approx(0.022, rel=0.05)  # a = 4 nats per unit of error
    assert far.nats == pytest.approx(1.2e-4, rel=0.35)
    assert model.damage("a", "Q4_0").log_deviation < near.log_deviation < far.log_deviation


def test_damage_is_conditioned_as_a_joint_gaussian() -> None:
    """By the precision matrix of the joint distribution, another way to the same numbers."""
    kld = {"Q4_0": [0.02, 0.03, 0.025, 0.021], "Q8_0": [9e-5, 7e-5, 8e-5, 8e-5]}
    model = model_of({"a": {t: Probe(v, v) for t, v in kld.items()}})
    names = list(TYPES)
    x = np.log(list(TYPES.values()))
    # The prior: one tensor alone has its own level's mean, and a spread of 2.
    along = 0.15**2 * np.exp(-np.abs(x[:, None] - x) / 12)
    prior = 4.0 + along + 0.08**2 * np.eye(len(x))
    share = np.mean([np.array(v) / np.mean(v) for v in kld.values()], axis=0).mean()
    means = np.array([np.mean(kld[t]) for t in kld]) / share
    # Of 4 draws the spread is widened by the root of 3, Student's with 3 degrees of freedom.
    variances = np.array([3 * np.var(v, ddof=1) / 4 / np.mean(v) ** 2 for v in kld.values()])
    noise = np.diag(variances + 1e-9) + 0.9 * variances.min() * (1 - np.eye(2))
    at = [names.index(t) for t in kld]
    y = np.log(means) - x[at]
    between = prior[np.ix_(at, at)] - 4.0 + noise
    weights = np.linalg.solve(between, np.ones(2))
    level = weights @ y / weights.sum()
    joint = np.block([[prior, prior[:, at]], [prior[at], prior[np.ix_(at, at)] + noise]])
    precision = np.linalg.inv(joint)
    n = len(names)
    expected = level - np.linalg.solve(precision[:n, :n], precision[:n, n:] @ (y - level))
    deviations = np.sqrt(np.diag(np.linalg.inv(precision[:n, :n])))
    for i, t in enumerate(names):
        found = model.damage("a", t)
        assert math.log(found.nats) - x[i] == pytest.approx(expected[i], abs=1e-3)
        assert found.log_deviation == pytest.approx(deviations[i], rel=1e-2)


def test_intervals_hold_the_truth() -> None:
    """Tensors drawn as the model thinks of them: 95% intervals hold 19 of 20 damages."""
    random = np.random.default_rng(0)
    names, x = list(TYPES), np.log(list(TYPES.values()))
    along = 0.15**2 * np.exp(-np.abs(x[:, None] - x) / 12) + 0.08**2 * np.eye(len(x))
    probes, truth = {}, {}
    level = 0.0
    for i in range(60):
        level += random.normal(0, 0.2)
        a = level + random.multivariate_normal(np.zeros(len(x)), along)
        truth[f"t{i}"] = np.exp(a + x)
        common = random.lognormal(0, 0.3, 8)
        seen = random.choice(len(x), int(random.integers(0, 3)), replace=False)
        probes[f"t{i}"] = {
            names[j]: Probe(list(truth[f"t{i}"][j] * common), [0.0] * 8) for j in seen
        }
    model = model_of(probes)
    held = [
        low <= truth[name][j] <= high
        for name in probes
        for j, t in enumerate(names)
        for low, high in [model.damage(name, t).interval]
    ]
    assert np.mean(held) > 0.85
    unprobed = [n for n, p in probes.items() if not p]
    errors = [math.log(model.damage(n, "Q4_0").nats / truth[n][3]) for n in unprobed]
    assert np.std(errors) < 0.6  # the walk itself has come much farther than that


def test_probes_on_few_chunks_are_brought_to_the_level_of_all() -> None:
    hard = np.array([4.0, 2.0, 1.0, 1.0])
    probes = {f"t{i}": {"Q4_0": Probe(list(0.01 * hard), [0.0] * 4)} for i in range(5)}
    probes["few"] = {"Q4_0": Probe(list(0.01 * hard[:2]), [0.0] * 2)}
    model = model_of(probes)
    assert model.damage("few", "Q4_0").nats == pytest.approx(
        model.damage("t0", "Q4_0").nats, rel=0.1
    )


def test_a_probe_below_the_noise_is_unresolved() -> None:
    random = np.random.default_rng(1)
    noisy = Probe([0.0] * 8, list(random.normal(1e-5, 1e-3, 8)))
    model = model_of({"a": {"Q4_0": noisy}}, metric="perplexity")
    assert not model.damage("a", "Q4_0").is_resolved
    assert model_of({"a": {"Q4_0": steady(0.02)}}).damage("a", "Q4_0").is_resolved


def test_a_type_that_holds_the_weights_exactly_says_nothing_of_others() -> None:
    probes = {"a": {"Q4_0": steady(0.02), "Q8_0": steady(0.0)}}
    model = DamageModel(tensors_of(probes, TensorErrors({**TYPES, "Q8_0": 1e-7}, {})))
    assert model.damage("a", "Q4_0").nats == pytest.approx(0.02, rel=0.02)
    assert model.damage("a", "Q8_0").nats < 1e-6


def test_kernels_add_what_whole_models_lost() -> None:
    probes = {n: {"Q8_0": steady(0.003)} for n in "ab"}
    tensors = tensors_of(probes, TensorErrors({"Q8_0": 3e-5}, {"Q8_0": 1e-5}))
    plain = DamageModel(tensors)
    without = 0.006
    raw = plain.damage_sum({"a": "Q8_0", "b": "Q8_0"})
    assert raw == pytest.approx(without * 4 / 3, rel=0.1)  # a third more error, a third more damage
    measured = replace(plain, kernels={"Q8_0": KernelLoss(0.006, 0.010)})
    assert measured.damage_sum({"a": "Q8_0", "b": "Q8_0"}) == pytest.approx(0.010, rel=1e-3)
    assert measured.damage_sum({"a": "F16", "b": "F16"}) == 0  # left as it is: no kernel, no loss


def test_totals_follow_real_files_and_come_back() -> None:
    probes = {f"t{i}": {"Q4_0": steady(0.01), "Q8_0": steady(1e-4)} for i in range(4)}
    maps = [dict.fromkeys(probes, t) for t in ("Q4_0", "Q5_0", "Q8_0")]
    plain = model_of(probes)
    real = [0.5 * plain.damage_sum(m) ** 0.9 for m in maps]
    files = [MeasuredFile(m, Estimate(r, 0.02 * r, 8)) for m, r in zip(maps, real, strict=True)]
    model = model_of(probes, files=files)
    for types, kld in zip(maps, real, strict=True):
        total = model.predicted(types)
        assert total.nats == pytest.approx(kld, rel=1e-2)
        assert total.interval[0] < kld < total.interval[1]
    for nats in (1e-5, 3e-4, 1e-3, 2e-2, 0.5):
        assert model.file_nats(model.sum_for(nats)) == pytest.approx(nats)
    totals = [model.file_nats(damage_sum) for damage_sum in np.geomspace(1e-6, 1, 200)]
    assert totals == sorted(totals)


def test_rounding_anew_takes_its_part_off_what_weights_lose_but_not_off_what_kernels_lose() -> None:
    probes = {n: {"Q8_0": steady(0.003), "Q4_0": steady(0.5)} for n in "ab"}
    tensors = tensors_of(probes, TensorErrors({"Q8_0": 3e-5, "Q4_0": 5e-3}, {"Q8_0": 1e-5}))
    ratios = {
        "a": {"Q8_0": 0.25, "Q4_0": 0.0625}
    }  # of the output error: half and a quarter of nats
    plain, with_it = DamageModel(tensors), DamageModel(tensors, rounding_ratios=ratios)
    # Q8_0's kernel adds a third to what its weights lose, 0.003; to Q4_0's 0.5 it adds 0.001.
    assert with_it.damage("a", "Q8_0").nats == pytest.approx(0.0015 + 0.001, rel=0.02)
    assert with_it.damage("a", "Q4_0").nats == pytest.approx(0.125 + 0.001, rel=0.02)
    assert with_it.damage("b", "Q4_0") == plain.damage("b", "Q4_0")  # nothing is rounded there
    types = dict.fromkeys("ab", "Q4_0")
    assert with_it.damage_sum(types, plain=True) == plain.damage_sum(types)
    assert with_it.predicted(types, plain=True).nats == plain.predicted(types).nats


def test_real_files_that_are_rounded_anew_tell_totals_of_such_files() -> None:
    probes = {f"t{i}": {"Q4_0": steady(0.01), "Q8_0": steady(1e-4)} for i in range(4)}
    types = dict.fromkeys(probes, "Q4_0")
    ratios = {name: dict.fromkeys(TYPES, 0.25) for name in probes}
    files = [
        MeasuredFile(types, Estimate(0.03, 1e-3, 8)),
        MeasuredFile(types, Estimate(0.015, 1e-3, 8), True),
    ]
    model = model_of(probes, files=files, rounding_ratios=ratios)
    assert model.predicted(types).nats == pytest.approx(0.015, rel=1e-2)
    assert model.predicted(types, plain=True).nats == pytest.approx(0.03, rel=1e-2)
    assert model_of(probes, files=files).predicted(types).nats == pytest.approx(0.03, rel=1e-2)


def test_expected_gain_is_the_mean_of_what_is_won() -> None:
    random = np.random.default_rng(2)
    for gap, deviation in ((0.0, 1.0), (1.0, 1.0), (0.5, 2.0)):
        drawn = np.maximum(0, random.normal(-gap, deviation, 400_000)).mean()
        found = expected_gain(np.array([gap]), np.array([deviation]))[0]
        assert found == pytest.approx(drawn, rel=0.02)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # users would see numpy's
        assert expected_gain(np.array([0.1]), np.array([0.0]))[0] < 1e-300
