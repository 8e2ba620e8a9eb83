"""The running model that probes are made on: one load, weights swapped underneath it.

A scratch copy of the model in a float type is mapped by llama.cpp. A probe writes fake-quantised
values of one tensor (or several) into that file through a second map, evaluates the probe tokens,
compares the logits with the reference's, and writes the old values back.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from apreqel import llama
from apreqel.artifacts import require_space
from apreqel.calibration import TokenSet
from apreqel.errors import EngineError
from apreqel.imatrix import Imatrix
from apreqel.inventory import Inventory, Tensor, read_inventory
from apreqel.metrics import Comparison, compare
from apreqel.qtypes import QuantType, lookup, registry
from apreqel.quantize import quantize_model

Floats = npt.NDArray[np.float32]

# Logits of one decode are kept under this, whatever the vocabulary (262k tokens: 256 positions).
_LOGITS_BYTES = 256 << 20
# Rows quantised by one thread at a time; large enough to hide the call, small enough to share out.
_WEIGHTS_AT_ONCE = 1 << 18


@dataclass(frozen=True)
class Reference:
    """Logits of the unquantised model, [scored positions, vocabulary], on disk."""

    logits: Floats
    tokens: TokenSet


def sequences_at_once(n_ctx: int, n_vocab: int, n_chunks: int) -> int:
    """How many chunks go into one decode: about 1,024 tokens, less for a huge vocabulary."""
    by_logits = _LOGITS_BYTES // (4 * n_vocab * n_ctx)
    return max(1, min(n_chunks, 1024 // n_ctx, by_logits))


def scratch_type(inventory: Inventory) -> QuantType:
    """F16 for an F16 source, which is exact; else F32, which holds BF16 and any quant type."""
    sources = {t.qtype.name for t in inventory.quantizable}
    return lookup("F16") if sources <= {"F16"} else lookup("F32")


@contextmanager
def scratch_copy(inventory: Inventory, folder: Path, n_threads: int) -> Iterator[Path]:
    """The model as one float file in `folder`, gone afterwards.

    Written by the C program, which checks every weight. Raises OutputError, ModelFileError (NaN).
    """
    target = scratch_type(inventory)
    types = {t.name: t.qtype.name for t in inventory.tensors}
    types |= {t.name: target.name for t in inventory.quantizable}
    require_space(folder, inventory.output_size(types), "the scratch copy of the model")
    place = Path(tempfile.mkdtemp(prefix="scratch-", dir=folder))
    try:
        path = place / "model.gguf"
        quantize_model(inventory, types, path, n_threads=n_threads, allow_requantize=True)
        yield path
    finally:
        shutil.rmtree(place, ignore_errors=True)


class ProbeBench:
    """A loaded scratch model, its weights by name, and comparison with the reference."""

    def __init__(self, scratch: Path, context: llama.Context, n_threads: int) -> None:
        self.imatrix: Imatrix | None = None
        self._context = context
        self._tensors = read_inventory(scratch).by_name
        self._map = np.memmap(scratch, np.uint8, "r+")
        self.pool = ThreadPoolExecutor(n_threads)

    def close(self) -> None:
        self.pool.shutdown()
        del self._map

    # -- weights --

    def weights(self, name: str, rows: slice | npt.NDArray[np.intp] = slice(None)) -> Floats:
        """Float32 weights [rows, row length] of a tensor, its experts one after another."""
        tensor = self._tensors[name]
        stored = self._stored(tensor)[rows]
        values = np.empty(stored.shape, np.float32)
        values[:] = stored
        return values

    def _stored(self, tensor: Tensor) -> npt.NDArray[np.floating]:
        raw = self._map[tensor.offset : tensor.offset + tensor.size_bytes]
        dtype = np.float16 if tensor.qtype.name == "F16" else np.float32
        return raw.view(dtype).reshape(-1, tensor.row_length)

    def fake_quantize(self, name: str, qtype: QuantType) -> Iterator[tuple[slice, Floats]]:
        """Blocks of rows of a tensor as they read back from `qtype`, shared out over threads."""
        tensor = self._tensors[name]
        importance = self.imatrix.weights(name) if self.imatrix else None
        rows_per_matrix = tensor.shape[1]
        step = max(1, min(rows_per_matrix, _WEIGHTS_AT_ONCE // tensor.row_length))
        blocks = [
            slice(first, min(first + step, end))
            for start in range(0, tensor.n_rows, rows_per_matrix)
            for end in (start + rows_per_matrix,)
            for first in range(start, end, step)
        ]

        def one(rows: slice) -> tuple[slice, Floats]:
            column_weights = expert_slice(importance, rows.start // rows_per_matrix, tensor)
            return rows, llama.fake_quantize(self.weights(name, rows), qtype, column_weights)

        return self.pool.map(one, blocks)

    # -- evaluation --

    def logits(self, tokens: TokenSet) -> Iterator[tuple[slice, Floats]]:
        """Logits of the scored positions: (range of positions, [n, vocabulary]) per decode."""
        step, per_chunk = self._context.n_sequences, tokens.n_scored // tokens.n_chunks
        for start in range(0, tokens.n_chunks, step):
            part = tokens.tokens[start : start + step]
            first = start * per_chunk
            rows = slice(first, first + len(part) * per_chunk)
            yield rows, self._context.evaluate(part, tokens.scored)

    def reference(self, tokens: TokenSet, folder: Path) -> Reference:
        """Evaluate the unpatched model and keep its logits in a file in `folder`."""
        n_vocab = self._context.model.n_vocab
        require_space(folder, 4 * tokens.n_scored * n_vocab, "the reference's logits")
        store = np.memmap(
            folder / "reference.f32", np.float32, "w+", shape=(tokens.n_scored, n_vocab)
        )
        for rows, logits in self.logits(tokens):
            if not np.isfinite(logits).all():
                raise EngineError(
                    f"{self._context.model.path}: the unquantised model gives NaN or Inf logits"
                )
            store[rows] = logits
        return Reference(store, tokens)

    def compare(self, reference: Reference) -> Comparison:
        """The model as it is now against the reference, at every scored position."""
        following = reference.tokens.next_tokens.reshape(-1)
        return Comparison.joined(
            [
                compare(logits, reference.logits[rows], following[rows], self.pool)
                for rows, logits in self.logits(reference.tokens)
            ]
        )

    def probe(self, types: Mapping[str, QuantType], reference: Reference) -> Comparison:
        """The model with the tensors of `types` fake-quantised, against the reference."""
        kept: list[tuple[Tensor, npt.NDArray[np.uint8]]] = []
        try:
            for name, qtype in types.items():
                tensor = self._tensors[name]
                place = self._map[tensor.offset : tensor.offset + tensor.size_bytes]
                kept.append((tensor, place.copy()))
                stored = self._stored(tensor)
                for rows, values in self.fake_quantize(name, qtype):
                    stored[rows] = values
            return self.compare(reference)
        finally:
            for tensor, original in kept:
                self._map[tensor.offset : tensor.offset + tensor.size_bytes] = original


def expert_slice(importance: Floats | None, expert: int, tensor: Tensor) -> Floats | None:
    """One expert's columns of the flat importance [experts x row length]."""
    if importance is None:
        return None
    return importance[expert * tensor.row_length : (expert + 1) * tensor.row_length]


