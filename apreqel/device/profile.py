"""How long each product takes on a device, and what that predicts for a whole map of types.

A device profile holds, for every quant type and matrix shape, the seconds of one product with one
token (decode) and with many (prefill), as `timing` measured them, and for every model the rest of a
token: attention, norms, look-ups, which do not depend on types. Seconds of a map are their sum:

    decode(map)  = scale x sum of kernels + rest + attention x context
    prefill(map) = scale x sum of kernels + rest + attention x (half the prompt - half a usual one)

with scale, rest and a generated token's attention over an F16 cache fitted to a few real runs of
llama.cpp on the same device (`Overhead`). Over other caches, and in prompts, attention is that of
ggml, timed for one layer, times the layers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import le
from typing import TYPE_CHECKING, ClassVar

from apreqel.artifacts import Record
from apreqel.device.machine import Device
from apreqel.device.shapes import CACHE_PIVOT, head_shape, matrix_shape, parse_key, shapes_of
from apreqel.errors import UsageError
from apreqel.estimates import Range
from apreqel.model.qtypes import TYPICAL_ERRORS, USUAL_CACHES, lookup, nearest

if TYPE_CHECKING:
    from apreqel.llama.graphs import MatrixShape
    from apreqel.model.inventory import Inventory, Tensor

# A shape that was not timed takes the rate of the nearest one that was, this uncertain (one
# standard deviation): rates of 576x192 to 1536x576 matrices differ that much here.
_BORROWED_ERROR = 0.15
# What remains unexplained even where all anchors agree (one standard deviation).
_LEAST_ERROR = 0.015


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


# Where a model was not profiled.
_NO_OVERHEAD = Overhead("", 1.0, 0.0, _BORROWED_ERROR, 1.0, 0.0, _BORROWED_ERROR, 0.0, 0.0, {})

# By type (of caches: "Q8_0/F16", K first) and key of the shape.
Kernels = Mapping[str, Mapping[str, Kernel]]


@dataclass(frozen=True)
class Speed:
    """Predicted tokens/s."""

    prefill: Range
    decode: Range


@dataclass(frozen=True)
class ThreadTuning:
    """With how many threads models about this large ran fastest.

    `seconds` per token of decode and prefill by number of threads; none where other programs kept
    the device busy, so that it says nothing of the next time.
    """

    n_weights: int
    n_threads: int
    seconds: Mapping[str, Sequence[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class DeviceProfile(Record):
    """Overheads are by the model's `shape_digest`; old profiles have no `attention`.

    That is of one layer, in seconds per token and per token that it looks back at.
    """

    name: str
    device: Device
    fingerprint: str
    n_threads: int
    n_prompt: int
    kernels: Kernels
    overheads: Mapping[str, Overhead] = field(default_factory=dict)
    tunings: Sequence[ThreadTuning] = field(default_factory=list)
    notes: Sequence[str] = ()
    attention: Kernels = field(default_factory=dict)

    KIND: ClassVar[str] = "device-profile"
    ADVICE: ClassVar[str] = "measure again with apreqel profile"

    def __post_init__(self) -> None:
        """Raises ValueError where a shape or a timing is none."""
        for name, shapes in [*self.kernels.items(), *self.attention.items()]:
            for key, kernel in shapes.items():
                if name in self.kernels:
                    parse_key(key)
                for seconds in (kernel.decode.seconds, kernel.prefill.seconds):
                    if not 0 < seconds < math.inf:
                        raise ValueError(f"kernels.{name}.{key}: {seconds!r} seconds")

    def covers(self, inventory: Inventory) -> bool:
        """Whether this model was profiled itself: its products timed, its overhead measured."""
        return inventory.shape_digest in self.overheads

    def is_complete(self, inventory: Inventory) -> bool:
        """Whether nothing of this model is left to time: attention over the caches neither."""
        timed = head_shape(inventory) is None or self.times_caches(inventory)
        return self.covers(inventory) and timed

    def n_rounds(self, inventory: Inventory) -> int:
        """In how many rounds the model's products were read, at least; 0 where none was."""
        keys = {shape.key for shape in shapes_of(inventory)}
        timed = [k for by_key in self.kernels.values() for key, k in by_key.items() if key in keys]
        return min((kernel.decode.count for kernel in timed), default=0)

    def overhead(self, inventory: Inventory) -> Overhead:
        """The model's own; where it was not profiled, none, and a wide error."""
        return self.overheads.get(inventory.shape_digest, _NO_OVERHEAD)

    def merged(self, newer: DeviceProfile) -> DeviceProfile:
        """Both measurements of one device; where they meet, the newer one."""

        def both(old: Kernels, new: Kernels) -> Kernels:
            return {name: {**old.get(name, {}), **new.get(name, {})} for name in {**old, **new}}

        return replace(
            newer,
            kernels=both(self.kernels, newer.kernels),
            overheads={**self.overheads, **newer.overheads},
            attention=both(self.attention, newer.attention),
        )

    def with_tuning(self, tuning: ThreadTuning) -> DeviceProfile:
        """With the newer of two for the same size."""
        others = [t for t in self.tunings if t.n_weights != tuning.n_weights]
        return replace(self, tunings=[*others, tuning])

    # -- products --

    def types_for(self, tensor: Tensor, inventory: Inventory) -> set[str]:
        """Types whose seconds are known for the tensor, by its own shape or a like one."""
        shape = matrix_shape(tensor, inventory)
        return {t for t in tensor.legal_types if shape is None or self._kernel(t, shape)}

    def nearest_types(
        self, inventory: Inventory, type_name: str
    ) -> tuple[dict[str, str], float] | None:
        """Every product in `type_name`, or in the nearest timed type that its rows can hold.

        With the part of the multiplied weights that is in it; None where that is nothing.
        """
        bits = lookup(type_name).bits_per_weight
        tensors = [t for tensors in shapes_of(inventory).values() for t in tensors]
        timed = {t.name: self.types_for(t, inventory) for t in tensors}
        held = sum(t.n_elements for t in tensors if type_name in timed[t.name])
        if not (held and all(timed.values())):
            return None
        types = {n: type_name if type_name in ts else nearest(ts, bits) for n, ts in timed.items()}
        return inventory.types | types, held / sum(t.n_elements for t in tensors)

    def is_repacked(self, tensor: Tensor, inventory: Inventory, type_name: str) -> bool:
        """Whether llama.cpp copies the tensor into another layout when it loads it."""
        shape = matrix_shape(tensor, inventory)
        kernel = self._kernel(type_name, shape) if shape else None
        return kernel is not None and kernel.is_repacked

    def _kernel(self, type_name: str, shape: MatrixShape) -> Kernel | None:
        """As it was timed; where this shape was not, by the rate of the one most like it."""
        timed = self.kernels.get(type_name, {})
        if shape.key in timed:
            return timed[shape.key]

        def distance(other: MatrixShape) -> float:
            of_size = math.log(other.weights_read / shape.weights_read)
            return abs(of_size) + abs(math.log(other.row_length / shape.row_length))

        others = [o for o in map(parse_key, timed) if bool(o.n_experts) == bool(shape.n_experts)]
        if not others:
            return None
        like = min(others, key=distance)
        kernel, factor = timed[like.key], shape.weights_read / like.weights_read
        decode, prefill = (
            Reading(reading.seconds * factor, _BORROWED_ERROR, 1)
            for reading in (kernel.decode, kernel.prefill)
        )
        return replace(kernel, decode=decode, prefill=prefill)

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
        if (shape := matrix_shape(tensor, inventory)) is None:
            return 0.0, 0.0
        if (kernel := self._kernel(type_name, shape)) is None:
            raise UsageError(f"device profile {self.name}: has no timing of {type_name}")
        # Of a prompt only the last token needs the output head.
        once = not decode and tensor.role in ("output", "token_embd")
        reading = kernel.decode if decode or once else kernel.prefill
        seconds = reading.seconds / (self.n_prompt if once else 1)
        return seconds, seconds * reading.variation / math.sqrt(max(1, reading.count))

    def kernel_seconds(
        self, inventory: Inventory, types: Mapping[str, str]
    ) -> list[tuple[float, float]]:
        """(sum of the products' seconds per token, its standard error): of decode, of prefill."""
        sums, tensors = [], inventory.quantizable
        for decode in (True, False):
            parts = [self._raw_seconds(t, inventory, types[t.name], decode) for t in tensors]
            # Tensors of one shape and type share one reading, so errors add up rather than cancel.
            sums.append((sum(seconds for seconds, _ in parts), sum(error for _, error in parts)))
        return sums

    # -- the rest of a token --

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
        of_answer, of_prompt = self._attention_seconds(inventory, caches)
        if decode:
            return overhead.decode_rest + of_answer * n_context
        _, usual = self._attention_seconds(inventory, USUAL_CACHES)
        mean = (self.n_prompt if n_prompt is None else n_prompt) / 2
        return max(0.0, overhead.prefill_rest + of_prompt * mean - usual * self.n_prompt / 2)

    def _attention_seconds(
        self, inventory: Inventory, caches: Sequence[str]
    ) -> tuple[float, float]:
        """Of a generated token and of a prompt's, per token that it looks back at, in all layers.

        Where attention over these types (K, V) was not timed: that of a generated token over F16,
        and none for prompts.
        """
        usual, layer = self.overhead(inventory).attention, self._layer_seconds(inventory, caches)
        if layer is None:
            return usual, 0.0
        decode, prefill = (inventory.n_attention_layers * seconds for seconds in layer)
        return usual if usual and tuple(caches) == USUAL_CACHES else decode, prefill

    def times_caches(self, inventory: Inventory, caches: Sequence[str] = USUAL_CACHES) -> bool:
        """Whether attention of this model's heads over a cache of these types is known."""
        return self._layer_seconds(inventory, caches) is not None

    def _layer_seconds(
        self, inventory: Inventory, caches: Sequence[str]
    ) -> tuple[float, float] | None:
        heads, (k, v) = head_shape(inventory), caches
        key = heads.key if heads else ""
        timed = {pair: shapes[key] for pair, shapes in self.attention.items() if key in shapes}
        if direct := timed.get(f"{k}/{v}"):
            return direct.decode.seconds, direct.prefill.seconds
        parts = f"{k}/{CACHE_PIVOT}", f"{CACHE_PIVOT}/{v}", f"{CACHE_PIVOT}/{CACHE_PIVOT}"
        if not timed.keys() >= set(parts):
            return None
        of_k, of_v, both = (timed[pair] for pair in parts)
        decode = of_k.decode.seconds + of_v.decode.seconds - both.decode.seconds
        prefill = of_k.prefill.seconds + of_v.prefill.seconds - both.prefill.seconds
        return max(0.0, decode), max(0.0, prefill)

    # -- all of it --

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
        if any(types[t.name] not in self.types_for(t, inventory) for t in inventory.quantizable):
            return None
        overhead = self.overhead(inventory)
        of_decode, of_prefill = self.kernel_seconds(inventory, types)
        decode_rest = self.rest_seconds(inventory, decode=True, n_context=n_context, caches=caches)
        prefill_rest = self.rest_seconds(inventory, decode=False, n_prompt=n_prompt, caches=caches)
        prefill = overhead.prefill_scale, of_prefill, prefill_rest, overhead.prefill_error
        decode = overhead.decode_scale, of_decode, decode_rest, overhead.decode_error
        return Speed(_tokens_per_second(*prefill), _tokens_per_second(*decode))


