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
from apreqel.sensitivity.imatrix_collection import activations_by_matrix
from apreqel.sensitivity.measurement import TensorErrors
from apreqel.sensitivity.texts import TokenSet

# Large enough an effect to rise above the noise of a few hundred tokens, small enough to stay in
# the range where tensors add up.
_FIRST_PROBE_BITS = 4.5
# Of a tensor so many rows and tokens, shared out over its experts.
_ROWS, _TOKENS = 128, 512
_EMBEDDINGS = ("token_embd", "per_layer_token_embd")
_SLOW_STEP = 4  # every so many of these rows in a slow type
# What of an output's error is the same at every token counts otherwise than what varies, by role;
# 1 elsewhere. Attention hardly notices a bias of all queries or keys, passes on one of all values
# undiminished where it averages out the rest, and softmax hardly notices one of all logits.
# Symmetric types make a large one, types with a minimum or a codebook a small one. By least spread
# of damage over error between seven types of 22 tensors (SmolLM2-135M, rows of 768): ffn_up from
# 0.09 to 0.08, attn_v from 0.42 to 0.24; attn_q by that of IQ3 and IQ4_XS over Q4_0 in all 30
# layers: 0.23 and no mean error at 0.25 (at 0.75, 0.27 and 10% too little damage in both).
_BIAS_COUNTS = {
    "attn_q": 0.25, "attn_k": 0.25, "attn_v": 4.0, "ffn_up": 2.0, "token_embd": 0.25,
    "output": 0.25,
}  # fmt: skip


