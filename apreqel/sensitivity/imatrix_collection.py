"""Collecting the importance matrix from a model as it runs.

As llama-imatrix does (tools/imatrix/imatrix.cpp), from every matrix product, with one difference:
the output head is included even when it is tied to the embedding, because leaving it out costs a
fifth of the KL divergence at the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from apreqel.arrays import Doubles, Floats, Tokens
from apreqel.errors import CalibrationError, printable
from apreqel.llama.engine import Context
from apreqel.model.imatrix import Imatrix, ImatrixEntry
from apreqel.model.inventory import Inventory
from apreqel.progress import Progress, silent
from apreqel.sensitivity.texts import TokenSet


class ImatrixCollector:
    """A listener (see `activations.Listener`) that adds up squared activations."""

    def __init__(self, n_matrices: Mapping[str, int]) -> None:
        self._n_matrices = n_matrices
        self._found: dict[str, tuple[Doubles, Doubles]] = {}  # sums and counts

    def __call__(self, name: str, values: Floats, experts: Tokens | None) -> None:
        row_length = values.shape[-1]
        n = self._n_matrices.get(name)
        if n is None:
            return
        sums, counts = self._found.setdefault(name, (np.zeros((n, row_length)), np.zeros(n)))
        if experts is None:
            for matrix, rows in activations_by_matrix(values, n):
                # float32 within one batch (at most a few thousand rows), float64 across batches.
                sums[matrix] += np.einsum("ij,ij->j", rows, rows)
                counts[matrix] += len(rows)
            return
        # values [1, tokens, 1 or experts used, row length]; experts [tokens, experts used]
        squared = np.square(values.reshape(len(experts), -1, row_length))
        for slot in range(experts.shape[1]):
            rows = squared[:, slot % squared.shape[1]]
            for expert in np.unique(experts[:, slot]):
                chosen = experts[:, slot] == expert
                sums[expert] += rows[chosen].sum(axis=0)
                counts[expert] += chosen.sum()

    def result(self, datasets: Sequence[str], n_chunks: int, chunk_size: int) -> Imatrix:
        """Raises CalibrationError where an activation was not finite."""
        entries = {}
        for name, (sums, counts) in self._found.items():
            if not np.isfinite(sums).all():
                raise CalibrationError(
                    f"tensor {printable(name)}: activations are not finite while collecting the "
                    "imatrix; the model itself is broken or overflows"
                )
            entries[name] = ImatrixEntry(sums.astype(np.float32), counts.astype(np.float32))
        return Imatrix(dict(sorted(entries.items())), datasets, n_chunks, chunk_size)


def activations_by_matrix(values: Floats, n: int) -> Iterator[tuple[int, Floats]]:
    """(matrix, its activations [tokens, row length]) of a product with `n` matrices side by side.

    So are the heads of DeepSeek's latent attention: every matrix sees all tokens, each its own row.
    `values` [..., matrices or a multiple of them, tokens, row length].
    """
    row_length = values.shape[-1]
    if n == 1 or values.ndim < 3 or values.shape[-3] % n:
        yield 0, values.reshape(-1, row_length)
        return
    by_matrix = values.reshape(-1, *values.shape[-3:])
    for matrix in range(n):
        yield matrix, by_matrix[:, matrix::n].reshape(-1, row_length)


def n_matrices(inventory: Inventory) -> dict[str, int]:
    """How many matrices each quantisable tensor holds: its experts, or 1."""
    return {t.name: t.n_experts for t in inventory.quantizable}


def collect(
    context: Context,
    collector: ImatrixCollector,
    tokens: TokenSet,
    progress: Progress = silent,
    n_before: int = 0,
    n_total: int = 0,
) -> Imatrix:
    """Run `tokens` through `context`, which was made with `collector` as its listener.

    `n_before` chunks of `n_total` went through `collector` already, and are in the result.
    """
    step = context.n_sequences
    for start in range(0, tokens.n_chunks, step):
        progress("collecting the imatrix", n_before + start, n_total or tokens.n_chunks)
        # Only the head needs logits, and it needs them everywhere: the head is listened to, too.
        part = tokens.tokens[start : start + step]
        everywhere = np.tile(np.arange(tokens.n_ctx, dtype=np.int32), (len(part), 1))
        context.evaluate(part, everywhere)
    return collector.result([tokens.name], n_before + tokens.n_chunks, tokens.n_ctx)
