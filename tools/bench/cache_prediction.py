"""Predicted against measured tokens/s of a file with its KV cache in other types than F16.

    python tools/bench/cache_prediction.py MODEL.gguf [--context 2048] [--caches Q8_0/Q5_0 ...]

The device is profiled first, for the types that this needs. Then llama.cpp takes a prompt that
fills the context but for a short answer, with each pair of types in turn.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from statistics import median

from apreqel.console.terminal import Reporter
from apreqel.device.machine import pinned
from apreqel.device.real_runs import forget_pages
from apreqel.device.threads import default_threads
from apreqel.device.timing import measure_profile
from apreqel.llama import engine
from apreqel.model.inventory import read_inventory
from apreqel.model.qtypes import lookup
from apreqel.workspace import Workspace

_ANSWER = 32
_PAIRS = ("F16/F16", "Q8_0/Q8_0", "Q8_0/Q5_0", "F16/Q4_0", "BF16/IQ4_NL")


def measured(path: Path, n_ctx: int, n_threads: int, caches: tuple[str, ...]) -> tuple[float, ...]:
    """Seconds per token of the prompt and of the answer."""
    k, v = map(lookup, caches)
    forget_pages(path)
    with (
        engine.LoadedModel(path) as model,
        model.context(n_ctx, 1, n_threads, as_users_run=True, cache_types=(k, v)) as context,
    ):
        context.seconds(8, 2)
        prompt, answer = context.seconds(n_ctx - _ANSWER, _ANSWER)
    return prompt / (n_ctx - _ANSWER), answer / _ANSWER


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--caches", nargs="+", default=_PAIRS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--workdir", type=Path)
    args = parser.parse_args()
    inventory, report = read_inventory(args.model), Reporter()
    pairs = [tuple(pair.upper().split("/")) for pair in args.caches]
    own = inventory.types
    needed = {"F16", "Q8_0", *own.values(), *(kind for pair in pairs for kind in pair)}
    with tempfile.TemporaryDirectory(prefix="caches-", dir=args.workdir) as folder:
        space = Workspace(inventory, "", Path(folder), args.threads, progress=report)
        profile = measure_profile(space, types=sorted(needed))
    runs: dict[tuple[str, ...], list[tuple[float, ...]]] = {pair: [] for pair in pairs}
    with pinned(args.threads):
        for i in range(args.rounds):
            for pair in pairs:
                report(f"llama.cpp with {'/'.join(pair)}", i, args.rounds)
                runs[pair].append(measured(args.model, args.context, args.threads, pair))
    report.finish()
    print(profile.notes[-1])
    n_prompt = args.context - _ANSWER
    print(f"{'K/V':14}     decode: predicted  measured  error     prefill: ...")
    for pair in pairs:
        predicted = profile.predict(
            inventory, own, n_prompt + _ANSWER // 2, n_prompt=n_prompt, caches=pair
        )
        assert predicted is not None
        prefill, decode = (median(column) for column in zip(*runs[pair], strict=True))
        print(f"{'/'.join(pair):14}", end="")
        for guess, found in ((predicted.decode, decode), (predicted.prefill, prefill)):
            error = 100 * (guess.value * found - 1)
            print(f"  {guess.value:20.1f} {1 / found:9.1f} {error:+6.1f}%", end="")
        print()


if __name__ == "__main__":
    main()
