"""Real files at the sizes of stock presets: KL divergence ours / stock, same imatrix, same text.

    python tools/bench/against_stock.py MODEL.gguf --text wikitext2-test.txt

MODEL must have been probed (`apreqel probe MODEL`). For each preset a plan of at most its bytes is
made and quantised, and measured on the same positions as the preset's file and the best uniform
type of no more bytes. Then the smallest plan as close as stock Q4_K_M.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from apreqel import pipeline, quantize
from apreqel.console.terminal import Reporter
from apreqel.evaluate.confirm import rival_maps
from apreqel.evaluate.presets import build_preset
from apreqel.evaluate.text_run import on_text
from apreqel.plan.make_plan import make_plan
from apreqel.plan.plan import Plan
from apreqel.plan.request import PlanRequest
from apreqel.plan.solve import solve_request
from apreqel.sensitivity.measurement import ProbedModel, require_probed_model
from apreqel.sensitivity.metrics import estimate, ratio_interval
from apreqel.sensitivity.texts import read_text, verification_set

PRESETS = ["Q3_K_M", "Q4_K_S", "Q4_K_M", "Q5_K_M", "Q6_K"]


@dataclass(frozen=True)
class File:
    """One file; `rival` names another that it is compared with, `plan` what it was planned as."""

    label: str
    path: Path
    rivals: tuple[str, ...] = ()
    plan: Plan | None = None


def write(probed: ProbedModel, label: str, types: Mapping[str, str], records: list[bytes]) -> Path:
    path = probed.space.folder / f"{label.replace(' ', '-')}.gguf"
    quantize.quantize_model(
        probed.inventory,
        types,
        path,
        imatrix=probed.imatrix,
        extra_metadata=records,
        n_threads=probed.space.n_threads,
        force=True,
        allow_requantize=True,
    )
    return path


def files(probed: ProbedModel, args: argparse.Namespace) -> Iterator[File]:
    for preset in args.presets:
        stock = build_preset(probed.space, preset, probed.imatrix)
        request = PlanRequest("accuracy", max_size_bytes=stock.stat().st_size)
        planner = pipeline.planner_of(probed, request, None)
        solved = solve_request(planner)
        made = make_plan(planner, solved)
        rivals = [preset]
        yield File(preset, stock)
        for label, types in rival_maps(planner, solved):
            if label.startswith("uniform") and not args.no_uniform:
                rivals.append(label)
                yield File(label, write(probed, label, types, made.extra_metadata()))
        ours = f"ours {preset}"
        path = write(probed, ours, made.types, made.extra_metadata())
        yield File(ours, path, tuple(rivals), made)
    if "Q4_K_M" in args.presets and not args.no_smallest:
        plan_path = probed.space.folder / "memory.json"
        made, _ = pipeline.plan(probed, PlanRequest("memory"), None, output=plan_path)
        path = write(probed, "smallest", made.types, made.extra_metadata())
        yield File("smallest", path, ("Q4_K_M",), made)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=8160)
    parser.add_argument("--workdir", type=Path)
    parser.add_argument("--presets", nargs="*", default=PRESETS)
    parser.add_argument("--no-uniform", action="store_true")
    parser.add_argument("--no-smallest", action="store_true")
    args = parser.parse_args()
    text = read_text(args.text)
    with pipeline.open_workspace(
        args.model, folder=args.workdir, allow_requantize=True, progress=Reporter()
    ) as space:
        made = {file.label: file for file in files(require_probed_model(space), args)}
        with on_text(
            space, lambda model: verification_set(model, text, 512, args.tokens), 512
        ) as run:
            results = {label: run.compare(file.path).kld_nats for label, file in made.items()}
            n_chunks = run.tokens.n_chunks
        for label, file in made.items():
            kld, tail = estimate(results[label], n_chunks), np.quantile(results[label], 0.999)
            size = file.path.stat().st_size
            line = f"{label:16} {size:>12,} bytes  KLD {kld.mean:.5f} 99.9% {tail:.3f}"
            if file.plan:
                low, high = file.plan.damage_interval
                line += f"  predicted {file.plan.damage_nats:.5f} ({low:.5f} to {high:.5f})"
            print(line)
        for label, file in made.items():
            for rival in file.rivals:
                a, b = results[label], results[rival]
                ratio, low, high = ratio_interval(a, b, n_chunks)
                tails = np.quantile(a, 0.999) / np.quantile(b, 0.999)
                sizes = file.path.stat().st_size / made[rival].path.stat().st_size
                print(
                    f"{label} / {rival}: bytes {sizes:.4f}, KLD {ratio:.3f} ({low:.3f} to "
                    f"{high:.3f}), 99.9% {tails:.3f}"
                )


if __name__ == "__main__":
    main()
