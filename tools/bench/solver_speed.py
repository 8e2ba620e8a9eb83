"""Time the solver on made-up models: tensors of many sizes, damages as 4 ** -bits with noise.

python tools/bench/solver_speed.py [--tensors 1000] [--types 20] [--limits 1]

Limits beyond the first are on seconds: every type has a rate of its own, and a plan must be a
twentieth of the way from the rates' own optimum to those of the closest plan.
"""

from __future__ import annotations

import argparse

import numpy as np

from apreqel.solver.knapsack import Limit, solve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tensors", type=int, default=1000)
    parser.add_argument("--types", type=int, default=20)
    parser.add_argument("--limits", type=int, default=1)
    args = parser.parse_args()
    for seed in range(3):
        random = np.random.default_rng(seed)
        weights = random.integers(1, 50, args.tensors) * 4096
        bits = np.sort(random.uniform(2, 9, args.types))
        sizes = [w * bits / 8 // 32 * 32 for w in weights]
        noise = np.exp(random.normal(0, 0.3, (args.tensors, args.types)))
        damages = list(np.exp(random.normal(0, 2, args.tensors))[:, None] * 4.0**-bits * noise)
        for bits_per_weight in (3, 4.5, 6, 8):
            limit = Limit("size", sizes, bits_per_weight / 8 * float(weights.sum()))
            limits, closest = [limit], solve(damages, [limit])
            for _ in range(1, args.limits):
                rates = random.uniform(0.5, 2, args.types)
                seconds = [w * rates for w in weights]
                now = sum(row[c] for row, c in zip(seconds, closest.choice, strict=True))
                least = sum(row.min() for row in seconds)
                limits.append(Limit("seconds", seconds, float(0.05 * least + 0.95 * now)))
            solution = solve(damages, limits)
            print(
                f"{args.tensors} tensors, {args.types} types, {bits_per_weight} bits per weight: "
                f"{solution.seconds:.2f} s, gap {solution.gap:.1e}"
            )


if __name__ == "__main__":
    main()
