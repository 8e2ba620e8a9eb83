"""How long each product takes on a device, and what that predicts for a whole map of types.

A device profile holds, for every quant type and matrix shape, the seconds of one product with one
token (decode) and with many (prefill), as `timing` measured them, and for every model the rest of a
token: attention, norms, look-ups, which do not depend on types. Seconds of a map are their sum:

    decode(map)  = scale x sum of kernels + rest + attention x context
    prefill(map) = scale x sum of kernels + rest + attention x (half the prompt - half a usual one)

with scale, rest and a generated token's attention over an F16 cache fitted to a few real runs of
llama.cpp on the same device (`Overhead`). Over other caches, and in prompts, attention is that of
ggml, timed for one layer, times the layers.
Profiles are kept in the user's data folder, and can be carried to other machines.
"""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apreqel import artifacts, llama
from apreqel.artifacts import Provenance
from apreqel.device.machine import Device, detect
from apreqel.errors import UsageError, printable
from apreqel.llama.kernels import HeadShape, MatrixShape
from apreqel.model.qtypes import KV_TYPES, USUAL_CACHES, lookup

if TYPE_CHECKING:
    from apreqel.model.inventory import Inventory, Tensor

# Two-sided 95% of a normal distribution.
_Z95 = 1.959964
# A shape that was not timed takes the rate of the nearest one that was, this uncertain (one
# standard deviation): rates of 576x192 to 1536x576 matrices differ that much here.
_BORROWED_ERROR = 0.15
# What remains unexplained even where all anchors agree (one standard deviation).
_LEAST_ERROR = 0.015

_ROLES_WITH_OWN_INPUTS = ("down",)

# Attention is a dot product with K and a sum of V: its seconds add up, from pairs with this type.
# Where neither is quantised they do not (F16 has kernels of its own): such pairs are all timed.
_CACHE_PIVOT = "Q8_0"


# --- what is stored ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reading:
    """The median of repeated readings in seconds, and their coefficient of variation."""

    seconds: float
    variation: float
    count: int


@dataclass(frozen=True)
class Kernel:
    """One product of one matrix: with one token, and per token of a prompt."""

    decode: Reading
    prefill: Reading
    layout: str  # ggml's buffer type
    flags: Sequence[str] = ()

    @property
    def is_repacked(self) -> bool:
        """Whether llama.cpp keeps a copy beside the file's map."""
        return self.layout not in ("CPU", "CPU_Mapped")


@dataclass(frozen=True)
class Anchor:
    """A real run of llama.cpp with every tensor in (nearly) one type; seconds per token."""

    decode: float
    decode_at_depth: float
    prefill: float
    decode_kernels: float
    prefill_kernels: float


@dataclass(frozen=True)
class Overhead:
    """What one model takes beside its products, in seconds, and its memory in bytes."""

    model: str
    decode_scale: float
    decode_rest: float
    decode_error: float  # relative standard deviation of the anchors around the fit
    prefill_scale: float
    prefill_rest: float
    prefill_error: float
    attention: float  # seconds of a generated token per token of context
    sampling: float  # seconds to pick a token; not part of tokens/s, as in llama-bench
    anchors: Mapping[str, Anchor]
    memory_rest: float = 0.0  # bytes: vocabulary and touched buffers
    memory_per_context: float = 0.0  # bytes per token of context beside the KV cache


@dataclass(frozen=True)
class Range:
    """A predicted quantity with its 95% interval."""

    value: float
    low: float
    high: float

    @staticmethod
    def around(value: float, relative_error: float) -> Range:
        spread = _Z95 * relative_error
        return Range(value, value * max(0.0, 1 - spread), value * (1 + spread))

    @property
    def inverse(self) -> Range:
        """Tokens/s of seconds per token."""
        return Range(1 / self.value, 1 / self.high, 1 / self.low if self.low > 0 else math.inf)


@dataclass(frozen=True)
class Speed:
    """Predicted tokens/s."""

    prefill: Range
    decode: Range


