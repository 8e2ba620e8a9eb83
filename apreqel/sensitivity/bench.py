"""The running model that probes are made on: one load, weights swapped underneath it.

A scratch copy of the model in a float type is mapped by llama.cpp. A probe writes fake-quantised
values of one tensor into that file through a second map, evaluates the probe tokens,
compares the logits with the reference's, and writes the old values back.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from threadpoolctl import threadpool_limits

from apreqel.arrays import Bytes, Floats, Reals, Whole
from apreqel.artifacts import require_space
from apreqel.device.machine import detect
from apreqel.errors import EngineError, ModelFileError, UnsupportedModelError
from apreqel.llama.activations import Listener
from apreqel.llama.engine import Context, LoadedModel
from apreqel.llama.quants import fake_quantize, read_values
from apreqel.model.imatrix import Imatrix
from apreqel.model.inventory import Inventory, Tensor, read_inventory
from apreqel.model.qtypes import QuantType
from apreqel.quantize import quantize_model
from apreqel.sensitivity.metrics import Comparison, Reference, compare
from apreqel.sensitivity.texts import TokenSet
from apreqel.workspace import Workspace

# Logits of one decode are kept under this, whatever the vocabulary (262k tokens: 256 positions).
_LOGITS_BYTES = 256 << 20
# Rows quantised by one thread at a time; large enough to hide the call, small enough to share out.
_WEIGHTS_AT_ONCE = 1 << 18

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


def evaluated(context: Context, tokens: TokenSet) -> Iterator[tuple[slice, Floats]]:
    """Logits of the scored positions: (range of positions, [n, vocabulary]) per decode."""
    first = 0
    for start in range(0, tokens.n_chunks, context.n_sequences):
        part = tokens.part(slice(start, start + context.n_sequences))
        rows = slice(first, first := first + part.n_scored)
        yield rows, context.evaluate(part.tokens, part.positions)


def compared(context: Context, reference: ReferenceRun, pool: ThreadPoolExecutor) -> Comparison:
    """A model against the reference, at every position that this was scored at."""
    following = reference.tokens.next_tokens.reshape(-1)
    return Comparison.joined(
        [
            compare(logits, reference.rows.part(rows), following[rows], pool)
            for rows, logits in evaluated(context, reference.tokens)
        ]
    )


def one_thread_a_product() -> AbstractContextManager[object]:
    """For what shares products out over threads itself, in turns with llama.cpp.

    The threads of numpy's linear algebra spin for a while after each product, on cores that others
    need: output errors of SmolLM2-135M took 40 and 33 s so and 54 and 49 s without, a probe 1.34
    and 1.25 s and 1.52 and 1.38 s (two cores).
    """
    return threadpool_limits(1, "blas")  # type: ignore[no-any-return]


def context_for(
    model: LoadedModel, tokens: TokenSet, n_threads: int, listener: Listener | None = None
) -> AbstractContextManager[Context]:
    """A context that takes as many of these chunks in one decode as memory should hold."""
    n = sequences_at_once(tokens.n_ctx, model.n_vocab, tokens.n_chunks)
    return model.context(tokens.n_ctx, n, n_threads, listener)


def sequences_at_once(n_ctx: int, n_vocab: int, n_chunks: int) -> int:
    """How many chunks go into one decode: about 1,024 tokens, less for a huge vocabulary."""
    return max(1, min(n_chunks, 1024 // n_ctx, _LOGITS_BYTES // (4 * n_vocab * n_ctx)))


def require_next_tokens(inventory: Inventory) -> None:
    """Raise where llama.cpp does not predict next tokens with the model, before any work.

    UnsupportedModelError for projectors, adapters, embedding and diffusion models, EngineError
    where llama.cpp cannot load it. No weights are read.
    """
    path, kind = inventory.files[0], inventory.headers[0].get("general.type", "model")
    if inventory.architecture == "clip" or kind in ("mmproj", "adapter", "controlvector"):
        raise UnsupportedModelError(
            f"{path}: a {kind} for another model, not a language model; only apreqel inspect works"
        )
    with LoadedModel(path, simulated=True) as model:
        if reason := model.why_no_next_tokens():
            raise UnsupportedModelError(f"{path}: {reason}; it cannot be probed or verified")


def scratch_types(inventory: Inventory) -> dict[str, str]:
    """F16 for an F16 source, which is exact, and for a quantised one; F32, which holds BF16, else.

    Values read back from a quant type are rounded by a few parts in 10,000 so, alike in all that is
    compared. A float even where memory does not hold it and every probe reads it from disk: in a
    Q8_0 copy activations are rounded too, other ones in each probe, which added 0.002 to 0.006 nats
    to every probe of SmolLM2-135M, several times what most tensors do.
    """
    is_wide = any(t.qtype.name in ("F32", "BF16", "F64") for t in inventory.quantizable)
    kind = "F32" if is_wide else "F16"
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
def scratch_copy(space: Workspace, types: Mapping[str, str] | None = None) -> Iterator[Path]:
    """The model as one file of floats (or of `types`) in the work folder, gone afterwards.

    Written by the C program, which checks every weight. Raises OutputError, ModelFileError (NaN).
    """
    types = types or scratch_types(space.inventory)
    needed = space.inventory.output_size(types)
    require_space(space.folder, needed, "the scratch copy of the model")
    with TemporaryDirectory("", "scratch-", space.folder, ignore_cleanup_errors=True) as place:
        path = Path(place) / "model.gguf"
        quantize_model(
            space.inventory, types, path, n_threads=space.n_threads, allow_requantize=True
        )
        yield path


def read_weights(inventory: Inventory, name: str, rows: slice | Whole = slice(None)) -> Floats:
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
    read_values(packed, tensor.qtype, values)
    return values


def float_rows(copy: Bytes, tensor: Tensor) -> Reals:
    """A view of a tensor in a scratch copy's bytes, F16 or F32 [rows, row length]."""
    raw = copy[tensor.offset : tensor.offset + tensor.size_bytes]
    dtype = np.float16 if tensor.qtype.name == "F16" else np.float32
    rows: Reals = raw.view(dtype).reshape(-1, tensor.row_length)
    return rows


