"""Whole type maps as real files, each measured once.

On a part of the calibration text that neither the imatrix nor the probes saw. What was measured is
kept, and tells the damage model how the damages of single tensors add up.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from apreqel.artifacts import Record
from apreqel.estimates import Estimate
from apreqel.evaluate.text_run import OnText, on_text
from apreqel.quantize import quantize_model
from apreqel.sensitivity.damage import MeasuredFile
from apreqel.sensitivity.equalise import imatrix_of_original
from apreqel.sensitivity.measurement import ProbedModel
from apreqel.sensitivity.metrics import estimate, ratio_interval
from apreqel.sensitivity.moments import VERSION
from apreqel.sensitivity.rounding import Rounding
from apreqel.sensitivity.texts import check_set

MEASURED_FILE = "measured-files.json"

# Labels of apreqel's own maps.
_OWN = ("plan", "ladder")


@dataclass(frozen=True)
class FileMeasurement:
    """A map as a real file: mean KLD in nats by chunk of the check text, and its 99.9% quantile."""

    label: str
    types: Mapping[str, str]
    size_bytes: int
    kld_by_chunk: tuple[float, ...]
    kld_p999: float
    rounding_version: int = 0  # 0 for weights as ggml rounds them

    @property
    def kld(self) -> Estimate:
        return estimate(np.array(self.kld_by_chunk), len(self.kld_by_chunk))

    def ratio(self, rival: FileMeasurement) -> tuple[float, float, float]:
        """This file's KLD over the rival's, paired, with its 95% interval."""
        n_chunks = len(self.kld_by_chunk)
        return ratio_interval(np.array(self.kld_by_chunk), np.array(rival.kld_by_chunk), n_chunks)

    def is_closer_than(self, rival: FileMeasurement) -> bool:
        """Whether the whole paired interval says so."""
        return self.ratio(rival)[2] < 1


@dataclass(frozen=True)
class MeasuredFiles(Record):
    """By the digest of the type map and the version of rounding."""

    KIND = "measured-files"

    files: Mapping[str, FileMeasurement] = field(default_factory=dict)

    @property
    def own(self) -> list[MeasuredFile]:
        """Of apreqel's own plans, for the damage model."""
        return [
            MeasuredFile(f.types, f.kld, bool(f.rounding_version), key)
            for key, f in self.files.items()
            if f.label in _OWN and f.rounding_version in (0, VERSION)
        ]


def measured_files(probed: ProbedModel) -> MeasuredFiles:
    """What was measured before with the same text and imatrix. Raises ArtifactError."""
    found = MeasuredFiles.load_same(probed.space.folder / MEASURED_FILE, probed.provenance)
    return found or MeasuredFiles(probed.provenance)


class FileBench(AbstractContextManager["FileBench"]):
    """Writes maps as files and measures them; the text is evaluated when first needed.

    `known` is everything measured so far, a new record after each.
    """

    def __init__(self, probed: ProbedModel, rounding: Rounding | None = None) -> None:
        """With `rounding`, apreqel's own maps are rounded by it, rivals by ggml.

        Raises ArtifactError where what was measured before cannot be read.
        """
        self.known = measured_files(probed)
        self._probed, self._rounding = probed, rounding
        self._stack = ExitStack()
        self._text: OnText | None = None

    def __exit__(self, *_: object) -> None:
        self._text = None
        self._stack.close()

    def measure(
        self, label: str, types: Mapping[str, str], *, plain: bool = False
    ) -> FileMeasurement:
        """Write the file, compare it with the original, delete it. Raises EngineError.

        `plain`: as ggml rounds it, whatever the bench was made with.
        """
        rounding = self._rounding if label in _OWN and not plain else None
        key = file_key(types, is_rounded=rounding is not None)
        known = self.known.files.get(key)
        found = replace(known or self._measured(label, types, rounding), label=label)
        if known is None or (known.label != label and label in _OWN):
            self.known = replace(self.known, files={**self.known.files, key: found})
            self.known.save(self._probed.space.folder / MEASURED_FILE)
        return found

    def _measured(
        self, label: str, types: Mapping[str, str], rounding: Rounding | None
    ) -> FileMeasurement:
        space = self._probed.space
        if self._text is None:
            tokens = check_set(self._probed.sensitivity.check_tokens)
            on_original = on_text(space, lambda _: tokens, tokens.n_ctx)
            self._text = self._stack.enter_context(on_original)
        with TemporaryDirectory(prefix="measured-", dir=space.folder) as place:
            path = Path(place) / "file.gguf"
            space.progress(f"trying a real file: {label}", 0, 1)
            source, imatrix = space.inventory, self._probed.imatrix
            if label.startswith("stock "):  # as llama-quantize would make it
                source, imatrix = space.given, imatrix_of_original(space, imatrix)
            quantize_model(
                source,
                types,
                path,
                imatrix=imatrix,
                n_threads=space.n_threads,
                allow_requantize=True,
                moments=rounding.moments(types) if rounding else None,
            )
            found = self._text.compare(path, f"{space.model} as {label}")
            klds, size = found.kld_nats, path.stat().st_size
        chunks = klds.reshape(self._text.tokens.n_chunks, -1).mean(axis=1).tolist()
        worst, version = float(np.quantile(klds, 0.999)), VERSION if rounding else 0
        return FileMeasurement(label, dict(types), size, tuple(chunks), worst, version)


def map_key(types: Mapping[str, str]) -> str:
    """A digest of a type map."""
    return hashlib.sha256(json.dumps(sorted(types.items())).encode()).hexdigest()


def file_key(types: Mapping[str, str], is_rounded: bool) -> str:
    """What a file with these types is kept under, rounded by second moments or by ggml alone."""
    return f"{map_key(types)} {VERSION if is_rounded else 0}"
