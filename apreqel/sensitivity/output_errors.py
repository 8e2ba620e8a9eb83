"""How wrong a tensor's output gets in each type, on activations of a running model.

The weights of each matrix product are quantised and read back, and multiplied with a sample of the
activations that the product sees. Types' ratios are what is wanted, so that few rows will do.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial

import numpy as np

from apreqel.arrays import Doubles, Floats, Tokens, Whole
from apreqel.llama.quants import fake_quantize, supports
from apreqel.model.imatrix import Imatrix
from apreqel.model.inventory import Inventory
from apreqel.model.qtypes import QuantType, lookup, nearest, registry
from apreqel.progress import Progress
from apreqel.sensitivity.bench import ProbeBench, importance
from apreqel.sensitivity.measurement import TensorErrors
from apreqel.sensitivity.texts import TokenSet

# Large enough an effect to rise above the noise of a few hundred tokens, small enough to stay in
# the range where tensors add up.
_FIRST_PROBE_BITS = 4.5
# Of a tensor so many rows and tokens, shared out over its experts.
_ROWS, _TOKENS = 128, 384


class OutputErrors:
    """A listener that measures each tensor's relative output errors in every candidate type.

    Unlike the imatrix-weighted weight error these see the correlations between columns (GPTQ,
    arXiv 2210.17323, uses the same objective). It also takes the cosine between what goes into each
    layer and what comes out (block influence, ShortGPT, arXiv 2403.03853).
    """

    def __init__(
        self, bench: ProbeBench, half: Imatrix | None, seed: int, progress: Progress
    ) -> None:
        """`half` is an imatrix from half the text, for `half_text_ratio`."""
        self.errors: dict[str, TensorErrors] = {}
        self.layer_cosines: list[float] = []
        self._bench, self._half, self._seed, self._progress = bench, half, seed, progress
        self._candidates = candidate_types(bench.inventory, bench.imatrix)
        self._hidden: Floats | None = None

    def __call__(self, name: str, values: Floats, experts: Tokens | None) -> None:
        if name in self.errors:
            return
        if name in self._candidates:
            self.errors[name] = self._measured(name, values, experts)
            self._progress("measuring output errors", len(self.errors), len(self._candidates))
        elif not name.endswith(".weight"):
            hidden = values.reshape(-1, values.shape[-1]).copy()
            before, self._hidden = self._hidden, hidden
            # The last layer goes on with the scored tokens only.
            if name.startswith("l_out-") and before is not None and before.shape == hidden.shape:
                self.layer_cosines.append(mean_cosine(before, hidden))

    def of(self, name: str, tokens: TokenSet) -> TensorErrors:
        """As seen; else of an embedding that is only looked up, over the rows that `tokens` use.

        No activation is rounded there. The same goes for a tensor that nothing uses.
        """
        if name in self.errors:
            return self.errors[name]
        bench = self._bench
        w = bench.weights(name, tokens.tokens.reshape(-1)[:512].astype(np.intp))
        total = float(np.square(w).sum(dtype=np.float64)) or 1.0
        columns = importance(bench.imatrix, bench.inventory.by_name[name], 0)
        weights = {
            q.name: float(np.square(w - fake_quantize(w, q, columns)).sum()) / total
            for q in self._candidates[name]
        }
        return TensorErrors(weights, {})

    def _measured(self, name: str, values: Floats, experts: Tokens | None) -> TensorErrors:
        bench, qtypes = self._bench, self._candidates[name]
        tensor = bench.inventory.by_name[name]
        random = np.random.default_rng(self._seed)
        per_matrix = tensor.shape[1]
        squared = {q.name: np.zeros(2) for q in qtypes}
        rounding = {q.activation: np.zeros(2) for q in qtypes}
        ratios = []
        for expert, x in activations_by_expert(values, experts, tensor.n_experts):
            x = x[sample(random, len(x), -(-_TOKENS // tensor.n_experts) + 1)]
            rows = sample(random, per_matrix, max(16, _ROWS // tensor.n_experts))
            w = bench.weights(name, expert * per_matrix + rows)
            output = np.square(w @ x.T).sum(axis=1, dtype=np.float64)
            columns = importance(bench.imatrix, tensor, expert)
            error = partial(_weight_error, w, x, output, columns)
            for q, sums in zip(qtypes, bench.pool.map(error, qtypes), strict=True):
                squared[q.name] += sums
            for activation, sums in rounding.items():
                e = w @ (x - rounded(x, activation)).T
                sums += np.square(e).sum(dtype=np.float64), output.sum()
            if columns is not None and qtypes:
                half = importance(self._half, tensor, expert)
                ratios.append(_text_ratios(w, x, lookup(first_type(squared)), columns, half))
        by_type, by_activation = (
            {name: float(a / (b or 1.0)) for name, (a, b) in sums.items()}
            for sums in (squared, rounding)
        )
        heldout, half_text = np.mean(ratios, axis=0) if ratios else (1.0, 1.0)
        return TensorErrors(by_type, by_activation, float(heldout), float(half_text))


def _weight_error(
    w: Floats, x: Floats, output: Doubles, columns: Floats | None, q: QuantType
) -> Doubles:
    """Squares of what the rows w do wrong in q, and of their output [rows], on activations x."""
    step = 4 if is_slow(q) else 1
    few = np.ascontiguousarray(w[::step])
    e = few - fake_quantize(few, q, columns)
    return np.array([np.square(e @ x.T).sum(dtype=np.float64), output[::step].sum()])


def is_slow(q: QuantType) -> bool:
    """The types that llama.cpp searches a codebook for: seconds a million weights."""
    return q.name.startswith("IQ") and q.bits_per_weight < 4


def _text_ratios(
    w: Floats, x: Floats, q: QuantType, columns: Floats, half: Floats | None
) -> tuple[float, float]:
    """`TensorErrors.heldout_ratio` and `.half_text_ratio` of the rows w on the activations x."""
    e = w - fake_quantize(w, q, columns)
    squares, by_column = np.square(w).sum(axis=0), np.square(e).sum(axis=0)
    here = np.square(x).mean(axis=0)
    scale = (here @ squares) / (columns @ squares)
    heldout = (here @ by_column) / (columns @ by_column * scale)
    if half is None:
        return float(heldout), 1.0
    from_half = np.square((w - fake_quantize(w, q, half)) @ x.T).sum()
    return float(heldout), float(from_half / np.square(e @ x.T).sum())


def rounded(x: Floats, activation: str) -> Floats:
    """Activations [tokens, row length] as ggml's kernels round them (quantize_row_q8_0, _q8_K).

    Blocks of 32, or 256 for Q8_K, in 127 steps up to the largest; F16 and BF16 as such.
    """
    if activation == "F16":
        return x.astype(np.float16).astype(np.float32)
    if activation in ("F32", "BF16"):  # a weight in BF16 has too coarse a grid for this to matter
        return x
    blocks = x.reshape(len(x), -1, 256 if activation == "Q8_K" else 32)
    step = np.abs(blocks).max(axis=2, keepdims=True) / np.float32(127)
    values: Floats = (np.rint(blocks / np.where(step > 0, step, 1)) * step).reshape(x.shape)
    return values


def mean_cosine(a: Floats, b: Floats) -> float:
    """The mean over rows of the cosine between a row of `a` and of `b`."""
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return float(((a * b).sum(axis=1) / np.maximum(lengths, 1e-30)).mean())


def activations_by_expert(
    values: Floats, experts: Tokens | None, n_experts: int
) -> Iterator[tuple[int, Floats]]:
    """(expert, activations [tokens, row length]) for each expert that was used; 0 if dense."""
    if experts is None:
        yield 0, values.reshape(-1, values.shape[-1])
        return
    by_token = values.reshape(len(experts), -1, values.shape[-1])
    for expert in range(n_experts):
        token, slot = np.nonzero(experts == expert)
        if len(token):
            yield expert, by_token[token, slot % by_token.shape[1]]


def sample(random: np.random.Generator, n: int, wanted: int) -> Whole:
    """`wanted` of range(n) without repetition, in order; all where there are no more."""
    return np.arange(n) if n <= wanted else np.sort(random.choice(n, wanted, replace=False))


def first_type(type_names: Iterable[str]) -> str:
    """The type nearest to 4.5 bits per weight, of which every tensor is probed first."""
    return nearest(type_names, _FIRST_PROBE_BITS)


def candidate_types(inventory: Inventory, imatrix: Imatrix | None) -> dict[str, list[QuantType]]:
    """For each quantisable tensor the types worth measuring: legal, supported, imatrix at hand."""
    usable = {
        q.name: q for q in registry().values() if q.is_quantized and q.for_weights and supports(q)
    }
    return {
        tensor.name: [
            usable[name]
            for name in tensor.legal_types
            if name in usable
            and not (usable[name].needs_imatrix and importance(imatrix, tensor, 0) is None)
        ]
        for tensor in inventory.quantizable
    }
