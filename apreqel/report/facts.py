"""What a report says, as values: taken from records, nothing formatted, nothing measured.

Every part is either what is known or what is `Missing`, with the command that would measure it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from apreqel.device.memory import MemoryUse
from apreqel.device.profile import Speed
from apreqel.estimates import Estimate
from apreqel.evaluate.verify import Measured
from apreqel.plan.explain import RoleShare


@dataclass(frozen=True)
class Missing:
    """Something that no work file tells, and the command that would."""

    why: str
    command: str


@dataclass(frozen=True)
class ModelFacts:
    """The model as the user has it."""

    name: str
    architecture: str
    n_layers: int
    n_weights: int
    size_bytes: int
    bits_per_weight: float
    types: Sequence[str]
    is_equalised: bool  # whether plans are for a copy with its channels rescaled


@dataclass(frozen=True)
class DeviceFacts:
    name: str
    cpu: str
    gpu: str
    system: str
    usable_cores: int
    memory_bytes: int
    n_threads: int


@dataclass(frozen=True)
class PlanFacts:
    """The planned file. Its KL divergence as predicted, with its 95% interval."""

    prefer: str
    size_bytes: int
    bits_per_weight: float
    counts: Mapping[str, int]  # tensors by type
    nats: float
    interval: tuple[float, float]
    metric: str  # what `nats` are of
    binding: Sequence[str]  # limits that stand in the way


@dataclass(frozen=True)
class Verified:
    """The written file beside others, on text that calibration never saw.

    `files` are the original, ours, then rivals.
    """

    file_name: str
    text: str
    n_scored: int
    verdicts: Sequence[str]
    files: Sequence[Measured]

    @property
    def quantised(self) -> Sequence[Measured]:
        """Ours first."""
        return self.files[1:]


@dataclass(frozen=True)
class PredictedFile:
    """A type map: bytes to the byte, the rest predicted, with 95% intervals.

    `kind` is plan, closest, fast, stock or uniform.
    """

    label: str
    kind: str
    size_bytes: int
    nats: float
    interval: tuple[float, float]
    speed: Speed | None
    share: float = 1.0  # of the weights that are in a uniform map's very type


@dataclass(frozen=True)
class MeasuredOnCheck:
    """A real file on the part of the calibration text that is kept for whole files.

    `ratio` is the plan's KL divergence over this file's, paired, with its 95% interval.
    """

    label: str
    kind: str  # plan, ours, stock, uniform, or other
    size_bytes: int
    kld: Estimate  # over chunks
    kld_p999: float
    ratio: tuple[float, float, float] | None = None


@dataclass(frozen=True)
class TensorFacts:
    """One tensor in the plan. Damage in nats with its 95% interval."""

    name: str
    role: str
    layer: int | None
    type_name: str
    bits_per_weight: float
    size_bytes: int
    damage_nats: float
    interval: tuple[float, float]
    is_probed: bool


@dataclass(frozen=True)
class PlanParts:
    """The plan tensor by tensor, and by role."""

    tensors: Sequence[TensorFacts]
    shares: Sequence[RoleShare]
    is_of_plan: bool  # whether these are the measurements that the plan was chosen from


@dataclass(frozen=True)
class KernelFacts:
    """The whole model in one quant type on this device; an empty context, a usual prompt.

    `nats` is the KL divergence that is predicted of the whole model in it, None where it was not
    probed. `dominated_by` is a type that is as close, as small and as fast.
    """

    type_name: str
    bits_per_weight: float
    share: float
    speed: Speed
    nats: float | None
    interval: tuple[float, float] | None
    dominated_by: str | None
    is_unsteady: bool


@dataclass(frozen=True)
class Kernels:
    """Smallest type first. `n_readings` are the fewest readings behind a product's seconds."""

    types: Sequence[KernelFacts]
    n_prompt: int
    n_readings: int
    is_by_damage: bool  # else closeness is that of normally distributed weights


@dataclass(frozen=True)
class ModelReport:
    """All of it."""

    model: ModelFacts
    device: DeviceFacts | Missing
    plan: PlanFacts | Missing
    verified: Verified | Missing
    predicted: Sequence[PredictedFile] | Missing
    rounding: Missing | None  # what rounding anew gives, where predictions have to do without
    workload: tuple[int, int]  # tokens of prompt and answer that speeds are predicted for
    checked: Sequence[MeasuredOnCheck] | Missing
    parts: PlanParts | Missing
    kernels: Kernels | Missing
    memory: Sequence[MemoryUse] | Missing
    cache_types: Sequence[str]