@dataclass(frozen=True)
class DeviceProfile:
    """Kernels by type and shape key; overheads by model signature.

    `attention` is by types of the KV cache ("Q8_0/F16", K first) and key of the heads' shape: one
    layer, in seconds per token and per token that it looks back at.
    """

    provenance: Provenance
    name: str
    device: Device
    fingerprint: str
    n_threads: int
    n_prompt: int
    kernels: Mapping[str, Mapping[str, Kernel]]
    overheads: Mapping[str, Overhead] = field(default_factory=dict)
    thread_seconds: Mapping[str, Sequence[float]] = field(default_factory=dict)
    notes: Sequence[str] = ()
    attention: Mapping[str, Mapping[str, Kernel]] = field(default_factory=dict)

    # -- prediction --

    def covers(self, inventory: Inventory) -> bool:
        """Whether this model was profiled itself: its products timed, its overhead measured."""
        return signature(inventory) in self.overheads

    def is_complete(self, inventory: Inventory) -> bool:
        """Whether nothing of this model is left to time: attention over the caches neither."""
        timed = head_shape(inventory) is None or self.times_caches(inventory)
        return self.covers(inventory) and timed

    def types_for(self, tensor: Tensor, inventory: Inventory) -> set[str]:
        """Types whose seconds are known for the tensor, by its own shape or a like one."""
        if not is_multiplied(tensor, inventory):
            return set(tensor.legal_types)
        shape = matrix_shape(tensor, inventory)
        return {t for t in tensor.legal_types if self._kernel(t, shape) is not None}

    def _kernel(self, type_name: str, shape: MatrixShape) -> tuple[Kernel, float, bool] | None:
        """(kernel, factor on its seconds, whether it is another shape's)."""
        timed = self.kernels.get(type_name, {})
        if shape.key in timed:
            return timed[shape.key], 1.0, False
        others = [(key, parse_key(key)) for key in timed]
        others = [(key, o) for key, o in others if bool(o.n_experts) == bool(shape.n_experts)]
        if not others:
            return None
        key, nearest = min(
            others,
            key=lambda o: (
                abs(math.log(o[1].weights_read / shape.weights_read))
                + abs(math.log(o[1].row_length / shape.row_length))
            ),
        )
        return timed[key], shape.weights_read / nearest.weights_read, True

    def tensor_seconds(
        self, tensor: Tensor, inventory: Inventory, type_name: str, *, decode: bool
    ) -> float:
        """A tensor's part of the seconds per token in this type."""
        overhead = self.overhead(inventory)
        scale = overhead.decode_scale if decode else overhead.prefill_scale
        return scale * self._raw_seconds(tensor, inventory, type_name, decode)[0]

    def _raw_seconds(
        self, tensor: Tensor, inventory: Inventory, type_name: str, decode: bool
    ) -> tuple[float, float]:
        """(seconds per token before scaling, their standard error)."""
        if not is_multiplied(tensor, inventory):
            return 0.0, 0.0
        found = self._kernel(type_name, matrix_shape(tensor, inventory))
        if found is None:
            raise UsageError(f"device profile {self.name}: has no timing of {type_name}")
        kernel, factor, borrowed = found
        # Of a prompt only the last token needs the output head.
        once = not decode and tensor.role in ("output", "token_embd")
        reading = kernel.decode if decode or once else kernel.prefill
        seconds = reading.seconds * factor / (self.n_prompt if once else 1)
        error = reading.variation / math.sqrt(max(1, reading.count))
        return seconds, seconds * (_BORROWED_ERROR if borrowed else error)

    def kernel_seconds(
        self, inventory: Inventory, types: Mapping[str, str], *, decode: bool
    ) -> tuple[float, float]:
        """(sum of the products' seconds per token, its standard error)."""
        parts = [
            self._raw_seconds(t, inventory, types[t.name], decode) for t in inventory.quantizable
        ]
        # Tensors of one shape and type share one reading, so errors add up rather than cancel.
        return sum(seconds for seconds, _ in parts), sum(error for _, error in parts)

    def rest_seconds(
        self,
        inventory: Inventory,
        *,
        decode: bool,
        n_context: int = 0,
        n_prompt: int | None = None,
        caches: Sequence[str] = USUAL_CACHES,
    ) -> float:
        """Seconds per token that do not depend on the weights' types.

        Of a generated token with `n_context` tokens in a cache of these types (K, V), or of a
        prompt of `n_prompt` tokens (None: as many as were timed), which look back at half of them.
        """
        overhead = self.overhead(inventory)
        attention = self.attention_seconds(inventory, caches, decode=decode)
        if decode:
            return overhead.decode_rest + attention * n_context
        usual = self.attention_seconds(inventory, decode=False)
        mean = (self.n_prompt if n_prompt is None else n_prompt) / 2
        rest = overhead.prefill_rest + attention * mean - usual * self.n_prompt / 2
        return max(0.0, rest)

    def attention_seconds(
        self, inventory: Inventory, caches: Sequence[str] = USUAL_CACHES, *, decode: bool
    ) -> float:
        """Seconds per token and per token that it looks back at, all layers together.

        Where attention over these types (K, V) was not timed: that of a generated token over F16,
        and none for prompts.
        """
        usual = self.overhead(inventory).attention if decode else 0.0
        found = self._layer_seconds(inventory, caches, decode=decode)
        if found is None or (usual and tuple(caches) == USUAL_CACHES):
            return usual
        return inventory.n_attention_layers * found

    def times_caches(self, inventory: Inventory, caches: Sequence[str] = USUAL_CACHES) -> bool:
        """Whether attention of this model's heads over a cache of these types is known."""
        return self._layer_seconds(inventory, caches, decode=True) is not None

    def _layer_seconds(
        self, inventory: Inventory, caches: Sequence[str], *, decode: bool
    ) -> float | None:
        shape = head_shape(inventory)

        def timed(k: str, v: str) -> float | None:
            kernel = self.attention.get(f"{k}/{v}", {}).get(shape.key) if shape else None
            if kernel is None:
                return None
            return kernel.decode.seconds if decode else kernel.prefill.seconds

        k, v = caches
        if (direct := timed(k, v)) is not None:
            return direct
        of_k, of_v = timed(k, _CACHE_PIVOT), timed(_CACHE_PIVOT, v)
        both = timed(_CACHE_PIVOT, _CACHE_PIVOT)
        if of_k is None or of_v is None or both is None:
            return None
        return max(0.0, of_k + of_v - both)

    def overhead(self, inventory: Inventory) -> Overhead:
        """The model's own; where it was not profiled, none, and a wide error."""
        known = self.overheads.get(signature(inventory))
        return known or Overhead("", 1.0, 0.0, _BORROWED_ERROR, 1.0, 0.0, _BORROWED_ERROR, 0, 0, {})

    def predict(
        self,
        inventory: Inventory,
        types: Mapping[str, str],
        n_context: int = 0,
        *,
        n_prompt: int | None = None,
        caches: Sequence[str] = USUAL_CACHES,
    ) -> Speed | None:
        """Tokens/s of a map, of a prompt and after `n_context` tokens, as in `rest_seconds`.

        None where a type of the weights has no timing at all on this device.
        """
        for tensor in inventory.quantizable:
            if types[tensor.name] not in self.types_for(tensor, inventory):
                return None
        overhead = self.overhead(inventory)
        ranges = []
        for decode, scale, unexplained in (
            (False, overhead.prefill_scale, overhead.prefill_error),
            (True, overhead.decode_scale, overhead.decode_error),
        ):
            kernels, error = self.kernel_seconds(inventory, types, decode=decode)
            rest = self.rest_seconds(
                inventory, decode=decode, n_context=n_context, n_prompt=n_prompt, caches=caches
            )
            seconds = scale * kernels + rest
            relative = math.hypot(max(unexplained, _LEAST_ERROR), scale * error / seconds)
            ranges.append(Range.around(seconds, relative).inverse)
        return Speed(*ranges)

    def is_repacked(self, tensor: Tensor, inventory: Inventory, type_name: str) -> bool:
        """Whether llama.cpp copies the tensor into another layout when it loads it."""
        if not is_multiplied(tensor, inventory):
            return False
        found = self._kernel(type_name, matrix_shape(tensor, inventory))
        return found is not None and found[0].is_repacked

    # -- files --

    def to_json(self) -> dict[str, Any]:
        return {k: v for k, v in asdict(self).items() if k != "provenance"}

    def save(self, path: Path) -> None:
        artifacts.save(path, "device-profile", self.provenance, self.to_json())

    @classmethod
    def load(cls, path: Path) -> DeviceProfile:
        """Raises ArtifactError naming the field that is damaged."""
        provenance, data = artifacts.load(path, "device-profile")
        with artifacts.understood(f"{path}: device profile", "measure again with apreqel profile"):
            data["device"] = Device(**data["device"])
            data.setdefault("attention", {})  # profiles of apreqel before it was timed
            for name in ("kernels", "attention"):
                data[name] = {
                    kind: {key: _kernel_from(kernel) for key, kernel in shapes.items()}
                    for kind, shapes in data[name].items()
                }
            data["overheads"] = {
                key: _overhead_from(overhead) for key, overhead in data["overheads"].items()
            }
            loaded = cls(provenance, **data)
            for kind, shapes in [*loaded.kernels.items(), *loaded.attention.items()]:
                for key, kernel in shapes.items():
                    if kind in loaded.kernels:
                        parse_key(key)
                    for seconds in (kernel.decode.seconds, kernel.prefill.seconds):
                        if not (isinstance(seconds, float) and 0 < seconds < math.inf):
                            raise ValueError(f"kernels.{kind}.{key}: {seconds!r} seconds")
            return loaded


