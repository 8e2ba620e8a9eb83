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
from apreqel.console import Reporter
from apreqel.plan import planner
from apreqel.plan.request import PlanRequest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--workdir", type=Path)
    parser.add_argument("--plans", type=int, default=10)
    args = parser.parse_args()
    with pipeline.open_workspace(
        args.model, workdir=args.workdir, allow_requantize=True, on_progress=Reporter()
    ) as space:
        state, imatrix = pipeline.require_measured(space)
        errors, held = [], []
        with pipeline.trials_of(space, state, imatrix) as trials:
            for bits in np.linspace(4.6, 8.0, args.plans):
                request = PlanRequest("accuracy", target_bpw=float(bits))
                made = planner.Planner(
                    space.inventory, state, imatrix, request, space.folder
                ).plan()
                real = trials.measure("tried", made.types).kld
                low, high = made.kld_interval
                errors.append(made.kld_nats / real.mean - 1)
                held.append(low <= real.mean <= high)
                print(
                    f"{bits:.2f} bits per weight: predicted {made.kld_nats:.5f} ({low:.5f} to "
                    f"{high:.5f}), measured {real.mean:.5f} ({errors[-1]:+.1%})",
                    flush=True,
                )
    print(
        f"median error {np.median(np.abs(errors)):.1%}, worst {np.max(np.abs(errors)):.1%}; "
        f"intervals hold {sum(held)} of {len(held)}"
    )


if __name__ == "__main__":
    main()
