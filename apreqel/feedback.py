"""Error feedback: what rounding did to a tensor's columns is made good by the columns after them.

GPTQ (Frantar et al. 2023, arXiv 2210.17323): rounding block b of a row changes its output by
(W_b - Q_b) X_b; the blocks that are still to be rounded are moved so that the output comes back as
near as they can bring it. Here ggml's own quantisers round each block, so that the moved weights
are written by the same C program and the file has the same types and bytes, and runs as fast.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from apreqel import artifacts, llama, probing
from apreqel.calibration import TokenSet
from apreqel.errors import EngineError
from apreqel.inventory import Inventory, Tensor, read_inventory
from apreqel.qtypes import QuantType, lookup

if TYPE_CHECKING:
    from apreqel.imatrix import Imatrix
    from apreqel.sensitivity import Sensitivity

Floats = npt.NDArray[np.float32]
Progress = Callable[[str, int, int], None]

# Added to all columns' second moments, as a part of their median: keeps weights of columns that are
# hardly used from being moved far (GPTQ's percdamp; by the median, as single columns can be huge).
_DAMPING = 0.1
# Columns after which the rest of a row is moved; within, each block moves those after it.
_COLUMNS_AT_ONCE = 256
# Rows taken together: a fixed number, so that the file does not depend on the number of threads.
_ROWS_AT_ONCE = 1024
# Second moments of as many tensors as fit are collected in one pass over the text.
_ROOM_BYTES = 2 << 30
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
        self._inventory, self._imatrix, self._folder = inventory, imatrix, folder
        self._n_threads, self._on_progress = n_threads, on_progress
        tokens = np.array(state.fitting_tokens, np.int32)
        self._tokens = TokenSet.scored_from(0, "fitting", tokens, "")
        facts = f"{state.provenance.model_sha256} {_DAMPING}".encode() + tokens.tobytes()
        self._place = folder / f"feedback-{hashlib.sha256(facts).hexdigest()[:12]}"

    @contextmanager
    def moved(self, types: Mapping[str, str]) -> Iterator[Inventory]:
        """The model with weights moved for `types`, as a file to be quantised to them.

        Raises EngineError, ModelFileError, OutputError.
        """
        inventory = self._inventory
        chosen = [t for t in inventory.quantizable if self._is_moved(t, types[t.name])]
        self._collect()
        kept = inventory.types
        floats = probing.scratch_types(inventory)
        with (
            probing.scratch_copy(
                inventory,
                self._folder,
                self._n_threads,
                kept | {t.name: floats[t.name] for t in chosen},
            ) as path,
            ThreadPoolExecutor(self._n_threads) as pool,
        ):
            copy = read_inventory(path)
            stored = np.memmap(path, np.uint8, "r+")
            for i, tensor in enumerate(chosen):
                self._on_progress("moving weights against rounding", i, len(chosen))
                self._move(
                    tensor, lookup(types[tensor.name]), copy.by_name[tensor.name], stored, pool
                )
            stored.flush()
            del stored
            yield copy

    def _is_moved(self, tensor: Tensor, kind: str) -> bool:
        """Experts see too few tokens each; an embedding that is looked up has no later columns."""
        return (
            tensor.n_experts == 1
            and tensor.layer is not None
            and lookup(kind).is_quantized
            and kind != tensor.qtype.name
            and tensor.row_length > lookup(kind).block_size
        )

    def _move(
        self,
        tensor: Tensor,
        kind: QuantType,
        copy: Tensor,
        stored: npt.NDArray[np.uint8],
        pool: ThreadPoolExecutor,
    ) -> None:
        factor = np.load(self._place / f"{self._source(tensor)}.npy")
        if not factor.size:  # no product reads it
            return
        importance = self._imatrix.weights(tensor.name)
        dtype = np.float16 if copy.qtype.name == "F16" else np.float32
        raw = stored[copy.offset : copy.offset + copy.size_bytes]
        rows = raw.view(dtype).reshape(-1, tensor.row_length)

        def move(first: int) -> None:
            part = slice(first, min(first + _ROWS_AT_ONCE, tensor.n_rows))
            weights = probing.read_weights(self._inventory, tensor.name, part)
            rows[part] = moved_rows(weights, factor, kind, importance)

        list(pool.map(move, range(0, tensor.n_rows, _ROWS_AT_ONCE)))

    def _source(self, tensor: Tensor) -> str:
        """The tensor whose activations it reads: of several that read the same, one."""
        first = _SHARED.get(tensor.role, tensor.role)
        name = tensor.name.replace(f".{tensor.role}.", f".{first}.")
        return name if name in self._inventory.by_name else tensor.name

    def _collect(self) -> None:
        """Collect what is not at hand, in passes over the text that memory holds."""
        wanted = {
            self._source(t): t.row_length
            for t in self._inventory.quantizable
            if t.n_experts == 1 and t.layer is not None
        }
        left = {
            n: length for n, length in wanted.items() if not (self._place / f"{n}.npy").exists()
        }
        if not left:
            return
        needed = sum(4 * length**2 for length in left.values())
        artifacts.require_space(self._folder, needed, "the second moments of activations")
        self._place.mkdir(parents=True, exist_ok=True)
        with llama.LoadedModel(self._inventory.files[0], patchable=True) as model:
            while left:
                now: list[str] = []
                room = _ROOM_BYTES
                for name, length in left.items():
                    if now and room < 8 * length**2:
                        break
                    now.append(name)
                    room -= 8 * length**2
                found = self._moments(model, now)
                for name in now:
                    part = self._place / f"{name}.part.npy"
                    np.save(part, factor_of(found[name]) if name in found else np.zeros((0, 0)))
                    part.rename(self._place / f"{name}.npy")
                    del left[name]

    def _moments(self, model: llama.LoadedModel, names: list[str]) -> dict[str, Floats]:
        found: dict[str, Floats] = {}

        def listen(name: str, values: Floats, experts: npt.NDArray[np.int32] | None) -> None:
            if name in names and experts is None:
                x = values.reshape(-1, values.shape[-1])
                product = x.T @ x
                found[name] = found[name] + product if name in found else product

        n = probing.sequences_at_once(self._tokens.n_ctx, model.n_vocab, self._tokens.n_chunks)
        with model.context(self._tokens.n_ctx, n, self._n_threads, listen) as context:
            for start in range(0, self._tokens.n_chunks, n):
                self._on_progress("collecting second moments", start, self._tokens.n_chunks)
                part = self._tokens.part(slice(start, start + n))
                context.evaluate(part.tokens, part.positions)
        return found


def factor_of(moments: Floats) -> Floats:
    """U, upper triangular, with U^T U the inverse of the damped second moments [n, n]."""
    from scipy.linalg import lapack

    n, diagonal = len(moments), np.diag(moments)
    damped = moments.astype(np.float64)
    damped[np.diag_indices(n)] += _DAMPING * np.median(diagonal) + 1e-6 * diagonal.mean() + 1e-30
    lower, failed = lapack.dpotrf(damped, lower=1, overwrite_a=1)
    inverse, _ = lapack.dpotri(lower, lower=1, overwrite_c=1)
    inverse = np.tril(inverse)
    inverse += np.tril(inverse, -1).T
    upper, failed = lapack.dpotrf(inverse, lower=0, overwrite_a=1)
    if failed:
        raise EngineError("second moments of activations are not finite")
    factor: Floats = np.triu(upper).astype(np.float32)
    return factor


def moved_rows(
    weights: Floats, factor: Floats, kind: QuantType, importance: Floats | None
) -> Floats:
    """`weights` [rows, n] as they are to be quantised to `kind`, block by block of columns."""
    moved: Floats = weights.copy()
    length, block = weights.shape[1], kind.block_size
    step = max(block, _COLUMNS_AT_ONCE)
    for start in range(0, length, step):
        end = min(start + step, length)
        errors = np.zeros((len(moved), end - start), np.float32)
        for first in range(start, end, block):
            last = min(first + block, length)
            part = np.ascontiguousarray(moved[:, first:last])
            column_weights = (
                None if importance is None else np.ascontiguousarray(importance[first:last])
            )
            lost = part - llama.fake_quantize(part, kind, column_weights)
            own = np.linalg.inv(factor[first:last, first:last].astype(np.float64))
            errors[:, first - start : last - start] = e = lost @ own.astype(np.float32)
            moved[:, last:end] -= e @ factor[first:last, last:end]
        moved[:, end:] -= errors @ factor[start:end, end:]
    return moved
