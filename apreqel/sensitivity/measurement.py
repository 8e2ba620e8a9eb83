"""What probing measured of a model, as records that nobody changes.

`Sensitivity` is what `sensitivity.json` holds: output errors, probes, losses in kernels, and the
text they were measured on. `ProbedModel` is that with its workspace and its importance matrix: what
everything after probing is made from.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from apreqel.artifacts import Provenance, Record, file_sha256, plain
from apreqel.errors import ArtifactError, CalibrationError
from apreqel.estimates import Estimate
from apreqel.llama.stock import stock_types
from apreqel.model.imatrix import Coverage, Imatrix, read_imatrix
from apreqel.model.inventory import Inventory
from apreqel.sensitivity.texts import TokenSet, probe_set
from apreqel.workspace import IMATRIX_FILE, Workspace

SENSITIVITY_FILE = "sensitivity.json"

METRICS = ("kld", "perplexity")
# Stock presets that a plan may be set against unasked, and what is a smaller file.
_USUAL_PRESETS, _SMALLER = ("Q4_K_M", "Q4_K_S", "Q3_K_M", "Q3_K_S", "Q2_K"), 0.96
# What a file of another size would be without apreqel, and how fast.
PRESETS_BY_SIZE = (
    "Q2_K", "Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M", "Q6_K", "Q8_0",
)  # fmt: skip


@dataclass(frozen=True)
class TensorErrors:
    """Relative output errors of one tensor, on activations that the imatrix was not fitted on.

    `weights[t]`: |(W - Q_t) X|^2 / |W X|^2, what quantising the weights to t does. `kernels[k]`:
    |W (X - k(X))|^2 / |W X|^2, what a kernel does that rounds its activations to k (Q8_0, Q8_K).
    For one common type: `heldout_ratio` is the error by the columns' mean squares here over that on
    the imatrix's own text, `half_text_ratio` the error with an imatrix from half the text over that
    from all; 1 where that was not measured. `power`: |W X|^2 per token.
    """

    weights: Mapping[str, float]
    kernels: Mapping[str, float]
    heldout_ratio: float = 1.0
    half_text_ratio: float = 1.0
    power: float = 1.0
    is_run: bool = True  # by any graph of llama.cpp


@dataclass(frozen=True)
class Probe:
    """One (tensor, type) pair: mean KLD and change of the loss, in nats, by piece of the text."""

    kld: Sequence[float] = ()
    nll_change: Sequence[float] = ()

    def estimate(self, metric: str = "kld") -> Estimate:
        """Over the pieces, which are the independent draws."""
        values = np.array(self.kld if metric == "kld" else self.nll_change)
        n = len(values)
        # Few draws tell their own spread badly: the variance of Student's t with n - 1 degrees.
        widened = math.sqrt((n - 1) / (n - 3)) if n > 3 else 3.0
        error = widened * float(values.std(ddof=1)) / math.sqrt(n) if n > 1 else math.inf
        return Estimate(float(values.mean()), error, n)


@dataclass(frozen=True)
class TensorSensitivity:
    """Where a tensor stands, its output errors by type, and what was probed."""

    role: str
    layer: int
    errors: TensorErrors
    probes: Mapping[str, Probe] = field(default_factory=dict)


@dataclass(frozen=True)
class KernelLoss:
    """Many tensors in one type: KLD with dequantised weights, and of the real file."""

    dequantised_nats: float
    real_nats: float


@dataclass(frozen=True)
class Sensitivity(Record):
    """The measurement as it stands; `effort` is the greatest that was made, or ''."""

    KIND = "sensitivity"

    tensors: Mapping[str, TensorSensitivity] = field(default_factory=dict)
    coverage: Coverage | None = None
    imatrix_sha256: str = ""
    excluded: Mapping[str, str] = field(default_factory=dict)  # "tensor TYPE" -> reason
    kernels: Mapping[str, KernelLoss] = field(default_factory=dict)  # by "TYPE" or "TYPE role"
    layer_cosines: Sequence[float] = ()
    self_kld_nats: float = 0.0
    seconds: float = 0.0
    effort: str = ""
    cut_short: bool = False  # by --minutes
    settled: bool = False  # whether further probes were not expected to change plans
    fitting_tokens: Sequence[Sequence[int]] = ()  # chunks that the imatrix was collected on,
    probe_tokens: Sequence[Sequence[int]] = ()  # that tensors were probed on,
    check_tokens: Sequence[Sequence[int]] = ()  # and that whole files are measured on

    @property
    def complete(self) -> bool:
        return bool(self.effort)

    @property
    def n_probes(self) -> int:
        return sum(len(t.probes) for t in self.tensors.values())

    @cached_property
    def probe_text(self) -> TokenSet:
        return probe_set(self.probe_tokens)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over what damages follow from."""
        facts = self.tensors, self.kernels, self.excluded, self.imatrix_sha256
        return hashlib.sha256(json.dumps(plain(facts)).encode()).hexdigest()

    def with_probe(self, name: str, type_name: str, probe: Probe) -> Sensitivity:
        tensor = self.tensors[name]
        tensor = replace(tensor, probes={**tensor.probes, type_name: probe})
        return replace(self, tensors={**self.tensors, name: tensor})

    def excluding(self, pair: str, reason: str) -> Sensitivity:
        return replace(self, excluded={**self.excluded, pair: reason})

    def usable_types(self, name: str) -> list[str]:
        """Types of a tensor whose errors were measured, without those whose probes failed."""
        types = self.tensors[name].errors.weights
        return [t for t in types if f"{name} {t}" not in self.excluded]

    def require_probed(self) -> None:
        """Raise CalibrationError where there is nothing to tell a tensor's damage from."""
        roles = {t.role for t in self.tensors.values() if t.probes}
        for name, tensor in self.tensors.items():
            if tensor.errors.weights and tensor.errors.is_run and tensor.role not in roles:
                raise CalibrationError(
                    f"tensor {name}: neither it nor its like was probed; run apreqel probe again, "
                    "with more --minutes"
                )