def _kernel_from(data: dict[str, Any]) -> Kernel:
    decode, prefill = Reading(**data.pop("decode")), Reading(**data.pop("prefill"))
    return Kernel(decode, prefill, **data)


def _overhead_from(data: dict[str, Any]) -> Overhead:
    anchors = {label: Anchor(**anchor) for label, anchor in data.pop("anchors").items()}
    return Overhead(anchors=anchors, **data)


# --- a model's products --------------------------------------------------------------------------


def is_multiplied(tensor: Tensor, inventory: Inventory) -> bool:
    """An embedding that is only looked up costs next to nothing."""
    return tensor.role != "token_embd" or inventory.tied_embeddings


def matrix_shape(tensor: Tensor, inventory: Inventory) -> MatrixShape:
    """The product that a tensor takes part in."""
    if tensor.n_experts < 2:
        return MatrixShape(tensor.row_length, tensor.n_rows)
    used = max(1, min(inventory.n_experts_used, tensor.n_experts))
    own_inputs = any(role in tensor.role for role in _ROLES_WITH_OWN_INPUTS)
    return MatrixShape(
        tensor.row_length, tensor.shape[1], tensor.n_experts, used, used if own_inputs else 1
    )


def parse_key(key: str) -> MatrixShape:
    """The inverse of MatrixShape.key. Raises ValueError."""
    found = re.fullmatch(r"(\d+)x(\d+)(?: (\d+)/(\d+) from (\d+))?", key)
    if not found or 0 in (int(found[1]), int(found[2])):
        raise ValueError(f"shape {key!r}")
    if found[3] is None:
        return MatrixShape(int(found[1]), int(found[2]))
    used, experts, inputs = int(found[3]), int(found[4]), int(found[5])
    return MatrixShape(int(found[1]), int(found[2]), experts, used, inputs)


