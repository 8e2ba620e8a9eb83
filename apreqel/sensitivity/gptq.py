"""Error feedback: what rounding did to a tensor's columns is made good by the columns after them.

GPTQ (Frantar et al. 2023, arXiv 2210.17323): rounding block b of a row changes its output by
(W_b - Q_b) X_b; the blocks that are still to be rounded are moved so that the output comes back as
near as they can bring it. Here ggml's own quantisers round each block, so that the moved weights
are written by the same C program and the file has the same types and bytes, and runs as fast.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from apreqel import artifacts, llama
from apreqel.device.machine import detect
from apreqel.errors import ArtifactError, EngineError
from apreqel.model.inventory import Inventory, Tensor, read_inventory
from apreqel.model.qtypes import QuantType, lookup
from apreqel.sensitivity import bench as probing
from apreqel.sensitivity.calibration import fitting_set, probe_set
from apreqel.sensitivity.measure import SENSITIVITY_FILE, measured_before, provenance_of

if TYPE_CHECKING:
    from apreqel.model.imatrix import Imatrix
    from apreqel.sensitivity.measure import Sensitivity

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Progress = Callable[[str, int, int], None]

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
# What feedback gives is measured on so many rows and tokens: the ratio of errors on the same ones.
_GAIN_ROWS, _GAIN_TOKENS = 64, 384
# ggml weighs these types' weights by the whole row's mean square (quantize_row_q4_0_impl and its
# like in ggml-quants.c); a block that is quantised alone gets columns that bring it to that.
_WEIGHED_BY_ROW = frozenset({"Q4_0", "Q4_1", "Q5_0", "Q5_1"})
_FILLER_BLOCKS = 3
# Tensors that read the same activations.
_SHARED = {"attn_k": "attn_q", "attn_v": "attn_q", "ffn_up": "ffn_gate"}


class Feedback:
    """The factors of a model's second moments, kept in `folder`, and weights moved by them."""

    def __init__(
        self,
        inventory: Inventory,
        imatrix: Imatrix,
        state: Sensitivity,
        folder: Path,
        n_threads: int,
        on_progress: Progress = lambda what, done, total: None,
    ) -> None:
        """Raises ArtifactError where the text was not kept that it needs."""
        if not state.fitting_tokens:
            raise ArtifactError(
                f"{folder / SENSITIVITY_FILE}: written before error feedback; for --feedback run "
                "apreqel probe in another --workdir"
            )
        self._inventory, self._imatrix, self._state = inventory, imatrix, state
        self._folder = folder
        self._n_threads, self._on_progress = n_threads, on_progress
        self._text = fitting_set(state.fitting_tokens)
        facts = f"{state.provenance.model_sha256} {_DAMPING} {VERSION}".encode()
        facts += self._text.tokens.tobytes()
        self._place = folder / f"feedback-{hashlib.sha256(facts).hexdigest()[:12]}"
        self._marks = artifacts.file_marks(inventory.files)

    def gains(self) -> Mapping[str, Mapping[str, float]]:
        """By tensor and type: the output error of moved weights over that of weights as they are.

        On a sample of rows, and of text that nothing was fitted on. Kept in the folder. Raises
        ArtifactError, EngineError, LockedError, ModelFileError, OutputError.
        """
        path = self._place / "gains.json"
        data = measured_before(path, "feedback-gains", self._state)
        if data is None:
            data = {"gains": self._measured_gains()}
            artifacts.save(path, "feedback-gains", provenance_of(self._state), data)
        with artifacts.understood(f"{path}"):
            return {name: dict(row) for name, row in data["gains"].items()}

    def _measured_gains(self) -> dict[str, dict[str, float]]:
        kinds = {
            tensor.name: moved
            for tensor in self._inventory.quantizable
            if (known := self._state.tensors.get(tensor.name))
            and (moved := [lookup(t) for t in known.errors.weights if self._is_moved(tensor, t)])
        }
        if not kinds:
            return {}
        self._require_factors([self._inventory.by_name[name] for name in kinds])
        found: dict[str, dict[str, float]] = {}
        text = probe_set(self._state.probe_tokens)

        def listen(name: str, values: Floats, experts: npt.NDArray[np.int32] | None) -> None:
            if name in kinds and name not in found:
                self._on_progress("measuring what feedback gives", len(found), len(kinds))
                x = values.reshape(-1, values.shape[-1])
                found[name] = self._gains_of(self._inventory.by_name[name], kinds[name], x, pool)

        with (
            ThreadPoolExecutor(self._n_threads) as pool,
            llama.LoadedModel(self._inventory.files[0], patchable=True) as model,
        ):
            wanted = min(text.n_chunks, _GAIN_TOKENS // text.n_ctx + 1)
            n = probing.sequences_at_once(text.n_ctx, model.n_vocab, wanted)
            part = text.part(slice(n))
            with model.context(text.n_ctx, n, self._n_threads, listen) as context:
                context.evaluate(part.tokens, part.positions)
        artifacts.source_is_unchanged(self._inventory.files, self._marks)
        return found

    def _gains_of(
        self, tensor: Tensor, kinds: Sequence[QuantType], x: Floats, pool: ThreadPoolExecutor
    ) -> dict[str, float]:
        """Of one tensor's types, on activations `x` [tokens, row length]."""
        factor = self._factor(tensor)
        if not factor.size:
            return {}
        random = np.random.default_rng(0)
        x = x[probing.sample(random, len(x), _GAIN_TOKENS)]
        rows = probing.sample(random, tensor.n_rows, _GAIN_ROWS)
        weights = probing.read_weights(self._inventory, tensor.name, rows)
        importance = self._imatrix.weights(tensor.name)
        own = {n: own_inverses(factor, n) for n in {kind.block_size for kind in kinds}}

        def gain(kind: QuantType) -> float:
            w = weights[:: 4 if probing.is_slow(kind) else 1]
            moved = moved_rows(w, factor, own[kind.block_size], kind, importance)
            with_it, without = (
                float(np.square((w - llama.fake_quantize(v, kind, importance)) @ x.T).sum())
                for v in (moved, np.ascontiguousarray(w))
            )
            return with_it / without if without > 0 else 1.0

        return dict(zip((k.name for k in kinds), pool.map(gain, kinds), strict=True))

    @contextmanager
    def moved(self, types: Mapping[str, str]) -> Iterator[Inventory]:
        """The model with weights moved for `types`, as a file to be quantised to them.

        Raises ArtifactError, EngineError, LockedError, ModelFileError, OutputError.
        """
        inventory = self._inventory
        chosen = [t for t in inventory.quantizable if self._is_moved(t, types[t.name])]
        if not chosen:
            yield inventory
            return
        self._require_factors(chosen)
        floats = probing.scratch_types(inventory)
        types_of_copy = inventory.types | {t.name: floats[t.name] for t in chosen}
        with (
            probing.scratch_copy(inventory, self._folder, self._n_threads, types_of_copy) as path,
            ThreadPoolExecutor(self._n_threads) as pool,
        ):
            copy = read_inventory(path)
            stored = np.memmap(path, np.uint8, "r+")
            for i, tensor in enumerate(chosen):
                self._on_progress("moving weights against rounding", i, len(chosen))
                rows = probing.float_rows(stored, copy.by_name[tensor.name])
                self._move(tensor, lookup(types[tensor.name]), rows, pool)
            stored.flush()
            del rows, stored
            artifacts.source_is_unchanged(inventory.files, self._marks)
            yield copy

    def _is_moved(self, tensor: Tensor, kind: str) -> bool:
        """Experts see too few tokens each; looking up an embedding has no output to make good."""
        return (
            tensor.n_experts == 1
            and (tensor.layer is not None or tensor.role == "output")
            and lookup(kind).is_quantized
            and kind != tensor.qtype.name
            and tensor.row_length > lookup(kind).block_size
        )

    def _move(
        self,
        tensor: Tensor,
        kind: QuantType,
        rows: npt.NDArray[np.floating],
        pool: ThreadPoolExecutor,
    ) -> None:
        """Let `rows` hold the tensor as it is to be quantised."""
        factor = self._factor(tensor)
        if not factor.size:  # no product reads it
            return
        own = own_inverses(factor, kind.block_size)
        importance = self._imatrix.weights(tensor.name)

        def move(first: int) -> None:
            part = slice(first, min(first + _ROWS_AT_ONCE, tensor.n_rows))
            weights = probing.read_weights(self._inventory, tensor.name, part)
            rows[part] = moved_rows(weights, factor, own, kind, importance)

        list(pool.map(move, range(0, tensor.n_rows, _ROWS_AT_ONCE)))

    def _source(self, tensor: Tensor) -> str:
        """The tensor whose activations it reads: of several that read the same, one."""
        first = _SHARED.get(tensor.role, tensor.role)
        name = tensor.name.replace(f".{tensor.role}.", f".{first}.")
        return name if name in self._inventory.by_name else tensor.name

    def _factor(self, tensor: Tensor) -> Floats:
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
        with artifacts.lock(self._folder / ".feedback.lock"):
            lengths = {self._source(t): t.row_length for t in tensors}
            left = {n: length for n, length in lengths.items() if not self._path(n).exists()}
            if left:
                self._collect(left)

    def _collect(self, left: dict[str, int]) -> None:
        """Factors by row length, in as many passes over the text as memory asks for."""
        needed = sum(4 * length**2 for length in left.values())
        artifacts.require_space(self._folder, needed, "the second moments of activations")
        self._place.mkdir(parents=True, exist_ok=True)
        with llama.LoadedModel(self._inventory.files[0], patchable=True) as model:
            while left:
                now: list[str] = []
                room = min(_ROOM_BYTES, detect().available_bytes // 4)
                for name, length in left.items():
                    if now and room < 8 * length**2:
                        break
                    now.append(name)
                    room -= 8 * length**2
                found = self._moments(model, now)
                artifacts.source_is_unchanged(self._inventory.files, self._marks)
                for name in now:
                    factor = factor_of(found.pop(name)) if name in found else np.zeros((0, 0))
                    content = io.BytesIO()
                    np.save(content, factor)
                    artifacts.write_atomically(self._path(name), content.getvalue())
                    del left[name]

    def _path(self, name: str) -> Path:
        return self._place / f"{name}.npy"

    def _moments(self, model: llama.LoadedModel, names: list[str]) -> dict[str, Doubles]:
        found: dict[str, Doubles] = {}

        def listen(name: str, values: Floats, experts: npt.NDArray[np.int32] | None) -> None:
            if name in names and experts is None:
                x = values.reshape(-1, values.shape[-1])
                if name not in found:
                    found[name] = np.zeros((x.shape[1], x.shape[1]))
                found[name] += x.T @ x

        text = self._text
        n = probing.sequences_at_once(text.n_ctx, model.n_vocab, text.n_chunks)
        with model.context(text.n_ctx, n, self._n_threads, listen) as context:
            for start in range(0, text.n_chunks, n):
                self._on_progress("collecting second moments", start, text.n_chunks)
                part = text.part(slice(start, start + n))
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


def moved_rows(
    weights: Floats,
    factor: Floats,
    own: Sequence[Floats],
    kind: QuantType,
    importance: Floats | None,
) -> Floats:
    """`weights` [rows, n] as they are to be quantised to `kind`, block by block of columns.

    `own` is what `own_inverses` gives for the factor.
    """
    moved: Floats = weights.copy()
    length, block = weights.shape[1], kind.block_size
    step = max(block, _COLUMNS_AT_ONCE)
    for start in range(0, length, step):
        end = min(start + step, length)
        errors = np.zeros((len(moved), end - start), np.float32)
        for first in range(start, end, block):
            last = min(first + block, length)
            e = (moved[:, first:last] - _rounded(moved, first, last, kind, importance)) @ own[
                first // block
            ]
            errors[:, first - start : last - start] = e
            moved[:, last:end] -= e @ factor[first:last, last:end]
        moved[:, end:] -= errors @ factor[start:end, end:]
    return moved


def _rounded(
    rows: Floats, first: int, last: int, kind: QuantType, importance: Floats | None
) -> Floats:
    """Columns `first` to `last` as they read back from `kind`, in rows that stay as they are."""
    block = np.ascontiguousarray(rows[:, first:last])
    weights = None if importance is None else np.ascontiguousarray(importance[first:last])
    if weights is None or kind.name not in _WEIGHED_BY_ROW:
        return llama.fake_quantize(block, kind, weights)
    n = last - first
    energy = np.square(block).sum(axis=1, dtype=np.float64)
    wanted = np.square(rows).mean(axis=1, dtype=np.float64) * n * (1 + _FILLER_BLOCKS)
    filler = np.sqrt(np.maximum(wanted - energy, 0) / (n * _FILLER_BLOCKS)).astype(np.float32)
    whole = np.concatenate([block, np.repeat(filler[:, None], n * _FILLER_BLOCKS, axis=1)], axis=1)
    back = llama.fake_quantize(whole, kind, np.tile(weights, 1 + _FILLER_BLOCKS))
    return np.ascontiguousarray(back[:, :n])
