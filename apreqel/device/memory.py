"""What a model takes of a device's memory when llama.cpp runs it: predicted for any map of types.

Weights are the file's own map, plus a copy of every tensor that this CPU keeps in another layout
(`--no-mmap` drops the first part of those again). The KV cache is what llama.cpp itself accounts
for; vocabulary and touched buffers are measured with the device profile, at two contexts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from apreqel.errors import EngineError, UsageError
from apreqel.llama.footprint import measure_footprint, memory_accounting
from apreqel.model.qtypes import USUAL_CACHES, lookup

if TYPE_CHECKING:
    from pathlib import Path

    from apreqel.device.profile import DeviceProfile
    from apreqel.model.inventory import Inventory
    from apreqel.progress import Progress

DEFAULT_CONTEXT = 4096


@dataclass(frozen=True)
class MemoryUse:
    """Bytes at the peak of a run with the whole context filled."""

    n_ctx: int
    file_bytes: int
    copied_bytes: int
    kv_bytes: int
    rest_bytes: int  # vocabulary, compute and output buffers as far as they are touched

    @property
    def total_bytes(self) -> int:
        return self.file_bytes + self.copied_bytes + self.kv_bytes + self.rest_bytes

    @property
    def without_map_bytes(self) -> int:
        """The same with --no-mmap: nothing is held twice."""
        return self.total_bytes - self.copied_bytes


def copied_bytes(profile: DeviceProfile, inventory: Inventory, types: Mapping[str, str]) -> int:
    """What of the weights is held once more, in another layout."""
    return sum(
        lookup(types[t.name]).size_bytes(t.shape)
        for t in inventory.quantizable
        if profile.is_repacked(t, inventory, types[t.name])
    )


def cache_bytes(
    inventory: Inventory, n_ctx: int, types: Sequence[str] = USUAL_CACHES
) -> tuple[float, float]:
    """Bytes of the K and of the V cache, as llama.cpp accounts for them. Raises EngineError."""
    found = memory_accounting(inventory.files[0], n_ctx, *map(lookup, types))
    if found["k"]:
        return float(found["k"]), float(found["v"])
    return found["kv"] / 2, found["kv"] / 2  # some architectures state only the sum


def measure_rest(
    profile: DeviceProfile,
    inventory: Inventory,
    types: Mapping[str, str],
    path: Path,
    progress: Progress,
    quick: bool = False,
) -> tuple[float, float]:
    """(bytes, bytes per token of context) that runs of the file take beside weights and KV cache.

    The file at `path` is the model with these types. `quick`: from shorter contexts. Raises
    EngineError.
    """
    weights = path.stat().st_size + copied_bytes(profile, inventory, types)
    longest = inventory.context_length or DEFAULT_CONTEXT
    contexts = sorted({min(512, longest), min(1536 if quick else 4096, longest)})

    def rest(n_ctx: int, cache: str) -> int:
        progress(f"measuring memory at context {n_ctx}", 0, 0)
        kv = memory_accounting(path, n_ctx, lookup(cache), lookup(cache))["kv"]
        used = measure_footprint(path, n_ctx, n_ctx, profile.n_threads, (cache, cache))
        return used - weights - kv

    rests = [rest(n_ctx, "F16") for n_ctx in contexts]
    # A quantised cache needs some room to work in; where heads hold none, it is not offered.
    with suppress(EngineError):
        more = max(0, rest(contexts[0], "Q8_0") - rests[0])
        rests = [value + more for value in rests]
    slope = (rests[-1] - rests[0]) / max(1, contexts[-1] - contexts[0])
    return float(rests[0] - slope * contexts[0]), float(slope)


def rest_bytes(profile: DeviceProfile, inventory: Inventory, n_ctx: int) -> int:
    """Bytes beside weights and KV cache. Raises UsageError where the device never ran the model."""
    if not profile.covers(inventory):
        raise UsageError(
            f"device profile {profile.name}: never ran {inventory.name}, so that its memory is "
            "unknown; run apreqel profile MODEL on that device"
        )
    overhead = profile.overhead(inventory)
    return int(overhead.memory_rest + overhead.memory_per_context * n_ctx)


def memory_use(
    profile: DeviceProfile,
    inventory: Inventory,
    types: Mapping[str, str],
    file_bytes: int,
    n_ctx: int,
    cache_types: Sequence[str] = USUAL_CACHES,
) -> MemoryUse:
    """The memory of a file of `file_bytes` with these types. Raises UsageError, EngineError."""
    copied = copied_bytes(profile, inventory, types)
    kv = int(sum(cache_bytes(inventory, n_ctx, cache_types)))
    return MemoryUse(n_ctx, file_bytes, copied, kv, rest_bytes(profile, inventory, n_ctx))


def usable_context(inventory: Inventory, wanted: int | None) -> int:
    """The context to reckon with: as wanted, or 4096, or what the model was trained for."""
    trained = inventory.context_length or DEFAULT_CONTEXT
    if wanted is not None and wanted > trained:
        raise UsageError(f"--ctx {wanted}: the model was trained for {trained} tokens")
    return wanted or min(DEFAULT_CONTEXT, trained)
