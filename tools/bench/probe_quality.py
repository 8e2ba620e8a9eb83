"""How well damages are predicted that were not probed, and how fast probing is.

    python tools/bench/probe_quality.py MODEL.gguf [--pairs 60] [--text other.txt]

MODEL must have been probed. Random (tensor, type) pairs that were not probed are, on all chunks of
the probe text or on another text; then tokens/s of probing beside llama.cpp's own prefill.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr

from apreqel import llama, pipeline
from apreqel.console import Reporter
from apreqel.device import timing
from apreqel.model.qtypes import lookup
from apreqel.sensitivity import bench as probing
from apreqel.sensitivity import calibration
from apreqel.sensitivity.calibration import TokenSet
from apreqel.sensitivity.measure import ProbeSettings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--workdir", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--pairs", type=int, default=60)
    args = parser.parse_args()
    with pipeline.open_workspace(
        args.model, workdir=args.workdir, allow_requantize=True, on_progress=Reporter()
    ) as space:
        state, imatrix = pipeline.require_measured(space)
        pairs = [
            (name, kind)
            for name, tensor in state.tensors.items()
            for kind in tensor.errors.weights
            if kind not in tensor.probes
        ]
        random = np.random.default_rng(0)
        chosen = [pairs[i] for i in random.choice(len(pairs), args.pairs, replace=False)]
        # Probes alone are compared with probes: what kernels add is left out.
        tensors = {
            name: replace(t, errors=replace(t.errors, kernels={}))
            for name, t in state.tensors.items()
        }
        dequantised = replace(state, tensors=tensors, knots=()).model
        with (
            probing.scratch_copy(space.inventory, space.folder, space.n_threads) as scratch,
            llama.LoadedModel(scratch, patchable=True) as model,
        ):
            tokens = ProbeSettings().split(model, calibration.bundled_texts()).probe
            if args.text is not None:
                chunks = calibration.chunks_of(model, [calibration.read_text(args.text)], 64)
                chunks = chunks[calibration.spread(len(chunks), 32)]
                tokens = TokenSet.scored_from(4, args.text.name, chunks)
            with probing.opened_bench(
                space.inventory, scratch, model, tokens, imatrix, space.n_threads
            ) as bench:
                reference = bench.reference(tokens, scratch.parent)
                measured, seconds = [], []
                for i, (name, kind) in enumerate(chosen):
                    space.on_progress("probing", i, len(chosen))
                    started = time.perf_counter()
                    result = bench.probe(name, lookup(kind), reference)
                    seconds.append(time.perf_counter() - started)
                    measured.append(float(result.kld_nats.mean()))
                rates = []
                for _ in range(5):
                    started = time.perf_counter()
                    bench.probe(chosen[0][0], lookup("Q8_0"), reference)
                    probing_rate = tokens.tokens.size / (time.perf_counter() - started)
                    run, _ = timing.time_file(space.model, space.n_threads, 512)
                    rates.append((probing_rate, 1 / run.prefill))
    damages = [dequantised.damage(name, kind) for name, kind in chosen]
    predicted = np.array([d.nats for d in damages])
    found = np.array(measured)
    off = np.log(predicted / np.maximum(found, 1e-12))
    low, high = np.array([d.interval for d in damages]).T
    held = (low <= found) & (found <= high)
    print(f"{len(chosen)} pairs not probed, on {tokens.name}, {tokens.n_scored} tokens")
    print(f"rank correlation {spearmanr(predicted, found).statistic:.3f}")
    print(
        f"predicted / measured: median {np.exp(np.median(off)):.2f}, middle two thirds "
        f"{np.exp(np.quantile(off, 1 / 6)):.2f} to {np.exp(np.quantile(off, 5 / 6)):.2f}; "
        f"95% intervals hold {np.mean(held):.0%}"
    )
    ours, theirs = np.median(np.array(rates), axis=0)
    print(
        f"tokens/s: probing {ours:.0f} (with dequantised weights written and compared), "
        f"llama.cpp's prefill of 512 {theirs:.0f}: {ours / theirs:.2f}; the random probes' mean "
        f"{tokens.tokens.size / np.mean(seconds):.0f}"
    )


if __name__ == "__main__":
    main()
