"""Divergence, perplexity and intervals against their definitions in double precision."""

from __future__ import annotations

import math
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from support import divergences, log_probabilities

from apreqel.estimates import Range
from apreqel.sensitivity.metrics import Comparison, Reference, compare, estimate, ratio_interval


def logits(random: np.random.Generator, n: int, vocabulary: int, spread: float = 3) -> np.ndarray:
    return (spread * random.standard_normal((n, vocabulary)) + 7).astype(np.float32)


def run(model: np.ndarray, reference: np.ndarray, following: np.ndarray) -> Comparison:
    with ThreadPoolExecutor(2) as pool:
        return compare(model, Reference.of(reference, pool), following.astype(np.int32), pool)


@pytest.mark.parametrize("noise", [1e-3, 1e-2, 0.1, 1.0])
def test_equals_the_definition(noise: float) -> None:
    random = np.random.default_rng(0)
    reference = logits(random, 37, 5000)
    model = reference + (noise * random.standard_normal(reference.shape)).astype(np.float32)
    following = random.integers(0, 5000, 37)
    result = run(model, reference, following)
    p, q = log_probabilities(reference), log_probabilities(model)
    expected = divergences(p, q)
    np.testing.assert_allclose(result.kld_nats, expected, rtol=2e-4, atol=4e-8)
    np.testing.assert_allclose(result.nll_nats, -q[np.arange(37), following], rtol=1e-6, atol=1e-5)
    own = -p[np.arange(37), following]
    np.testing.assert_allclose(result.nll_change_nats, result.nll_nats - own, atol=1e-5)
    assert (result.same_top1 == (p.argmax(axis=1) == q.argmax(axis=1))).all()


def test_entropy_is_that_of_the_definition() -> None:
    reference = logits(np.random.default_rng(6), 21, 3000)
    p = np.exp(reference.astype(np.float64))
    p /= p.sum(axis=1, keepdims=True)
    with ThreadPoolExecutor(2) as pool:
        found = Reference.of(reference, pool).entropies(pool)
    np.testing.assert_allclose(found, -(p * np.log(p)).sum(axis=1), rtol=1e-4)


def test_a_model_against_itself_is_zero() -> None:
    reference = logits(np.random.default_rng(1), 64, 49152, spread=5)
    result = run(reference.copy(), reference, np.zeros(64))
    assert np.abs(result.kld_nats).max() == 0
    assert result.same_top1.all()


def test_a_shift_of_all_logits_changes_nothing() -> None:
    reference = logits(np.random.default_rng(2), 16, 32000)
    result = run(reference + np.float32(4), reference, np.zeros(16))
    assert np.abs(result.kld_nats).max() < 5e-7  # a logit of 30 is held to 2e-6


def test_logits_far_apart_have_a_finite_divergence() -> None:
    """Beyond exp(88), where float32 ends; without a warning."""
    random = np.random.default_rng(3)
    p, q = random.normal(0, 40, (2, 6, 50)).astype(np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = run(q, p, np.zeros(6))
    expected = divergences(log_probabilities(p), log_probabilities(q))
    assert expected.max() > 88
    assert found.kld_nats == pytest.approx(expected, rel=1e-5)


def test_nan_is_seen() -> None:
    reference = logits(np.random.default_rng(3), 4, 100)
    model = reference.copy()
    model[2, 7] = np.nan
    assert not run(model, reference, np.zeros(4)).is_finite


def test_interval_covers_the_truth_nineteen_times_of_twenty() -> None:
    random = np.random.default_rng(4)
    hits = 0
    for _ in range(400):
        chunk_effects = np.repeat(random.normal(0, 1, 40), 25)
        low, high = estimate(3 + chunk_effects + random.normal(0, 1, 1000), 40).interval
        hits += low <= 3 <= high
    assert 0.90 <= hits / 400 <= 0.98


def test_paired_ratio_is_tighter_than_unpaired() -> None:
    random = np.random.default_rng(5)
    hard = np.repeat(np.exp(random.normal(0, 1, 40)), 25)
    theirs = hard * np.exp(random.normal(0, 0.3, 1000))
    ours = 0.5 * hard * np.exp(random.normal(0, 0.3, 1000))
    ratio, low, high = ratio_interval(ours, theirs, 40)
    assert low < 0.5 < high and high - low < 0.1
    assert ratio == pytest.approx(ours.mean() / theirs.mean())


@pytest.mark.parametrize("relative_error", [0.01, 0.51, 40.0])
def test_speeds_of_a_noisy_device_have_an_interval_that_ends(relative_error: float) -> None:
    """Readings that spread by half let infinite tokens/s into a plan, which could not be kept."""
    speed = Range.around(0.02, relative_error).inverse
    assert 0 < speed.low < speed.value < speed.high < math.inf
    assert speed.value == pytest.approx(50)
    if relative_error == 0.01:
        assert (speed.low, speed.high) == pytest.approx((49, 51), abs=0.1)
