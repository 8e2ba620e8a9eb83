"""What another number of active experts costs: a mixture that runs N a token instead of its own.

One more lever beside the types of the weights: fewer experts are less to read and to multiply for
every token. Its damage is measured on the unquantised model: KL divergence on calibration text in
chunks of 512 tokens, N active experts against the model's own count. Only the router's cut moves;
routers were trained for one count, so that damage grows fast below it, and need not fall above it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

from apreqel.artifacts import Provenance, Record
from apreqel.errors import EngineError, UnsupportedModelError, UsageError
from apreqel.estimates import Estimate
from apreqel.llama.engine import LoadedModel
from apreqel.llama.library import build_info
from apreqel.model.inventory import Inventory
from apreqel.sensitivity.kv_cache import probe_tokens, settings_of
from apreqel.sensitivity.metrics import Comparison, Reference, compare, estimate
from apreqel.sensitivity.texts import Text
from apreqel.workspace import Workspace

EXPERTS_FILE = "experts.json"


@dataclass(frozen=True)
class ExpertCounts(Record):
    """KL divergence in nats by number of active experts (as text, for JSON)."""

    KIND = "experts"

    kld_by_count: Mapping[str, Estimate] = field(default_factory=dict)


@dataclass(frozen=True)
class ExpertUse:
    """`used` of `n_experts` a token where the model's own count is `own`; `kld` in nats a token."""

    used: int
    own: int
    n_experts: int
    kld: Estimate

    @property
    def damage_nats(self) -> float:
        """Never negative, as the damage of tensors."""
        return max(0.0, self.kld.mean)


def require_count(inventory: Inventory, count: int) -> None:
    """Raise UsageError, UnsupportedModelError where so many experts cannot be active."""
    n_experts = inventory.n_experts
    if not n_experts:
        raise UsageError(f"--experts {count}: {inventory.name} is dense; it has no experts")
    if not 1 <= count <= n_experts:
        raise UsageError(
            f"--experts {count}: {inventory.name} has {n_experts} experts; give 1 to {n_experts}"
        )
    if not inventory.n_experts_used:
        raise UnsupportedModelError(
            f"--experts {count}: the layers of {inventory.name} have counts of their own "
            f"({inventory.experts_used_key}), which llama.cpp does not replace by one number"
        )


def with_experts(inventory: Inventory, experts: ExpertUse | None) -> Inventory:
    """The model as it runs with so many active experts; as it is without."""
    return replace(inventory, experts_used=experts.used) if experts else inventory


def expert_use(space: Workspace, used: int, texts: Sequence[Text]) -> ExpertUse:
    """The damage of `used` active experts: as kept in the work folder, or measured and kept there.

    Every count that was measured in the same way stays. Raises UsageError, UnsupportedModelError,
    CalibrationError, EngineError, ArtifactError, OutputError.
    """
    inventory, path = space.inventory, space.folder / EXPERTS_FILE
    require_count(inventory, used)
    provenance = Provenance(space.sha256, build_info(), settings=settings_of(texts))
    known = ExpertCounts.load_same(path, provenance) or ExpertCounts(provenance)
    if str(used) not in known.kld_by_count:
        measured = {**known.kld_by_count, str(used): _probe(space, used, texts)}
        known = replace(known, kld_by_count=measured)
        known.save(path)
    kld = known.kld_by_count[str(used)]
    return ExpertUse(used, inventory.n_experts_used, inventory.n_experts, kld)


def _probe(space: Workspace, used: int, texts: Sequence[Text]) -> Estimate:
    """KL divergence of `used` active experts from the model's own count, chunk by chunk."""
    what, path = f"probing {used} active experts", space.model
    overrides = {space.inventory.experts_used_key: used}
    with (
        # Both from one map of the file (nothing repacked): two models in the memory of one.
        LoadedModel(path, patchable=True) as own,
        LoadedModel(path, patchable=True, overrides=overrides) as other,
        ThreadPoolExecutor(space.n_threads) as pool,
    ):
        tokens, parts = probe_tokens(own, texts), []
        with (
            own.context(tokens.n_ctx, 1, space.n_threads) as reference,
            other.context(tokens.n_ctx, 1, space.n_threads) as changed,
        ):
            for i in range(tokens.n_chunks):
                space.progress(what, i, tokens.n_chunks)
                chunk = tokens.part(slice(i, i + 1))
                expected = reference.evaluate(chunk.tokens, chunk.positions)
                found = changed.evaluate(chunk.tokens, chunk.positions)
                following = chunk.next_tokens[0]
                parts.append(compare(found, Reference.of(expected, pool), following, pool))
    space.progress(what, tokens.n_chunks, tokens.n_chunks)
    result = Comparison.joined(parts)
    if not result.is_finite:
        raise EngineError(f"{path}: gives NaN or Inf with {used} active experts")
    return estimate(result.kld_nats, tokens.n_chunks)
