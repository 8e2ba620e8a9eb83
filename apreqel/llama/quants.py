"""Quant types in ggml itself: weights to bytes and back, as in the real file."""

from __future__ import annotations

import numpy as np

from apreqel.arrays import Bytes, Floats
from apreqel.llama.library import ggml
from apreqel.model.qtypes import QuantType


def supports(qtype: QuantType) -> bool:
    """Whether this llama.cpp's ggml knows the type with the size that the registry gives."""
    try:
        traits = ggml().ggml_get_type_traits(qtype.ggml_id).contents
    except ValueError:
        return False
    same = (traits.blck_size, traits.type_size) == (qtype.block_size, qtype.block_bytes)
    return same and (not qtype.is_quantized or bool(traits.to_float))


def fake_quantize(
    weights: Floats, qtype: QuantType, imatrix: Floats | None, out: Floats | None = None
) -> Floats:
    """`weights` [rows, row length] as they read back from `qtype`; `imatrix` [row length].

    Goes through ggml itself, so that the values are those of the real file.
    """
    values = np.empty_like(weights) if out is None else out
    read_values(quantize_rows(weights, qtype, imatrix), qtype, values)
    return values


def quantize_rows(weights: Floats, qtype: QuantType, imatrix: Floats | None) -> Bytes:
    """Bytes of `weights` [rows, row length] in `qtype`; `imatrix` [row length]."""
    rows, row_length = weights.shape
    assert weights.dtype == np.float32 and weights.flags.c_contiguous
    packed = np.empty(qtype.size_bytes((row_length, rows)), np.uint8)
    weight_pointer = None if imatrix is None else imatrix.ctypes.data
    ggml().ggml_quantize_chunk(
        qtype.ggml_id, weights.ctypes.data, packed.ctypes.data, 0, rows, row_length, weight_pointer
    )
    return packed


def read_values(packed: Bytes, qtype: QuantType, out: Floats) -> None:
    """Dequantise whole blocks into `out` (any shape of as many weights as `packed` holds)."""
    if qtype.name in ("F32", "F16"):
        out.reshape(-1)[:] = packed.reshape(-1).view(f"f{qtype.block_bytes}")
    elif qtype.name == "BF16":
        wide = packed.reshape(-1).view(np.uint16).astype(np.uint32) << 16
        out.reshape(-1)[:] = wide.view(np.float32)
    else:
        traits = ggml().ggml_get_type_traits(qtype.ggml_id).contents
        traits.to_float(packed.ctypes.data, out.ctypes.data, out.size)