@dataclass(frozen=True)
class ProbedModel:
    """A model with everything that probing measured on it."""

    space: Workspace
    sensitivity: Sensitivity
    imatrix: Imatrix

    @property
    def inventory(self) -> Inventory:
        return self.space.inventory

    @property
    def provenance(self) -> Provenance:
        """Of what is measured later with this text, imatrix and llama.cpp."""
        made = self.sensitivity.provenance
        settings = {**made.settings, "imatrix_sha256": self.sensitivity.imatrix_sha256}
        return Provenance(made.model_sha256, made.llama_build, settings=settings)

    @cached_property
    def _stock(self) -> dict[str, dict[str, str]]:
        """By preset, what llama.cpp was asked already: it reads the header each time."""
        return {}

    def stock_types(self, preset: str) -> dict[str, str]:
        """What llama.cpp's preset makes of every tensor, with this imatrix. Raises EngineError."""
        if preset not in self._stock:
            names = list(self.sensitivity.tensors)
            self._stock[preset] = stock_types(self.space.model, preset, has_imatrix_for=names)
        return self._stock[preset]

    @cached_property
    def default_preset(self) -> str:
        """What a plan has to beat when nothing else is said: Q4_K_M, as most people use it.

        Of a model that is hardly larger, the largest of the usual ones that makes it smaller.
        """
        most = _SMALLER * self.space.given.size_bytes
        fitting = (
            p for p in _USUAL_PRESETS if self.inventory.output_size(self.stock_types(p)) <= most
        )
        return next(fitting, _USUAL_PRESETS[0])

    def preset_of_size(self, file_bytes: int | None) -> str:
        """The stock preset nearest to a file of so many bytes; without these the default one."""
        if file_bytes is None:
            return self.default_preset
        output_size, stock = self.inventory.output_size, self.stock_types
        return min(PRESETS_BY_SIZE, key=lambda p: abs(output_size(stock(p)) - file_bytes))


def probed_model(space: Workspace) -> ProbedModel | None:
    """What an earlier probe left complete, in whatever settings; None where there is none.

    Raises ArtifactError, ModelFileError, CalibrationError.
    """
    path, imatrix = space.folder / SENSITIVITY_FILE, space.folder / IMATRIX_FILE
    if not path.exists():
        return None
    found = Sensitivity.load(path, space.sha256)
    if not found.complete or not imatrix.exists():
        return None
    if file_sha256(imatrix) != found.imatrix_sha256:
        raise ArtifactError(
            f"{imatrix}: is not the imatrix that was probed with; run apreqel probe"
        )
    return ProbedModel(space, found, read_imatrix(imatrix, space.inventory))


def require_probed_model(space: Workspace) -> ProbedModel:
    """`probed_model`; raises ArtifactError where there is none."""
    found = probed_model(space)
    if found is None:
        raise ArtifactError(f"{space.folder}: not probed yet; run apreqel probe first")
    return found