class ProbeBench:
    """A loaded scratch copy of a model, its weights by name, and comparison with the reference."""

    def __init__(
        self,
        inventory: Inventory,
        scratch: Path,
        context: Context,
        n_threads: int,
        imatrix: Imatrix | None = None,
    ) -> None:
        """`inventory` is the original's, whose weights are quantised with `imatrix`."""
        self.inventory, self.imatrix, self._context = inventory, imatrix, context
        self._tensors = read_inventory(scratch).by_name
        self._map = np.memmap(scratch, np.uint8, "r+")
        self.pool = ThreadPoolExecutor(n_threads)

    def close(self) -> None:
        self.pool.shutdown()
        del self._map

    def weights(self, name: str, rows: slice | Whole = slice(None)) -> Floats:
        """See `read_weights`."""
        return read_weights(self.inventory, name, rows)

    def _stored(self, name: str) -> Reals:
        """The rows of a tensor in the scratch copy [rows, row length]."""
        return float_rows(self._map, self._tensors[name])

    def _write(self, name: str, qtype: QuantType | None) -> None:
        """Let the scratch copy hold a tensor as it reads back from `qtype`; None: as it was."""
        tensor, stored = self._tensors[name], self._stored(name)
        rows_per_matrix = tensor.shape[1]
        step = max(1, min(rows_per_matrix, _WEIGHTS_AT_ONCE // tensor.row_length))

        def write(rows: slice) -> None:
            values = self.weights(name, rows)
            if qtype is not None:
                expert = rows.start // rows_per_matrix
                values = fake_quantize(values, qtype, importance(self.imatrix, tensor, expert))
            stored[rows] = values

        blocks = [
            slice(first, min(first + step, start + rows_per_matrix))
            for start in range(0, tensor.n_rows, rows_per_matrix)
            for first in range(start, start + rows_per_matrix, step)
        ]
        # Not one block may be written after this, whatever happens to another.
        for future in wait([self.pool.submit(write, block) for block in blocks]).done:
            future.result()

    def reference(
        self, tokens: TokenSet, folder: Path, informative_part: float = _INFORMATIVE_PART
    ) -> ReferenceRun:
        """Evaluate the unpatched model and keep its logits in a file in `folder`.

        Of each piece's scored positions only the `informative_part` with the highest entropy of
        the next token is kept.
        """
        n_vocab, per_draw = self._context.model.n_vocab, tokens.n_scored // tokens.n_draws
        kept = max(1, round(per_draw * informative_part))
        shape = tokens.n_draws, kept, n_vocab
        require_space(folder, 4 * math.prod(shape), "the reference's logits")
        store = np.memmap(folder / "reference.f32", np.float32, "w+", shape=shape)
        chosen = np.empty(shape[:2], np.intp)
        for rows, logits in evaluated(self._context, tokens):
            if not np.isfinite(logits).all():
                raise EngineError(
                    f"{self._context.model.shown}: the unquantised model gives NaN or Inf logits"
                )
            entropy = Reference.of(logits, self.pool).entropies(self.pool).reshape(-1, per_draw)
            best = np.sort(np.argsort(-entropy, axis=1, kind="stable")[:, :kept], axis=1)
            draws = slice(rows.start // per_draw, rows.stop // per_draw)
            chosen[draws] = best
            by_draw = logits.reshape(-1, per_draw, n_vocab)
            store[draws] = by_draw[np.arange(len(best))[:, None], best]
        positions = np.take_along_axis(tokens.positions.reshape(-1, per_draw), chosen, axis=1)
        scored = replace(tokens, positions=positions.reshape(tokens.n_chunks, -1))
        return ReferenceRun(scored, Reference.of(store.reshape(-1, n_vocab), self.pool))

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
    space: Workspace, scratch: Path, model: LoadedModel, tokens: TokenSet, imatrix: Imatrix
) -> Iterator[ProbeBench]:
    """A bench on the loaded scratch copy, for chunks as long as those of `tokens`."""
    with (
        one_thread_a_product(),
        context_for(model, tokens, space.n_threads) as context,
        closing(ProbeBench(space.inventory, scratch, context, space.n_threads, imatrix)) as bench,
    ):
        yield bench


def importance(imatrix: Imatrix | None, tensor: Tensor, expert: int) -> Floats | None:
    """The imatrix's weights [row length] of one expert's columns; None where it has none."""
    weights = imatrix.weights(tensor.name) if imatrix else None
    return None if weights is None else weights.reshape(-1, tensor.row_length)[expert]
