"""The planner: a request, with everything that its plan follows from.

Measurements, the damage model built from them, the device profile to plan for, what the KV cache's
types and another number of experts cost. From these follow what may be chosen and the limits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from apreqel.device.memory import cache_bytes, rest_bytes, usable_context
from apreqel.device.profile import DeviceProfile, Speed
from apreqel.errors import UsageError
from apreqel.model.inventory import Inventory
from apreqel.model.qtypes import USUAL_CACHES
from apreqel.plan.cache_types import CACHES, with_caches
from apreqel.plan.options import Options, option_timings, padded_bytes
from apreqel.plan.plan import encode_metadata, output_metadata
from apreqel.plan.request import PlanRequest
from apreqel.sensitivity.damage import DamageModel
from apreqel.sensitivity.experts import ExpertUse, with_experts
from apreqel.sensitivity.kv_cache import CacheSensitivity
from apreqel.sensitivity.measurement import ProbedModel
from apreqel.solver.knapsack import Limit

# Of that preset's predicted speed: timings of machines are not good for more.
_AS_FAST = 0.97


@dataclass(frozen=True)
class Planner:
    """Choosing a type for every tensor: what is asked, and what is known."""

    probed: ProbedModel
    damage: DamageModel
    request: PlanRequest = field(default_factory=PlanRequest)
    profile: DeviceProfile | None = None
    caches: CacheSensitivity | None = None
    experts: ExpertUse | None = None

    @property
    def inventory(self) -> Inventory:
        return self.probed.inventory

    @property
    def running(self) -> Inventory:
        """The model as it runs: with the active experts that were asked for."""
        return with_experts(self.inventory, self.experts)

    @property
    def experts_nats(self) -> float:
        return self.experts.damage_nats if self.experts else 0.0

    @property
    def n_ctx(self) -> int:
        """Tokens of context that memory is reckoned with. Raises UsageError."""
        return usable_context(self.inventory, self.request.n_ctx)

    @property
    def metadata(self) -> dict[str, str | int]:
        """What the file will say of itself, but for the plan's digest."""
        metadata = output_metadata(self.probed.imatrix)
        if self.experts is not None:
            # In place of the source's own.
            metadata[self.inventory.experts_used_key] = self.experts.used
        return metadata

    @cached_property
    def stock(self) -> dict[str, str]:
        """The type map of the stock preset that a plan is set against."""
        return self.probed.stock_types(self.probed.default_preset)

    @property
    def stock_damage_sum(self) -> float:
        """The damages of that preset's tensors, which are never compensated."""
        return self.damage.damage_sum(self.stock, plain=True)

    # -- what may be chosen --

    def options(self, profile: DeviceProfile | None) -> Options:
        """All types that a tensor can hold and that were measured, and its own type.

        With a profile, of these the ones that were timed; where memory is limited and what the KV
        cache's types cost is known, these too. Raises CalibrationError, UsageError.
        """
        inventory, request = self.running, self.request
        self.probed.sensitivity.require_probed()
        request.constraints.check(inventory)
        tensors, align = inventory.quantizable, inventory.alignment
        names = [tensor.name for tensor in tensors]
        types = [self._types_of(name, profile) for name in names]
        rows = list(zip(tensors, types, strict=True))
        sizes = [np.array([padded_bytes(tensor, t, align) for t in row]) for tensor, row in rows]
        # Its own type does no damage: the bytes are copied.
        own = inventory.types
        damages = [
            np.array([0.0 if t == own[n] else self.damage.damage(n, t).nats for t in row])
            for n, row in zip(names, types, strict=True)
        ]
        in_place = sum(padded_bytes(t, t.qtype.name, align) for t in tensors)
        fixed = inventory.output_size(own, encode_metadata(self.metadata)) - int(in_place)
        n_prompt, n_context = request.workload[0], request.decode_context
        options = Options(
            names, types, sizes, damages, None, fixed, self.damage, experts_nats=self.experts_nats
        )
        if profile is None:
            return options
        timings = option_timings(inventory, types, sizes, profile, n_context, n_prompt)
        options = replace(options, timings=timings)
        if self.caches is None or request.max_ram_bytes is None:
            return options

        def rest(caches: Sequence[str], decode: bool) -> float:
            return profile.rest_seconds(
                inventory, decode=decode, n_context=n_context, n_prompt=n_prompt, caches=caches
            )

        return with_caches(options, self.caches, *cache_bytes(self.inventory, self.n_ctx), rest)

    def _types_of(self, name: str, profile: DeviceProfile | None) -> list[str]:
        """Types that a tensor may take, its own the last."""
        tensor = self.inventory.by_name[name]
        own = tensor.qtype.name
        types = [t for t in self.probed.sensitivity.usable_types(name) if t != own] + [own]
        if profile is not None:
            timed = profile.types_for(tensor, self.running)
            types = [t for t in types if t in timed]
            if not types:
                raise UsageError(
                    f"device profile {profile.name}: no timing for tensor {name} "
                    f"({'x'.join(map(str, tensor.shape))}); run apreqel profile MODEL"
                )
        return self.request.constraints.allowed(tensor, types)

    def speed(
        self, model: Inventory, types: Mapping[str, str], caches: Sequence[str] = USUAL_CACHES
    ) -> Speed | None:
        """Of a map of types with the request's workload; None without a profile, or its timings."""
        n_context, n_prompt = self.request.decode_context, self.request.workload[0]
        if self.profile is None:
            return None
        return self.profile.predict(model, types, n_context, n_prompt=n_prompt, caches=caches)

    # -- limits --

    def limits(self, options: Options, limit_factor: float = 1.0) -> list[Limit]:
        """What the user asked a plan to keep to, whatever is preferred. Raises UsageError.

        `limit_factor` is what a limit on damage is multiplied by.
        """
        request, limits = self.request, []
        budget = self.size_budget(options)
        if budget is not None:
            by_size = request.max_size_bytes == budget
            limit = options.size_limit(budget)
            limits.append(limit if by_size else self._as_bits_per_weight(limit, options))
        if request.max_kld_nats is not None:
            damage_sum = limit_factor * options.sum_for(request.max_kld_nats)
            limits.append(options.damage_limit(damage_sum, "--max-kld"))
        if request.max_ram_bytes is not None:
            assert self.profile is not None
            outside = rest_bytes(self.profile, self.inventory, self.n_ctx)
            if CACHES not in options.names:
                outside += int(sum(cache_bytes(self.inventory, self.n_ctx)))
            limits.append(options.memory_limit(request.max_ram_bytes, outside))
        speeds = {"decode": request.min_decode_tps, "prefill": request.min_prefill_tps}
        for what, least in speeds.items():
            if least is not None:
                assert options.timings is not None
                limits.append(options.timings.speed_limit(what, least))
        return limits

    def stock_speed_limits(self, options: Options) -> list[Limit]:
        """As fast as the stock preset of the plan's size, as predicted; none without timings."""
        preset, timings = self.probed.preset_of_size(self.size_budget(options)), options.timings
        speed = self.speed(self.running, self.probed.stock_types(preset))
        if timings is None or speed is None:
            return []
        return [
            timings.speed_limit(what, _AS_FAST * value, f"the {what} speed of stock {preset}")
            for what, value in (("decode", speed.decode.value), ("prefill", speed.prefill.value))
        ]

    def size_budget(self, options: Options) -> int | None:
        """Bytes of the file that --max-size and --target-bpw allow, the stricter of both."""
        request = self.request
        budgets = [] if request.max_size_bytes is None else [request.max_size_bytes]
        if request.target_bpw is not None:
            data = request.target_bpw * self.inventory.n_weights / 8 - self._kept_bytes
            budgets.append(int(data) + options.fixed_bytes)
        return min(budgets, default=None)

    @property
    def _kept_bytes(self) -> int:
        """Of tensors that are never quantised: bits per weight count all tensor data."""
        return sum(t.size_bytes for t in self.inventory.tensors if t.keep_reason is not None)

    def _as_bits_per_weight(self, limit: Limit, options: Options) -> Limit:
        def show(data: float) -> str:
            bits = 8 * (data + self._kept_bytes) / self.inventory.n_weights
            return f"{bits:.2f} ({(data + options.fixed_bytes) / 1e6:.2f} MB)"

        return replace(limit, name="--target-bpw", show=show)
