"""Predicted against real peak memory of llama.cpp, each run in a process of its own.

    python tools/bench/memory_prediction.py MODEL.gguf

MODEL must have been profiled. Uniform and mixed maps, with contexts of 512 and 4096 filled.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from speed_prediction import mixed_plans

from apreqel.device import memory, shapes, store
from apreqel.device.threads import default_threads
from apreqel.llama.footprint import measure_footprint
from apreqel.model.inventory import read_inventory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--workdir", type=Path)
    args = parser.parse_args()
    inventory = read_inventory(args.model)
    known = store.stored_profile(default_threads())
    if known is None or not known.covers(inventory):
        raise SystemExit(f"{args.model}: run apreqel profile first")
    maps = {
        name: found[0]
        for name in ("Q4_0", "Q8_0", "Q5_1", "F16")
        if (found := known.nearest_types(inventory, name))
    }
    maps |= mixed_plans(inventory, 4)
    worst = 0.0
    with tempfile.TemporaryDirectory(prefix="memory-", dir=args.workdir) as folder:
        path = Path(folder) / "shapes.gguf"
        for label, types in maps.items():
            shapes.write_shapes(inventory, types, path)
            for n_ctx in (512, 4096):
                predicted = memory.memory_use(
                    known, inventory, types, path.stat().st_size, n_ctx
                ).total_bytes
                real = measure_footprint(path, n_ctx, n_ctx, known.n_threads)
                error = predicted / real - 1
                worst = max(worst, abs(error))
                print(
                    f"{label:10} context {n_ctx:5}: predicted {predicted / 1e6:7.1f} MB, real "
                    f"{real / 1e6:7.1f} MB ({100 * error:+.1f}%)",
                    flush=True,
                )
    print(f"worst error {100 * worst:.1f}%")


if __name__ == "__main__":
    main()
