"""From measurements and wishes to a quant type for every tensor.

Options come from the sensitivity (damage in nats) and the registry (exact bytes), and, where a
device profile is given, from its timings (seconds per token). One knapsack decides.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from apreqel import __version__, artifacts, llama
from apreqel.artifacts import Provenance
from apreqel.errors import ArtifactError, InfeasiblePlanError, UsageError
from apreqel.gguf_header import encode_kv
from apreqel.knapsack import Limit, Solution, solve
from apreqel.qtypes import lookup
from apreqel.sensitivity import Sensitivity, require_probed

if TYPE_CHECKING:
    from apreqel.imatrix import Imatrix
    from apreqel.inventory import Inventory, Tensor
    from apreqel.profile import DeviceProfile

Doubles = npt.NDArray[np.float64]

PRIORITIES = ("memory", "latency", "accuracy", "balanced")
PLAN_FILE = "plan.json"

# The preset that most people use today: what a plan has to beat when nothing else is said.
DEFAULT_PRESET = "Q4_K_M"

# Points of the front from which `balanced` takes the knee; it ends where every tensor has its best
# type below this part of its own size: against F16 that is Q8_0, beyond which nothing is gained.
_FRONT_POINTS = 24
_NEAR_LOSSLESS = 0.6

_STRING, _UINT32 = 8, 4  # GGUF value types


@dataclass(frozen=True)
class PlanRequest:
    """What the user wants. Sizes are of the whole file, in bytes."""

    prefer: str = "accuracy"
    max_size_bytes: int | None = None
    target_bpw: float | None = None
    max_kld_nats: float | None = None


@dataclass(frozen=True)
class Plan:
    """A type for every tensor of the model, and what it should give."""

    provenance: Provenance
    types: Mapping[str, str]
    prefer: str
    limits: Mapping[str, float]
    size_bytes: int
    bits_per_weight: float
    kld_nats: float
    gap: float
    solver_seconds: float
    imatrix_sha256: str
    metadata: Mapping[str, str | int]
    model_files: Sequence[str]
    workdir: str  # where the imatrix is
    seconds_per_token: Sequence[float] | None = None  # prefill, decode
    notes: Sequence[str] = field(default_factory=tuple)

    @cached_property
    def counts(self) -> dict[str, int]:
        """How many tensors have each type, most frequent first."""
        return dict(Counter(self.types.values()).most_common())

    def extra_metadata(self) -> list[bytes]:
        """The GGUF records that the quantised file gets beside the source's own."""
        return encode_metadata(self.metadata)

    def save(self, path: Path) -> None:
        data = {k: v for k, v in asdict(self).items() if k != "provenance"}
        artifacts.save(path, "plan", self.provenance, data)

    @classmethod
    def load(cls, path: Path, model_sha256: str | None = None) -> Plan:
        """Raises ArtifactError."""
        provenance, data = artifacts.load(path, "plan", model_sha256)
        try:
            return cls(provenance, **data)
        except TypeError as error:
            raise ArtifactError(f"{path}: damaged plan ({error}); plan again") from error


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
        encode_kv(key, _STRING if isinstance(value, str) else _UINT32, value)
        for key, value in metadata.items()
    ]


def map_digest(types: Mapping[str, str], imatrix_sha256: str) -> str:
    """SHA-256 over what determines the tensor data of the quantised file."""
    text = json.dumps([sorted(types.items()), imatrix_sha256])
    return hashlib.sha256(text.encode()).hexdigest()


# --- options -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Options:
    """The choices of every quantisable tensor; per tensor: types, padded bytes, damage, seconds."""

    names: Sequence[str]
    types: Sequence[Sequence[str]]
    sizes: Sequence[Doubles]
    damages: Sequence[Doubles]
    decode_seconds: Sequence[Doubles] | None
    fixed_bytes: int  # header and tensors that stay as they are

    def types_of(self, solution: Solution) -> dict[str, str]:
        chosen = zip(self.names, self.types, solution.choice, strict=True)
        return {name: kinds[c] for name, kinds, c in chosen}

    def size_limit(self, file_bytes: float, name: str = "--max-size") -> Limit:
        """Raises InfeasiblePlanError where even the smallest types are too large."""
        least = self.fixed_bytes + int(sum(row.min() for row in self.sizes))
        if file_bytes < least:
            raise InfeasiblePlanError(
                f"{name} {file_bytes:.0f} bytes: the smallest possible file has {least} bytes "
                f"({least / 1e6:.1f} MB)"
            )
        return Limit(name, self.sizes, file_bytes - self.fixed_bytes)

    def damage_limit(self, nats: float) -> Limit:
        return Limit("--max-kld", self.damages, nats)


