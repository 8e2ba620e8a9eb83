"""Activations, shown to a listener as llama.cpp computes: inputs of weights, and hidden states.

Read out of ggml's own tensors while a graph is evaluated, after each node that was asked for.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from apreqel.arrays import Floats, Tokens
from apreqel.llama.library import GgmlTensor, ggml, readable

# Called with the weight's name, its activations [tokens, row length] and, for a mixture of
# experts, the chosen experts [tokens, experts used] (else None). Also with the hidden states
# [tokens, embedding length] that go into the first layer and come out of each: "l_out-0", ...
Listener = Callable[[str, Floats, Tokens | None], None]

# llama-graph.cpp names the embedding (scaled in Gemma) and what leaves each layer so.
_HIDDEN_STATE = re.compile(r"embd|l_out-[0-9]+")
_F32 = 0  # GGML_TYPE_F32


def show_node(pointer: int, listener: Listener | None) -> bool:
    """Show the node of a graph to `listener`; whether it is one to be shown.

    With None nothing is shown, nor read: so ggml asks before it computes the node.
    """
    node = _tensor_at(pointer)
    name, operation = readable(node.name), readable(ggml().ggml_op_name(node.op))
    if _HIDDEN_STATE.fullmatch(name):
        if listener is not None:
            listener(name, _values(pointer, np.float32), None)
        return True
    if operation not in ("MUL_MAT", "MUL_MAT_ID"):
        return False
    weight = readable(_tensor_at(node.src[0]).name)
    if not weight.endswith(".weight") or _tensor_at(node.src[1]).type != _F32:
        return False
    if listener is not None:
        experts = _values(node.src[2], np.int32)[0, 0] if operation == "MUL_MAT_ID" else None
        listener(weight, _values(node.src[1], np.float32), experts)
    return True


def _tensor_at(pointer: int) -> Any:
    return ctypes.cast(pointer, ctypes.POINTER(GgmlTensor)).contents


def _values(pointer: int, kind: type[np.generic]) -> Any:
    """A tensor's values as a numpy array, its ggml dimensions reversed; copied off a device."""
    tensor, dtype = _tensor_at(pointer), np.dtype(kind)
    shape, strides = tuple(tensor.ne)[::-1], tuple(tensor.nb)[::-1]
    extent = sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) + dtype.itemsize
    # A view has the buffer of what it looks into.
    buffer = _tensor_at(tensor.view_src).buffer if tensor.view_src else tensor.buffer
    if ggml().ggml_backend_buffer_is_host(buffer):
        raw = (ctypes.c_char * extent).from_address(tensor.data)
    else:
        raw = (ctypes.c_char * extent)()
        ggml().ggml_backend_tensor_get(pointer, raw, 0, extent)
    return np.ndarray(shape, dtype, memoryview(raw), strides=strides)
