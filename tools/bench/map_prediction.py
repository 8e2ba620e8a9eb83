"""Predicted against measured KL divergence of twenty very different maps, as real files.

    python tools/bench/map_prediction.py MODEL.gguf --text wikitext2-test.txt [--file OTHER.gguf]

MODEL must have been probed (`apreqel probe MODEL`). All tensors in one type, stock presets, maps of
least output error, smooth and ragged mixtures, plans from all types and from parts of them, and the
type maps of other files, from the size of Q3_K_M to that of Q8_0. Measured on calibration text that
nothing was fitted on, and on --text, beside which predictions may be off by a constant factor.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from results import keep

from apreqel import pipeline, quantize
from apreqel.console.terminal import Reporter
from apreqel.errors import InfeasiblePlanError, UsageError
from apreqel.evaluate.confirm import least_error, uniform_maps
from apreqel.evaluate.text_run import on_text
from apreqel.model.qtypes import lookup, nearest
from apreqel.model.recipes import types_of_file
from apreqel.plan.constraints import Constraints
from apreqel.plan.planner import Planner
from apreqel.plan.request import PlanRequest
from apreqel.plan.solve import solve_request
from apreqel.sensitivity.measurement import ProbedModel, require_probed_model
from apreqel.sensitivity.texts import check_set, read_text, verification_set

UNIFORM = ["Q3_K", "Q4_0", "Q4_K", "IQ4_XS", "Q5_0", "Q5_K", "Q6_K", "Q8_0"]
STOCK = ["Q3_K_M", "Q4_K_M", "Q5_K_M"]
SIZES = ["Q3_K_M", "Q4_K_M", "Q6_K"]
# Parts of the types that a plan may be made of.
PARTS = {
    "K-quants": ["Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0", "IQ4_XS"],
    "blocks of 32": ["Q4_0", "Q4_1", "IQ4_NL", "Q5_0", "Q5_1", "Q8_0"],
    "4 bits and more": [
        "Q4_0", "Q4_1", "IQ4_NL", "IQ4_XS", "Q4_K", "Q5_0", "Q5_1", "Q5_K", "Q6_K", "Q8_0",
    ],
}  # fmt: skip


def maps(planner: Planner, files: list[Path]) -> Iterator[tuple[str, dict[str, str]]]:
    inventory, options = planner.inventory, planner.options(None)
    uniform = uniform_maps(options)
    for name in UNIFORM:
        if name in uniform:
            yield f"all {name}", uniform[name]
    for preset in STOCK:
        yield f"stock {preset}", planner.probed.stock_types(preset)
    for preset in SIZES:
        n_bytes = inventory.output_size(planner.probed.stock_types(preset))
        limit = options.size_limit(n_bytes)
        yield f"least error, {preset}", least_error(planner, options, [limit])
        yield f"plan, {preset}", _planned(planner, n_bytes, Constraints())
        if preset == "Q4_K_M":
            for label, part in PARTS.items():
                with suppress(InfeasiblePlanError, UsageError):
                    made = _planned(planner, n_bytes, Constraints(only_types=part))
                    yield f"plan of {label}, {preset}", made
    random = np.random.default_rng(0)
    n_layers = 1 + max(t.layer or 0 for t in inventory.quantizable)
    smooth, ragged = {}, {}
    for name, row in zip(options.names, options.types, strict=True):
        depth = (inventory.by_name[name].layer or 0) / n_layers
        smooth[name] = nearest(row, 6.6 - 2.6 * depth)
        ragged[name] = str(random.choice([t for t in row if 3 < lookup(t).bits_per_weight < 9]))
    yield "smooth, by depth", smooth
    yield "ragged, at random", ragged
    for path in files:
        yield path.stem, dict(types_of_file(path, inventory))


def _planned(planner: Planner, n_bytes: int, constraints: Constraints) -> dict[str, str]:
    request = PlanRequest(max_size_bytes=n_bytes, any_speed=True, constraints=constraints)
    solved = solve_request(replace(planner, request=request))
    return solved.options.types_of(solved.solution)


@dataclass(frozen=True)
class Row:
    """One map: KL divergence in nats as predicted, with its interval, and by text as measured."""

    map: str
    n_bytes: int
    predicted: float
    interval: tuple[float, float]
    damage_sum: float
    measured: Mapping[str, float]


def measured(probed: ProbedModel, planner: Planner, args: argparse.Namespace) -> Iterator[Row]:
    space, path = probed.space, probed.space.folder / "bench-map.gguf"
    cuts = {"kept apart": lambda _: check_set(probed.sensitivity.check_tokens)}
    if args.text:
        text = read_text(args.text)
        cuts[text.name] = lambda model: verification_set(model, text, 512, args.tokens)
    with ExitStack() as stack:
        runs = {name: stack.enter_context(on_text(space, cut, 512)) for name, cut in cuts.items()}
        for label, types in maps(planner, args.file):
            types = space.inventory.types | types
            quantize.quantize_model(
                space.inventory,
                types,
                path,
                imatrix=probed.imatrix,
                n_threads=space.n_threads,
                force=True,
                allow_requantize=True,
            )
            predicted, damage_sum = (
                planner.damage.predicted(types),
                planner.damage.damage_sum(types),
            )
            found = {name: float(run.compare(path).kld_nats.mean()) for name, run in runs.items()}
            n_bytes = path.stat().st_size
            yield Row(label, n_bytes, predicted.nats, predicted.interval, damage_sum, found)
    path.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--workdir", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--tokens", type=int, default=4080)
    parser.add_argument("--file", type=Path, action="append", default=[])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = []
    with pipeline.open_workspace(
        args.model, folder=args.workdir, allow_requantize=True, progress=Reporter()
    ) as space:
        probed = require_probed_model(space)
        planner = pipeline.planner_of(probed, PlanRequest(any_speed=True), None)
        for row in measured(probed, planner, args):
            rows.append(row)
            nats = ", ".join(f"{found:.5f}" for found in row.measured.values())
            print(
                f"{row.map:32} {row.n_bytes:>12,} bytes  predicted {row.predicted:.5f}  measured "
                f"{nats}  predicted / measured {row.predicted / row.measured['kept apart']:.3f}",
                flush=True,
            )
    says = []
    for name in rows[0].measured:
        off = np.log([row.predicted / row.measured[name] for row in rows])
        # Another text is easier or harder as a whole.
        off -= 0.0 if name == "kept apart" else np.median(off)
        size = np.abs(np.expm1(off))
        says.append(f"{name}: off by {np.median(size):.1%} (median), {size.max():.1%} (worst)")
    held = [row.interval[0] <= row.measured["kept apart"] <= row.interval[1] for row in rows]
    says.append(f"95% intervals hold {sum(held)} of {len(held)}")
    print("\n".join(says))
    keep(args.json, rows, "; ".join(says))


if __name__ == "__main__":
    main()