def build_options(
    inventory: Inventory,
    sensitivity: Sensitivity,
    extra_metadata: Sequence[bytes],
    profile: DeviceProfile | None = None,
) -> Options:
    """All types that a tensor can hold and that were measured, and its own type.

    Raises CalibrationError where the probes are not complete.
    """
    require_probed(sensitivity, inventory)
    names, kinds, sizes, damages, seconds = [], [], [], [], []
    for tensor in inventory.quantizable:
        known = sensitivity.tensors[tensor.name]
        options = [
            t
            for t in known.errors
            if f"{tensor.name} {t}" not in sensitivity.excluded and t != tensor.qtype.name
        ]
        if profile is not None:
            options = [t for t in options if t in profile.timings]
        options.append(tensor.qtype.name)
        names.append(tensor.name)
        kinds.append(options)
        sizes.append(np.array([padded_bytes(tensor, t, inventory.alignment) for t in options]))
        damage = [known.damage(t) for t in options[:-1]]
        damages.append(np.array([*damage, 0.0]))  # its own type: the bytes are copied
        if profile is not None:
            row = [profile.option_seconds(tensor, inventory, t, decode=True) for t in options]
            seconds.append(np.array(row))
    own = {t.name: t.qtype.name for t in inventory.tensors}
    in_place = sum(
        padded_bytes(t, t.qtype.name, inventory.alignment) for t in inventory.quantizable
    )
    fixed = inventory.output_size(own, extra_metadata) - int(in_place)
    return Options(names, kinds, sizes, damages, seconds if profile else None, fixed)


