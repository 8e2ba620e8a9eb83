"""Graphs in ggml, as llama.cpp would build them: matrix products, and attention over a KV cache.

Weights may be those of a mixture's experts. Attention (flash) reads KV caches of `CACHED_TOKENS`
tokens, laid out as llama.cpp's are.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

import numpy as np
import numpy.typing as npt

from apreqel.errors import EngineError
from apreqel.llama.library import GgmlInitParams, ggml
from apreqel.model.qtypes import QuantType

_F32, _F16, _I32 = 0, 1, 26  # ggml types

# So many tokens are looked back at when attention is timed: ggml splits an F16 cache among threads
# from 512 on.
CACHED_TOKENS = 512
TENSORS_EACH = 6  # at most, of one operation: K, V and queries, turned, and the result
_PRECISION_F32 = 10  # GGML_PREC_F32, as llama.cpp asks for
_ANY_SCALE = 0.1  # of queries times keys; so that, of noise, many tokens count

# What a graph computes, and the tensors it reads with their values, which are made when asked for.
Operations = tuple[list[int], Iterator[tuple[int, npt.NDArray[Any]]]]


@dataclass(frozen=True, order=True)
class MatrixShape:
    """One weight matrix, or the stacked ones of a mixture's experts.

    `inputs_per_token` is 1 where all chosen experts read the same activations (gate, up), and
    `n_used` where each has its own (down).
    """

    row_length: int
    n_rows: int
    n_experts: int = 0
    n_used: int = 0
    inputs_per_token: int = 1

    @property
    def key(self) -> str:
        """'576x1536', or '576x1536 8/64 from 1' with 8 of 64 experts."""
        dense = f"{self.row_length}x{self.n_rows}"
        if not self.n_experts:
            return dense
        return f"{dense} {self.n_used}/{self.n_experts} from {self.inputs_per_token}"

    @property
    def weights_read(self) -> int:
        """Weights that one token multiplies."""
        return self.row_length * self.n_rows * max(1, self.n_used)


@dataclass(frozen=True, order=True)
class HeadShape:
    """Attention of one layer: the length of a key and of a value, and the numbers of heads."""

    k_length: int
    v_length: int
    n_heads: int
    n_kv_heads: int

    @property
    def key(self) -> str:
        """'64/64 9/3': keys and values of 64, nine heads over three of keys and values."""
        return f"{self.k_length}/{self.v_length} {self.n_heads}/{self.n_kv_heads}"


@contextmanager
def tensor_context(n_tensors: int) -> Iterator[int]:
    """A ggml context for so many tensors without memory, and a graph of them."""
    g = ggml()
    needed = g.ggml_tensor_overhead() * (n_tensors + 1)
    needed += g.ggml_graph_overhead_custom(n_tensors, False)
    context = g.ggml_init(GgmlInitParams(needed, None, True))
    if not context:
        raise EngineError("ggml_init failed")
    try:
        yield context
    finally:
        g.ggml_free(context)


@contextmanager
def allocated(context: int, buffer_type: int, what: str) -> Iterator[int]:
    """Memory of that type for every tensor of the context that has none. Raises EngineError."""
    buffer = ggml().ggml_backend_alloc_ctx_tensors_from_buft(context, buffer_type)
    if not buffer:
        raise EngineError(f"no memory for {what}")
    try:
        yield buffer
    finally:
        ggml().ggml_backend_buffer_free(buffer)


def fill(tensor: int, values: npt.NDArray[Any]) -> None:
    ggml().ggml_backend_tensor_set(tensor, values.ctypes.data, 0, values.nbytes)


def _tensor(context: int, ggml_type: int, *lengths: int) -> int:
    array = (ctypes.c_int64 * len(lengths))(*lengths)
    return int(ggml().ggml_new_tensor(context, ggml_type, len(lengths), array))


def weight_tensor(context: int, qtype: QuantType, shape: MatrixShape) -> int:
    return _tensor(context, qtype.ggml_id, shape.row_length, shape.n_rows, max(1, shape.n_experts))


def cache_tensors(
    context: int, types: tuple[QuantType, QuantType], shape: HeadShape
) -> tuple[int, ...]:
    """Keys and values as llama.cpp keeps them: a token's heads lie together."""
    (k, v), rows = types, (shape.n_kv_heads, CACHED_TOKENS)
    keys = _tensor(context, k.ggml_id, shape.k_length, *rows)
    return keys, _tensor(context, v.ggml_id, shape.v_length, *rows)


def products(
    shape: MatrixShape, weights: Sequence[int], context: int, n_tokens: int, count: int
) -> Operations:
    """`count` products of `n_tokens` tokens' activations with the weights in turn."""
    g, turns = ggml(), islice(cycle(weights), count)
    per_token = [shape.inputs_per_token] if shape.n_experts else []
    lengths = shape.row_length, *per_token, n_tokens
    x, chosen = _tensor(context, _F32, *lengths), list[int]()
    if shape.n_experts:
        chosen = [_tensor(context, _I32, shape.n_used, n_tokens) for _ in range(count)]
        pairs = zip(turns, chosen, strict=True)
        results = [int(g.ggml_mul_mat_id(context, weight, x, used)) for weight, used in pairs]
    else:
        results = [int(g.ggml_mul_mat(context, weight, x)) for weight in turns]

    def inputs() -> Iterator[tuple[int, npt.NDArray[Any]]]:
        random = np.random.default_rng(0)
        yield x, random.standard_normal(lengths[::-1], np.float32)
        for used in chosen:
            order = random.random((n_tokens, shape.n_experts)).argsort(axis=1)
            yield used, np.ascontiguousarray(order[:, : shape.n_used], np.int32)

    return results, inputs()


def attentions(
    shape: HeadShape, caches: Sequence[tuple[int, ...]], context: int, n_tokens: int, count: int
) -> Operations:
    """`count` times attention of `n_tokens` tokens over the caches (K, V) in turn."""
    g, results = ggml(), list[int]()
    queries = _tensor(context, _F32, shape.k_length, shape.n_heads, n_tokens)
    mask = _tensor(context, _F16, CACHED_TOKENS, n_tokens)  # of cached tokens to look at: all
    for cache in islice(cycle(caches), count):
        by_head = [g.ggml_permute(context, tensor, 0, 2, 1, 3) for tensor in (queries, *cache)]
        attended = g.ggml_flash_attn_ext(context, *by_head, mask, _ANY_SCALE, 0.0, 0.0)
        g.ggml_flash_attn_ext_set_prec(attended, _PRECISION_F32)
        results.append(int(attended))

    def inputs() -> Iterator[tuple[int, npt.NDArray[Any]]]:
        rows = n_tokens * shape.n_heads, shape.k_length
        yield queries, np.random.default_rng(0).standard_normal(rows, np.float32)
        yield mask, np.zeros((n_tokens, CACHED_TOKENS), np.float16)

    return results, inputs()
