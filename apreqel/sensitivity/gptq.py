"""GPTQ: what rounding did to a tensor's columns is compensated in the columns after them.

Frantar et al. 2023, arXiv 2210.17323: rounding block b of a row changes its output by
(W_b - Q_b) X_b; the blocks that are still to be rounded are moved so that the output comes back as
near as they can bring it. Here ggml's own quantisers round each block, so that the compensated
weights are written by the same C program and the file has the same types and bytes, and runs as
fast.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

import numpy as np

from apreqel.arrays import Doubles, Floats, Reals, Tokens
from apreqel.artifacts import FileMarks, Record, lock, require_space, write_atomically
from apreqel.device.machine import detect
from apreqel.errors import ArtifactError, EngineError
from apreqel.llama.engine import LoadedModel
from apreqel.llama.quants import fake_quantize
from apreqel.model.inventory import Inventory, Tensor, read_inventory
from apreqel.model.qtypes import QuantType, lookup
from apreqel.sensitivity.bench import (
    context_for,
    evaluated,
    float_rows,
    read_weights,
    scratch_copy,
    scratch_types,
)
from apreqel.sensitivity.measurement import ProbedModel
from apreqel.sensitivity.output_errors import is_slow, sample
from apreqel.sensitivity.texts import fitting_set

# Added to all columns' second moments, as a part of their median: keeps weights of columns that are
# hardly used from being moved far (GPTQ's percdamp; by the median, as single columns can be huge).
_DAMPING = 0.1
# Raised whenever other weights come of the same input: files and measurements are kept by it.
VERSION = 1
# Columns after which the rest of a row is moved; within, each block moves those after it.
_COLUMNS_AT_ONCE = 256
# Rows taken together: a fixed number, so that the file does not depend on the number of threads.
_ROWS_AT_ONCE = 256
# Second moments of as many tensors as fit are collected in one pass over the text.
_ROOM_BYTES = 2 << 30
# What it gives is measured on so many rows and tokens: the ratio of errors on the same ones.
_RATIO_ROWS, _RATIO_TOKENS = 64, 384
# ggml weighs these types' weights by the whole row's mean square (quantize_row_q4_0_impl and its
# like in ggml-quants.c); a block that is quantised alone gets columns that bring it to that.
_WEIGHED_BY_ROW = frozenset({"Q4_0", "Q4_1", "Q5_0", "Q5_1"})
_FILLER_BLOCKS = 3
# Tensors that read the same activations.
_SHARED = {"attn_k": "attn_q", "attn_v": "attn_q", "ffn_up": "ffn_gate"}


@dataclass(frozen=True)
class GptqRatios(Record):
    """By tensor and type: the output error of compensated weights over that of weights as they are.

    None for a tensor that stays as it is: nothing reads it, or the second moments of its
    activations cannot be inverted.
    """

    KIND = "gptq-ratios"

    ratios: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


class Gptq:
    """The factors of a model's second moments, kept in its folder, and what they compensate."""

    def __init__(self, probed: ProbedModel) -> None:
        self._probed, self._space, self._inventory = probed, probed.space, probed.inventory
        self._text = fitting_set(probed.sensitivity.fitting_tokens)
        facts = f"{self._space.sha256} {_DAMPING} {VERSION}".encode() + self._text.tokens.tobytes()
        digest = hashlib.sha256(facts).hexdigest()[:12]
        self._place = self._space.folder / f"gptq-{digest}"
        self._source_files = FileMarks(self._inventory.files)

    # -- what it gives --

    def ratios(self) -> GptqRatios:
        """Measured on a sample of rows, and of text that nothing was fitted on; kept.

        Raises ArtifactError, EngineError, LockedError, ModelFileError, OutputError.
        """
        path = self._place / "ratios.json"
        found = GptqRatios.load_same(path, self._probed.provenance)
        if found is None:
            found = self._measured_ratios()
            found.save(path)
        return found

    def _measured_ratios(self) -> GptqRatios:
        errors = {n: t.errors.weights for n, t in self._probed.sensitivity.tensors.items()}
        qtypes = {
            t.name: compensated
            for t in self._inventory.quantizable
            if (compensated := [lookup(k) for k in errors[t.name] if self._is_compensated(t, k)])
        }
        self._require_factors([self._inventory.by_name[name] for name in qtypes])
        found: dict[str, dict[str, float]] = {}
        text = self._probed.sensitivity.probe_text
        text = text.part(slice(min(text.n_chunks, _RATIO_TOKENS // text.n_ctx + 1)))

        def listen(name: str, values: Floats, experts: Tokens | None) -> None:
            if name in qtypes and name not in found:
                self._space.progress("measuring what GPTQ gives", len(found), len(qtypes))
                x = values.reshape(-1, values.shape[-1])
                found[name] = self._ratios_of(name, qtypes[name], x, pool)

        with (
            ThreadPoolExecutor(self._space.n_threads) as pool,
            LoadedModel(self._space.model, patchable=True) as model,
            context_for(model, text, self._space.n_threads, listen) as context,
        ):
            next(evaluated(context, text))
        self._source_files.check()
        return GptqRatios(self._probed.provenance, {n: found.get(n, {}) for n in qtypes})

    def _ratios_of(
        self, name: str, qtypes: Sequence[QuantType], x: Floats, pool: ThreadPoolExecutor
    ) -> dict[str, float]:
        """Of one tensor's types, on activations `x` [tokens, row length]."""
        tensor = self._inventory.by_name[name]
        factor = self._factor(tensor)
        if not factor.size:
            return {}
        random = np.random.default_rng(0)
        x = x[sample(random, len(x), _RATIO_TOKENS)]
        rows = sample(random, tensor.n_rows, _RATIO_ROWS)
        weights = read_weights(self._inventory, name, rows)
        importance = self._probed.imatrix.weights(name)
        own = {n: own_inverses(factor, n) for n in {q.block_size for q in qtypes}}

        def ratio(qtype: QuantType) -> float:
            w = weights[:: 4 if is_slow(qtype) else 1]
            compensated = compensated_rows(w, factor, own[qtype.block_size], qtype, importance)
            with_it, without = (
                float(np.square((w - fake_quantize(v, qtype, importance)) @ x.T).sum())
                for v in (compensated, np.ascontiguousarray(w))
            )
            return with_it / without if without > 0 else 1.0

        return dict(zip((q.name for q in qtypes), pool.map(ratio, qtypes), strict=True))

    # -- weights --

    @contextmanager
    def compensated(self, types: Mapping[str, str]) -> Iterator[Inventory]:
        """The model with weights compensated for `types`, as a file to be quantised to them.

        Raises ArtifactError, EngineError, LockedError, ModelFileError, OutputError.
        """
        chosen = [t for t in self._inventory.quantizable if self._is_compensated(t, types[t.name])]
        if not chosen:
            yield self._inventory
            return
        self._require_factors(chosen)
        floats = scratch_types(self._inventory)
        types_of_copy = self._inventory.types | {t.name: floats[t.name] for t in chosen}
        with (
            scratch_copy(self._space, types_of_copy) as path,
            ThreadPoolExecutor(self._space.n_threads) as pool,
        ):
            copy = read_inventory(path)
            stored = np.memmap(path, np.uint8, "r+")
            for i, tensor in enumerate(chosen):
                self._space.progress("compensating for rounding (GPTQ)", i, len(chosen))
                rows = float_rows(stored, copy.by_name[tensor.name])
                self._compensate(tensor, lookup(types[tensor.name]), rows, pool)
            stored.flush()
            del rows, stored
            self._source_files.check()
            yield copy

    def _is_compensated(self, tensor: Tensor, type_name: str) -> bool:
        """Experts see too few tokens each; looking up an embedding has no output to compensate."""
        return (
            tensor.n_experts == 1
            and (tensor.layer is not None or tensor.role == "output")
            and lookup(type_name).is_quantized
            and type_name != tensor.qtype.name
            and tensor.row_length > lookup(type_name).block_size
        )

    def _compensate(
        self, tensor: Tensor, qtype: QuantType, rows: Reals, pool: ThreadPoolExecutor
    ) -> None:
        """Let `rows` hold the tensor as it is to be quantised."""
        factor = self._factor(tensor)
        if not factor.size:
            return
        own = own_inverses(factor, qtype.block_size)
        importance = self._probed.imatrix.weights(tensor.name)

        def compensate(first: int) -> None:
            part = slice(first, min(first + _ROWS_AT_ONCE, tensor.n_rows))
            weights = read_weights(self._inventory, tensor.name, part)
            rows[part] = compensated_rows(weights, factor, own, qtype, importance)

        list(pool.map(compensate, range(0, tensor.n_rows, _ROWS_AT_ONCE)))

    # -- factors --

    def _source(self, tensor: Tensor) -> str:
        """The tensor whose activations it reads: of several that read the same, one."""
        first = _SHARED.get(tensor.role, tensor.role)
        name = tensor.name.replace(f".{tensor.role}.", f".{first}.")
        return name if name in self._inventory.by_name else tensor.name

    def _path(self, name: str) -> Path:
        return self._place / f"{name}.npy"

    def _factor(self, tensor: Tensor) -> Floats:
        """[row length, row length]; empty for a tensor that stays as it is."""
        path = self._path(self._source(tensor))
        try:
            factor: Floats = np.load(path)
        except (OSError, ValueError) as error:
            raise ArtifactError(f"{path}: damaged ({error}); delete it") from error
        if factor.shape not in ((0, 0), (tensor.row_length, tensor.row_length)):
            raise ArtifactError(f"{path}: has the shape {factor.shape}; delete it")
        return factor

    def _require_factors(self, tensors: Sequence[Tensor]) -> None:
        """Collect those that are not at hand."""
        with lock(self._space.folder / ".gptq.lock"):
            lengths = {self._source(t): t.row_length for t in tensors}
            left = {n: length for n, length in lengths.items() if not self._path(n).exists()}
            if left:
                self._collect(left)

    def _collect(self, left: dict[str, int]) -> None:
        """Factors by row length, in as many passes over the text as memory asks for."""
        needed = sum(4 * length**2 for length in left.values())
        require_space(self._space.folder, needed, "the second moments of activations")
        with LoadedModel(self._space.model, patchable=True) as model:
            while left:
                room = min(_ROOM_BYTES, detect().available_bytes // 4)
                filled = accumulate(8 * length**2 for length in left.values())
                now = list(left)[: max(1, sum(n_bytes <= room for n_bytes in filled))]
                found = self._moments(model, now)
                self._source_files.check()
                for name in now:
                    factor = np.zeros((0, 0), np.float32)  # without one a tensor stays as it is
                    with suppress(EngineError):
                        factor = factor_of(found.pop(name, np.zeros((0, 0))))
                    content = io.BytesIO()
                    np.save(content, factor)
                    write_atomically(self._path(name), content.getvalue())
                    del left[name]

    def _moments(self, model: LoadedModel, names: list[str]) -> dict[str, Doubles]:
        found: dict[str, Doubles] = {}

        def listen(name: str, values: Floats, experts: Tokens | None) -> None:
            if name in names and experts is None:
                x = values.reshape(-1, values.shape[-1])
                if name not in found:
                    found[name] = np.zeros((x.shape[1], x.shape[1]))
                found[name] += x.T @ x

        text = self._text
        with context_for(model, text, self._space.n_threads, listen) as context:
            for start in range(0, text.n_chunks, context.n_sequences):
                self._space.progress("collecting second moments", start, text.n_chunks)
                part = text.part(slice(start, start + context.n_sequences))
                context.evaluate(part.tokens, part.positions)
        return found


def factor_of(moments: Doubles) -> Floats:
    """U, upper triangular, with U^T U the inverse of the damped second moments [n, n].

    Raises EngineError where they are not finite, or singular however they are damped.
    """
    from scipy.linalg import lapack

    diagonal = np.diag(moments).copy()
    if not np.isfinite(diagonal).all():
        raise EngineError("second moments of activations are not finite")
    used = diagonal[diagonal > 0]
    if not used.size:
        return np.zeros((0, 0), np.float32)
    damping = _DAMPING * float(np.median(used)) + 1e-6 * diagonal
    for _ in range(8):
        a = np.array(moments, order="F")  # a copy, for another try; LAPACK works in it
        a[np.diag_indices(len(a))] += damping
        a, failed = lapack.dpotrf(a, lower=1, overwrite_a=1)
        if not failed:
            a, failed = lapack.dpotri(a, lower=1, overwrite_c=1)
        if not failed:
            for i in range(len(a)):
                a[i, i + 1 :] = a[i + 1 :, i]
            a, failed = lapack.dpotrf(a, lower=0, overwrite_a=1)
        if not failed:
            factor: Floats = np.triu(a.astype(np.float32))
            return factor
        damping = 10 * damping  # a few columns have nearly all the energy, and are alike
    raise EngineError("second moments of activations cannot be inverted")


def own_inverses(factor: Floats, block: int) -> list[Floats]:
    """Of each diagonal block of the factor."""
    return [
        np.linalg.inv(factor[i : i + block, i : i + block].astype(np.float64)).astype(np.float32)
        for i in range(0, len(factor), block)
    ]


def compensated_rows(
    weights: Floats,
    factor: Floats,
    own: Sequence[Floats],
    qtype: QuantType,
    importance: Floats | None,
) -> Floats:
    """`weights` [rows, n] as they are to be quantised to `qtype`, block by block of columns.

    `own` is what `own_inverses` gives for the factor.
    """
    moved: Floats = weights.copy()
    length, block = weights.shape[1], qtype.block_size
    step = max(block, _COLUMNS_AT_ONCE)
    for start in range(0, length, step):
        end = min(start + step, length)
        errors = np.zeros((len(moved), end - start), np.float32)
        for first in range(start, end, block):
            last = min(first + block, length)
            e = moved[:, first:last] - _rounded(moved, first, last, qtype, importance)
            e = e @ own[first // block]
            errors[:, first - start : last - start] = e
            moved[:, last:end] -= e @ factor[first:last, last:end]
        moved[:, end:] -= errors @ factor[start:end, end:]
    return moved


def _rounded(
    rows: Floats, first: int, last: int, qtype: QuantType, importance: Floats | None
) -> Floats:
    """Columns `first` to `last` as they read back from `qtype`, in rows that stay as they are."""
    block = np.ascontiguousarray(rows[:, first:last])
    weights = None if importance is None else np.ascontiguousarray(importance[first:last])
    if weights is None or qtype.name not in _WEIGHED_BY_ROW:
        return fake_quantize(block, qtype, weights)
    n = last - first
    energy = np.square(block).sum(axis=1, dtype=np.float64)
    wanted = np.square(rows).mean(axis=1, dtype=np.float64) * n * (1 + _FILLER_BLOCKS)
    filler = np.sqrt(np.maximum(wanted - energy, 0) / (n * _FILLER_BLOCKS)).astype(np.float32)
    whole = np.concatenate([block, np.repeat(filler[:, None], n * _FILLER_BLOCKS, axis=1)], axis=1)
    back = fake_quantize(whole, qtype, np.tile(weights, 1 + _FILLER_BLOCKS))
    return np.ascontiguousarray(back[:, :n])
