"""The same measurements and bytes, other ways to choose: an ablation for readers of papers.

Every strategy gets the sensitivity, the imatrix and the file size that ours gets; what differs is
how types are chosen. The files are real, and so are the divergences and speeds that are compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from apreqel.evaluate.confirm import STOCK, best_fitting, uniform_maps
from apreqel.model.qtypes import lookup
from apreqel.plan.options import Options, build_options
from apreqel.plan.planner import stock_map
from apreqel.sensitivity.damage import DamageModel
from apreqel.solver.knapsack import Limit, solve

if TYPE_CHECKING:
    from apreqel.device.profile import DeviceProfile
    from apreqel.model.inventory import Inventory
    from apreqel.plan.options import Doubles
    from apreqel.sensitivity.measure import Sensitivity
    from apreqel.solver.knapsack import Choice

# APreQEL (arXiv 2603.23575): tensors by score, this part low, middle and high precision.
_QUOTAS = (0.50, 0.35, 0.15)
_EPSILON = 1e-6


def strategies(
    inventory: Inventory,
    sensitivity: Sensitivity,
    records: Sequence[bytes],
    file_bytes: int,
    profile: DeviceProfile | None,
) -> dict[str, dict[str, str]]:
    """A map of types by strategy, each of at most `file_bytes`; those that cannot be are left out.

    uniform, stock: the single type and the preset of least predicted damage that fit. error only:
    least sum of relative output errors. layer score: (latency + memory) / (sensitivity + eps) with
    quotas of 50, 35 and 15% (needs a profile). first order: the knapsack from one probe a tensor.
    apreqel: the knapsack from all probes.
    """
    options = build_options(inventory, sensitivity, records)
    limit = options.size_limit(file_bytes)
    own = inventory.types
    made: dict[str, dict[str, str]] = {}

    def solved(label: str, costs: Sequence[Doubles]) -> None:
        made[label] = own | options.types_of(solve(costs, [limit]))

    rivals = {
        "uniform": uniform_maps(options),
        "stock": {name: stock_map(inventory, sensitivity, name) for name in STOCK},
    }
    for label, maps in rivals.items():
        best = best_fitting(maps, options, 1.001 * limit.at_most)
        if best is not None:
            made[label] = own | maps[best]
    solved(
        "error only",
        options.rows(lambda name, kind: sensitivity.tensors[name].errors.weights[kind]),
    )
    if profile is not None:
        scored = _layer_score(inventory, options, limit, profile)
        if scored is not None:
            made["layer score"] = own | _types(options, scored)
    first = _first_probes_alone(sensitivity)
    solved("first order", options.rows(lambda name, kind: first.damage(name, kind).nats))
    solved("apreqel", options.damages)
    return made


def _first_probes_alone(sensitivity: Sensitivity) -> DamageModel:
    """Damages from one probe a tensor, without kernels and real files."""
    return DamageModel(
        {name: replace(t.errors, kernels={}) for name, t in sensitivity.tensors.items()},
        {name: dict(list(t.probes.items())[:1]) for name, t in sensitivity.tensors.items()},
        sensitivity.places,
    )


def _types(options: Options, choice: Choice) -> dict[str, str]:
    return {
        name: kinds[c] for name, kinds, c in zip(options.names, options.types, choice, strict=True)
    }


def _fits(limit: Limit, choice: Choice) -> bool:
    return sum(float(row[c]) for row, c in zip(limit.costs, choice, strict=True)) <= limit.at_most


def _nearest(options: Options, i: int, bits: float) -> int:
    """The option of tensor i nearest to so many bits per weight."""
    found = [abs(lookup(kind).bits_per_weight - bits) for kind in options.types[i]]
    return int(np.argmin(found))


def _layer_score(
    inventory: Inventory, options: Options, limit: Limit, profile: DeviceProfile
) -> Choice | None:
    """Rank tensors by (latency + memory) / (sensitivity + eps), each part scaled to its largest.

    The quotas of the ranking get three neighbouring widths of bits; the widest that fit are taken.
    """
    n = len(options.names)
    reference = [_nearest(options, i, 4.5) for i in range(n)]
    latency, memory, harm = np.zeros(n), np.zeros(n), np.zeros(n)
    for i, (name, j) in enumerate(zip(options.names, reference, strict=True)):
        tensor = inventory.by_name[name]
        kinds = profile.types_for(tensor, inventory)
        if options.types[i][j] in kinds:
            latency[i] = profile.tensor_seconds(tensor, inventory, options.types[i][j], decode=True)
        memory[i], harm[i] = options.sizes[i][j], options.damages[i][j]
    scaled = [row / (row.max() or 1.0) for row in (latency, memory, harm)]
    order = np.argsort(-(scaled[0] + scaled[1]) / (scaled[2] + _EPSILON))
    cuts = np.cumsum([round(quota * n) for quota in _QUOTAS[:2]])
    level = np.empty(n, int)
    for rank, i in enumerate(order):
        level[i] = int(np.searchsorted(cuts, rank, side="right"))
    best: tuple[float, Choice] | None = None
    for low in np.arange(1.5, 8.5, 0.125):
        widths = low, low + 1.0, low + 2.5
        choice = tuple(_nearest(options, i, widths[level[i]]) for i in range(n))
        if _fits(limit, choice) and (best is None or low > best[0]):
            best = float(low), choice
    return best[1] if best else None
