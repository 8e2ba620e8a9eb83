"""The running model that probes are made on: one load, weights swapped underneath it.

A scratch copy of the model in a float type is mapped by llama.cpp. A probe writes fake-quantised
values of one tensor into that file through a second map, evaluates the probe tokens,
compares the logits with the reference's, and writes the old values back.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from apreqel import llama
from apreqel.artifacts import require_space
from apreqel.device.machine import detect
from apreqel.errors import EngineError, ModelFileError
from apreqel.model.imatrix import Imatrix
from apreqel.model.inventory import Inventory, Tensor, read_inventory
from apreqel.model.qtypes import QuantType, registry
from apreqel.quantize import quantize_model
from apreqel.sensitivity.calibration import TokenSet
from apreqel.sensitivity.metrics import Comparison, Reference, compare

Floats = npt.NDArray[np.float32]

# Logits of one decode are kept under this, whatever the vocabulary (262k tokens: 256 positions).
_LOGITS_BYTES = 256 << 20
# Rows quantised by one thread at a time; large enough to hide the call, small enough to share out.
_WEIGHTS_AT_ONCE = 1 << 18
_FIRST_PROBE_BITS = 4.5

# Of a text's positions this part is scored: where the original is least sure what comes next. Over
# 60 pairs that half told the damage on other text as well (log off by 0.146) as all did (0.153).
_INFORMATIVE_PART = 0.5


@dataclass(frozen=True)
class ReferenceRun:
    """The unquantised model at the scored positions of `tokens`."""

    tokens: TokenSet
    rows: Reference

    def part(self, chunks: slice) -> ReferenceRun:
        """The run on some of the chunks."""
        per_chunk = self.tokens.n_scored // self.tokens.n_chunks
        first, end, _ = chunks.indices(self.tokens.n_chunks)
        rows = slice(first * per_chunk, end * per_chunk)
        return ReferenceRun(self.tokens.part(chunks), self.rows.part(rows))


def evaluated(context: llama.Context, tokens: TokenSet) -> Iterator[tuple[slice, Floats]]:
    """Logits of the scored positions: (range of positions, [n, vocabulary]) per decode."""
    first = 0
    for start in range(0, tokens.n_chunks, context.n_sequences):
        part = tokens.part(slice(start, start + context.n_sequences))
        rows = slice(first, first := first + part.n_scored)
        yield rows, context.evaluate(part.tokens, part.positions)


def compared(
    context: llama.Context, reference: ReferenceRun, pool: ThreadPoolExecutor
) -> Comparison:
    """A model against the reference, at every position that this was scored at."""
    following = reference.tokens.next_tokens.reshape(-1)
    return Comparison.joined(
        [
            compare(logits, reference.rows.part(rows), following[rows], pool)
            for rows, logits in evaluated(context, reference.tokens)
        ]
    )


def sequences_at_once(n_ctx: int, n_vocab: int, n_chunks: int) -> int:
    """How many chunks go into one decode: about 1,024 tokens, less for a huge vocabulary."""
    by_logits = _LOGITS_BYTES // (4 * n_vocab * n_ctx)
    return max(1, min(n_chunks, 1024 // n_ctx, by_logits))


def scratch_types(inventory: Inventory) -> dict[str, str]:
    """F16 for an F16 source, which is exact; else F32, which holds BF16 and any quant type.

    Exact even where memory does not hold it and every probe reads it from disk: in a Q8_0 copy
    activations are rounded too, other ones in each probe, which added 0.002 to 0.006 nats to every
    probe of SmolLM2-135M, several times what most tensors do.
    """
    kind = "F16" if {t.qtype.name for t in inventory.quantizable} <= {"F16"} else "F32"
    return inventory.types | {t.name: kind for t in inventory.quantizable}


def paging_note(inventory: Inventory) -> str:
    """What to know where memory does not hold the scratch copy, else nothing."""
    size, free = inventory.output_size(scratch_types(inventory)), detect().available_bytes
    if size <= free:
        return ""
    return (
        f": its {size / 1e9:.1f} GB are more than the {free / 1e9:.1f} GB of memory that are free, "
        "so that every probe reads it from disk. Probing is the same on a larger machine: copy the "
        "work folder from there"
    )


@contextmanager
def scratch_copy(
    inventory: Inventory, folder: Path, n_threads: int, types: Mapping[str, str] | None = None
) -> Iterator[Path]:
    """The model as one file of floats (or of `types`) in `folder`, gone afterwards.

    Written by the C program, which checks every weight. Raises OutputError, ModelFileError (NaN).
    """
    types = types or scratch_types(inventory)
    require_space(folder, inventory.output_size(types), "the scratch copy of the model")
    place = Path(tempfile.mkdtemp(prefix="scratch-", dir=folder))
    try:
        path = place / "model.gguf"
        quantize_model(inventory, types, path, n_threads=n_threads, allow_requantize=True)
        yield path
    finally:
        shutil.rmtree(place, ignore_errors=True)


def read_weights(
    inventory: Inventory, name: str, rows: slice | npt.NDArray[np.intp] = slice(None)
) -> Floats:
    """Weights [rows, row length] from a model's file, its experts one after another.

    Raises ModelFileError where the file is gone or shorter than it was.
    """
    tensor = inventory.by_name[name]
    path, row_bytes = inventory.files[tensor.shard], tensor.size_bytes // tensor.n_rows
    if isinstance(rows, slice):
        first, end, _ = rows.indices(tensor.n_rows)
        parts = [(first, end - first)]
    else:
        parts = [(int(row), 1) for row in rows]
    try:
        packed = np.concatenate(
            [
                np.fromfile(path, np.uint8, n * row_bytes, offset=tensor.offset + first * row_bytes)
                for first, n in parts
            ]
        )
    except OSError as error:
        raise ModelFileError(f"{path}: cannot be read ({error.strerror})") from error
    if packed.size != row_bytes * sum(n for _, n in parts):
        raise ModelFileError(f"{path}: ends inside tensor {name}; it was changed meanwhile")
    values = np.empty((packed.size // row_bytes, tensor.row_length), np.float32)
    llama.read_values(packed, tensor.qtype, values)
    return values


def float_rows(copy: npt.NDArray[np.uint8], tensor: Tensor) -> npt.NDArray[np.floating]:
    """A view of a tensor in a scratch copy's bytes, F16 or F32 [rows, row length]."""
    raw = copy[tensor.offset : tensor.offset + tensor.size_bytes]
    dtype = np.float16 if tensor.qtype.name == "F16" else np.float32
    rows: npt.NDArray[np.floating] = raw.view(dtype).reshape(-1, tensor.row_length)
    return rows


