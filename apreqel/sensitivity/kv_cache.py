"""What quantising the KV cache costs: its damage by type, measured, and its bytes.

The K and the V cache are two more choices beside the weights: in a long context they are most of
the memory. Each type is probed by itself on the unquantised model: KL divergence on calibration
text in chunks of 512 tokens, against the F16 cache.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from apreqel import artifacts, llama
from apreqel.artifacts import Provenance
from apreqel.errors import EngineError
from apreqel.model.qtypes import KV_TYPES, USUAL_CACHES, lookup
from apreqel.sensitivity import calibration
from apreqel.sensitivity.bench import ReferenceRun, compared, evaluated, sequences_at_once
from apreqel.sensitivity.metrics import Estimate, Reference, estimate

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from apreqel.model.inventory import Inventory
    from apreqel.sensitivity.calibration import Text, TokenSet

KV_FILE = "kv-cache.json"

USUAL = USUAL_CACHES[0]

PROBE_CHUNKS, PROBE_CTX = 4, 512


@dataclass(frozen=True)
class KvSensitivity:
    """KL divergence in nats by type, for each cache alone; what llama.cpp refused is excluded."""

    provenance: Provenance
    k: Mapping[str, Estimate]
    v: Mapping[str, Estimate]
    excluded: Mapping[str, str] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        data = {name: value for name, value in asdict(self).items() if name != "provenance"}
        artifacts.save(path, "kv-cache", self.provenance, data)

    @classmethod
    def load(cls, path: Path, model_sha256: str) -> KvSensitivity:
        """Raises ArtifactError."""
        provenance, data = artifacts.load(path, "kv-cache", model_sha256)
        with artifacts.understood(f"{path}"):
            for cache in ("k", "v"):
                data[cache] = {kind: Estimate(**row) for kind, row in data[cache].items()}
            return cls(provenance, **data)


def measure_kv(
    inventory: Inventory,
    model_sha256: str,
    texts: Sequence[Text],
    n_threads: int,
    on_progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> KvSensitivity:
    """Probe both caches in every type that the model's heads can hold. Raises EngineError."""
    probes: dict[str, dict[str, Estimate]] = {"k": {}, "v": {}}
    excluded = {}
    wanted = [(cache, kind) for cache in probes for kind in KV_TYPES if kind != USUAL]
    with (
        llama.LoadedModel(inventory.files[0]) as model,
        ThreadPoolExecutor(n_threads) as pool,
    ):
        tokens = probe_tokens(model, texts)
        n = sequences_at_once(tokens.n_ctx, model.n_vocab, 1)

        def caching(k: str, v: str) -> AbstractContextManager[llama.Context]:
            kinds = lookup(k), lookup(v)
            return model.context(tokens.n_ctx, n, n_threads, cache_types=kinds)

        original = np.empty((tokens.n_scored, model.n_vocab), np.float32)
        with caching(USUAL, USUAL) as context:
            for rows, logits in evaluated(context, tokens):
                original[rows] = logits
        reference = ReferenceRun(tokens, Reference.of(original, pool))
        for i, (cache, kind) in enumerate(wanted):
            on_progress("probing the KV cache", i, len(wanted))
            try:
                with caching(kind, USUAL) if cache == "k" else caching(USUAL, kind) as context:
                    result = compared(context, reference, pool)
            except EngineError as error:
                excluded[f"{cache} {kind}"] = str(error)
                continue
            if result.is_finite:
                probes[cache][kind] = estimate(result.kld_nats, tokens.n_chunks)
            else:
                excluded[f"{cache} {kind}"] = "the probe gave NaN or Inf"
    on_progress("probing the KV cache", len(wanted), len(wanted))
    provenance = Provenance(
        model_sha256,
        llama.build_info(),
        settings={"n_ctx": tokens.n_ctx, "texts": {t.name: t.sha256 for t in texts}},
    )
    return KvSensitivity(provenance, probes["k"], probes["v"], excluded)


def probe_tokens(model: llama.LoadedModel, texts: Sequence[Text]) -> TokenSet:
    """Calibration text in long chunks. Raises CalibrationError."""
    return calibration.split_for_calibration(
        model, texts, check_chunks=PROBE_CHUNKS, n_ctx=PROBE_CTX
    ).check
