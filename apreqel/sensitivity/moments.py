"""Second moments of activations: what each tensor reads, over the calibration text, in a folder.

Rounding with the output error in view goes by them (`rounding`). The pass over the text that the
imatrix is collected in keeps as many as memory holds, others need passes of their own.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path

import numpy as np
from scipy.linalg.blas import ssyrk

from apreqel.arrays import Doubles, Floats, Tokens
from apreqel.artifacts import FileMarks, lock, require_space, write_atomically
from apreqel.device.machine import detect
from apreqel.errors import ArtifactError, OutputError
from apreqel.llama.activations import Listener
from apreqel.llama.engine import LoadedModel
from apreqel.model.inventory import Tensor
from apreqel.sensitivity.bench import context_for, evaluated
from apreqel.sensitivity.output_errors import bias_weight
from apreqel.sensitivity.texts import TokenSet
from apreqel.workspace import Workspace

# Added to all columns' second moments, as a part of their median, so that what the text shows of
# columns that are hardly used is not taken for more than it is. Of 0.01, 0.1, 0.3 and 1, on text
# that nothing was fitted on (SmolLM2-135M, four tensors in seven types each), the best in most.
_DAMPING = 0.3
# Raised whenever other weights come of the same input: files and measurements are kept by it.
VERSION = 3
# Second moments of as many tensors as fit are collected in one pass over the text.
_ROOM_BYTES = 2 << 30
# Activations wait until there are so many: llama.cpp's threads and those of the linear algebra spin
# for a while after their work, and in turns, one product each, took each other's cores (8 chunks of
# SmolLM2-135M on two cores: 30 s; 15 s so; 12 s without second moments).
_WAITING_BYTES = 256 << 20
# Where they are, and were.
_FOLDER = re.compile(r"(gptq|moments)-[0-9a-f]{12}")
# Tensors that read the same activations.
READS_AS = {"attn_k": "attn_q", "attn_v": "attn_q", "ffn_up": "ffn_gate"}


class Moments:
    """The second moments of a model on a text, kept in its work folder."""

    def __init__(self, space: Workspace, text: TokenSet) -> None:
        self._space, self._inventory, self._text = space, space.inventory, text
        facts = f"{space.sha256} {_DAMPING} {VERSION}".encode() + text.tokens.tobytes()
        self.folder = space.folder / f"moments-{hashlib.sha256(facts).hexdigest()[:12]}"
        self._source_files = FileMarks(self._inventory.files)

    def path(self, tensor: Tensor) -> Path:
        """Float32 [row length, row length]; an empty file for a tensor that stays as it is."""
        return self.folder / f"{self._reads_as(tensor)}-{bias_weight(tensor.role)}.f32"

    def require(self, tensors: Sequence[Tensor]) -> None:
        """Collect those that are not at hand; in as many passes over the text as memory asks for.

        Raises ArtifactError, EngineError, LockedError, ModelFileError, OutputError.
        """
        with lock(self._space.folder / ".moments.lock"):
            if not (missing := self._missing(tensors)):
                return
            with LoadedModel(self._space.model, patchable=True) as model:
                while missing:
                    now, text = self._together(missing), self._text
                    self._make_room(now)
                    with (
                        self._kept(now) as listener,
                        context_for(model, text, self._space.n_threads, listener) as context,
                    ):
                        for rows, _ in evaluated(context, text):
                            progress = self._space.progress
                            progress("collecting second moments", rows.stop, text.n_scored)
                    missing = self._missing(tensors)

    @contextmanager
    def collected(self) -> Iterator[Listener]:
        """With a listener for one pass over the whole text, made for something else.

        As many as memory holds are kept of it; none where the disk has no room.
        """
        tensors = [t for t in self._inventory.quantizable if t.n_experts == 1]
        with lock(self._space.folder / ".moments.lock"):
            now = self._together(self._missing(tensors))
            try:
                self._make_room(now)
            except OutputError:
                now = []
            with self._kept(now) as listener:
                yield listener

    def _reads_as(self, tensor: Tensor) -> str:
        """The tensor whose activations it reads: of several that read the same, one."""
        first = READS_AS.get(tensor.role, tensor.role)
        name = tensor.name.replace(f".{tensor.role}.", f".{first}.")
        other = self._inventory.by_name.get(name)
        return name if other and other.row_length == tensor.row_length else tensor.name

    def _missing(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """One of each file that is not there. Raises ArtifactError for one that is not whole."""
        found = []
        for path, tensor in {self.path(t): t for t in tensors}.items():
            size = 4 * tensor.row_length**2
            if not path.exists():
                found.append(tensor)
            elif path.stat().st_size not in (0, size):
                raise ArtifactError(
                    f"{path}: has {path.stat().st_size} bytes, not {size}; delete it"
                )
        return found

    def _together(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The first of them, as many as one pass can take."""
        room = min(_ROOM_BYTES, detect().available_bytes // 4)
        lengths = {self._reads_as(t): t.row_length for t in tensors}
        filled = accumulate(4 * length**2 for length in lengths.values())
        names = list(lengths)[: max(1, sum(n_bytes <= room for n_bytes in filled))]
        return [t for t in tensors if self._reads_as(t) in names]

    def _make_room(self, tensors: Sequence[Tensor]) -> None:
        """Raise OutputError where there is none.

        Second moments of another text, or of an older apreqel, go.
        """
        for old in self._space.folder.iterdir():
            if _FOLDER.fullmatch(old.name) and old != self.folder and not old.is_symlink():
                shutil.rmtree(old, ignore_errors=True)
        needed = sum(4 * t.row_length**2 for t in tensors)
        require_space(self._space.folder, needed, "the second moments of activations")

    @contextmanager
    def _kept(self, tensors: Sequence[Tensor]) -> Iterator[Listener]:
        """A listener; what it heard is written in the end."""
        sums = {self._reads_as(t): _Sums(t.row_length) for t in tensors}
        waiting: list[tuple[str, Floats]] = []

        def add_up() -> None:
            for name, x in waiting:
                sums[name].add(x)
            waiting.clear()

        def listen(name: str, values: Floats, experts: Tokens | None) -> None:
            if name in sums and experts is None:
                waiting.append((name, values.reshape(-1, values.shape[-1]).copy()))
                if sum(x.nbytes for _, x in waiting) > _WAITING_BYTES:
                    add_up()

        yield listen
        add_up()
        self._source_files.check()
        for tensor in tensors:
            damped = sums[self._reads_as(tensor)].damped(bias_weight(tensor.role))
            write_atomically(self.path(tensor), damped)


class _Sums:
    """Over tokens, of x x' [row length, row length] and of x."""

    def __init__(self, row_length: int) -> None:
        # One triangle, in float32: what is lost so is far below the damping.
        self._squares = np.zeros((row_length, row_length), np.float32, order="F")
        self._values: Doubles = np.zeros(row_length)
        self._n_tokens = 0

    def add(self, x: Floats) -> None:
        """`x` [tokens, row length]."""
        self._squares = ssyrk(1.0, x.T, beta=1.0, c=self._squares, overwrite_c=1, lower=1)
        self._values += x.sum(axis=0, dtype=np.float64)
        self._n_tokens += len(x)

    def damped(self, bias_counts: float) -> bytes:
        """As float32; empty where they tell nothing.

        What is the same at every token counts `bias_counts` times.
        """
        diagonal = np.diag(self._squares).astype(np.float64)
        if not np.isfinite(diagonal).all() or not diagonal.any():
            return b""
        mean = self._values / self._n_tokens
        moments = np.tril(self._squares) / self._n_tokens
        moments += np.tril(moments, -1).T
        moments += ((bias_counts - 1) * np.outer(mean, mean)).astype(np.float32)
        damping = _DAMPING * float(np.median(diagonal[diagonal > 0])) / self._n_tokens
        moments[np.diag_indices(len(moments))] += damping + 1e-6 * diagonal / self._n_tokens
        sound = np.isfinite(moments).all() and np.diag(moments).min() > np.finfo(np.float32).tiny
        return moments.tobytes() if sound else b""
