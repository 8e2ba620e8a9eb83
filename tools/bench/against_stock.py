"""Real files at the sizes of stock presets: KL divergence ours / stock, same imatrix, same text.

    python tools/bench/against_stock.py MODEL.gguf --text wikitext2-test.txt

MODEL must have been probed (`apreqel probe MODEL`). For each preset a plan of at most its bytes is
made and quantised, and both files are measured on the same positions.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from apreqel import calibration, pipeline, plan, quantize, verify
from apreqel.console import Reporter

PRESETS = ["Q3_K_M", "Q4_K_S", "Q4_K_M", "Q5_K_M", "Q6_K"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=3060)
    parser.add_argument("--workdir", type=Path)
    parser.add_argument("--presets", nargs="+", default=PRESETS)
    args = parser.parse_args()
    with pipeline.open_workspace(
        args.model,
        workdir=args.workdir,
        allow_requantize=True,
        on_progress=Reporter(),
    ) as space:
        known = pipeline.measured(space)
        if known is None:
            raise SystemExit(f"{args.model}: run apreqel probe first")
        state, imatrix = known
        predicted = {}
        print(
            "preset   bytes ours / stock        KLD ours / stock    ratio (95%)            ", end=""
        )
        print("99.9% ours / stock  predicted")
        for preset in args.presets:
            stock = verify.build_preset(space.inventory, preset, imatrix, space.folder, 2)
            request = plan.PlanRequest("accuracy", max_size_bytes=stock.stat().st_size)
            made = plan.make_plan(space.inventory, state, imatrix, request, space.folder)
            ours = space.folder / f"ours-{preset}.gguf"
            quantize.quantize_model(
                space.inventory,
                made.types,
                ours,
                imatrix=imatrix,
                extra_metadata=made.extra_metadata(),
                n_threads=space.n_threads,
                force=True,
                allow_requantize=True,
            )
            predicted[preset] = made.kld_nats
            report = verify.verify(
                space.inventory,
                space.sha256,
                {"ours": ours, preset: stock},
                text=calibration.read_text(args.text),
                calibration_sha256=(),
                settings=verify.VerifySettings(n_scored=args.tokens, with_speed=False),
                n_threads=space.n_threads,
                folder=space.folder,
            )
            _, a, b = report.files
            (versus,) = report.versus
            low, high = versus.kld_ratio_interval
            print(
                f"{preset:8} {a.size_bytes:>11,} / {b.size_bytes:>11,}  "
                f"{a.kld.mean:.5f} / {b.kld.mean:.5f}  "
                f"{versus.kld_ratio:.3f} ({low:.3f} to {high:.3f})  "
                f"{a.kld_p999:.3f} / {b.kld_p999:.3f}  {predicted[preset]:.5f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
