"""What the difference between two models is, in nats, at every scored position. Pure numpy.

KL divergence is KLD(reference || model) over the full vocabulary. With d = logits - reference
logits, centred so that sum(p d) = 0, it equals log(sum(p exp(d))): one exponential per entry, no
cancellation, and exactly 0 for a model against itself. (Summing p (log p - log q) from two
separately normalised float32 log-softmaxes loses up to 1e-4.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

from apreqel.arrays import Doubles, Floats, Mask, Tokens, Whole
from apreqel.estimates import Z95, Estimate

# Rows compared at a time: 8 rows of a 256k vocabulary in float32 are 8 MB, near a cache's size.
_ROWS_AT_ONCE = 8

# Beyond this exp overflows in float32 once summed.
_MOST_EXPONENT = 60.0

# Where a rival is the reference itself, a ratio to it is taken to this.
_LEAST_NATS = 1e-9


@dataclass(frozen=True)
class Reference:
    """The reference's logits [positions, vocabulary] and what every comparison needs of them.

    `log_sum` [positions] is log(sum(exp(logits))), `top1` the most likely token.
    """

    logits: Floats
    log_sum: Doubles
    top1: npt.NDArray[np.int64]

    @staticmethod
    def of(logits: Floats, pool: ThreadPoolExecutor) -> Reference:
        n = len(logits)
        log_sum, top1 = np.empty(n), np.empty(n, np.int64)

        def block(rows: slice) -> None:
            r = np.asarray(logits[rows])
            top1[rows] = r.argmax(axis=1)
            most = r[np.arange(len(r)), top1[rows]]
            log_sum[rows] = most + np.log(np.exp(r - most[:, None]).sum(axis=1, dtype=np.float64))

        list(pool.map(block, _blocks(n)))
        return Reference(logits, log_sum, top1)

    def part(self, rows: slice | Whole) -> Reference:
        return Reference(self.logits[rows], self.log_sum[rows], self.top1[rows])

    def entropies(self, pool: ThreadPoolExecutor) -> Doubles:
        """Entropy in nats of the next token at every position."""
        entropy = np.empty(len(self.logits))

        def block(rows: slice) -> None:
            r = np.asarray(self.logits[rows])
            p = np.exp(r - self.log_sum[rows, None].astype(np.float32))
            entropy[rows] = self.log_sum[rows] - _row_dots(p, r)

        list(pool.map(block, _blocks(len(self.logits))))
        return entropy


@dataclass(frozen=True)
class Comparison:
    """Per scored position, all of shape [positions]: divergence and next-token loss in nats.

    `nll_change_nats` is the loss beyond the reference's.
    """

    kld_nats: Doubles
    nll_nats: Doubles
    nll_change_nats: Doubles
    same_top1: Mask

    @staticmethod
    def joined(parts: Sequence[Comparison]) -> Comparison:
        names = [f.name for f in fields(Comparison)]
        return Comparison(*(np.concatenate([getattr(p, n) for p in parts]) for n in names))

    @property
    def is_finite(self) -> bool:
        return bool(np.isfinite(self.kld_nats).all() and np.isfinite(self.nll_nats).all())


def compare(
    logits: Floats, reference: Reference, next_tokens: Tokens, pool: ThreadPoolExecutor
) -> Comparison:
    """Compare logits [positions, vocabulary] with the reference's at the same positions.

    `next_tokens` [positions] are the tokens that really follow. Rows are shared out over `pool`.
    """
    n = len(logits)
    kld, nll, change, same = np.empty(n), np.empty(n), np.empty(n), np.empty(n, np.bool_)

    def block(rows: slice) -> None:
        r = np.asarray(reference.logits[rows])
        d = logits[rows] - r
        same[rows] = logits[rows].argmax(axis=1) == reference.top1[rows]
        index = np.arange(len(r))
        log_p_next = r[index, next_tokens[rows]] - reference.log_sum[rows]
        p = r - reference.log_sum[rows, None].astype(np.float32)
        np.exp(p, out=p)
        d -= (_row_dots(p, d) / p.sum(axis=1))[:, None]
        rest = _row_dots(p, d).astype(np.float64)  # what rounding left of sum(p d)
        d_next = d[index, next_tokens[rows]].astype(np.float64)
        with np.errstate(over="ignore", invalid="ignore"):
            grown = np.exp(d)
            grown -= 1
            grown -= d
            # log sum(p exp(d)), its first-order part, which is all rounding, taken out of the sum
            log_sum = np.log1p(_row_dots(p, grown).astype(np.float64) + rest)
        for row in np.flatnonzero(d.max(axis=1) > _MOST_EXPONENT):  # far apart: nothing cancels
            log_p = (r[row] - reference.log_sum[rows][row]).astype(np.float64)
            log_sum[row] = np.logaddexp.reduce(log_p + d[row])
        kld[rows] = log_sum - rest
        change[rows] = log_sum - d_next
        nll[rows] = log_sum - d_next - log_p_next

    # list() brings an exception in a worker back to the caller.
    list(pool.map(block, _blocks(n)))
    return Comparison(kld, nll, change, same)


def _blocks(n: int) -> list[slice]:
    return [slice(start, min(start + _ROWS_AT_ONCE, n)) for start in range(0, n, _ROWS_AT_ONCE)]


def _row_dots(a: Floats, b: Floats) -> Floats:
    """Dot products of the rows; through BLAS, whose many partial sums keep float32 exact enough."""
    dots: Floats = np.matmul(a[:, None, :], b[:, :, None])[:, 0, 0]
    return dots


def estimate(values: Doubles, n_chunks: int) -> Estimate:
    """The mean of `values` with a standard error clustered by chunk.

    Positions of one text depend on each other, so the chunk means are the independent draws
    (Cameron & Miller 2015). `values` holds `n_chunks` chunks of equal length, in order. With one
    chunk the positions themselves must do.
    """
    by_chunk = n_chunks > 1 and len(values) % n_chunks == 0
    draws = values.reshape(n_chunks, -1).mean(axis=1) if by_chunk else values
    error = float(draws.std(ddof=1)) / math.sqrt(len(draws)) if len(draws) > 1 else math.inf
    return Estimate(float(values.mean()), error, len(values))


def ratio_interval(ours: Doubles, theirs: Doubles, n_chunks: int) -> tuple[float, float, float]:
    """mean(ours) / mean(theirs) on the same positions, with its paired 95% interval.

    Delta method on the per-chunk means; the pairing takes out what makes a text hard for both.
    """
    if n_chunks < 2:
        n_chunks = len(ours)  # the positions themselves must do
    a, b = (values.reshape(n_chunks, -1).mean(axis=1) for values in (ours, theirs))
    if not a.any() and not b.any():
        return 1.0, 1.0, 1.0
    least = max(float(b.mean()), _LEAST_NATS)
    ratio = float(a.mean()) / least
    if n_chunks < 2:
        return ratio, ratio, ratio
    residual = a - ratio * b
    error = float(residual.std(ddof=1)) / math.sqrt(n_chunks) / least
    return ratio, ratio - Z95 * error, ratio + Z95 * error