def head_shape(inventory: Inventory) -> HeadShape | None:
    """Attention of one of the model's layers, as most of them have it."""
    found = inventory.head_shape
    return HeadShape(*found) if found else None


def timed_caches(shape: HeadShape) -> list[tuple[str, str]]:
    """Types of K and V to time, of which the seconds of all others follow."""
    blocks = [(lookup(kind).block_size, kind) for kind in KV_TYPES]
    ks = [kind for size, kind in blocks if shape.k_length % size == 0]
    vs = [kind for size, kind in blocks if shape.v_length % size == 0]
    return [
        (k, v)
        for k in ks
        for v in vs
        if _CACHE_PIVOT in (k, v) or not (lookup(k).is_quantized or lookup(v).is_quantized)
    ]


def shapes_of(inventory: Inventory) -> dict[MatrixShape, list[Tensor]]:
    """The distinct products of a model with their tensors."""
    found: dict[MatrixShape, list[Tensor]] = {}
    for tensor in inventory.quantizable:
        if is_multiplied(tensor, inventory):
            found.setdefault(matrix_shape(tensor, inventory), []).append(tensor)
    return found


def signature(inventory: Inventory) -> str:
    """What a model's overhead depends on, as 16 hex digits: all but the values of its weights."""
    return inventory.shape_digest


def nearest_types(
    profile: DeviceProfile, inventory: Inventory, type_name: str
) -> dict[str, str] | None:
    """Every product in `type_name`, or in the nearest timed type that its rows can hold."""
    wanted = lookup(type_name).bits_per_weight

    def distance(name: str) -> tuple[float, int]:
        other = lookup(name)
        return abs(other.bits_per_weight - wanted), other.ggml_id

    types = inventory.types
    for tensor in inventory.quantizable:
        if is_multiplied(tensor, inventory):
            timed = profile.types_for(tensor, inventory)
            if not timed:
                return None
            types[tensor.name] = type_name if type_name in timed else min(timed, key=distance)
    return types


