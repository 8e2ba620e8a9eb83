"""Real files at the sizes of stock presets: KL divergence ours / stock, same imatrix, same text.

    python tools/bench/against_stock.py MODEL.gguf --text wikitext2-test.txt

MODEL must have been probed (`apreqel probe MODEL`). For each preset a plan of at most its bytes is
made and quantised, and measured on the same positions as the preset's file and the best uniform
type of no more bytes. Then the smallest plan as close as stock Q4_K_M.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from apreqel import pipeline, quantize
from apreqel.console import Reporter
from apreqel.evaluate import confirm as candidates
from apreqel.evaluate import verify
from apreqel.evaluate.real_files import on_text
from apreqel.plan import planner
from apreqel.plan.request import PlanRequest
from apreqel.sensitivity import calibration
from apreqel.sensitivity.metrics import estimate, ratio_interval

PRESETS = ["Q3_K_M", "Q4_K_S", "Q4_K_M", "Q5_K_M", "Q6_K"]


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
    with pipeline.open_workspace(
        args.model, workdir=args.workdir, allow_requantize=True, on_progress=Reporter()
    ) as space:
        state, imatrix = pipeline.require_measured(space)
        files, predicted, pairs = {}, {}, []

        def write(label: str, types: dict[str, str], records: list[bytes]) -> Path:
            path = space.folder / f"{label.replace(' ', '-')}.gguf"
            quantize.quantize_model(
                space.inventory,
                types,
                path,
                imatrix=imatrix,
                extra_metadata=records,
                n_threads=space.n_threads,
                force=True,
                allow_requantize=True,
            )
            return path

        for preset in args.presets:
            stock = verify.build_preset(space.inventory, preset, imatrix, space.folder, 2)
            request = PlanRequest("accuracy", max_size_bytes=stock.stat().st_size)
            made = planner.Planner(space.inventory, state, imatrix, request, space.folder).plan()
            ours, records = f"ours {preset}", made.extra_metadata()
            files[ours] = write(ours, dict(made.types), records)
            files[preset] = stock
            predicted[ours] = made
            pairs.append((ours, preset))
            for label, types in candidates.rival_maps(made, request, space.inventory, state):
                if label.startswith("uniform") and not args.no_uniform:
                    if label not in files:
                        files[label] = write(label, types, records)
                    pairs.append((ours, label))
        if "Q4_K_M" in files and not args.no_smallest:
            request = PlanRequest("memory")
            path = space.folder / "memory.json"
            made, _ = pipeline.plan(space, request, state, imatrix, None, path)
            files["smallest"] = write("smallest", dict(made.types), made.extra_metadata())
            predicted["smallest"] = made
            pairs.append(("smallest", "Q4_K_M"))
        text_run = on_text(
            space.inventory.files[0],
            lambda model: calibration.verification_set(
                model, calibration.read_text(args.text), 512, args.tokens
            ),
            512,
            space.folder,
            space.n_threads,
        )
        with text_run as text:
            results = {}
            for label, path in files.items():
                results[label] = text.compare(path)
                kld = estimate(results[label].kld_nats, text.tokens.n_chunks)
                tail = float(np.quantile(results[label].kld_nats, 0.999))
                size = path.stat().st_size
                line = f"{label:16} {size:>12,} bytes  KLD {kld.mean:.5f} 99.9% {tail:.3f}"
                if label in predicted:
                    low, high = predicted[label].kld_interval
                    line += f"  predicted {predicted[label].kld_nats:.5f} ({low:.5f} to {high:.5f})"
                print(line, flush=True)
            for ours, rival in pairs:
                a, b = results[ours].kld_nats, results[rival].kld_nats
                ratio, low, high = ratio_interval(a, b, text.tokens.n_chunks)
                tails = [float(np.quantile(x, 0.999)) for x in (a, b)]
                sizes = files[ours].stat().st_size / files[rival].stat().st_size
                print(
                    f"{ours} / {rival}: bytes {sizes:.4f}, KLD {ratio:.3f} ({low:.3f} to "
                    f"{high:.3f}), 99.9% {tails[0] / tails[1]:.3f}"
                )


if __name__ == "__main__":
    main()
