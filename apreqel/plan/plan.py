"""A plan: the quant type of every tensor, what is predicted of it, and the metadata of its file."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from apreqel import __version__
from apreqel.artifacts import Record
from apreqel.device.memory import MemoryUse
from apreqel.device.profile import Speed
from apreqel.estimates import Estimate
from apreqel.llama.flags import RunSettings
from apreqel.model.gguf_header import STRING, UINT32, encode_kv
from apreqel.model.imatrix import Imatrix
from apreqel.sensitivity.damage import Swap
from apreqel.sensitivity.experts import ExpertUse
from apreqel.sensitivity.kv_cache import USUAL
from apreqel.sensitivity.moments import VERSION


@dataclass(frozen=True)
class Binding:
    """A limit that stands in the way, and its shadow price in units of the objective."""

    limit: str
    at_most: str
    one_more: str
    buys: float
    of: str  # nats, bytes, seconds, or weighted


@dataclass(frozen=True)
class FileResult:
    """A real file that was measured beside the plan; `ratio` is the plan's KLD over this file's."""

    label: str
    size_bytes: int
    kld: Estimate
    kld_p999: float
    ratio: float
    ratio_interval: tuple[float, float]
    is_taken: bool


@dataclass(frozen=True)
class Plan(Record):
    """A type for every tensor of the model, and what it should give."""

    KIND = "plan"
    ADVICE = "plan again"

    types: Mapping[str, str]
    prefer: str
    limits: Mapping[str, float]
    size_bytes: int
    bits_per_weight: float
    damage_nats: float  # predicted, of a real file, the KV cache's and the experts' part included
    damage_interval: tuple[float, float]  # 95%
    cache_and_experts_nats: float  # its part that is not the weights'
    gap: float
    solver_seconds: float
    imatrix_sha256: str
    metadata: Mapping[str, str | int]
    model_files: Sequence[str]
    workdir: str  # where the imatrix is
    original_files: Sequence[str] = field(default=(), kw_only=True)  # of an equalised model
    sensitivity_digest: str  # what it was chosen from: probes,
    measured_files: Sequence[str]  # and files, by their keys
    binding: Sequence[Binding] = ()
    device: str = ""  # the profile planned with
    speed: Speed | None = None
    memory: MemoryUse | None = None
    cache_types: Sequence[str] = (USUAL, USUAL)  # of K and V
    n_threads: int | None = None
    experts: ExpertUse | None = None  # where they are not the model's own count
    speed_with_own_experts: Speed | None = None
    notes: Sequence[str] = ()
    files: Sequence[FileResult] = ()  # this plan and its rivals as real files
    limit_factor: float = 1.0  # of a limit on damage, see `solve_request`
    metric: str = "kld"  # what the damage that was made small is
    beyond_limit: bool = False  # whether the real file passes a limit on damage
    swaps: Sequence[Swap] = ()  # what was probed around it
    is_rounded: bool = False  # by second moments when it is written; else as ggml does

    @property
    def is_equalised(self) -> bool:
        return bool(self.original_files)

    @cached_property
    def counts(self) -> dict[str, int]:
        """How many tensors have each type, most frequent first."""
        return dict(Counter(self.types.values()).most_common())

    @property
    def run_flags(self) -> str:
        """How to start llama.cpp with this file so that the predictions hold."""
        return " ".join(self.run_settings.flags)

    @property
    def run_settings(self) -> RunSettings:
        n_ctx = self.memory.n_ctx if self.memory else None
        return RunSettings(n_ctx, self.cache_types, self.n_threads)

    def extra_metadata(self) -> list[bytes]:
        """The GGUF records that the quantised file gets beside the source's own."""
        return encode_metadata(self.metadata)


def output_metadata(imatrix: Imatrix) -> dict[str, str | int]:
    """Where the file comes from: llama-quantize's own keys, and apreqel's."""
    return {
        "quantize.imatrix.dataset": ", ".join(imatrix.datasets),
        "quantize.imatrix.entries_count": len(imatrix.entries),
        "quantize.imatrix.chunks_count": imatrix.n_chunks,
        "apreqel.version": __version__,
        "apreqel.plan": "0" * 64,  # the digest's place: the size must be known before the plan is
    }


def encode_metadata(metadata: Mapping[str, str | int]) -> list[bytes]:
    return [
        encode_kv(key, STRING if isinstance(value, str) else UINT32, value)
        for key, value in metadata.items()
    ]


def map_digest(
    types: Mapping[str, str], imatrix_sha256: str, experts_used: int | None, is_rounded: bool
) -> str:
    """SHA-256 over what determines the tensor data of the quantised file, and how it runs."""
    rest: list[int | str] = [] if experts_used is None else [experts_used]
    if is_rounded:
        rest.append(f"rounding {VERSION}")
    text = json.dumps([sorted(types.items()), imatrix_sha256, *rest])
    return hashlib.sha256(text.encode()).hexdigest()
