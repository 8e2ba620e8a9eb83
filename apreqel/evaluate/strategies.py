"""The same measurements and bytes, other ways to choose: an ablation for readers of papers.

Every strategy gets the measurements, the imatrix and the file size that ours gets; what differs is
how types are chosen. The files are real, and so are the divergences and speeds that are compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from apreqel.arrays import Doubles
from apreqel.device.profile import DeviceProfile
from apreqel.device.profiling import profile_for
from apreqel.evaluate.confirm import best_fitting, least_error, stock_and_uniform
from apreqel.evaluate.real_files import measured_files
from apreqel.evaluate.verify import VerificationReport, VerifySettings, verify
from apreqel.model.qtypes import nearest
from apreqel.plan.options import Options
from apreqel.plan.plan import encode_metadata, output_metadata
from apreqel.plan.planner import Planner
from apreqel.quantize import quantize_model
from apreqel.sensitivity.damage import DamageModel, damage_model
from apreqel.sensitivity.measurement import Sensitivity, require_probed_model
from apreqel.sensitivity.texts import Text
from apreqel.solver.knapsack import Choice, Limit, solve, total
from apreqel.workspace import Workspace

# APreQEL (arXiv 2603.23575): tensors by score, this part low, middle and high precision.
_QUOTAS = (0.50, 0.35, 0.15)
_EPSILON = 1e-6


def strategies(planner: Planner, file_bytes: int) -> dict[str, dict[str, str]]:
    """A type map by strategy, each of at most `file_bytes`; those that cannot be are left out.

    uniform, stock: the single type and the preset of least predicted damage that fit. error only:
    least sum of relative output errors. layer score: (latency + memory) / (sensitivity + eps) with
    quotas of 50, 35 and 15% (needs a profile). first order: the knapsack from one probe a tensor.
    apreqel: the knapsack from all probes.
    """
    options, own = planner.options(None), planner.inventory.types
    limit = options.size_limit(file_bytes)
    made: dict[str, dict[str, str]] = {}

    def solved(label: str, costs: Sequence[Doubles]) -> None:
        made[label] = own | options.types_of(solve(costs, [limit]))

    for label, maps in reversed(stock_and_uniform(planner, options).items()):
        if best := best_fitting(maps, options, 1.001 * limit.at_most):
            made[label] = own | maps[best]
    made["error only"] = own | least_error(planner, options, [limit])
    if planner.profile is not None:
        scored = _layer_score(planner, options, limit, planner.profile)
        if scored is not None:
            types = [row[c] for row, c in zip(options.types, scored, strict=True)]
            made["layer score"] = own | dict(zip(options.names, types, strict=True))
    first = _first_probes_alone(planner.probed.sensitivity)
    solved("first order", options.rows(lambda name, t: first.damage(name, t).nats))
    solved("apreqel", options.damages)
    return made


def compare_strategies(
    space: Workspace, file_bytes: int | None, *, text: Text, settings: VerifySettings
) -> VerificationReport:
    """Real files of all strategies, made from the same measurements, measured side by side.

    Of the usual stock preset's size where none is given.
    Raises ArtifactError where the model was not probed, and what `verify` raises.
    """
    probed = require_probed_model(space)
    damage = replace(damage_model(probed.sensitivity), files=measured_files(probed).own)
    profile = profile_for(space, None, needed=False)
    planner = Planner(probed, damage, profile=profile)
    made = strategies(planner, file_bytes or probed.inventory.output_size(planner.stock))
    made = {"apreqel": made["apreqel"]} | made  # ours first
    with TemporaryDirectory(prefix="compare-", dir=space.folder) as folder:
        files = {label: Path(folder) / f"{label.replace(' ', '-')}.gguf" for label in made}
        for i, (label, types) in enumerate(made.items()):
            space.progress(f"writing {label}", i, len(made))
            quantize_model(
                space.inventory,
                types,
                files[label],
                imatrix=probed.imatrix,
                extra_metadata=encode_metadata(output_metadata(probed.imatrix)),
                n_threads=space.n_threads,
                allow_requantize=space.allow_requantize,
            )
        return verify(space, files, text=text, settings=settings)


def _first_probes_alone(found: Sensitivity) -> DamageModel:
    """Damages from one probe a tensor, without kernels and real files."""
    tensors = {}
    for name, tensor in found.tensors.items():
        errors, first = replace(tensor.errors, kernels={}), dict(list(tensor.probes.items())[:1])
        tensors[name] = replace(tensor, errors=errors, probes=first)
    return DamageModel(tensors)


def _nearest(options: Options, i: int, bits: float) -> int:
    """The option of tensor i nearest to so many bits per weight."""
    return list(options.types[i]).index(nearest(options.types[i], bits))


def _layer_score(
    planner: Planner, options: Options, limit: Limit, profile: DeviceProfile
) -> Choice | None:
    """Rank tensors by (latency + memory) / (sensitivity + eps), each part scaled to its largest.

    The quotas of the ranking get three neighbouring widths of bits; the widest that fit are taken.
    """
    n, inventory = len(options.names), planner.inventory
    latency, memory, harm = np.zeros((3, n))
    for i, name in enumerate(options.names):
        j, tensor = _nearest(options, i, 4.5), inventory.by_name[name]
        type_name = options.types[i][j]
        if type_name in profile.types_for(tensor, inventory):
            latency[i] = profile.tensor_seconds(tensor, inventory, type_name, decode=True)
        memory[i], harm[i] = options.sizes[i][j], options.damages[i][j]
    scaled = [row / (row.max() or 1.0) for row in (latency, memory, harm)]
    order = np.argsort(-(scaled[0] + scaled[1]) / (scaled[2] + _EPSILON))
    cuts = np.cumsum([round(quota * n) for quota in _QUOTAS[:2]])
    level = np.empty(n, int)
    level[order] = np.searchsorted(cuts, np.arange(n), side="right")
    best: Choice | None = None
    for low in np.arange(1.5, 8.5, 0.125):
        widths = low, low + 1.0, low + 2.5
        choice = tuple(_nearest(options, i, widths[level[i]]) for i in range(n))
        if total(limit.costs, choice) <= limit.at_most:
            best = choice
    return best
