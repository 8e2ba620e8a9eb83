"""Predicted against measured tokens/s, on real files of mixed types that no fit has seen.

    python tools/bench/speed_prediction.py MODEL.gguf [--plans 12]

Half of the plans give every tensor a type of its own at random, half every role. Their files are
made by the quantiser and run by llama.cpp in the same rounds in which the device is profiled.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from pathlib import Path
from statistics import median

from apreqel import quantize
from apreqel.console.terminal import Reporter
from apreqel.device.real_runs import RealRun
from apreqel.device.shapes import timed_types
from apreqel.device.threads import default_threads
from apreqel.device.timing import measure_profile
from apreqel.model.inventory import Inventory, read_inventory
from apreqel.model.qtypes import lookup
from apreqel.workspace import Workspace


def mixed_plans(inventory: Inventory, count: int) -> dict[str, dict[str, str]]:
    """Maps of types at random (seeded), without those that need an imatrix."""
    chance = random.Random(1)
    usable = {q.name for q in timed_types(inventory, None) if not q.needs_imatrix}
    plans = {}
    for i in range(count):
        types = inventory.types
        few = chance.sample(sorted(usable), 3)
        by_role: dict[str, str] = {}
        for tensor in inventory.quantizable:
            legal = [t for t in tensor.legal_types if t in usable]
            preferred = [t for t in legal if t in few] or legal
            if i % 2:
                types[tensor.name] = chance.choice(preferred)
            else:
                types[tensor.name] = by_role.setdefault(tensor.role, chance.choice(legal))
        plans[f"{'roles' if i % 2 == 0 else 'random'} {i + 1}"] = types
    return plans


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--plans", type=int, default=12)
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--workdir", type=Path)
    args = parser.parse_args()
    inventory = read_inventory(args.model)
    plans = mixed_plans(inventory, args.plans)
    with tempfile.TemporaryDirectory(prefix="speed-", dir=args.workdir) as name:
        folder, report = Path(name), Reporter()
        for label, types in plans.items():
            report(f"writing {label}", 0, 0)
            quantize.quantize_model(
                inventory, types, folder / f"{label}.gguf", n_threads=args.threads
            )
        runs: dict[str, RealRun] = {}
        profile = measure_profile(
            Workspace(inventory, "", folder, args.threads, progress=report),
            also={label: folder / f"{label}.gguf" for label in plans},
            also_runs=runs,
        )
        report.finish()
    print(profile.notes[-1])
    overhead = profile.overhead(inventory)
    print(
        f"decode = {overhead.decode_scale:.3f} x kernels + {1e3 * overhead.decode_rest:.3f} ms + "
        f"{1e6 * overhead.attention:.2f} us x context; "
        f"prefill = {overhead.prefill_scale:.3f} x kernels + {1e3 * overhead.prefill_rest:.3f} ms"
    )
    for label, anchor in overhead.anchors.items():
        print(
            f"anchor {label}: decode {1e3 * anchor.decode:.3f} ms (kernels "
            f"{1e3 * anchor.decode_kernels:.3f}), prefill {1e3 * anchor.prefill:.3f} ms (kernels "
            f"{1e3 * anchor.prefill_kernels:.3f})"
        )
    print(f"{'plan':12} bits/w   decode: predicted (95%)        measured  error   prefill: ...")
    errors: dict[str, list[float]] = {"decode": [], "prefill": []}
    for label, types in plans.items():
        predicted, run = profile.predict(inventory, types, n_context=24), runs[label]
        assert predicted is not None
        bits = 8 * sum(lookup(types[t.name]).size_bytes(t.shape) for t in inventory.tensors)
        print(f"{label:12} {bits / inventory.n_weights:6.3f} ", end="")
        for kind, found in (("decode", run.decode), ("prefill", run.prefill)):
            guess = getattr(predicted, kind)
            error = guess.value * found - 1
            errors[kind].append(abs(error))
            inside = " " if guess.low <= 1 / found <= guess.high else "!"
            print(
                f"  {guess.value:7.1f} ({guess.low:6.1f} to {guess.high:6.1f}) "
                f"{1 / found:8.1f}{inside} {100 * error:+6.1f}%",
                end="",
            )
        print()
    for kind, found_errors in errors.items():
        print(
            f"{kind}: median error {100 * median(found_errors):.1f}%, "
            f"worst {100 * max(found_errors):.1f}%"
        )


if __name__ == "__main__":
    main()
