"""What may be chosen for every tensor, and what each choice costs.

Costs are exact bytes (registry), damage in nats (damage model) and, with a device profile, seconds
and resident bytes on that device. Limits are sums of these.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from apreqel.arrays import Doubles
from apreqel.device.profile import DeviceProfile
from apreqel.model.inventory import Inventory, Tensor
from apreqel.model.qtypes import lookup
from apreqel.sensitivity.damage import DamageModel
from apreqel.solver.knapsack import Limit, Solution

# Against F16 the best type below this part of its size is Q8_0, beyond which nothing is gained.
_NEAR_LOSSLESS = 0.6


@dataclass(frozen=True)
class Timings:
    """Seconds per token of every option, what is added to them, and its resident bytes."""

    decode: Sequence[Doubles]
    prefill: Sequence[Doubles]
    decode_rest: float
    prefill_rest: float
    resident: Sequence[Doubles]

    def speed_limit(self, what: str, least: float, name: str = "") -> Limit:
        """At least so many tokens/s of `what`: decode or prefill."""
        is_decode = what == "decode"
        rest = self.decode_rest if is_decode else self.prefill_rest
        return Limit(
            name or f"--min-{what}-tps",
            self.decode if is_decode else self.prefill,
            1 / least - rest,
            lambda seconds: f"{1 / (seconds + rest):.1f} tokens/s",
            (1 / least**2, "1 token/s less"),
        )

    def workload_seconds(self, n_prompt: int, n_generated: int) -> list[Doubles]:
        """Seconds for a prompt and its answer, per option."""
        return [
            n_prompt * p + n_generated * d for p, d in zip(self.prefill, self.decode, strict=True)
        ]


@dataclass(frozen=True)
class Options:
    """The choices of every quantisable tensor; per tensor: types, padded bytes, damage."""

    names: Sequence[str]
    types: Sequence[Sequence[str]]
    sizes: Sequence[Doubles]
    damages: Sequence[Doubles]
    timings: Timings | None
    fixed_bytes: int  # header and tensors that stay as they are
    damage: DamageModel  # what a sum of damages measures as a real file
    cache_scale: float = 1.0  # nats of a real run per unit of the KV cache's damage here
    experts_nats: float = 0.0  # damage of the active experts, beside weights and caches

    def types_of(self, solution: Solution) -> dict[str, str]:
        chosen = zip(self.names, self.types, solution.choice, strict=True)
        return {name: types[c] for name, types, c in chosen}

    def choice_of(self, types: Mapping[str, str]) -> list[int | None]:
        """The option that a map gives each name; None where it is no option, or not in the map."""
        return [
            row.index(types[name]) if types.get(name) in row else None
            for name, row in zip(self.names, self.types, strict=True)
        ]

    def rows(self, cost: Callable[[str, str], float]) -> list[Doubles]:
        """A cost for every option (tensor, type); a tensor's own type costs nothing."""
        options = zip(self.names, self.types, self.damages, strict=True)
        return [
            np.array([cost(name, t) if d > 0 else 0.0 for t, d in zip(types, row, strict=True)])
            for name, types, row in options
        ]

    def sum_of(self, rows: Sequence[Doubles], types: Mapping[str, str]) -> float:
        """The cost of a whole map; a type that is no option here counts as the cheapest."""
        choice = self.choice_of(types)
        return sum(
            float(row.min() if j is None else row[j]) for row, j in zip(rows, choice, strict=True)
        )

    @property
    def near_lossless_bytes(self) -> float:
        """Of a file in which every tensor has its best type below `_NEAR_LOSSLESS` of its size."""
        return self.fixed_bytes + sum(
            float(row[np.argmin(np.where(row < _NEAR_LOSSLESS * row.max(), damage, np.inf))])
            for row, damage in zip(self.sizes, self.damages, strict=True)
        )

    # -- limits --

    def size_limit(self, file_bytes: float, name: str = "--max-size") -> Limit:
        def show(data: float) -> str:
            whole = data + self.fixed_bytes
            return f"{whole:.0f} bytes ({whole / 1e6:.2f} MB)"

        return Limit(name, self.sizes, file_bytes - self.fixed_bytes, show, (1e6, "1 MB more"))

    def sum_for(self, nats: float) -> float:
        """The sum of tensors' damages at which a whole run measures as `nats`."""
        left = nats - self.experts_nats
        return self.damage.sum_for(left) if left > 0 else left

    def damage_limit(self, damage_sum: float, name: str) -> Limit:
        """At most this sum of the tensors' damages."""

        def show(total: float) -> str:
            return f"{self.damage.file_nats(total) + self.experts_nats:.5f} nats"

        return Limit(name, self.damages, damage_sum, show, (1e-3, "0.001 nats more"))

    def change_limit(self, types: Mapping[str, str], count: int) -> Limit:
        """At most `count` tensors in another type than in `types`."""
        rows = [
            np.array([float(name in types and t != types[name]) for t in row])
            for name, row in zip(self.names, self.types, strict=True)
        ]
        return Limit("--max-type-changes", rows, count, "{:.0f}".format, (1.0, "1 more"))

    def memory_limit(self, ram_bytes: float, outside_bytes: int) -> Limit:
        """`outside_bytes` is what a run takes beside the weights that are chosen here."""
        assert self.timings is not None
        outside = self.fixed_bytes + outside_bytes
        return Limit(
            "--max-ram",
            self.timings.resident,
            ram_bytes - outside,
            lambda data: f"{(data + outside) / 1e6:.1f} MB",
            (1e6, "1 MB more"),
        )


def option_timings(
    inventory: Inventory,
    types: Sequence[Sequence[str]],
    sizes: Sequence[Doubles],
    profile: DeviceProfile,
    n_context: int,
    n_prompt: int | None = None,
) -> Timings:
    """Seconds and resident bytes of every option on the profile's device.

    Decode is reckoned with `n_context` tokens in the cache, prefill of `n_prompt` (None: as many as
    were timed).
    """
    options = list(zip(inventory.quantizable, types, sizes, strict=True))
    decode, prefill = (
        [
            np.array([profile.tensor_seconds(tensor, inventory, t, decode=is_decode) for t in row])
            for tensor, row, _ in options
        ]
        for is_decode in (True, False)
    )
    return Timings(
        decode,
        prefill,
        profile.rest_seconds(inventory, decode=True, n_context=n_context),
        profile.rest_seconds(inventory, decode=False, n_prompt=n_prompt),
        [
            n_bytes * [1.0 + profile.is_repacked(tensor, inventory, t) for t in row]
            for tensor, row, n_bytes in options
        ],
    )


def padded_bytes(tensor: Tensor, type_name: str, alignment: int) -> float:
    """Bytes that a tensor takes in the file, padding included."""
    size = lookup(type_name).size_bytes(tensor.shape)
    return float(-(-size // alignment) * alignment)
