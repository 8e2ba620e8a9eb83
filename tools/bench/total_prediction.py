"""Predicted against measured KL divergence of whole plans, as real files on text kept apart.

    python tools/bench/total_prediction.py MODEL.gguf [--plans 10]

MODEL must have been probed. Plans of sizes between those that probing tried; the model of damages
sees none of their files.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from apreqel import pipeline
from apreqel.console.terminal import Reporter
from apreqel.evaluate.real_files import FileBench
from apreqel.plan.make_plan import make_plan
from apreqel.plan.request import PlanRequest
from apreqel.plan.solve import solve_request
from apreqel.sensitivity.measurement import require_probed_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--workdir", type=Path)
    parser.add_argument("--plans", type=int, default=10)
    args = parser.parse_args()
    with pipeline.open_workspace(
        args.model, folder=args.workdir, allow_requantize=True, progress=Reporter()
    ) as space:
        probed = require_probed_model(space)
        errors, held = [], []
        with FileBench(probed) as bench:
            for bits in np.linspace(4.6, 8.0, args.plans):
                request = PlanRequest("accuracy", target_bpw=float(bits))
                planner = pipeline.planner_of(probed, request, None)
                made = make_plan(planner, solve_request(planner))
                real = bench.measure("tried", made.types).kld
                low, high = made.damage_interval
                errors.append(made.damage_nats / real.mean - 1)
                held.append(low <= real.mean <= high)
                print(
                    f"{bits:.2f} bits per weight: predicted {made.damage_nats:.5f} ({low:.5f} to "
                    f"{high:.5f}), measured {real.mean:.5f} ({errors[-1]:+.1%})",
                    flush=True,
                )
    print(
        f"median error {np.median(np.abs(errors)):.1%}, worst {np.max(np.abs(errors)):.1%}; "
        f"intervals hold {sum(held)} of {len(held)}"
    )


if __name__ == "__main__":
    main()
