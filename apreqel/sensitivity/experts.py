"""What another number of active experts costs: a mixture that runs N a token instead of its own.

One more lever beside the types of the weights: fewer experts are less to read and to multiply for
every token. Its damage is measured on the unquantised model: KL divergence on calibration text in
chunks of 512 tokens, N active experts against the model's own count. Only the router's cut moves;
routers were trained for one count, so that damage grows fast below it, and need not fall above it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apreqel import artifacts, llama
from apreqel.artifacts import Provenance
from apreqel.errors import EngineError, UnsupportedModelError, UsageError
from apreqel.sensitivity.kv_cache import PROBE_CHUNKS, PROBE_CTX, probe_tokens
from apreqel.sensitivity.metrics import Comparison, Estimate, Reference, compare, estimate

if TYPE_CHECKING:
    from apreqel.model.inventory import Inventory
    from apreqel.sensitivity.calibration import Text

EXPERTS_FILE = "experts.json"


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

    @staticmethod
    def from_json(row: dict[str, Any]) -> ExpertUse:
        """Raises KeyError, TypeError where `row` is damaged."""
        return ExpertUse(**{**row, "kld": Estimate(**row["kld"])})


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


def measure_experts(
    inventory: Inventory,
    model_sha256: str,
    folder: Path,
    used: int,
    *,
    texts: Sequence[Text],
    n_threads: int,
    on_progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> ExpertUse:
    """The damage of `used` active experts: as kept in `folder`, or measured and kept there.

    Every count that was measured in the same way stays in `experts.json`. Raises UsageError,
    UnsupportedModelError, CalibrationError, EngineError, ArtifactError, OutputError.
    """
    require_count(inventory, used)
    path = folder / EXPERTS_FILE
    provenance = Provenance(
        model_sha256,
        llama.build_info(),
        settings={
            "n_ctx": PROBE_CTX,
            "chunks": PROBE_CHUNKS,
            "texts": {t.name: t.sha256 for t in texts},
        },
    )
    known = _known(path, provenance)
    if used not in known:
        known[used] = _probe(inventory, used, texts, n_threads, on_progress)
        data = {"kld_by_count": {str(n): asdict(known[n]) for n in sorted(known)}}
        artifacts.save(path, "experts", provenance, data)
    return ExpertUse(used, inventory.n_experts_used, inventory.n_experts, known[used])


def _known(path: Path, provenance: Provenance) -> dict[int, Estimate]:
    """What was measured in the same way before, by count. Raises ArtifactError."""
    if not path.exists():
        return {}
    found, data = artifacts.load(path, "experts", provenance.model_sha256)
    if (found.settings, found.llama_build) != (provenance.settings, provenance.llama_build):
        return {}
    with artifacts.understood(f"{path}"):
        return {int(count): Estimate(**row) for count, row in data["kld_by_count"].items()}


def _probe(
    inventory: Inventory,
    used: int,
    texts: Sequence[Text],
    n_threads: int,
    on_progress: Callable[[str, int, int], None],
) -> Estimate:
    """KL divergence of `used` active experts from the model's own count, chunk by chunk."""
    what, path = f"probing {used} active experts", inventory.files[0]
    overrides = {inventory.experts_used_key: used}
    with (
        # Both from one map of the file (nothing repacked): two models in the memory of one.
        llama.LoadedModel(path, patchable=True) as own,
        llama.LoadedModel(path, patchable=True, overrides=overrides) as other,
        ThreadPoolExecutor(n_threads) as pool,
    ):
        tokens = probe_tokens(own, texts)
        following = tokens.next_tokens
        parts = []
        with (
            own.context(tokens.n_ctx, 1, n_threads) as reference,
            other.context(tokens.n_ctx, 1, n_threads) as changed,
        ):
            for i in range(tokens.n_chunks):
                on_progress(what, i, tokens.n_chunks)
                chunk = tokens.part(slice(i, i + 1))
                expected = reference.evaluate(chunk.tokens, chunk.positions)
                found = changed.evaluate(chunk.tokens, chunk.positions)
                parts.append(compare(found, Reference.of(expected, pool), following[i], pool))
    on_progress(what, tokens.n_chunks, tokens.n_chunks)
    result = Comparison.joined(parts)
    if not result.is_finite:
        raise EngineError(f"{path}: gives NaN or Inf with {used} active experts")
    return estimate(result.kld_nats, tokens.n_chunks)
