"""Speed against stock presets: real files, paired timings, same imatrix, same text.

    python tools/bench/fast_plans.py MODEL.gguf --text wikitext2-test.txt

MODEL must have been probed and profiled. For the size of each preset: the fastest plan whose
KL divergence, measured on calibration text that was kept apart, is at most `--margin` times the
preset's, and the closest plan that is predicted to be at least as fast as the preset both ways.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from apreqel import pipeline
from apreqel.console.terminal import Reporter
from apreqel.device.profiling import profile_of
from apreqel.evaluate import verify
from apreqel.evaluate.presets import build_preset
from apreqel.evaluate.real_files import FileBench
from apreqel.from_plan import run_plan
from apreqel.plan.request import PlanRequest, parse_workload
from apreqel.sensitivity.measurement import require_probed_model
from apreqel.sensitivity.texts import read_text

PRESETS = ["Q3_K_M", "Q4_K_S", "Q4_K_M", "Q5_K_M", "Q6_K"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=3060)
    parser.add_argument("--workdir", type=Path)
    parser.add_argument("--presets", nargs="+", default=PRESETS)
    parser.add_argument("--plans", nargs="+", default=["fastest", "closest"])
    parser.add_argument("--margin", type=float, default=1.0)
    parser.add_argument("--workload", default="512:128")
    parser.add_argument("--plain", action="store_true")
    parser.add_argument("--repetitions", type=int, default=9)
    args = parser.parse_args()
    with pipeline.open_workspace(
        args.model, folder=args.workdir, allow_requantize=True, progress=Reporter()
    ) as space:
        probed, profile = require_probed_model(space), profile_of(space)
        for preset in args.presets:
            stock = build_preset(space, preset, probed.imatrix)
            types = probed.stock_types(preset)
            speed = profile.predict(space.inventory, types, 576)
            assert speed is not None
            size = stock.stat().st_size
            with FileBench(probed) as bench:
                floor = bench.measure(f"stock {preset}", types).kld.mean
            wishes = {
                "fastest": PlanRequest(
                    "latency",
                    max_size_bytes=size,
                    max_kld_nats=args.margin * floor,
                    workload=parse_workload(args.workload),
                ),
                "closest": PlanRequest(
                    "accuracy",
                    max_size_bytes=size,
                    min_decode_tps=speed.decode.value,
                    min_prefill_tps=speed.prefill.value,
                ),
            }
            files = {}
            for label in args.plans:
                wish = replace(wishes[label], plain=args.plain)
                plan_path = space.folder / f"{label}.json"
                pipeline.plan(probed, wish, profile, output=plan_path)
                files[label] = space.folder / f"{label}-{preset}.gguf"
                run_plan(
                    plan_path,
                    output=files[label],
                    n_threads=space.n_threads,
                    force=True,
                    allow_requantize=True,
                    progress=space.progress,
                )
            report = verify.verify(
                space,
                {**files, "stock": stock},
                text=read_text(args.text),
                settings=verify.VerifySettings(
                    n_scored=args.tokens, repetitions=args.repetitions, n_prompt=512
                ),
            )
            *ours, rival = report.files[1:]
            assert rival.speed is not None
            print(
                f"{preset:8} stock   {rival.size_bytes:>11,} KLD {rival.kld.mean:.5f} decode "
                f"{rival.speed.decode:.1f} prefill {rival.speed.prefill:.0f}"
            )
            for row in ours:
                assert row.speed is not None
                print(
                    f"{preset:8} {row.label:7} {row.size_bytes:>11,} KLD {row.kld.mean:.5f} "
                    f"({row.kld.mean / rival.kld.mean:.2f} x) decode {row.speed.decode:.1f} "
                    f"({row.speed.decode / rival.speed.decode:.2f} x) prefill "
                    f"{row.speed.prefill:.0f} ({row.speed.prefill / rival.speed.prefill:.2f} x)",
                    flush=True,
                )


if __name__ == "__main__":
    main()
