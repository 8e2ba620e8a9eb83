"""`apreqel inspect`: a model's facts, its tensors by role, and the file's size in each type."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from apreqel.console.terminal import size, table, write
from apreqel.model.inventory import Inventory
from apreqel.model.qtypes import lookup, registry

# What --json gives under the names that they have in an Inventory and in a Tensor.
_FACTS = (
    *("name", "architecture", "n_layers", "n_weights", "size_bytes", "bits_per_weight"),
    *("vocabulary_size", "context_length", "n_experts", "n_experts_used", "tied_embeddings"),
)
_TENSOR_FACTS = ("role", "layer", "size_bytes", "legal_types", "keep_reason")


def show(inventory: Inventory) -> None:
    tied = "tied: the output head is the token embedding" if inventory.tied_embeddings else "untied"
    experts = f", {inventory.n_experts} experts" if inventory.n_experts else ""
    if inventory.n_experts_used:
        experts += f" ({inventory.n_experts_used} active a token)"
    write(
        f"{inventory.name}: {inventory.architecture}, {inventory.n_layers} layers{experts}, "
        f"{inventory.n_weights / 1e6:.1f} M weights, {size(inventory.size_bytes)}, "
        f"{inventory.bits_per_weight:.2f} bits per weight\n"
        f"vocabulary {inventory.vocabulary_size}, context {inventory.context_length}, "
        f"embeddings {tied}"
    )
    if len(inventory.files) > 1:
        write(f"split into {len(inventory.files)} files")
    if inventory.is_quantized_source:
        write("The source is quantised already; what that lost stays lost and is not counted.")
    roles = _role_rows(inventory)
    write(table("role", "tensors", "shape", "type", "bytes", "can be", rows=roles))
    n, by_type = len(inventory.quantizable), bytes_by_type(inventory)
    bits = {name: lookup(name).bits_per_weight for name in by_type}
    rows = (
        (t, f"{bits[t]:.3f}", f"{by_type[t]['tensors']} of {n}", f"{by_type[t]['file_bytes']:,}")
        for t in sorted(by_type, key=lambda t: bits[t])
    )
    columns = "type", "bits/weight", "tensors that can hold it", "file with those in it, bytes"
    write(table(*columns, rows=rows))


def _role_rows(inventory: Inventory) -> Iterator[Sequence[str]]:
    groups = Counter((t.role, t.shape, t.qtype.name, t.keep_reason) for t in inventory.tensors)
    for (role, shape, type_name, reason), count in groups.items():
        one = next(t for t in inventory.tensors if (t.role, t.shape) == (role, shape))
        options = f"kept: {reason}" if reason else f"{len(one.legal_types)} types"
        if not reason and one.row_length % 256:
            options += f" (rows of {one.row_length}: no K- or IQ-types but IQ4_NL)"
        dims = " x ".join(map(str, shape))
        yield role, str(count), dims, type_name, f"{count * one.size_bytes:,}", options


def as_json(inventory: Inventory) -> dict[str, Any]:
    return {
        "files": inventory.files,
        **{name: getattr(inventory, name) for name in _FACTS},
        "quantized_source": inventory.is_quantized_source,
        "bytes_by_type": bytes_by_type(inventory),
        "tensors": [
            {"name": t.name, "shape": t.shape, "type": t.qtype.name}
            | {name: getattr(t, name) for name in _TENSOR_FACTS}
            for t in inventory.tensors
        ],
    }


def bytes_by_type(inventory: Inventory) -> dict[str, dict[str, int]]:
    """For each type: how many tensors can hold it, and the file's bytes with those in it."""
    result = {}
    for name in registry():
        holders = [t for t in inventory.quantizable if name in t.legal_types]
        if holders:
            types = inventory.types | {t.name: name for t in holders}
            result[name] = {"tensors": len(holders), "file_bytes": inventory.output_size(types)}
    return result
