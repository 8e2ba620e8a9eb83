"""Which probes to make next: where what is not known about a pair could change plans.

At the price that size has in a plan, every type of a tensor costs damage + price x bytes. A pair is
worth probing by the gain expected of finding that it beats the chosen type, or is beaten (expected
improvement, Jones et al. 1998), over plans along a ladder of sizes.
"""

from __future__ import annotations

import numpy as np

from apreqel.model.inventory import Inventory
from apreqel.model.qtypes import lookup
from apreqel.sensitivity.damage import damage_model, expected_gain
from apreqel.sensitivity.measurement import Sensitivity
from apreqel.solver.knapsack import Limit, priced, solve

# Plans whose choices further probes are to settle, in bits per weight of the quantised tensors.
LADDER_BITS = (3.5, 4.0, 4.5, 5.0, 5.5, 6.0, 6.75, 7.5)
# No more probes once no pair is expected to gain this part of a ladder plan's damage.
_SETTLED = 2e-5


def decisive_pairs(
    sensitivity: Sensitivity, inventory: Inventory, count: int
) -> list[tuple[str, str]]:
    """At most `count` (tensor, type) pairs not yet probed on the whole text, the best first."""
    model = damage_model(sensitivity)
    tensors = [inventory.by_name[n] for n in sensitivity.tensors if sensitivity.usable_types(n)]
    rows = [(t, sensitivity.usable_types(t.name)) for t in tensors]
    sizes = [np.array([lookup(k).size_bytes(t.shape) for k in kinds], float) for t, kinds in rows]
    tables = [[model.damage(t.name, k) for k in kinds] for t, kinds in rows]
    damages = [np.array([d.nats for d in table]) for table in tables]
    doubts = [np.array([d.nats * min(d.log_deviation, 1.5) for d in table]) for table in tables]
    n_weights = sum(t.n_elements for t in tensors)
    gains: dict[tuple[str, str], float] = {}
    for bits in LADDER_BITS:
        limit = Limit("size", sizes, bits * n_weights / 8)
        if limit.at_most < sum(s.min() for s in sizes):
            continue
        solution = solve(damages, [limit], gap_wanted=1e-3)
        for i, (tensor, kinds) in enumerate(rows):
            cost, chosen = priced(i, damages, [limit], solution), solution.choice[i]
            behind = np.maximum(0.0, cost - cost[chosen])
            ahead = np.delete(cost, chosen).min(initial=np.inf) - cost[chosen]
            behind[chosen] = max(0.0, ahead)
            expected = expected_gain(behind, doubts[i]) / max(solution.objective, 1e-12)
            for kind, gain in zip(kinds, expected.tolist(), strict=True):
                gains[tensor.name, kind] = max(gains.get((tensor.name, kind), 0.0), gain)

    def is_open(pair: tuple[str, str]) -> bool:
        known = sensitivity.tensors[pair[0]].probes.get(pair[1])
        return known is None or len(known.kld) < sensitivity.probe_text.n_draws

    best = sorted((p for p in gains if is_open(p)), key=lambda p: -gains[p])[:count]
    return [pair for pair in best if gains[pair] > _SETTLED]