class OutputErrors:
    """A listener that measures each tensor's relative output errors in every candidate type.

    Unlike the imatrix-weighted weight error these see the correlations between columns (GPTQ,
    arXiv 2210.17323, uses the same objective). It also takes the cosine between what goes into each
    layer and what comes out (block influence, ShortGPT, arXiv 2403.03853).
    """

    def __init__(
        self,
        bench: ProbeBench,
        tokens: TokenSet,
        half: Imatrix | None,
        seed: int,
        progress: Progress,
    ) -> None:
        """`tokens` will be evaluated; `half` is an imatrix from half the text."""
        self.errors: dict[str, TensorErrors] = {}
        self.layer_cosines: list[float] = []
        self._bench, self._half, self._seed, self._progress = bench, half, seed, progress
        self._tokens = tokens
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

        No activation is rounded there. A tensor that no graph runs gets a type that is safe
        whatever it is for, Q8_0, or keeps its own.
        """
        if name in self.errors:
            return self.errors[name]
        bench = self._bench
        if bench.inventory.by_name[name].role not in _EMBEDDINGS:
            safe = {q.name: 0.0 for q in self._candidates[name] if q.name == "Q8_0"}
            return TensorErrors(safe, {}, is_run=False)
        w = bench.weights(name, tokens.tokens.reshape(-1)[:512].astype(np.intp))
        total = float(np.square(w).sum(dtype=np.float64)) or 1.0
        columns = importance(bench.imatrix, bench.inventory.by_name[name], 0)
        weights = {
            q.name: float(np.square(w - fake_quantize(w, q, columns)).sum()) / total
            for q in self._candidates[name]
        }
        return TensorErrors(weights, {})

    @np.errstate(all="ignore")  # see its end
    def _measured(self, name: str, values: Floats, experts: Tokens | None) -> TensorErrors:
        bench, qtypes = self._bench, self._candidates[name]
        tensor = bench.inventory.by_name[name]
        random = np.random.default_rng(self._seed)
        per_matrix = tensor.shape[1]
        squared = {q.name: np.zeros(2) for q in qtypes}
        rounding = {q.activation: np.zeros(2) for q in qtypes}
        ratios, power = [], 0.0
        if experts is None and tensor.n_experts > 1:  # matrices side by side
            n_tokens = values.shape[-2]
        else:
            values, experts = self._within_text(values, experts)
            n_tokens = len(values)
        for expert, x in activations_by_expert(values, experts, tensor.n_experts):
            share = len(x) / n_tokens
            x = x[sample(random, len(x), -(-_TOKENS // tensor.n_experts) + 1)]
            rows = sample(random, per_matrix, max(16, _ROWS // tensor.n_experts))
            w = bench.weights(name, expert * per_matrix + rows)
            output = np.square(w @ x.T).sum(axis=1, dtype=np.float64)
            columns = importance(bench.imatrix, tensor, expert)
            power += share * per_matrix * output.mean() / len(x)
            wrong = partial(_row_errors, w, x, columns, bias_weight(tensor.role))
            rows_wrong = dict(zip(squared, bench.pool.map(wrong, qtypes), strict=True))
            for q in qtypes:
                whole = rows_wrong[q.name].sum()
                if is_slow(q):  # on few rows only the ratio to another type's error is sure
                    usual = rows_wrong[first_type(squared)]
                    whole *= usual.sum() / (usual[::_SLOW_STEP].sum() or 1.0)
                squared[q.name] += whole, output.sum()
            for activation, sums in rounding.items():
                e = w @ (x - rounded(x, activation)).T
                sums += np.square(e).sum(dtype=np.float64), output.sum()
            if columns is not None and qtypes:
                half = importance(self._half, tensor, expert)
                ratios.append(_text_ratios(w, x, lookup(first_type(squared)), columns, half))
        # A type that holds the weights as infinity is none; weights of 0 are right in every type.
        by_type, by_activation = (
            {name: float(a / (b or 1.0)) for name, (a, b) in sums.items() if np.isfinite(a)}
            for sums in (squared, rounding)
        )
        sound = [pair for pair in ratios if np.isfinite(pair).all()]
        heldout, half_text = np.mean(sound, axis=0) if sound else (1.0, 1.0)
        return TensorErrors(by_type, by_activation, float(heldout), float(half_text), float(power))

    def _within_text(self, values: Floats, experts: Tokens | None) -> tuple[Floats, Tokens | None]:
        """Without the tokens of the first pieces, whose huge activations would drown the others."""
        tokens, length = self._tokens, values.shape[-1]
        n_tokens = values.size // length if experts is None else len(experts)
        by_token = values.reshape(n_tokens, -1, length)
        if n_tokens != tokens.tokens.size:  # the last layer goes on with the scored ones only
            return by_token, experts
        is_within = np.arange(n_tokens) % tokens.n_ctx >= int(tokens.positions.min())
        return by_token[is_within], None if experts is None else experts[is_within]


def _row_errors(
    w: Floats, x: Floats, columns: Floats | None, bias_counts: float, q: QuantType
) -> Doubles:
    """Squares of what the rows w do wrong in q on activations x; of a slow type some rows only.

    What is wrong in the same way at every token counts `bias_counts` times.
    """
    few = np.ascontiguousarray(w[:: _SLOW_STEP if is_slow(q) else 1])
    return squared_errors((few - fake_quantize(few, q, columns)) @ x.T, bias_counts)


def bias_weight(role: str) -> float:
    """How often that part of its output's error counts that is the same at every token."""
    return _BIAS_COUNTS.get(role, 1.0)


def squared_errors(wrong: Floats, bias_counts: float) -> Doubles:
    """Sums over tokens of the squares of `wrong` [rows, tokens], what is the same at every token
    counted `bias_counts` times."""
    bias = wrong.shape[1] * np.square(wrong.mean(axis=1, dtype=np.float64))
    squares: Doubles = np.square(wrong).sum(axis=1, dtype=np.float64)
    squares += (bias_counts - 1) * bias
    return squares


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
        yield from activations_by_matrix(values, n_experts)
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
    """For each quantisable tensor the types worth measuring: legal, supported, imatrix at hand.

    In its own it stays as it is, bit by bit: nothing is to be measured there.
    """
    usable = {
        q.name: q for q in registry().values() if q.is_quantized and q.for_weights and supports(q)
    }
    return {
        tensor.name: [
            usable[name]
            for name in tensor.legal_types
            if name in usable
            and name != tensor.qtype.name
            and not (usable[name].needs_imatrix and importance(imatrix, tensor, 0) is None)
        ]
        for tensor in inventory.quantizable
    }
