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

from apreqel import pipeline
from apreqel.console.terminal import Reporter
from apreqel.device.real_runs import time_file
from apreqel.llama import engine
from apreqel.model.qtypes import lookup
from apreqel.sensitivity.bench import opened_bench, scratch_copy
from apreqel.sensitivity.damage import DamageModel
from apreqel.sensitivity.measure import ProbeSettings
from apreqel.sensitivity.measurement import require_probed_model
from apreqel.sensitivity.texts import TokenSet, bundled_texts, chunks_of, read_text, spread


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--workdir", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--pairs", type=int, default=60)
    args = parser.parse_args()
    with pipeline.open_workspace(
        args.model, folder=args.workdir, allow_requantize=True, progress=Reporter()
    ) as space:
        probed = require_probed_model(space)
        tensors = probed.sensitivity.tensors
        pairs = [
            (name, type_name)
            for name, tensor in tensors.items()
            for type_name in tensor.errors.weights
            if type_name not in tensor.probes
        ]
        random = np.random.default_rng(0)
        chosen = [pairs[i] for i in random.choice(len(pairs), args.pairs, replace=False)]
        # Probes alone are compared with probes: what kernels add is left out.
        dequantised = DamageModel(
            {n: replace(t, errors=replace(t.errors, kernels={})) for n, t in tensors.items()}
        )
        with (
            scratch_copy(space) as scratch,
            engine.LoadedModel(scratch, patchable=True) as model,
        ):
            tokens = ProbeSettings().split(model, bundled_texts()).probe
            if args.text is not None:
                chunks = chunks_of(model, [read_text(args.text)], 64)
                chunks = chunks[spread(len(chunks), 32)]
                tokens = TokenSet.scored_from(4, args.text.name, chunks)
            with opened_bench(space, scratch, model, tokens, probed.imatrix) as bench:
                reference = bench.reference(tokens, scratch.parent)
                measured, seconds = [], []
                for i, (name, kind) in enumerate(chosen):
                    space.progress("probing", i, len(chosen))
                    started = time.perf_counter()
                    result = bench.probe(name, lookup(kind), reference)
                    seconds.append(time.perf_counter() - started)
                    measured.append(float(result.kld_nats.mean()))
                rates = []
                for _ in range(5):
                    started = time.perf_counter()
                    bench.probe(chosen[0][0], lookup("Q8_0"), reference)
                    probing_rate = tokens.tokens.size / (time.perf_counter() - started)
                    run, _ = time_file(space.model, space.n_threads, 512)
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