def _tokens_per_second(
    scale: float, kernels: tuple[float, float], rest: float, unexplained: float
) -> Range:
    seconds = scale * kernels[0] + rest
    relative_error = math.hypot(max(unexplained, _LEAST_ERROR), scale * kernels[1] / seconds)
    return Range.around(seconds, relative_error).inverse


def default_name(device: Device, n_threads: int, fingerprint: str) -> str:
    """'amd-epyc-2t-1a2b3c': what is typed after --device."""
    chip = (device.gpu or device.cpu).lower()
    named = re.sub(r"\(.*?\)|@.*|\bcpu\b|processor", " ", chip)
    words = re.sub(r"[^a-z0-9]+", "-", named).strip("-")[:40].strip("-")
    return f"{words or 'device'}-{n_threads}t-{fingerprint[:6]}"


# --- a whole model in one type -------------------------------------------------------------------


def type_speeds(profile: DeviceProfile, inventory: Inventory) -> dict[str, tuple[Speed, float]]:
    """By type: predicted tokens/s with the model in it, and the part of it that can be."""
    found = {name: profile.nearest_types(inventory, name) for name in profile.kernels}
    return {
        name: (speed, pair[1])
        for name, pair in found.items()
        if pair and (speed := profile.predict(inventory, pair[0]))
    }


def dominated(
    speeds: Mapping[str, tuple[Speed, float]], errors: Mapping[str, float] = TYPICAL_ERRORS
) -> dict[str, str]:
    """Types that there is no use for: {type: one as close, as small and as fast, not equal in all}.

    `errors` tell how far each type is from the original, in any one measure. Only types that the
    whole model can hold, and whose error is known, are compared.
    """
    rows = {
        name: (
            errors[name],
            lookup(name).bits_per_weight,
            -speed.prefill.value,
            -speed.decode.value,
        )
        for name, (speed, share) in speeds.items()
        if share == 1 and name in errors
    }
    return {
        name: min(better, key=lambda other: rows[other])
        for name, row in rows.items()
        if (better := [o for o, its in rows.items() if its != row and all(map(le, its, row))])
    }