# --- output errors -------------------------------------------------------------------------------


class OutputErrors:
    """A listener that measures each tensor's relative output error in every candidate type.

    e(t) = |(W - Q_t) X|^2 / |W X|^2 on the activations X [tokens, row length] of the probe text,
    which the imatrix was not fitted on. Unlike the imatrix-weighted weight error it sees the
    correlations between columns (GPTQ, arXiv 2210.17323, uses the same objective). A sample of
    rows and tokens is enough: what is wanted is the ratio between types.
    """

    def __init__(
        self,
        candidates: Mapping[str, Sequence[QuantType]],
        *,
        rows_per_tensor: int = 128,
        tokens_per_tensor: int = 384,
        seed: int = 0,
        on_tensor: Callable[[str], None] | None = None,
    ) -> None:
        self.errors: dict[str, dict[str, float]] = {}
        self.bench: ProbeBench | None = None
        self._candidates, self._on_tensor = candidates, on_tensor
        self._rows, self._tokens, self._seed = rows_per_tensor, tokens_per_tensor, seed

    def __call__(self, name: str, values: Floats, experts: npt.NDArray[np.int32] | None) -> None:
        if self.bench is None or name not in self._candidates or name in self.errors:
            return
        tensor = self.bench._tensors[name]
        random = np.random.default_rng(self._seed)
        per_matrix = tensor.shape[1]
        parts = []
        for expert, x in activations_by_expert(values, experts, tensor.n_experts):
            x = x[sample(random, len(x), -(-self._tokens // tensor.n_experts) + 1)]
            rows = sample(random, per_matrix, max(16, self._rows // tensor.n_experts))
            parts.append((expert, x, rows))
        squared_errors = dict.fromkeys((q.name for q in self._candidates[name]), 0.0)
        total = 0.0
        for expert, x, rows in parts:
            w = self.bench.weights(name, expert * per_matrix + rows)
            total += float(np.square(w @ x.T).sum(dtype=np.float64))
            jobs = [(q, w, x, expert, tensor) for q in self._candidates[name]]
            for q, squared in zip(
                self._candidates[name], self.bench.pool.map(self._squared_error, jobs), strict=True
            ):
                squared_errors[q.name] += squared
        scale = total if total > 0 else 1.0
        self.errors[name] = {kind: value / scale for kind, value in squared_errors.items()}
        if self._on_tensor:
            self._on_tensor(name)

    def _squared_error(self, job: tuple[QuantType, Floats, Floats, int, Tensor]) -> float:
        qtype, w, x, expert, tensor = job
        assert self.bench is not None
        importance = self.bench.imatrix.weights(tensor.name) if self.bench.imatrix else None
        q = llama.fake_quantize(w, qtype, expert_slice(importance, expert, tensor))
        return float(np.square((w - q) @ x.T).sum(dtype=np.float64))


def lookup_errors(
    bench: ProbeBench, name: str, candidates: Sequence[QuantType], tokens: TokenSet
) -> dict[str, float]:
    """e(t) of an embedding that is only looked up: over the rows that the text uses."""
    rows = tokens.tokens.reshape(-1)[:512]
    w = bench.weights(name, rows.astype(np.intp))
    total = float(np.square(w).sum(dtype=np.float64)) or 1.0
    importance = bench.imatrix.weights(name) if bench.imatrix else None
    return {
        q.name: float(np.square(w - llama.fake_quantize(w, q, importance)).sum()) / total
        for q in candidates
    }


def activations_by_expert(
    values: Floats, experts: npt.NDArray[np.int32] | None, n_experts: int
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


def sample(random: np.random.Generator, n: int, wanted: int) -> npt.NDArray[np.intp]:
    """`wanted` of range(n) without repetition, in order; all where there are no more."""
    if n <= wanted:
        return np.arange(n)
    return np.sort(random.choice(n, wanted, replace=False))


def candidate_types(
    inventory: Inventory, imatrix: Imatrix | None, allowed: Sequence[str] | None = None
) -> dict[str, list[QuantType]]:
    """For each quantisable tensor the types worth measuring: legal, supported, imatrix at hand."""
    usable = {
        q.name: q
        for q in registry().values()
        if q.is_quantized and q.for_weights and llama.supports(q)
    }
    if allowed is not None:
        usable = {name: q for name, q in usable.items() if name in allowed}
    result = {}
    for tensor in inventory.quantizable:
        has_imatrix = imatrix is not None and imatrix.weights(tensor.name) is not None
        result[tensor.name] = [
            usable[name]
            for name in tensor.legal_types
            if name in usable and (has_imatrix or not usable[name].needs_imatrix)
        ]
    return result
