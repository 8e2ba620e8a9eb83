"""How fast each quant type runs on this device, in real llama.cpp.

For every type a file with the model's shapes, all in that type, is made without quantising
anything: its weights are zero, and kernels do the same work whatever the values. It is loaded as a
user would load it (repacked layouts allowed) and timed. Where a row cannot hold the type, the
tensor takes the nearest type that fits, and the types' own times are solved from all files.
"""

from __future__ import annotations

import os
import resource
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, median, stdev
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.optimize import nnls

from apreqel import artifacts, llama
from apreqel.artifacts import Provenance
from apreqel.device import Device, detect
from apreqel.errors import ArtifactError
from apreqel.gguf_header import ARRAY, STRING, UINT32, TensorRecord, encode_header, encode_kv
from apreqel.inventory import Inventory, Tensor, read_inventory
from apreqel.qtypes import lookup, registry

if TYPE_CHECKING:
    from apreqel.qtypes import QuantType

PROFILE_FILE = "device-profile.json"

# A reading is accepted at this coefficient of variation; otherwise repeated, then flagged.
_ACCEPTED_CV = 0.03
_LEAST_REPETITIONS, _MOST_REPETITIONS = 5, 12

# Shapes for a device without a model: rows that every type fits, weights beyond any cache.
_STANDARD = {"n_embd": 1024, "n_ff": 3072, "n_layer": 8, "n_head": 16, "n_vocab": 16384}

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class TypeTiming:
    """One type: seconds per token solved for it, and what its file was measured at."""

    bits_per_weight: float
    prefill_seconds: float  # per token, if all multiplied weights were in this type
    decode_seconds: float
    prefill_cv: float
    decode_cv: float
    repetitions: int
    file_types: Mapping[str, float]  # share of multiplied weights by type in the timed file
    flags: Sequence[str]


@dataclass(frozen=True)
class DeviceProfile:
    provenance: Provenance
    device: Device
    fingerprint: str
    n_threads: int
    shapes: str
    n_prompt: int
    n_generated: int
    timings: Mapping[str, TypeTiming]

    def option_seconds(
        self, tensor: Tensor, inventory: Inventory, type_name: str, *, decode: bool
    ) -> float:
        """One tensor's part of the seconds per token: its share of the multiplied weights."""
        if not is_multiplied(tensor, inventory):
            return 0.0
        timing = self.timings[type_name]
        share = tensor.n_elements / multiplied_weights(inventory)
        return share * (timing.decode_seconds if decode else timing.prefill_seconds)

    def seconds_per_token(
        self, inventory: Inventory, types: Mapping[str, str]
    ) -> tuple[float, float] | None:
        """(prefill, decode) predicted for a map; None where a type was not timed."""
        if any(types[t.name] not in self.timings for t in inventory.quantizable):
            return None
        prefill, decode = (
            sum(
                self.option_seconds(t, inventory, types[t.name], decode=decode)
                for t in inventory.quantizable
            )
            for decode in (False, True)
        )
        return prefill, decode

    def dominated(self) -> set[str]:
        """Types for which another is no larger, no slower either way, and better in one."""

        def key(t: TypeTiming) -> tuple[float, float, float]:
            return t.bits_per_weight, t.prefill_seconds, t.decode_seconds

        return {
            name
            for name, timing in self.timings.items()
            if any(
                all(a <= b for a, b in zip(key(other), key(timing), strict=True))
                and key(other) != key(timing)
                for other in self.timings.values()
            )
        }

    def save(self, path: Path) -> None:
        data = {k: v for k, v in asdict(self).items() if k != "provenance"}
        artifacts.save(path, "device-profile", self.provenance, data)

    @classmethod
    def load(cls, path: Path, model_sha256: str | None = None) -> DeviceProfile:
        """Raises ArtifactError."""
        provenance, data = artifacts.load(path, "device-profile", model_sha256)
        try:
            data["device"] = Device(**data["device"])
            data["timings"] = {k: TypeTiming(**v) for k, v in data["timings"].items()}
            return cls(provenance, **data)
        except (KeyError, TypeError) as error:
            raise ArtifactError(
                f"{path}: damaged device profile ({error}); measure again"
            ) from error


def is_multiplied(tensor: Tensor, inventory: Inventory) -> bool:
    """An embedding that is only looked up costs next to nothing."""
    return tensor.role != "token_embd" or inventory.tied_embeddings


def multiplied_weights(inventory: Inventory) -> int:
    return sum(t.n_elements for t in inventory.quantizable if is_multiplied(t, inventory))