def padded_bytes(tensor: Tensor, type_name: str, alignment: int) -> float:
    """Bytes that a tensor takes in the file, padding included."""
    size = lookup(type_name).size_bytes(tensor.shape)
    return float(-(-size // alignment) * alignment)


def predicted_damage(sensitivity: Sensitivity, types: Mapping[str, str]) -> float:
    """The sum of damages of a map, for the tensors whose type was measured."""
    total = 0.0
    for name, known in sensitivity.tensors.items():
        kind = types.get(name, "")
        if kind in known.errors or kind in known.probes:
            total += known.damage(kind)
    return total


# --- planning ------------------------------------------------------------------------------------


def make_plan(
    inventory: Inventory,
    sensitivity: Sensitivity,
    imatrix: Imatrix,
    request: PlanRequest,
    workdir: Path,
    *,
    profile: DeviceProfile | None = None,
) -> Plan:
    """Solve for `request`. Raises UsageError, InfeasiblePlanError, CalibrationError."""
    if request.prefer not in PRIORITIES:
        raise UsageError(f"--prefer {request.prefer!r}: choose one of {', '.join(PRIORITIES)}")
    if request.prefer == "latency" and profile is None:
        raise UsageError("--prefer latency needs a device profile; run apreqel profile MODEL first")
    metadata = output_metadata(imatrix)
    records = encode_metadata(metadata)
    options = build_options(
        inventory, sensitivity, records, profile if request.prefer == "latency" else None
    )
    budget = size_budget(inventory, options, request)
    stock = stock_map(inventory, sensitivity, DEFAULT_PRESET)
    limits: dict[str, float] = {}
    size_limits = []
    if budget is None and request.prefer == "accuracy":
        budget = stock_size(inventory, stock)
    if budget is not None:
        limits["size_bytes"] = float(budget)
        size_limits = [options.size_limit(budget)]
    floor = request.max_kld_nats
    if floor is None and request.prefer in ("memory", "latency"):
        floor = predicted_damage(sensitivity, stock)
    quality = [options.damage_limit(floor)] if floor is not None else []
    if floor is not None:
        limits["kld_nats"] = floor
    if request.prefer == "memory":
        solution = solve(options.sizes, [*quality, *size_limits])
    elif request.prefer == "latency":
        assert options.decode_seconds is not None
        solution = solve(options.decode_seconds, [*quality, *size_limits])
    elif request.prefer == "accuracy":
        solution = solve(options.damages, [*size_limits, *quality])
    else:
        worst = floor if floor is not None else predicted_damage(sensitivity, stock)
        solution = knee(options, budget, quality, worst)
    chosen = {t.name: t.qtype.name for t in inventory.tensors} | options.types_of(solution)
    metadata["apreqel.plan"] = map_digest(chosen, sensitivity.imatrix_sha256)
    picked = list(zip(options.damages, solution.choice, strict=True))
    tensor_bytes = sum(lookup(chosen[t.name]).size_bytes(t.shape) for t in inventory.tensors)
    return Plan(
        provenance=Provenance(
            sensitivity.provenance.model_sha256,
            sensitivity.provenance.llama_build,
            profile.fingerprint if profile else "",
            asdict(request),
        ),
        types=chosen,
        prefer=request.prefer,
        limits=limits,
        size_bytes=inventory.output_size(chosen, encode_metadata(metadata)),
        bits_per_weight=8 * tensor_bytes / inventory.n_weights,
        kld_nats=float(sum(row[c] for row, c in picked)),
        gap=solution.gap,
        solver_seconds=solution.seconds,
        imatrix_sha256=sensitivity.imatrix_sha256,
        metadata=metadata,
        model_files=[str(f.resolve()) for f in inventory.files],
        workdir=str(workdir.resolve()),
        seconds_per_token=profile.seconds_per_token(inventory, chosen) if profile else None,
        notes=tuple(plan_notes(sensitivity, chosen)),
    )


def size_budget(inventory: Inventory, options: Options, request: PlanRequest) -> int | None:
    """Bytes of the whole file that --max-size and --target-bpw allow, the stricter of both."""
    budgets = []
    if request.max_size_bytes is not None:
        budgets.append(request.max_size_bytes)
    if request.target_bpw is not None:
        # Bits per weight count tensor data, without header and padding.
        kept = [t for t in inventory.tensors if t.keep_reason is not None]
        data = request.target_bpw * inventory.n_weights / 8 - sum(t.size_bytes for t in kept)
        budgets.append(int(data) + options.fixed_bytes)
    return min(budgets, default=None)


def knee(
    options: Options, budget: int | None, quality: Sequence[Limit], worst_kld: float
) -> Solution:
    """The point of the size/damage front farthest below its chord (Satopaa et al. 2011).

    The front is taken from the smallest plan with a damage of at most `worst_kld` up: below that
    every byte saved is dear, and the knee would be a ruin.
    """
    start = solve(options.sizes, [options.damage_limit(worst_kld), *quality])
    least = options.fixed_bytes + start.objective
    most = options.fixed_bytes + sum(
        float(row[np.argmin(np.where(row < _NEAR_LOSSLESS * row.max(), damage, np.inf))])
        for row, damage in zip(options.sizes, options.damages, strict=True)
    )
    if budget is not None:
        options.size_limit(budget)
        least, most = min(least, budget), min(most, budget)
    points = []
    for size in np.linspace(least, most, _FRONT_POINTS):
        try:
            solution = solve(options.damages, [options.size_limit(size), *quality])
        except InfeasiblePlanError:
            continue
        points.append((float(size), solution))
    if not points:
        raise InfeasiblePlanError("no plan meets --max-kld within the size limit")
    x = np.array([size for size, _ in points])
    y = np.array([s.objective for _, s in points])
    if len(points) < 3 or y[0] <= y[-1]:
        return points[-1][1]
    below = (x - x[0]) / (x[-1] - x[0]) + (y - y[-1]) / (y[0] - y[-1])
    return points[int(np.argmin(below))][1]


def stock_map(inventory: Inventory, sensitivity: Sensitivity, preset: str) -> dict[str, str]:
    """What llama.cpp's preset would make of every tensor, for this model and imatrix."""
    return llama.stock_types(inventory.files[0], preset, has_imatrix_for=list(sensitivity.tensors))


def stock_size(inventory: Inventory, types: Mapping[str, str]) -> int:
    """Bytes of the file that llama.cpp itself writes for this map, from its header alone."""
    return inventory.output_size(types)


def plan_notes(sensitivity: Sensitivity, types: Mapping[str, str]) -> Iterator[str]:
    """What the reader of a plan should know about the measurements behind it."""
    unresolved = [
        name
        for name, known in sensitivity.tensors.items()
        if (probe := known.probes.get(types.get(name, ""))) and not probe.is_resolved
    ]
    if unresolved:
        yield f"{len(unresolved)} probed effects are below the noise (unresolved)"
    if sensitivity.excluded:
        yield f"{len(sensitivity.excluded)} probes failed and were left out"
    coverage = sensitivity.coverage
    if coverage and coverage.n_unseen_experts:
        yield (
            f"{coverage.n_unseen_experts} of {coverage.n_experts} experts were never chosen by the "
            "calibration text; they weigh 1"
        )
    if coverage and coverage.n_zero_columns:
        yield f"{coverage.n_zero_columns} imatrix columns were zero and were substituted"


# --- files for others ----------------------------------------------------------------------------


def tensor_type_lines(types: Mapping[str, str], inventory: Inventory) -> str:
    """A --tensor-type-file for llama-quantize: one anchored, escaped, lower-case line a tensor.

    llama-quantize lower-cases the pattern and searches it as a regular expression.
    """
    lines = [f"^{re.escape(t.name)}$={types[t.name]}".lower() for t in inventory.quantizable]
    return "\n".join(lines) + "\n"


def parse_size(text: str) -> int:
    """Bytes of '95MB', '1.5GiB', '102400' (decimal and binary units). Raises UsageError."""
    units = {"": 1, "B": 1}
    for power, letter in enumerate("KMGT", 1):
        units[f"{letter}B"] = units[letter] = 1000**power
        units[f"{letter}IB"] = 1024**power
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]*)\s*", text)
    if not found or found[2].upper() not in units:
        raise UsageError(f"--max-size {text!r}: give bytes, or a number with MB, MiB, GB or GiB")
    return int(float(found[1]) * units[found[2].upper()])


def require_presets(names: Sequence[str]) -> None:
    """Raise UsageError where --against names no preset of llama.cpp."""
    known = llama.stock_presets()
    for name in names:
        if name.upper() not in known:
            raise UsageError(
                f"--against {name!r}: there is no such preset; there are {', '.join(known)}"
            )


def size_from(text: str, inventory: Inventory) -> int:
    """--max-size: bytes, or the exact size of a stock preset of this model. Raises UsageError."""
    if text.upper() not in llama.stock_presets():
        return parse_size(text)
    names = [t.name for t in inventory.quantizable]
    return stock_size(inventory, llama.stock_types(inventory.files[0], text, has_imatrix_for=names))
