"""Real files at the sizes of stock presets, ours beside others': KL divergence, same imatrix, text.

    python tools/bench/against_others.py MODEL.gguf --text wikitext2-test.txt [--peer NAME=FOLDER]

MODEL must have been probed and, for plans as fast as stock, profiled. For each preset: our plan of
at most its bytes, the closest and one as fast as the preset, the preset's file, the map of least
output error, and the file PRESET.gguf of every peer's folder, all on the same positions.
`--unchecked` takes plans as solved, without measuring them and their rivals first. With `--rounds`
of timing the files' speeds are measured in pairs, too.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from results import keep
from scipy.stats import binom

from apreqel import pipeline, quantize
from apreqel.arrays import Doubles
from apreqel.console.terminal import Reporter
from apreqel.device.profiling import profile_for
from apreqel.device.real_runs import time_file
from apreqel.evaluate.confirm import least_error
from apreqel.evaluate.presets import build_preset
from apreqel.evaluate.text_run import on_text
from apreqel.plan.request import PlanRequest
from apreqel.sensitivity.measurement import ProbedModel, require_probed_model
from apreqel.sensitivity.metrics import estimate, ratio_interval
from apreqel.sensitivity.rounding import Rounding
from apreqel.sensitivity.texts import read_text, verification_set
from apreqel.workspace import Workspace

PRESETS = ["Q3_K_M", "Q4_K_M", "Q5_K_M", "Q6_K"]


@dataclass(frozen=True)
class Row:
    """One file; our closest plan's KLD over its own, and its speeds over stock's, paired."""

    size_of: str
    file: str
    n_bytes: int
    kld: float
    kld_p999: float
    top1: float
    ours_over_it: tuple[float, float, float]
    predicted: float | None = None
    prefill_over_stock: tuple[float, float, float] | None = None
    decode_over_stock: tuple[float, float, float] | None = None


def write(
    probed: ProbedModel,
    label: str,
    types: Mapping[str, str],
    records: list[bytes],
    is_rounded: bool = False,
) -> Path:
    path = probed.space.folder / f"bench-{label.replace(' ', '-')}.gguf"
    quantize.quantize_model(
        probed.inventory,
        types,
        path,
        imatrix=probed.imatrix,
        extra_metadata=records,
        n_threads=probed.space.n_threads,
        force=True,
        allow_requantize=True,
        moments=Rounding(probed).moments(types) if is_rounded else None,
    )
    return path


def files(
    probed: ProbedModel, preset: str, args: argparse.Namespace
) -> Iterator[tuple[str, Path, float | None]]:
    """(label, file, predicted KLD) of one size; ours, the closest, first."""
    stock = build_preset(probed.space, preset, probed.imatrix)
    n_bytes = stock.stat().st_size
    profile = profile_for(probed.space, None, needed=False)
    asked = {"closest": PlanRequest(max_size_bytes=n_bytes, any_speed=True, plain=args.plain)}
    if profile is not None:
        asked["as fast"] = replace(asked["closest"], any_speed=False)
    for label, request in asked.items():
        plan_path = probed.space.folder / f"bench-{preset}-{label.replace(' ', '-')}.json"
        made, _ = pipeline.plan(
            probed, request, profile, output=plan_path, check=not args.unchecked
        )
        records = made.extra_metadata()
        path = write(probed, f"{preset} {label}", made.types, records, made.is_rounded)
        yield f"apreqel, {label}", path, made.damage_nats
    yield f"stock {preset}", stock, None
    planner = pipeline.planner_of(probed, asked["closest"], None)
    options = planner.options(None)
    types = probed.inventory.types | least_error(planner, options, [options.size_limit(n_bytes)])
    yield "least output error", write(probed, f"{preset} least error", types, records), None
    for peer in args.peer:
        name, _, folder = peer.partition("=")
        yield name, Path(folder) / f"{preset}.gguf", None


def timed(space: Workspace, rows: list[Row], paths: list[Path], n_rounds: int) -> list[Row]:
    """The rows with speeds over those of the stock file, each file once in every round."""
    runs = np.empty((n_rounds, len(paths), 2))
    for i in range(n_rounds):
        for j, path in enumerate(paths):
            space.progress("timing", i * len(paths) + j, n_rounds * len(paths))
            run, _ = time_file(path, space.n_threads, 512)
            runs[i, j] = 1 / run.prefill, 1 / run.decode
    stock = next(j for j, row in enumerate(rows) if row.file.startswith("stock"))
    ratios = runs / runs[:, [stock]]

    def interval(column: Doubles) -> tuple[float, float, float]:
        """The median and the ranks that hold it 19 times in 20."""
        ordered = np.sort(column)
        low, high = binom.interval(0.95, len(ordered), 0.5)
        first, last = ordered[max(int(low) - 1, 0)], ordered[min(int(high), len(ordered) - 1)]
        return float(np.median(ordered)), float(first), float(last)

    return [
        replace(
            row,
            prefill_over_stock=interval(ratios[:, j, 0]),
            decode_over_stock=interval(ratios[:, j, 1]),
        )
        for j, row in enumerate(rows)
    ]


def show(row: Row) -> None:
    ratio, low, high = row.ours_over_it
    line = (
        f"{row.size_of:7} {row.file:20} {row.n_bytes:>12,} bytes  KLD {row.kld:.5f}  99.9% "
        f"{row.kld_p999:.3f}  top-1 {row.top1:.1%}  ours / it {ratio:.3f} ({low:.3f} to {high:.3f})"
    )
    line += f"  predicted {row.predicted:.5f}" if row.predicted else ""
    for what, found in (("prefill", row.prefill_over_stock), ("decode", row.decode_over_stock)):
        line += f"  {what} {found[0]:.3f} ({found[1]:.3f} to {found[2]:.3f})" if found else ""
    print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=8160)
    parser.add_argument("--workdir", type=Path)
    parser.add_argument("--presets", nargs="*", default=PRESETS)
    parser.add_argument("--peer", action="append", default=[])
    parser.add_argument("--unchecked", action="store_true")
    parser.add_argument("--plain", action="store_true")
    parser.add_argument("--rounds", type=int, default=0, help="of timing, at each size")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    text, rows = read_text(args.text), []
    with (
        pipeline.open_workspace(
            args.model, folder=args.workdir, allow_requantize=True, progress=Reporter()
        ) as given,
        pipeline.equalised(given, pipeline.was_equalised(given)) as space,
    ):
        probed = require_probed_model(space)
        with on_text(
            space, lambda model: verification_set(model, text, 512, args.tokens), 512
        ) as run:
            for preset in args.presets:
                ours, found, paths = None, list[Row](), list[Path]()
                for label, path, predicted in files(probed, preset, args):
                    result = run.compare(path)
                    klds = result.kld_nats
                    ours = klds if ours is None else ours
                    row = Row(
                        preset,
                        label,
                        path.stat().st_size,
                        estimate(klds, run.tokens.n_chunks).mean,
                        float(np.quantile(klds, 0.999)),
                        float(result.same_top1.mean()),
                        ratio_interval(ours, klds, run.tokens.n_chunks),
                        predicted,
                    )
                    show(row)
                    found.append(row)
                    paths.append(path)
                if args.rounds:
                    found = timed(space, found, paths, args.rounds)
                    for row in found:
                        show(row)
                rows += found
                keep(args.json, rows)
                for path in paths:
                    if path.name.startswith("bench-"):
                        path.unlink()


if __name__ == "__main__":
    main()