# --- measuring -----------------------------------------------------------------------------------


def measure_profile(
    inventory: Inventory | None,
    model_sha256: str,
    folder: Path,
    *,
    n_threads: int,
    n_prompt: int = 256,
    n_generated: int = 32,
    types: Sequence[str] | None = None,
    on_progress: Progress = lambda what, done, total: None,
) -> DeviceProfile:
    """Time every type that this llama.cpp has and some tensor can hold. Raises EngineError."""
    device, build = detect(), llama.build_info()
    with tempfile.TemporaryDirectory(prefix="profile-", dir=folder) as name:
        place = Path(name)
        if inventory is None:
            inventory = standard_model(place / "standard.gguf")
            shapes = "standard"
        else:
            shapes = inventory.name
        wanted = list(timed_types(inventory, types))
        readings: dict[str, _Reading] = {}
        for i, qtype in enumerate(wanted):
            on_progress(f"timing {qtype.name}", i, len(wanted))
            chosen = uniform_types(inventory, qtype)
            path = place / "shapes.gguf"
            write_shapes(inventory, chosen, path)
            readings[qtype.name] = _time_file(path, n_threads, n_prompt, n_generated)
            readings[qtype.name].shares = shares(inventory, chosen)
    on_progress("timing", len(wanted), len(wanted))
    prefill = solve_types({k: (r.shares, median(r.prefill)) for k, r in readings.items()})
    decode = solve_types({k: (r.shares, median(r.decode)) for k, r in readings.items()})
    timings = {
        name: TypeTiming(
            lookup(name).bits_per_weight,
            prefill[name],
            decode[name],
            _cv(r.prefill),
            _cv(r.decode),
            len(r.decode),
            r.shares,
            tuple(r.flags()),
        )
        for name, r in readings.items()
    }
    settings = {"n_prompt": n_prompt, "n_generated": n_generated, "n_threads": n_threads}
    fingerprint = device.fingerprint(n_threads, build)
    provenance = Provenance(model_sha256, build, fingerprint, settings)
    return DeviceProfile(
        provenance, device, fingerprint, n_threads, shapes, n_prompt, n_generated, timings
    )


def timed_types(inventory: Inventory, types: Sequence[str] | None) -> Iterator[QuantType]:
    """Types that some tensor can hold and this llama.cpp knows, largest first."""
    holdable = {t for tensor in inventory.quantizable for t in tensor.legal_types}
    for qtype in sorted(registry().values(), key=lambda q: -q.bits_per_weight):
        asked = types is None or qtype.name in types
        if asked and qtype.name in holdable and llama.supports(qtype):
            yield qtype


def uniform_types(inventory: Inventory, qtype: QuantType) -> dict[str, str]:
    """Every quantisable tensor in `qtype`, or in the nearest legal type that its rows fit."""

    def distance(name: str) -> tuple[float, int]:
        other = lookup(name)
        return abs(other.bits_per_weight - qtype.bits_per_weight), other.ggml_id

    result = {t.name: t.qtype.name for t in inventory.tensors}
    for tensor in inventory.quantizable:
        legal = [t for t in tensor.legal_types if llama.supports(lookup(t))]
        result[tensor.name] = qtype.name if qtype.name in legal else min(legal, key=distance)
    return result


def shares(inventory: Inventory, types: Mapping[str, str]) -> dict[str, float]:
    """Part of the multiplied weights that each type holds."""
    total, result = multiplied_weights(inventory), dict[str, float]()
    for tensor in inventory.quantizable:
        if is_multiplied(tensor, inventory):
            kind = types[tensor.name]
            result[kind] = result.get(kind, 0.0) + tensor.n_elements / total
    return result


def write_shapes(inventory: Inventory, types: Mapping[str, str], path: Path) -> None:
    """A loadable file of these types whose weights are all zero; it takes no disk space."""
    header, _ = inventory.output_header(types)
    with open(path, "wb") as file:
        file.write(header)
        file.truncate(inventory.output_size(types))


@dataclass
class _Reading:
    """Seconds per token of each repetition."""

    prefill: list[float]
    decode: list[float]
    page_faults: int
    shares: dict[str, float]

    def flags(self) -> Iterator[str]:
        if max(_cv(self.prefill), _cv(self.decode)) > _ACCEPTED_CV:
            yield "unsteady"
        if self.page_faults:
            yield "paging"


