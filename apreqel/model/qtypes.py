"""The open registry of GGUF quant types: what a block holds and what it costs.

Sizes come from gguf-py's `GGML_QUANT_SIZES`; what a type needs and how its CPU kernel
treats activations comes from llama.cpp (`ggml.c`, `llama-quant.cpp`, `ggml-cpu.c`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache

from apreqel.errors import UsageError, printable

FLOAT_TYPES = ("F32", "F16", "BF16")

# What llama.cpp's -ctk and -ctv take, and its CPU kernels of flash attention read.
KV_TYPES = ("F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "IQ4_NL")
USUAL_CACHES = ("F16", "F16")  # of K and V, where nothing is said

# llama.cpp never stores weights in these: activations inside kernels, or plain numbers.
_NOT_FOR_WEIGHTS = frozenset({"Q8_1", "Q8_K", "I8", "I16", "I32", "I64", "F64"})

# ggml_quantize_requires_imatrix (ggml.c) and tensor_requires_imatrix (llama-quant.cpp).
_NEEDS_IMATRIX = frozenset({"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS"})

# |w - q(w)|^2 / |w|^2 of normally distributed weights as ggml rounds them, without an imatrix but
# for types that need one: how close types are where no model was probed. A test measures them.
TYPICAL_ERRORS: Mapping[str, float] = {
    "F32": 0.0, "F16": 4.28e-8, "BF16": 2.75e-6, "Q8_0": 2.88e-5, "Q6_K": 3.16e-4,
    "Q5_K": 1.32e-3, "Q5_1": 1.45e-3, "Q5_0": 1.83e-3, "Q4_K": 5.11e-3, "IQ4_NL": 5.85e-3,
    "IQ4_XS": 5.93e-3, "Q4_1": 6.12e-3, "Q4_0": 7.44e-3, "NVFP4": 8.99e-3, "MXFP4": 1.34e-2,
    "Q3_K": 2.29e-2, "IQ3_S": 2.76e-2, "IQ3_XXS": 3.32e-2, "IQ2_S": 6.22e-2, "Q2_K": 8.77e-2,
    "IQ2_XS": 9.06e-2, "IQ2_XXS": 0.119, "IQ1_M": 0.206, "IQ1_S": 0.237, "Q1_0": 0.360,
    "TQ1_0": 0.654, "TQ2_0": 0.654,
}  # fmt: skip


@dataclass(frozen=True)
class QuantType:
    """One ggml type. `block_size` weights take `block_bytes` bytes; a row is whole blocks."""

    name: str
    ggml_id: int
    block_size: int
    block_bytes: int

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.block_bytes / self.block_size

    @property
    def is_quantized(self) -> bool:
        return self.block_size > 1

    @property
    def for_weights(self) -> bool:
        """Whether llama.cpp can hold a weight matrix in this type."""
        return self.name not in _NOT_FOR_WEIGHTS

    @property
    def needs_imatrix(self) -> bool:
        return self.name in _NEEDS_IMATRIX

    @property
    def activation(self) -> str:
        """The type in which ggml's CPU kernel takes the activations (`vec_dot_type`)."""
        if not self.is_quantized:
            return self.name
        if self.block_size == 256:
            return "Q8_K"
        return "Q8_1" if self.name in ("Q4_1", "Q5_1") else "Q8_0"

    def holds_row(self, row_length: int) -> bool:
        return row_length % self.block_size == 0

    def size_bytes(self, shape: tuple[int, ...]) -> int:
        """Exact bytes of a ggml shape, row length first. Raises ValueError for parts of blocks."""
        if not self.holds_row(shape[0]):
            raise ValueError(f"{self.name} cannot hold rows of {shape[0]}")
        return math.prod(shape) // self.block_size * self.block_bytes


@lru_cache(maxsize=1)
def registry() -> Mapping[str, QuantType]:
    """All types that the installed gguf-py knows, by name, in order of their ggml id."""
    from gguf.constants import GGML_QUANT_SIZES

    by_id = sorted(GGML_QUANT_SIZES.items(), key=lambda item: int(item[0]))
    return {kind.name: QuantType(kind.name, int(kind), *sizes) for kind, sizes in by_id}


@lru_cache(maxsize=1)
def by_id() -> Mapping[int, QuantType]:
    return {qtype.ggml_id: qtype for qtype in registry().values()}


def lookup(name: str) -> QuantType:
    """The type of this name, upper or lower case. Raises UsageError naming what exists."""
    found = registry().get(name.upper())
    if found is None:
        known = ", ".join(q.name for q in registry().values() if q.for_weights)
        raise UsageError(f"quant type '{printable(name)}' is unknown; there are {known}")
    return found


def nearest(names: Iterable[str], bits_per_weight: float) -> str:
    """Of these types the nearest in bits; of equally near ones the larger, then the older."""

    def distance(name: str) -> tuple[float, float, int]:
        own = registry()[name].bits_per_weight
        return abs(own - bits_per_weight), -own, registry()[name].ggml_id

    return min(names, key=distance)
