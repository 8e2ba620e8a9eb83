"""What quantising the KV cache costs: its damage by type, measured.

The K and the V cache are two more choices beside the weights: in a long context they are most of
the memory. Each type is probed by itself on the unquantised model: KL divergence on calibration
text in chunks of 512 tokens, against the F16 cache.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from apreqel.artifacts import Provenance, Record
from apreqel.errors import EngineError
from apreqel.estimates import Estimate
from apreqel.llama.engine import LoadedModel
from apreqel.llama.library import build_info
from apreqel.model.qtypes import KV_TYPES, USUAL_CACHES, lookup
from apreqel.sensitivity.bench import ReferenceRun, compared, evaluated
from apreqel.sensitivity.metrics import Reference, estimate
from apreqel.sensitivity.texts import Text, TokenSet, split_for_calibration
from apreqel.workspace import Workspace

KV_FILE = "kv-cache.json"
USUAL = USUAL_CACHES[0]

_CHUNKS, _N_CTX = 4, 512


@dataclass(frozen=True)
class CacheSensitivity(Record):
    """KL divergence in nats by type, for each cache alone; what llama.cpp refused is excluded."""

    KIND = "cache-sensitivity"

    k: Mapping[str, Estimate] = field(default_factory=dict)
    v: Mapping[str, Estimate] = field(default_factory=dict)
    excluded: Mapping[str, str] = field(default_factory=dict)


def settings_of(texts: Sequence[Text]) -> dict[str, object]:
    """What a probe of the unquantised model as a whole depends on beside model and llama.cpp."""
    return {"n_ctx": _N_CTX, "chunks": _CHUNKS, "texts": {t.name: t.sha256 for t in texts}}


def cache_sensitivity(space: Workspace, texts: Sequence[Text]) -> CacheSensitivity:
    """As kept in the work folder, if measured with these texts and this llama.cpp, or measured now.

    Raises ArtifactError, CalibrationError, EngineError, OutputError.
    """
    path = space.folder / KV_FILE
    provenance = Provenance(space.sha256, build_info(), settings=settings_of(texts))
    found = CacheSensitivity.load_same(path, provenance)
    if found is None:
        found = _measured(space, texts, provenance)
        found.save(path)
    return found


def _measured(space: Workspace, texts: Sequence[Text], provenance: Provenance) -> CacheSensitivity:
    """Both caches in every type that the model's heads can hold."""
    probes: dict[str, dict[str, Estimate]] = {"k": {}, "v": {}}
    excluded = {}
    wanted = [(cache, name) for cache in probes for name in KV_TYPES if name != USUAL]
    with LoadedModel(space.model) as model, ThreadPoolExecutor(space.n_threads) as pool:
        tokens = probe_tokens(model, texts)
        original = np.empty((tokens.n_scored, model.n_vocab), np.float32)
        usual = lookup(USUAL)
        with model.context(tokens.n_ctx, 1, space.n_threads, cache_types=(usual, usual)) as context:
            for rows, logits in evaluated(context, tokens):
                original[rows] = logits
        reference = ReferenceRun(tokens, Reference.of(original, pool))
        for i, (cache, name) in enumerate(wanted):
            space.progress("probing the KV cache", i, len(wanted))
            pair = (lookup(name), usual) if cache == "k" else (usual, lookup(name))
            try:
                with model.context(tokens.n_ctx, 1, space.n_threads, cache_types=pair) as context:
                    result = compared(context, reference, pool)
            except EngineError as error:
                excluded[f"{cache} {name}"] = str(error)
                continue
            if result.is_finite:
                probes[cache][name] = estimate(result.kld_nats, tokens.n_chunks)
            else:
                excluded[f"{cache} {name}"] = "the probe gave NaN or Inf"
    space.progress("probing the KV cache", len(wanted), len(wanted))
    return CacheSensitivity(provenance, **probes, excluded=excluded)


def probe_tokens(model: LoadedModel, texts: Sequence[Text]) -> TokenSet:
    """Calibration text in long chunks. Raises CalibrationError."""
    return split_for_calibration(model, texts, check_chunks=_CHUNKS, n_ctx=_N_CTX).check
