"""Rounding with the output error in view: which tensors, by which moments, and what it gives.

A row of weights that is written with the error e puts e'x beside each output: on the whole e'Me,
with M the second moments of what the tensor reads. The C program brings each row from where ggml's
quantisers leave it to where that is least (tools/rounding.c; QuantEase, Behdin et al. 2023,
arXiv 2309.01885). Types, bytes and speed of the file stay the same. Here it is measured what that
takes off each tensor's output error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from apreqel.arrays import Floats, Tokens
from apreqel.artifacts import FileMarks, Record
from apreqel.errors import EngineError
from apreqel.llama.engine import LoadedModel
from apreqel.llama.quants import fake_quantize
from apreqel.model.inventory import Tensor
from apreqel.model.qtypes import QuantType, lookup
from apreqel.quantize import ROUNDED_TYPES, rounded_rows
from apreqel.sensitivity.bench import context_for, evaluated, read_weights
from apreqel.sensitivity.measurement import ProbedModel
from apreqel.sensitivity.moments import Moments
from apreqel.sensitivity.output_errors import bias_weight, sample, squared_errors
from apreqel.sensitivity.texts import fitting_set

# What it gives is measured on so many rows and tokens: the ratio of errors on the same ones.
_RATIO_ROWS, _RATIO_TOKENS = 64, 384
_QUICK_ROWS = 24


@dataclass(frozen=True)
class RoundingRatios(Record):
    """By tensor and type: the output error after rounding anew over that of ggml's rounding.

    None for a tensor that stays as it is: nothing reads it, or its activations are not finite.
    """

    KIND = "rounding-ratios"

    ratios: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


class Rounding:
    """How a probed model is rounded anew, and what that gives."""

    def __init__(self, probed: ProbedModel) -> None:
        self._probed, self._space, self._inventory = probed, probed.space, probed.inventory
        self._moments = Moments(self._space, fitting_set(probed.sensitivity.fitting_tokens))
        self._source_files = FileMarks(self._inventory.files)

    def moments(self, types: Mapping[str, str]) -> dict[str, Path]:
        """For `quantize_model`: of each tensor that is rounded anew in its type, collected if new.

        Raises ArtifactError, EngineError, LockedError, ModelFileError, OutputError.
        """
        chosen = [t for t in self._inventory.quantizable if self._is_rounded(t, types[t.name])]
        self._moments.require(chosen)
        return {t.name: path for t in chosen if (path := self._moments.path(t)).stat().st_size}

    def ratios(self) -> RoundingRatios:
        """Measured on a sample of rows, and of text that nothing was fitted on; kept.

        On fewer rows where probing was quick, too.

        Raises ArtifactError, EngineError, LockedError, ModelFileError, OutputError.
        """
        found = self.known_ratios()
        if found is None:
            found = self._measured_ratios(_QUICK_ROWS if self._is_quick else _RATIO_ROWS)
            found.save(self._ratios_file(self._is_quick))
        return found

    def known_ratios(self) -> RoundingRatios | None:
        """What was measured before, after quick probing also quickly. Raises ArtifactError."""
        for is_quick in (False, True)[: 1 + self._is_quick]:
            path = self._ratios_file(is_quick)
            if found := RoundingRatios.load_same(path, self._probed.provenance):
                return found
        return None

    @property
    def _is_quick(self) -> bool:
        return self._probed.sensitivity.effort == "quick"

    def _ratios_file(self, is_quick: bool) -> Path:
        return self._moments.folder / ("ratios-quick.json" if is_quick else "ratios.json")

    def _is_rounded(self, tensor: Tensor, type_name: str) -> bool:
        """Experts see too few tokens each."""
        changes = type_name in ROUNDED_TYPES and type_name != tensor.qtype.name
        return changes and tensor.n_experts == 1

    def _measured_ratios(self, n_rows: int) -> RoundingRatios:
        errors = {n: t.errors.weights for n, t in self._probed.sensitivity.tensors.items()}
        qtypes = {
            t.name: rounded
            for t in self._inventory.quantizable
            if (rounded := [lookup(k) for k in errors[t.name] if self._is_rounded(t, k)])
        }
        self._moments.require([self._inventory.by_name[name] for name in qtypes])
        found: dict[str, dict[str, float]] = {}
        text = self._probed.sensitivity.probe_text
        text = text.part(slice(min(text.n_chunks, _RATIO_TOKENS // text.n_ctx + 1)))

        def listen(name: str, values: Floats, experts: Tokens | None) -> None:
            if name in qtypes and name not in found:
                self._space.progress("measuring what rounding gives", len(found), len(qtypes))
                x = values.reshape(-1, values.shape[-1])
                found[name] = self._ratios_of(name, qtypes[name], x, n_rows)

        with (
            LoadedModel(self._space.model, patchable=True) as model,
            context_for(model, text, self._space.n_threads, listen) as context,
        ):
            next(evaluated(context, text))
        self._source_files.check()
        return RoundingRatios(self._probed.provenance, {n: found.get(n, {}) for n in qtypes})

    def _ratios_of(
        self, name: str, qtypes: Sequence[QuantType], x: Floats, n_rows: int
    ) -> dict[str, float]:
        """Of one tensor's types, on activations `x` [tokens, row length]."""
        tensor = self._inventory.by_name[name]
        path = self._moments.path(tensor)
        if not path.stat().st_size:
            return {}
        random = np.random.default_rng(0)
        x = x[sample(random, len(x), _RATIO_TOKENS)]
        weights = read_weights(self._inventory, name, sample(random, tensor.n_rows, n_rows))
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
