"""Time the C quantiser against llama_model_quantize, and its memory on a model of any size.

    python tools/bench/quantize_speed.py MODEL.gguf [--preset Q4_K_M] [--repetitions 5]
    python tools/bench/quantize_speed.py --synthetic 1000      # MB, F16, made in a temp folder

Runs are taken in turn, so that the machine's drift meets both alike; the ratio is of pairs.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from apreqel import quantize
from apreqel.llama.stock import stock_quantize, stock_types
from apreqel.model.gguf_header import STRING, UINT32, TensorRecord, encode_header, encode_kv
from apreqel.model.imatrix import Imatrix, ImatrixEntry
from apreqel.model.inventory import Inventory, read_inventory
from apreqel.model.qtypes import lookup


def synthetic(path: Path, megabytes: int) -> Path:
    """A llama-shaped F16 file of this size with rows of 4096 and 14336, of random weights."""
    layer = [("attn_q", 4096, 4096), ("ffn_up", 4096, 14336), ("ffn_down", 14336, 4096)]
    per_layer = sum(2 * a * b for _, a, b in layer)
    records, offset, sizes = [], 0, []
    for i in range(max(1, megabytes * 10**6 // per_layer)):
        for role, row, rows in layer:
            records.append(TensorRecord(f"blk.{i}.{role}.weight", (row, rows), 1, offset))
            offset += 2 * row * rows
            sizes.append(row * rows)
    metadata = [
        encode_kv("general.architecture", STRING, "llama"),
        encode_kv("llama.block_count", UINT32, len(records) // 3),
        encode_kv("llama.context_length", UINT32, 2048),
        encode_kv("llama.embedding_length", UINT32, 4096),
        encode_kv("llama.feed_forward_length", UINT32, 14336),
        encode_kv("llama.attention.head_count", UINT32, 32),
        encode_kv("llama.attention.layer_norm_rms_epsilon", 6, 1e-5),
    ]
    random = np.random.default_rng(0)
    with open(path, "wb") as file:
        file.write(encode_header(metadata, records, 32))
        for n in sizes:
            file.write(random.standard_normal(n, np.float32).astype(np.float16).tobytes())
    return path


def imatrix_of(inventory: Inventory) -> Imatrix:
    random = np.random.default_rng(1)
    return Imatrix(
        {
            t.name: ImatrixEntry(
                np.exp(random.normal(0, 1, (t.n_experts, t.row_length))).astype(np.float32),
                np.ones(t.n_experts, np.float32),
            )
            for t in inventory.quantizable
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--synthetic", type=int, help="MB")
    parser.add_argument("--preset", default="Q4_K_M")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = args.model or synthetic(folder / "model.gguf", args.synthetic)
        inventory = read_inventory(model)
        imatrix = imatrix_of(inventory)
        types = stock_types(model, args.preset, has_imatrix_for=list(imatrix.entries))
        kinds = [(f"^{t.name}$", lookup(types[t.name]).ggml_id) for t in inventory.quantizable]
        weights = {n: w for n in imatrix.entries if (w := imatrix.weights(n)) is not None}
        ours, theirs, memory = [], [], 0
        for i in range(args.repetitions + 1):
            started = time.perf_counter()
            result = quantize.quantize_model(
                inventory, types, folder / "a.gguf", imatrix=imatrix, n_threads=args.threads,
                force=True,
            )  # fmt: skip
            middle = time.perf_counter()
            stock_quantize(
                model, folder / "b.gguf", "Q8_0", imatrix=weights, n_threads=args.threads,
                tensor_types=kinds,
            )  # fmt: skip
            if i:  # the first brings the file into memory
                ours.append(middle - started)
                theirs.append(time.perf_counter() - middle)
            memory = max(memory, result.peak_rss_bytes)
    ratios = sorted(a / b for a, b in zip(ours, theirs, strict=True))
    print(f"{inventory.size_bytes / 1e6:.0f} MB to {args.preset}, {args.threads} threads")
    print(f"apreqel              {statistics.median(ours):.2f} s (checking included)")
    print(f"llama_model_quantize {statistics.median(theirs):.2f} s")
    print(
        f"ratio, pair by pair  {statistics.median(ratios):.3f} ({ratios[0]:.3f}–{ratios[-1]:.3f})"
    )
    print(f"peak memory of the C program {memory / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