def share_of(inventory: Inventory, types: Mapping[str, str], type_name: str) -> float:
    """Part of the multiplied weights that a map holds in one type."""
    weights = {t.name: t.n_elements for t in inventory.quantizable if is_multiplied(t, inventory)}
    held = sum(n for name, n in weights.items() if types[name] == type_name)
    return held / max(1, sum(weights.values()))


def type_speeds(profile: DeviceProfile, inventory: Inventory) -> dict[str, tuple[Speed, float]]:
    """By type: predicted tokens/s with the model in it, and the part of it that can be."""
    result = {}
    for kind in profile.kernels:
        types = nearest_types(profile, inventory, kind)
        speed = profile.predict(inventory, types) if types else None
        if types and speed and (share := share_of(inventory, types, kind)) > 0:
            result[kind] = speed, share
    return result


def dominated(speeds: Mapping[str, tuple[Speed, float]]) -> dict[str, str]:
    """Types that another one beats in bytes, prefill and decode alike: {type: the other}.

    Only types that the whole model can hold are compared.
    """
    rows = {
        kind: (lookup(kind).bits_per_weight, -speed.prefill.value, -speed.decode.value)
        for kind, (speed, share) in speeds.items()
        if share == 1
    }
    return {
        kind: min(better, key=lambda other: rows[other])
        for kind, row in rows.items()
        if (better := [o for o, its in rows.items() if its != row and _all_less(its, row)])
    }


def _all_less(a: Sequence[float], b: Sequence[float]) -> bool:
    return all(x <= y for x, y in zip(a, b, strict=True))


# --- the user's profiles -------------------------------------------------------------------------


def store_folder() -> Path:
    """Where measured and imported profiles are kept, by the system's custom."""
    if sys.platform == "darwin":
        base = Path.home() / "Library" / "Application Support"
    else:
        base = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share")
    return base / "apreqel" / "profiles"


def bundled_folder() -> Path:
    """Profiles of common devices that come with apreqel."""
    installed = Path(__file__).parents[1] / "device_profiles"
    return installed if installed.is_dir() else Path(__file__).parents[2] / "device_profiles"


def stored_path(name: str) -> Path:
    return store_folder() / f"{name}.json"


def this_device() -> tuple[Device, str]:
    """(the device that runs this, its fingerprint with the llama.cpp that is installed)."""
    device = replace(detect(), gpu=llama.gpu_name())
    return device, device.fingerprint(llama.build_info())


def default_name(device: Device, n_threads: int, fingerprint: str) -> str:
    """'amd-epyc-2t-1a2b3c': what is typed after --device."""
    chip = (device.gpu or device.cpu).lower()
    named = re.sub(r"\(.*?\)|@.*|\bcpu\b|processor", " ", chip)
    words = re.sub(r"[^a-z0-9]+", "-", named).strip("-")[:40].strip("-")
    return f"{words or 'device'}-{n_threads}t-{fingerprint[:6]}"


def safe_name(name: str) -> str:
    """A profile's name as a file's name: an imported one is not to be trusted."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip(".-")[:80] or "imported"


def list_profiles() -> Iterator[tuple[str, Path]]:
    """(name, file) of every profile at hand, the user's own first."""
    seen = set()
    for folder in (store_folder(), bundled_folder()):
        for path in sorted(folder.glob("*.json")):
            if path.stem not in seen and path.stem != "schema":
                seen.add(path.stem)
                yield path.stem, path


def load_named(name: str) -> DeviceProfile:
    """A profile by its name or file. Raises UsageError, ArtifactError."""
    if name.endswith(".json"):
        return DeviceProfile.load(Path(name))
    at_hand = dict(list_profiles())
    if name not in at_hand:
        known = ", ".join(at_hand) or "none yet"
        raise UsageError(f"device {printable(name)!r}: no such profile; there are: {known}")
    return DeviceProfile.load(at_hand[name])


def merged(profile: DeviceProfile, newer: DeviceProfile) -> DeviceProfile:
    """Both measurements of one device; where they meet, the newer one."""
    return replace(
        newer,
        kernels=_merged_kernels(profile.kernels, newer.kernels),
        overheads={**profile.overheads, **newer.overheads},
        attention=_merged_kernels(profile.attention, newer.attention),
    )


def _merged_kernels(
    older: Mapping[str, Mapping[str, Kernel]], newer: Mapping[str, Mapping[str, Kernel]]
) -> dict[str, dict[str, Kernel]]:
    return {kind: {**older.get(kind, {}), **newer.get(kind, {})} for kind in {**older, **newer}}
