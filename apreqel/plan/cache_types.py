"""The types of the KV cache, of K and V, chosen as one more item beside the weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from apreqel.model.qtypes import USUAL_CACHES, lookup
from apreqel.plan.options import Options
from apreqel.sensitivity.kv_cache import USUAL, CacheSensitivity

# The KV cache's types are chosen beside the tensors' under this name, of K and V together
# ("Q8_0/F16"): their bytes and their damage add up, but not their seconds.
CACHES = "KV cache"
# A damage near those that people plan for, at which scales are taken.
_TYPICAL_NATS = 0.02


def with_caches(
    options: Options,
    caches: CacheSensitivity,
    k_bytes: float,
    v_bytes: float,
    rest_seconds: Callable[[Sequence[str], bool], float],
) -> Options:
    """The KV cache as one more choice; the bytes of its parts at F16 are given.

    `rest_seconds` of (K, V) and whether a token is generated: `DeviceProfile.rest_seconds`.
    """
    old = options.timings
    assert old is not None
    k_nats, v_nats = (
        {USUAL: 0.0} | {t: max(0.0, p.mean) for t, p in probes.items()}
        for probes in (caches.k, caches.v)
    )
    pairs = [(k, v) for k in k_nats for v in v_nats]
    # Weights' damages add up to something else than nats of a real run: bring these to theirs.
    scale = _TYPICAL_NATS / options.damage.sum_for(_TYPICAL_NATS)
    usual = lookup(USUAL).bits_per_weight
    part = {t: lookup(t).bits_per_weight / usual for t in k_nats | v_nats}
    resident = np.array([k_bytes * part[k] + v_bytes * part[v] for k, v in pairs])
    decode, prefill = (
        np.array([rest_seconds(p, is_decode) for p in pairs])
        - rest_seconds(USUAL_CACHES, is_decode)
        for is_decode in (True, False)
    )
    damage = np.array([(k_nats[k] + v_nats[v]) / scale for k, v in pairs])
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


def without_caches(options: Options) -> Options:
    """The weights' choices alone."""
    n = options.names.index(CACHES) if CACHES in options.names else len(options.names)
    rows = {key: getattr(options, key)[:n] for key in ("names", "types", "sizes", "damages")}
    return replace(options, **rows)