class ProbeBench:
    """A loaded scratch copy of a model, its weights by name, and comparison with the reference."""

    def __init__(
        self, original: Inventory, scratch: Path, context: llama.Context, n_threads: int
    ) -> None:
        self.imatrix: Imatrix | None = None
        self._original, self._context = original, context
        self._tensors = read_inventory(scratch).by_name
        self._map = np.memmap(scratch, np.uint8, "r+")
        self.pool = ThreadPoolExecutor(n_threads)

    def close(self) -> None:
        self.pool.shutdown()
        del self._map

    # -- weights --

    def tensor(self, name: str) -> Tensor:
        return self._original.by_name[name]

    def importance(self, name: str) -> Floats | None:
        """The imatrix's weights of the tensor's columns, its experts one after another."""
        return self.imatrix.weights(name) if self.imatrix else None

    def weights(self, name: str, rows: slice | npt.NDArray[np.intp] = slice(None)) -> Floats:
        """See `read_weights`."""
        return read_weights(self._original, name, rows)

    def _stored(self, name: str) -> npt.NDArray[np.floating]:
        """The rows of a tensor in the scratch copy [rows, row length]."""
        return float_rows(self._map, self._tensors[name])

    def _write(self, name: str, qtype: QuantType | None) -> None:
        """Let the scratch copy hold a tensor as it reads back from `qtype`; None: as it was."""
        tensor, stored = self._tensors[name], self._stored(name)
        importance = self.importance(name)
        rows_per_matrix = tensor.shape[1]
        step = max(1, min(rows_per_matrix, _WEIGHTS_AT_ONCE // tensor.row_length))

        def write(rows: slice) -> None:
            values = self.weights(name, rows)
            if qtype is not None:
                columns = expert_slice(importance, rows.start // rows_per_matrix, tensor)
                values = llama.fake_quantize(values, qtype, columns)
            stored[rows] = values

        blocks = [
            slice(first, min(first + step, start + rows_per_matrix))
            for start in range(0, tensor.n_rows, rows_per_matrix)
            for first in range(start, start + rows_per_matrix, step)
        ]
        # Not one block may be written after this, whatever happens to another.
        done, _ = wait([self.pool.submit(write, block) for block in blocks])
        for future in done:
            future.result()

    # -- evaluation --

    def logits(self, tokens: TokenSet) -> Iterator[tuple[slice, Floats]]:
        """See `evaluated`."""
        return evaluated(self._context, tokens)

    def reference(
        self, tokens: TokenSet, folder: Path, informative_part: float = _INFORMATIVE_PART
    ) -> ReferenceRun:
        """Evaluate the unpatched model and keep its logits in a file in `folder`.

        Of each chunk's scored positions only the `informative_part` with the highest entropy of
        the next token is kept.
        """
        n_vocab, per_chunk = self._context.model.n_vocab, tokens.n_scored // tokens.n_chunks
        kept = max(1, round(per_chunk * informative_part))
        shape = tokens.n_chunks * kept, n_vocab
        require_space(folder, 4 * shape[0] * shape[1], "the reference's logits")
        store = np.memmap(folder / "reference.f32", np.float32, "w+", shape=shape)
        chosen = np.empty((tokens.n_chunks, kept), np.intp)
        for rows, logits in self.logits(tokens):
            if not np.isfinite(logits).all():
                raise EngineError(
                    f"{self._context.model.path}: the unquantised model gives NaN or Inf logits"
                )
            entropy = Reference.of(logits, self.pool).entropies(self.pool).reshape(-1, per_chunk)
            first = rows.start // per_chunk
            best = np.sort(np.argsort(-entropy, axis=1, kind="stable")[:, :kept], axis=1)
            chosen[first : first + len(best)] = best
            of_rows = (np.arange(len(best))[:, None] * per_chunk + best).reshape(-1)
            store[first * kept : first * kept + len(of_rows)] = logits[of_rows]
        scored = replace(tokens, positions=np.take_along_axis(tokens.positions, chosen, axis=1))
        return ReferenceRun(scored, Reference.of(store, self.pool))

    def compare(self, reference: ReferenceRun) -> Comparison:
        """The model as it is now against the reference."""
        return compared(self._context, reference, self.pool)

    def probe(self, name: str, qtype: QuantType, reference: ReferenceRun) -> Comparison:
        """The model with one more tensor fake-quantised, against the reference."""
        stored = self._stored(name)
        before = stored.copy()
        try:
            self._write(name, qtype)
            return self.compare(reference)
        finally:
            stored[:] = before

    @contextmanager
    def installed(self, types: Mapping[str, QuantType]) -> Iterator[None]:
        """With the tensors of `types` fake-quantised; probes start from there.

        After an error in between, the bench is of no more use.
        """
        for name, qtype in types.items():
            self._write(name, qtype)
        yield
        for name in types:
            self._write(name, None)


@contextmanager
def opened_bench(
    inventory: Inventory,
    scratch: Path,
    model: llama.LoadedModel,
    tokens: TokenSet,
    imatrix: Imatrix,
    n_threads: int,
    listener: llama.Listener | None = None,
) -> Iterator[ProbeBench]:
    """A bench on the loaded scratch copy, for chunks as long as those of `tokens`."""
    n = sequences_at_once(tokens.n_ctx, model.n_vocab, tokens.n_chunks)
    with model.context(tokens.n_ctx, n, n_threads, listener) as context:
        bench = ProbeBench(inventory, scratch, context, n_threads)
        bench.imatrix = imatrix
        try:
            yield bench
        finally:
            bench.close()


def expert_slice(importance: Floats | None, expert: int, tensor: Tensor) -> Floats | None:
    """One expert's columns of the flat importance [experts x row length]."""
    if importance is None:
        return None
    return importance[expert * tensor.row_length : (expert + 1) * tensor.row_length]


# --- output errors -------------------------------------------------------------------------------


@dataclass(frozen=True)
class TensorErrors:
    """Relative output errors of one tensor, on activations that the imatrix was not fitted on.

    `weights[t]`: |(W - Q_t) X|^2 / |W X|^2, what quantising the weights to t does. `kernels[k]`:
    |W (X - k(X))|^2 / |W X|^2, what a kernel does that rounds its activations to k (Q8_0, Q8_K).
    `fitted` and `half_text` are ratios for one common type: error by the columns' mean squares
    here over that on the imatrix's own text, and error with an imatrix from half the text over
    that from all; 1 where that was not measured.
    """

    weights: Mapping[str, float]
    kernels: Mapping[str, float]
    fitted: float = 1.0
    half_text: float = 1.0


class OutputErrors:
    """A listener that measures each tensor's relative output errors in every candidate type.

    Unlike the imatrix-weighted weight error these see the correlations between columns (GPTQ,
    arXiv 2210.17323, uses the same objective). A sample of rows and tokens is enough: what is
    wanted is the ratio between types. It also takes the cosine between what goes into each layer
    and what comes out (block influence, ShortGPT, arXiv 2403.03853).
    """

    def __init__(
        self,
        candidates: Mapping[str, Sequence[QuantType]],
        half: Imatrix | None = None,
        *,
        rows_per_tensor: int = 128,
        tokens_per_tensor: int = 384,
        seed: int = 0,
        on_tensor: Callable[[str], None] | None = None,
    ) -> None:
        self.errors: dict[str, TensorErrors] = {}
        self.layer_cosines: list[float] = []
        self.bench: ProbeBench | None = None
        self._candidates, self._half, self._on_tensor = candidates, half, on_tensor
        self._rows, self._tokens, self._seed = rows_per_tensor, tokens_per_tensor, seed
        self._hidden: Floats | None = None

    def __call__(self, name: str, values: Floats, experts: npt.NDArray[np.int32] | None) -> None:
        if self.bench is None or name in self.errors:
            return
        if name in self._candidates:
            self.errors[name] = self._measured(self.bench, name, values, experts)
            if self._on_tensor:
                self._on_tensor(name)
        elif not name.endswith(".weight"):
            hidden = values.reshape(-1, values.shape[-1]).copy()
            before, self._hidden = self._hidden, hidden
            # The last layer goes on with the scored tokens only.
            if name.startswith("l_out-") and before is not None and before.shape == hidden.shape:
                self.layer_cosines.append(mean_cosine(before, hidden))

    def _measured(
        self,
        bench: ProbeBench,
        name: str,
        values: Floats,
        experts: npt.NDArray[np.int32] | None,
    ) -> TensorErrors:
        tensor, kinds = bench.tensor(name), self._candidates[name]
        random = np.random.default_rng(self._seed)
        per_matrix = tensor.shape[1]
        squared = {q.name: np.zeros(2) for q in kinds}
        rounding = {q.activation: np.zeros(2) for q in kinds}
        common = first_type(kinds) if kinds else None
        ratios = []
        for expert, x in activations_by_expert(values, experts, tensor.n_experts):
            x = x[sample(random, len(x), -(-self._tokens // tensor.n_experts) + 1)]
            rows = sample(random, per_matrix, max(16, self._rows // tensor.n_experts))
            w = bench.weights(name, expert * per_matrix + rows)
            output = np.square(w @ x.T).sum(axis=1, dtype=np.float64)
            importance = expert_slice(bench.importance(name), expert, tensor)

            def weight_error(q: QuantType, w=w, x=x, output=output, importance=importance):  # type: ignore[no-untyped-def]
                step = 4 if is_slow(q) else 1
                few = np.ascontiguousarray(w[::step])
                e = few - llama.fake_quantize(few, q, importance)
                return np.array([np.square(e @ x.T).sum(dtype=np.float64), output[::step].sum()])

            for q, sums in zip(kinds, bench.pool.map(weight_error, kinds), strict=True):
                squared[q.name] += sums
            for kind, sums in rounding.items():
                e = w @ (x - rounded(x, kind)).T
                sums += np.square(e).sum(dtype=np.float64), output.sum()
            half = self._half.weights(name) if self._half else None
            half = expert_slice(half, expert, tensor)
            if importance is not None and common is not None:
                ratios.append(_fitting_ratios(w, x, common, importance, half))
        fitted, half_text = np.mean(ratios, axis=0) if ratios else (1.0, 1.0)
        return TensorErrors(
            {kind: a / (b or 1.0) for kind, (a, b) in squared.items()},
            {kind: a / (b or 1.0) for kind, (a, b) in rounding.items()},
            float(fitted),
            float(half_text),
        )


def is_slow(q: QuantType) -> bool:
    """The types that llama.cpp searches a codebook for: seconds a million weights."""
    return q.name.startswith("IQ") and q.bits_per_weight < 4


def _fitting_ratios(
    w: Floats, x: Floats, q: QuantType, importance: Floats, half: Floats | None
) -> tuple[float, float]:
    """`TensorErrors.fitted` and `.half_text` of the rows w on the activations x."""
    e = w - llama.fake_quantize(w, q, importance)
    by_column, here = np.square(e).sum(axis=0), np.square(x).mean(axis=0)
    scale = (here @ np.square(w).sum(axis=0)) / (importance @ np.square(w).sum(axis=0))
    fitted = (here @ by_column) / (importance @ by_column * scale)
    if half is None:
        return float(fitted), 1.0
    from_half = np.square((w - llama.fake_quantize(w, q, half)) @ x.T).sum()
    return float(fitted), float(from_half / np.square(e @ x.T).sum())


def rounded(x: Floats, kind: str) -> Floats:
    """Activations [tokens, row length] as ggml's kernels round them (quantize_row_q8_0, _q8_K).

    Blocks of 32, or 256 for Q8_K, in 127 steps up to the largest; F16 and BF16 as such.
    """
    if kind == "F16":
        return x.astype(np.float16).astype(np.float32)
    if kind in ("F32", "BF16"):  # a weight in BF16 has too coarse a grid for this to matter
        return x
    blocks = x.reshape(len(x), -1, 256 if kind == "Q8_K" else 32)
    step = np.abs(blocks).max(axis=2, keepdims=True) / np.float32(127)
    values: Floats = (np.rint(blocks / np.where(step > 0, step, 1)) * step).reshape(x.shape)
    return values


def mean_cosine(a: Floats, b: Floats) -> float:
    """The mean over rows of the cosine between a row of `a` and of `b`."""
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return float(((a * b).sum(axis=1) / np.maximum(lengths, 1e-30)).mean())


def lookup_errors(
    bench: ProbeBench, name: str, candidates: Sequence[QuantType], tokens: TokenSet
) -> TensorErrors:
    """Errors of an embedding that is only looked up, over the rows that the text uses.

    No activation is rounded.
    """
    rows = tokens.tokens.reshape(-1)[:512]
    w = bench.weights(name, rows.astype(np.intp))
    total = float(np.square(w).sum(dtype=np.float64)) or 1.0
    importance = bench.importance(name)
    weights = {
        q.name: float(np.square(w - llama.fake_quantize(w, q, importance)).sum()) / total
        for q in candidates
    }
    return TensorErrors(weights, {})


def first_type(kinds: Sequence[QuantType]) -> QuantType:
    """The type nearest to 4.5 bits per weight, of which every tensor is probed first.

    Large enough an effect to rise above the noise of a few hundred tokens, small enough to stay in
    the range where tensors add up.
    """
    return min(kinds, key=lambda q: (abs(q.bits_per_weight - _FIRST_PROBE_BITS), q.ggml_id))


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
