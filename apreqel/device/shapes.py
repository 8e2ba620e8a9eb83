"""What a model multiplies and attends over, and files of such shapes without any weights.

Kernels are timed by shape, so tensors of one shape share a timing, in one model and across models.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from apreqel.llama import quants
from apreqel.llama.graphs import HeadShape, MatrixShape
from apreqel.model.gguf_header import (
    DEFAULT_ALIGNMENT,
    FLOAT32,
    STRING,
    UINT32,
    encode_header,
    encode_kv,
    records_of,
)
from apreqel.model.inventory import read_inventory
from apreqel.model.qtypes import KV_TYPES, lookup, registry

if TYPE_CHECKING:
    from apreqel.model.inventory import Inventory, Tensor
    from apreqel.model.qtypes import QuantType

# Attention is a dot product with K and a sum of V: its seconds add up, from pairs with this type.
# Where neither is quantised they do not (F16 has kernels of its own): such pairs are all timed.
CACHE_PIVOT = "Q8_0"

Shape = MatrixShape | HeadShape


def matrix_shape(tensor: Tensor, inventory: Inventory) -> MatrixShape | None:
    """The product that a tensor takes part in; None for an embedding that is only looked up."""
    if tensor.role == "token_embd" and not inventory.tied_embeddings:
        return None
    if tensor.n_experts < 2:
        return MatrixShape(tensor.row_length, tensor.n_rows)
    used = max(1, min(inventory.n_experts_used, tensor.n_experts))
    # What goes down is each expert's own.
    inputs = used if "down" in tensor.role else 1
    return MatrixShape(tensor.row_length, tensor.shape[1], tensor.n_experts, used, inputs)


def parse_key(key: str) -> MatrixShape:
    """The inverse of MatrixShape.key. Raises ValueError."""
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)(?: (\d+)/(\d+) from (\d+))?", key)
    if not found:
        raise ValueError(f"shape {key!r}")
    length, rows, used, experts, inputs = (int(number or 0) for number in found.groups())
    return MatrixShape(length, rows, experts, used, inputs if experts else 1)


def shapes_of(inventory: Inventory) -> dict[MatrixShape, list[Tensor]]:
    """The distinct products of a model with their tensors."""
    found: dict[MatrixShape, list[Tensor]] = {}
    for tensor in inventory.quantizable:
        if shape := matrix_shape(tensor, inventory):
            found.setdefault(shape, []).append(tensor)
    return found


def timed_types(inventory: Inventory, types: Sequence[str] | None) -> Iterator[QuantType]:
    """Types that some tensor can hold and this llama.cpp knows, largest first."""
    holdable = {t for tensor in inventory.quantizable for t in tensor.legal_types}
    for qtype in sorted(registry().values(), key=lambda q: -q.bits_per_weight):
        asked = types is None or qtype.name in types
        if asked and qtype.name in holdable and quants.supports(qtype):
            yield qtype


def head_shape(inventory: Inventory) -> HeadShape | None:
    """Attention of one of the model's layers, as most of them have it."""
    return HeadShape(*found) if (found := inventory.head_shape) else None


def timed_caches(shape: HeadShape) -> list[tuple[str, str]]:
    """Types of K and V to time, of which the seconds of all others follow."""
    return [
        (k.name, v.name)
        for k in map(lookup, KV_TYPES)
        for v in map(lookup, KV_TYPES)
        if k.holds_row(shape.k_length) and v.holds_row(shape.v_length)
        if CACHE_PIVOT in (k.name, v.name) or not (k.is_quantized or v.is_quantized)
    ]


def timed_shapes(inventory: Inventory, types: Sequence[str] | None) -> dict[str, list[Shape]]:
    """What is timed: by type its products, by K/V attention; of all types where `types` is None."""
    found: dict[str, list[Shape]] = {}
    for qtype in timed_types(inventory, types):
        for shape, tensors in shapes_of(inventory).items():
            if any(qtype.name in t.legal_types for t in tensors):
                found.setdefault(qtype.name, []).append(shape)
    if heads := head_shape(inventory):
        for k, v in timed_caches(heads):
            if types is None or {k, v} <= set(types):
                found[f"{k}/{v}"] = [heads]
    return found


# --- files of zeros ------------------------------------------------------------------------------


def write_shapes(inventory: Inventory, types: Mapping[str, str], path: Path) -> None:
    """A loadable file of these types whose weights are all zero; it takes no disk space."""
    path.write_bytes(inventory.output_header(types)[0])
    os.truncate(path, inventory.output_size(types))


@contextmanager
def standard_model() -> Iterator[Inventory]:
    """A llama without a vocabulary, with shapes of small models that people run."""
    n_layer, n_embd, n_kv, n_ff, n_vocab = 8, 1024, 256, 3072, 16384
    metadata: list[tuple[str, int, str | int | float]] = [
        ("general.architecture", STRING, "llama"),
        ("general.name", STRING, "standard shapes"),
        ("llama.block_count", UINT32, n_layer),
        ("llama.context_length", UINT32, 4096),
        ("llama.embedding_length", UINT32, n_embd),
        ("llama.feed_forward_length", UINT32, n_ff),
        ("llama.attention.head_count", UINT32, n_embd // 64),
        ("llama.attention.head_count_kv", UINT32, n_kv // 64),
        ("llama.attention.layer_norm_rms_epsilon", FLOAT32, 1e-5),
        ("llama.vocab_size", UINT32, n_vocab),
        ("tokenizer.ggml.model", STRING, "none"),
    ]
    layer: dict[tuple[int, ...], Sequence[str]] = {
        (n_embd,): ("attn_norm", "ffn_norm"),
        (n_embd, n_embd): ("attn_q", "attn_output"),
        (n_embd, n_kv): ("attn_k", "attn_v"),
        (n_embd, n_ff): ("ffn_gate", "ffn_up"),
        (n_ff, n_embd): ("ffn_down",),
    }
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (n_embd, n_vocab), "output_norm": (n_embd,)}
    for i in range(n_layer):
        shapes |= {f"blk.{i}.{name}": shape for shape, names in layer.items() for name in names}
    kinds = {1: lookup("F32"), 2: lookup("F16")}
    rows = ((f"{name}.weight", shape, kinds[len(shape)]) for name, shape in shapes.items())
    records, size = records_of(rows, DEFAULT_ALIGNMENT)
    header = encode_header([encode_kv(*pair) for pair in metadata], records, DEFAULT_ALIGNMENT)
    with tempfile.TemporaryDirectory(prefix="apreqel-") as folder:
        path = Path(folder) / "standard.gguf"
        path.write_bytes(header)
        os.truncate(path, len(header) + size)
        yield read_inventory(path)