def _time_file(path: Path, n_threads: int, n_prompt: int, n_generated: int) -> _Reading:
    reading = _Reading([], [], 0, {})
    with (
        llama.LoadedModel(path) as model,
        model.context(max(n_prompt, 8) + n_generated, 1, n_threads) as context,
    ):
        context.seconds(n_prompt, 2)  # brings everything in
        before = resource.getrusage(resource.RUSAGE_SELF).ru_majflt
        while len(reading.decode) < _MOST_REPETITIONS:
            reading.prefill.append(context.seconds(n_prompt, 0) / n_prompt)
            reading.decode.append(context.seconds(8, n_generated) / n_generated)
            steady = max(_cv(reading.prefill), _cv(reading.decode)) <= _ACCEPTED_CV
            if len(reading.decode) >= _LEAST_REPETITIONS and steady:
                break
        reading.page_faults = resource.getrusage(resource.RUSAGE_SELF).ru_majflt - before
    return reading


def _cv(values: Sequence[float]) -> float:
    return stdev(values) / mean(values) if len(values) > 1 else 0.0


def solve_types(files: Mapping[str, tuple[Mapping[str, float], float]]) -> dict[str, float]:
    """Seconds of each type from files that mix them: seconds = sum of share x seconds of type.

    Non-negative least squares; `files` maps a type to (shares in its file, seconds of the file).
    Types that only ever stood in for others are solved too, but not returned.
    """
    kinds = sorted({kind for mix, _ in files.values() for kind in mix} | set(files))
    matrix = np.array([[mix.get(kind, 0.0) for kind in kinds] for mix, _ in files.values()])
    seconds = np.array([s for _, s in files.values()])
    solved, _ = nnls(matrix / seconds[:, None], np.ones(len(seconds)))
    return {kind: float(x) for kind, x in zip(kinds, solved, strict=True) if kind in files}


def standard_model(path: Path) -> Inventory:
    """A llama-shaped model of common sizes, without a vocabulary, all zero."""
    s = _STANDARD
    entries: list[tuple[str, int, Any]] = [
        ("general.architecture", STRING, "llama"),
        ("general.name", STRING, "standard shapes"),
        ("llama.block_count", UINT32, s["n_layer"]),
        ("llama.context_length", UINT32, 4096),
        ("llama.embedding_length", UINT32, s["n_embd"]),
        ("llama.feed_forward_length", UINT32, s["n_ff"]),
        ("llama.attention.head_count", UINT32, s["n_head"]),
        ("llama.attention.head_count_kv", UINT32, s["n_head"] // 4),
        ("llama.attention.layer_norm_rms_epsilon", 6, 1e-5),
        ("llama.vocab_size", UINT32, s["n_vocab"]),
        ("tokenizer.ggml.model", STRING, "none"),
        ("general.tags", ARRAY, ["apreqel"]),
    ]
    kv = s["n_embd"] // 4
    f16, f32 = lookup("F16"), lookup("F32")
    shapes: list[tuple[str, tuple[int, ...], QuantType]] = [
        ("token_embd.weight", (s["n_embd"], s["n_vocab"]), f16),
        ("output_norm.weight", (s["n_embd"],), f32),
    ]
    for i in range(s["n_layer"]):
        shapes += [
            (f"blk.{i}.attn_norm.weight", (s["n_embd"],), f32),
            (f"blk.{i}.attn_q.weight", (s["n_embd"], s["n_embd"]), f16),
            (f"blk.{i}.attn_k.weight", (s["n_embd"], kv), f16),
            (f"blk.{i}.attn_v.weight", (s["n_embd"], kv), f16),
            (f"blk.{i}.attn_output.weight", (s["n_embd"], s["n_embd"]), f16),
            (f"blk.{i}.ffn_norm.weight", (s["n_embd"],), f32),
            (f"blk.{i}.ffn_gate.weight", (s["n_embd"], s["n_ff"]), f16),
            (f"blk.{i}.ffn_up.weight", (s["n_embd"], s["n_ff"]), f16),
            (f"blk.{i}.ffn_down.weight", (s["n_ff"], s["n_embd"]), f16),
        ]
    records, offset = [], 0
    for name, shape, qtype in shapes:
        records.append(TensorRecord(name, shape, qtype.ggml_id, offset))
        offset += -(-qtype.size_bytes(shape) // 32) * 32
    header = encode_header([encode_kv(k, t, v) for k, t, v in entries], records, 32)
    with open(path, "wb") as file:
        file.write(header)
        os.truncate(file.fileno(), len(header) + offset)
    return read_inventory(path)
