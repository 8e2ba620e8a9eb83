"""What may be chosen for every tensor, and what each choice costs.

Costs are exact bytes (registry), damage in nats (sensitivity) and, with a device profile, seconds
and resident bytes on that device. The user's own constraints only take options away.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from apreqel.errors import UsageError, printable
from apreqel.model.qtypes import USUAL_CACHES, lookup
from apreqel.sensitivity.experts import ExpertUse, with_experts
from apreqel.sensitivity.kv_cache import USUAL, KvSensitivity
from apreqel.sensitivity.measure import Sensitivity, require_probed
from apreqel.solver.knapsack import Limit, Solution

if TYPE_CHECKING:
    from apreqel.device.profile import DeviceProfile
    from apreqel.model.inventory import Inventory, Tensor
    from apreqel.sensitivity.damage import DamageModel

Doubles = npt.NDArray[np.float64]

# A damage near those that people plan for, at which scales are taken.
_TYPICAL_NATS = 0.02

# The KV cache's types are chosen beside the tensors' under this name, of K and V together
# ("Q8_0/F16"): their bytes and their damage add up, but not their seconds.
CACHES = "KV cache"


@dataclass(frozen=True)
class Constraints:
    """What the user rules out or in, by hand. Patterns are those of a shell: 'blk.0.*', '*attn_v*'.

    The last pin that matches a tensor holds.
    """

    pins: Sequence[tuple[str, str]] = ()  # pattern, type
    only_types: Sequence[str] = ()
    exclude_types: Sequence[str] = ()

    def pinned(self, name: str) -> str | None:
        """The type that a tensor must have, if any."""
        matching = [kind for pattern, kind in self.pins if fnmatch.fnmatchcase(name, pattern)]
        return matching[-1] if matching else None

    def allowed(self, tensor: Tensor, kinds: Sequence[str]) -> list[str]:
        """Of `kinds`, what is left for the tensor. Raises UsageError where nothing is."""
        pin = self.pinned(tensor.name)
        if pin is not None:
            if pin not in kinds:
                raise UsageError(
                    f"--pin {tensor.name}={pin}: it can be {', '.join(kinds)}; rows of "
                    f"{tensor.row_length} hold no other type, or it was not probed"
                )
            return [pin]
        left = [
            t
            for t in kinds
            if (not self.only_types or t in self.only_types) and t not in self.exclude_types
        ]
        if not left:
            raise UsageError(
                f"--only-types, --exclude-types: leave nothing for tensor {tensor.name}, which can "
                f"be {', '.join(kinds)}"
            )
        return left

    def check(self, inventory: Inventory) -> None:
        """Raise UsageError where a pattern matches nothing that can be quantised."""
        for pattern, _ in self.pins:
            if not any(fnmatch.fnmatchcase(t.name, pattern) for t in inventory.quantizable):
                raise UsageError(
                    f"--pin {printable(pattern)}: matches no tensor that can be quantised; "
                    "apreqel inspect MODEL --json names them"
                )


def parse_constraints(pins: Sequence[str], only: str | None, exclude: str | None) -> Constraints:
    """From the command line: 'pattern=TYPE' and lists with commas. Raises UsageError."""
    pairs = []
    for pin in pins:
        pattern, equals, kind = pin.rpartition("=")
        if not equals or not pattern:
            raise UsageError(f"--pin {printable(pin)}: give pattern=TYPE, as in 'blk.0.*=Q8_0'")
        pairs.append((pattern, lookup(kind).name))
    lists = [
        [lookup(part.strip()).name for part in (text or "").split(",") if part.strip()]
        for text in (only, exclude)
    ]
    return Constraints(pairs, *lists)


@dataclass(frozen=True)
class Timings:
    """Seconds per token of every option, what is added to them, and its resident bytes."""

    decode: Sequence[Doubles]
    prefill: Sequence[Doubles]
    decode_rest: float
    prefill_rest: float
    resident: Sequence[Doubles]

    def speed_limit(self, name: str, tokens_per_second: float, *, decode: bool) -> Limit:
        rest = self.decode_rest if decode else self.prefill_rest
        return Limit(
            name,
            self.decode if decode else self.prefill,
            1 / tokens_per_second - rest,
            lambda seconds: f"{1 / (seconds + rest):.1f} tokens/s",
            (1 / tokens_per_second**2, "1 token/s less"),
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
    model: DamageModel  # what a sum of damages measures as a real file
    cache_scale: float = 1.0  # nats of a real run per unit of the KV cache's damage here
    fixed_damage: float = 0.0  # nats beside the weights and caches: the active experts'

    def types_of(self, solution: Solution) -> dict[str, str]:
        chosen = zip(self.names, self.types, solution.choice, strict=True)
        return {name: kinds[c] for name, kinds, c in chosen}

    def rows(self, cost: Callable[[str, str], float]) -> list[Doubles]:
        """A cost for every option (tensor, type); a tensor's own type costs nothing."""
        options = zip(self.names, self.types, self.damages, strict=True)
        return [
            np.array([cost(name, t) if d > 0 else 0.0 for t, d in zip(kinds, row, strict=True)])
            for name, kinds, row in options
        ]

    def sum_of(self, rows: Sequence[Doubles], types: Mapping[str, str]) -> float:
        """The cost of a whole map; a type that is no option here counts as the cheapest."""
        total = 0.0
        for name, kinds, row in zip(self.names, self.types, rows, strict=True):
            kind = types.get(name)
            total += float(row[kinds.index(kind)] if kind in kinds else row.min())
        return total

    def size_limit(self, file_bytes: float, name: str = "--max-size") -> Limit:
        return Limit(
            name,
            self.sizes,
            file_bytes - self.fixed_bytes,
            lambda data: (
                f"{data + self.fixed_bytes:.0f} bytes ({(data + self.fixed_bytes) / 1e6:.2f} MB)"
            ),
            (1e6, "1 MB more"),
        )

    def raw_damage(self, nats: float) -> float:
        """The sum of tensors' damages at which a whole run measures as `nats`."""
        left = nats - self.fixed_damage
        return self.model.raw(left) if left > 0 else left

    def damage_limit(self, raw: float, name: str) -> Limit:
        """`raw` as a sum of the tensors' damages."""

        def show(total: float) -> str:
            return f"{self.model.nats(total) + self.fixed_damage:.5f} nats"

        return Limit(name, self.damages, raw, show, (1e-3, "0.001 nats more"))

    def change_limit(self, types: Mapping[str, str], count: int) -> Limit:
        """At most `count` tensors in another type than in `types`."""
        rows = [
            np.array([float(name in types and t != types[name]) for t in kinds])
            for name, kinds in zip(self.names, self.types, strict=True)
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


def build_options(
    inventory: Inventory,
    sensitivity: Sensitivity,
    extra_metadata: Sequence[bytes],
    profile: DeviceProfile | None = None,
    n_context: int = 0,
    constraints: Constraints | None = None,
    experts: ExpertUse | None = None,
    n_prompt: int | None = None,
) -> Options:
    """All types that a tensor can hold and that were measured, and its own type.

    With a profile, of these the ones that were timed; decode is reckoned with `n_context` tokens
    in the cache, prefill of `n_prompt` (None: as many as were timed), both with the active experts
    of `experts`. Raises CalibrationError where the probes are not complete.
    """
    inventory = with_experts(inventory, experts)
    require_probed(sensitivity)
    constraints = constraints or Constraints()
    constraints.check(inventory)
    names, kinds, sizes, damages = [], [], [], []
    for tensor in inventory.quantizable:
        known = sensitivity.tensors[tensor.name]
        options = [
            t
            for t in known.errors.weights
            if f"{tensor.name} {t}" not in sensitivity.excluded and t != tensor.qtype.name
        ]
        options.append(tensor.qtype.name)
        if profile is not None:
            timed = profile.types_for(tensor, inventory)
            options = [t for t in options if t in timed]
        if not options:
            raise UsageError(
                f"device profile {profile.name if profile else ''}: no timing for tensor "
                f"{tensor.name} ({'x'.join(map(str, tensor.shape))}); run apreqel profile MODEL"
            )
        options = constraints.allowed(tensor, options)
        names.append(tensor.name)
        kinds.append(options)
        sizes.append(np.array([padded_bytes(tensor, t, inventory.alignment) for t in options]))
        # Its own type does no damage: the bytes are copied.
        model = sensitivity.model
        damage = [
            0.0 if t == tensor.qtype.name else model.damage(tensor.name, t).nats for t in options
        ]
        damages.append(np.array(damage))
    own = inventory.types
    in_place = sum(
        padded_bytes(t, t.qtype.name, inventory.alignment) for t in inventory.quantizable
    )
    fixed = inventory.output_size(own, extra_metadata) - int(in_place)
    timings = None
    if profile is not None:
        timings = option_timings(inventory, kinds, sizes, profile, n_context, n_prompt)
    lost = experts.damage_nats if experts else 0.0
    return Options(
        names, kinds, sizes, damages, timings, fixed, sensitivity.model, fixed_damage=lost
    )


def with_caches(
    options: Options,
    kv: KvSensitivity,
    k_bytes: float,
    v_bytes: float,
    rest_seconds: Callable[[Sequence[str], bool], float],
) -> Options:
    """The KV cache as one more choice; the bytes of its parts at F16 are given.

    `rest_seconds` of (K, V) and whether a token is generated: `DeviceProfile.rest_seconds`.
    """
    assert options.timings is not None
    damages = [
        {USUAL: 0.0} | {t: max(0.0, p.mean) for t, p in probes.items()} for probes in (kv.k, kv.v)
    ]
    pairs = [(k, v) for k in damages[0] for v in damages[1]]
    # Weights' damages add up to something else than nats of a real run: bring these to their scale.
    scale = _TYPICAL_NATS / options.model.raw(_TYPICAL_NATS)
    k_bit, v_bit = (n / lookup(USUAL).bits_per_weight for n in (k_bytes, v_bytes))
    rows = [
        [k_bit * lookup(k).bits_per_weight + v_bit * lookup(v).bits_per_weight for k, v in pairs],
        [(damages[0][k] + damages[1][v]) / scale for k, v in pairs],
        *(
            [rest_seconds(pair, decode) - rest_seconds(USUAL_CACHES, decode) for pair in pairs]
            for decode in (True, False)
        ),
    ]
    resident, damage, decode, prefill = (np.array(row) for row in rows)
    old = options.timings
    timings = replace(
        old,
        decode=[*old.decode, decode],
        prefill=[*old.prefill, prefill],
        resident=[*old.resident, resident],
    )
    return replace(
        options,
        names=[*options.names, CACHES],
        types=[*options.types, ["/".join(pair) for pair in pairs]],
        sizes=[*options.sizes, np.zeros(len(pairs))],
        damages=[*options.damages, damage],
        timings=timings,
        cache_scale=scale,
    )


def option_timings(
    inventory: Inventory,
    kinds: Sequence[Sequence[str]],
    sizes: Sequence[Doubles],
    profile: DeviceProfile,
    n_context: int,
    n_prompt: int | None = None,
) -> Timings:
    """Seconds and resident bytes of every option on the profile's device."""
    decode: list[Doubles] = []
    prefill: list[Doubles] = []
    resident: list[Doubles] = []
    for tensor, options, row in zip(inventory.quantizable, kinds, sizes, strict=True):
        for rows, is_decode in ((decode, True), (prefill, False)):
            seconds = [
                profile.tensor_seconds(tensor, inventory, t, decode=is_decode) for t in options
            ]
            rows.append(np.array(seconds))
        copied = [profile.is_repacked(tensor, inventory, t) for t in options]
        resident.append(row * (1.0 + np.array(copied)))
    return Timings(
        decode,
        prefill,
        profile.rest_seconds(inventory, decode=True, n_context=n_context),
        profile.rest_seconds(inventory, decode=False, n_prompt=n_prompt),
        resident,
    )


def padded_bytes(tensor: Tensor, type_name: str, alignment: int) -> float:
    """Bytes that a tensor takes in the file, padding included."""
    size = lookup(type_name).size_bytes(tensor.shape)
    return float(-(-size // alignment) * alignment)
