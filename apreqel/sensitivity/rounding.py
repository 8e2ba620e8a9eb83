"""Rounding with the output error in view: second moments of activations, and what they give.

A row of weights that is written with the error e puts e'x beside each output: on the whole e'Me,
with M the second moments of what the tensor reads. The C program brings each row from where ggml's
quantisers leave it to where that is least (tools/rounding.c; QuantEase, Behdin et al. 2023,
arXiv 2309.01885). Types, bytes and speed of the file stay the same. Here the second moments are
collected, and it is measured what they take off each tensor's output error.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

import numpy as np

from apreqel.arrays import Doubles, Floats, Tokens
from apreqel.artifacts import FileMarks, Record, lock, require_space, write_atomically
from apreqel.device.machine import detect
from apreqel.errors import ArtifactError, EngineError
from apreqel.llama.engine import LoadedModel
from apreqel.llama.quants import fake_quantize
from apreqel.model.inventory import Tensor
from apreqel.model.qtypes import QuantType, lookup
from apreqel.quantize import ROUNDED_TYPES, rounded_rows
from apreqel.sensitivity.bench import context_for, evaluated, read_weights
from apreqel.sensitivity.measurement import ProbedModel
from apreqel.sensitivity.output_errors import bias_weight, sample, squared_errors
from apreqel.sensitivity.texts import fitting_set

# Added to all columns' second moments, as a part of their median, so that what the text shows of
# columns that are hardly used is not taken for more than it is. Of 0.01, 0.1, 0.3 and 1, on text
# that nothing was fitted on (SmolLM2-135M, four tensors in seven types each), the best in most.
_DAMPING = 0.3
# Raised whenever other weights come of the same input: files and measurements are kept by it.
VERSION = 2
# Second moments of as many tensors as fit are collected in one pass over the text.
_ROOM_BYTES = 2 << 30
# What it gives is measured on so many rows and tokens: the ratio of errors on the same ones.
_RATIO_ROWS, _RATIO_TOKENS = 64, 384
# Where second moments are, and were.
_FOLDER = re.compile(r"(gptq|moments)-[0-9a-f]{12}")
# Tensors that read the same activations.
_READS_AS = {"attn_k": "attn_q", "attn_v": "attn_q", "ffn_up": "ffn_gate"}


@dataclass(frozen=True)
class RoundingRatios(Record):
    """By tensor and type: the output error after rounding anew over that of ggml's rounding.

    None for a tensor that stays as it is: nothing reads it, or its activations are not finite.
    """

    KIND = "rounding-ratios"

    ratios: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


class Rounding:
    """The second moments of a probed model, kept in its folder, and what rounding by them gives."""

    def __init__(self, probed: ProbedModel) -> None:
        self._probed, self._space, self._inventory = probed, probed.space, probed.inventory
        self._text = fitting_set(probed.sensitivity.fitting_tokens)
        facts = f"{self._space.sha256} {_DAMPING} {VERSION}".encode() + self._text.tokens.tobytes()
        digest = hashlib.sha256(facts).hexdigest()[:12]
        self._place = self._space.folder / f"moments-{digest}"
        self._source_files = FileMarks(self._inventory.files)

    def moments(self, types: Mapping[str, str]) -> dict[str, Path]:
        """For `quantize_model`: of each tensor that is rounded anew in its type, collected if new.

        Raises ArtifactError, EngineError, LockedError, ModelFileError, OutputError.
        """
        chosen = [t for t in self._inventory.quantizable if self._is_rounded(t, types[t.name])]
        self._require(chosen)
        return {t.name: path for t in chosen if (path := self._path(t)).stat().st_size}

    def ratios(self) -> RoundingRatios:
        """Measured on a sample of rows, and of text that nothing was fitted on; kept.

        Raises ArtifactError, EngineError, LockedError, ModelFileError, OutputError.
        """
        path = self._place / "ratios.json"
        found = RoundingRatios.load_same(path, self._probed.provenance)
        if found is None:
            found = self._measured_ratios()
            found.save(path)
        return found

    def _is_rounded(self, tensor: Tensor, type_name: str) -> bool:
        """Experts see too few tokens each."""
        changes = type_name in ROUNDED_TYPES and type_name != tensor.qtype.name
        return changes and tensor.n_experts == 1

    # -- what it gives --

    def _measured_ratios(self) -> RoundingRatios:
        errors = {n: t.errors.weights for n, t in self._probed.sensitivity.tensors.items()}
        qtypes = {
            t.name: rounded
            for t in self._inventory.quantizable
            if (rounded := [lookup(k) for k in errors[t.name] if self._is_rounded(t, k)])
        }
        self._require([self._inventory.by_name[name] for name in qtypes])
        found: dict[str, dict[str, float]] = {}
        text = self._probed.sensitivity.probe_text
        text = text.part(slice(min(text.n_chunks, _RATIO_TOKENS // text.n_ctx + 1)))

        def listen(name: str, values: Floats, experts: Tokens | None) -> None:
            if name in qtypes and name not in found:
                self._space.progress("measuring what rounding gives", len(found), len(qtypes))
                x = values.reshape(-1, values.shape[-1])
                found[name] = self._ratios_of(name, qtypes[name], x)

        with (
            LoadedModel(self._space.model, patchable=True) as model,
            context_for(model, text, self._space.n_threads, listen) as context,
        ):
            next(evaluated(context, text))
        self._source_files.check()
        return RoundingRatios(self._probed.provenance, {n: found.get(n, {}) for n in qtypes})

    def _ratios_of(self, name: str, qtypes: Sequence[QuantType], x: Floats) -> dict[str, float]:
        """Of one tensor's types, on activations `x` [tokens, row length]."""
        tensor = self._inventory.by_name[name]
        path = self._path(tensor)
        if not path.stat().st_size:
            return {}
        random = np.random.default_rng(0)
        x = x[sample(random, len(x), _RATIO_TOKENS)]
        weights = read_weights(self._inventory, name, sample(random, tensor.n_rows, _RATIO_ROWS))
        importance = self._probed.imatrix.weights(name)
        folder, n_threads = self._space.folder, self._space.n_threads
        after = rounded_rows(weights, qtypes, importance, path, folder, n_threads)

        def wrong(rows: Floats) -> float:
            return float(squared_errors((weights - rows) @ x.T, bias_weight(tensor.role)).sum())

        before = {q.name: wrong(fake_quantize(weights, q, importance)) for q in qtypes}
        found = {
            q.name: wrong(after[q.name]) / before[q.name] if before[q.name] > 0 else 1.0
            for q in qtypes
        }
        if bad := [type_name for type_name, ratio in found.items() if not np.isfinite(ratio)]:
            raise EngineError(
                f"{name}: rounded to {bad[0]} its outputs are not finite; use --plain"
            )
        return found

    # -- second moments --

    def _reads_as(self, tensor: Tensor) -> str:
        """The tensor whose activations it reads: of several that read the same, one."""
        first = _READS_AS.get(tensor.role, tensor.role)
        name = tensor.name.replace(f".{tensor.role}.", f".{first}.")
        other = self._inventory.by_name.get(name)
        return name if other and other.row_length == tensor.row_length else tensor.name

    def _path(self, tensor: Tensor) -> Path:
        """Float32 [row length, row length]; an empty file for a tensor that stays as it is."""
        return self._place / f"{self._reads_as(tensor)}-{bias_weight(tensor.role)}.f32"

    def _require(self, tensors: Sequence[Tensor]) -> None:
        """Collect those that are not at hand."""
        with lock(self._space.folder / ".moments.lock"):
            wanted: dict[str, list[Tensor]] = {}
            for tensor in {self._path(t): t for t in tensors}.values():
                self._check(tensor)
                if not self._path(tensor).exists():
                    wanted.setdefault(self._reads_as(tensor), []).append(tensor)
            if wanted:
                self._collect(wanted)

    def _check(self, tensor: Tensor) -> None:
        path, size = self._path(tensor), 4 * tensor.row_length**2
        if path.exists() and path.stat().st_size not in (0, size):
            raise ArtifactError(f"{path}: has {path.stat().st_size} bytes, not {size}; delete it")

    def _collect(self, wanted: dict[str, list[Tensor]]) -> None:
        """By what is read; in as many passes over the text as memory asks for.

        Those of another text, or of an older apreqel, make room first.
        """
        for old in self._space.folder.iterdir():
            if _FOLDER.fullmatch(old.name) and old != self._place and not old.is_symlink():
                shutil.rmtree(old, ignore_errors=True)
        needed = sum(4 * t.row_length**2 for tensors in wanted.values() for t in tensors)
        require_space(self._space.folder, needed, "the second moments of activations")
        with LoadedModel(self._space.model, patchable=True) as model:
            while wanted:
                room = min(_ROOM_BYTES, detect().available_bytes // 4)
                filled = accumulate(8 * tensors[0].row_length ** 2 for tensors in wanted.values())
                now = list(wanted)[: max(1, sum(n_bytes <= room for n_bytes in filled))]
                found = self._collected(model, now)
                self._source_files.check()
                for name in now:
                    for tensor in wanted.pop(name):
                        sums, counts = found.get(name), bias_weight(tensor.role)
                        write_atomically(self._path(tensor), sums.damped(counts) if sums else b"")

    def _collected(self, model: LoadedModel, names: list[str]) -> dict[str, _Moments]:
        found: dict[str, _Moments] = {}

        def listen(name: str, values: Floats, experts: Tokens | None) -> None:
            if name in names and experts is None:
                x = values.reshape(-1, values.shape[-1])
                if name not in found:
                    found[name] = _Moments(np.zeros((x.shape[1], x.shape[1])), np.zeros(x.shape[1]))
                found[name].add(x)

        text = self._text
        with context_for(model, text, self._space.n_threads, listen) as context:
            for rows, _ in evaluated(context, text):
                self._space.progress("collecting second moments", rows.stop, text.n_scored)
        return found


@dataclass
class _Moments:
    """Sums over tokens of x x' [row length, row length] and of x."""

    squares: Doubles
    values: Doubles
    n_tokens: int = 0

    def add(self, x: Floats) -> None:
        """`x` [tokens, row length]."""
        self.squares += x.T @ x
        self.values += x.sum(axis=0, dtype=np.float64)
        self.n_tokens += len(x)

    def damped(self, bias_counts: float) -> bytes:
        """As float32; empty where they tell nothing.

        What is the same at every token counts `bias_counts` times.
        """
        diagonal = np.diag(self.squares)
        if not np.isfinite(diagonal).all() or not diagonal.any():
            return b""
        mean = self.values / self.n_tokens
        moments = self.squares / self.n_tokens + (bias_counts - 1) * np.outer(mean, mean)
        damping = _DAMPING * float(np.median(diagonal[diagonal > 0])) / self.n_tokens
        moments[np.diag_indices(len(moments))] += damping + 1e-6 * diagonal / self.n_tokens
        found = moments.astype(np.float32)
        sound = np.isfinite(found).all() and np.diag(found).min() > np.finfo(np.float32).tiny
        return found.tobytes() if sound else b""
