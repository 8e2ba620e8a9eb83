"""What a measurement says about itself: how sure it is, and what would have told the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from apreqel.sensitivity.damage import Damage, damage_model
from apreqel.sensitivity.measurement import Probe, Sensitivity


@dataclass(frozen=True)
class Report:
    """`heldout_ratio` and `half_text_ratio` are medians of `TensorErrors`'.

    `correlations` are Spearman's with the KL divergence of the first probes; `most_sensitive` are
    (tensor, first type, damage).
    """

    heldout_ratio: float
    half_text_ratio: float
    correlations: Mapping[str, float]
    most_sensitive: Sequence[tuple[str, str, Damage]]
    n_unresolved: int


def report(found: Sensitivity) -> Report:
    model, tensors = damage_model(found), found.tensors
    first = {n: next(iter(t.probes.items())) for n, t in tensors.items() if t.probes}
    damages = [(n, t, model.damage(n, t)) for n, (t, _) in first.items()]
    ranked = sorted(damages, key=lambda row: -row[2].nats)
    errors = [t.errors for t in tensors.values()]
    return Report(
        float(np.median([e.heldout_ratio for e in errors])),
        float(np.median([e.half_text_ratio for e in errors])),
        _correlations(found, first),
        [row for row in ranked if row[2].is_resolved],
        sum(not row[2].is_resolved for row in ranked),
    )


def _correlations(found: Sensitivity, first: Mapping[str, tuple[str, Probe]]) -> dict[str, float]:
    """Of cheaper measures with the KL divergence of each tensor's first probe."""
    from scipy.stats import spearmanr

    tensors, cosines = found.tensors, found.layer_cosines
    others = {
        "perplexity": {n: p.estimate("perplexity").mean for n, (_, p) in first.items()},
        "output error": {n: tensors[n].errors.weights[t] for n, (t, _) in first.items()},
        "layer's 1 - cosine": {
            n: 1 - cosines[tensors[n].layer] for n in first if 0 < tensors[n].layer < len(cosines)
        },
    }
    kld = {n: p.estimate().mean for n, (_, p) in first.items()}
    return {
        label: float(spearmanr([kld[n] for n in values], list(values.values())).statistic)
        for label, values in others.items()
        if len(values) > 2
    }
