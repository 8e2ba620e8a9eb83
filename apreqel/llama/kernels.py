"""Matrix products and attention in ggml, timed by shape and type, as llama.cpp would run them.

Weights lie in the buffer type that llama.cpp itself would choose for them: the backends are asked
in its order (make_cpu_buft_list and weight_buft_supported in llama.cpp's src), so that a layout
repacked for this CPU is timed as such. The copies of a set together are larger than the last-level
cache and are used in turn: when a product runs again, its weights have left the cache, as they have
between two tokens of a real model. Attention (flash) reads KV caches of `CACHED_TOKENS` tokens,
laid out as llama.cpp's are.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from apreqel import llama
from apreqel.errors import EngineError

if TYPE_CHECKING:
    from apreqel.model.qtypes import QuantType

Bytes = npt.NDArray[np.uint8]

_F32, _F16, _I32 = 0, 1, 26  # ggml types
_ALIGNMENT = 32  # of tensors in a GGUF
_DEVICE_CPU, _DEVICE_ACCEL = 0, 3
_USAGE_WEIGHTS = 1

# Rows are quantised from noise once and repeated: kernels do the same work whatever the values,
# but look-up tables must be hit all over, as by real weights.
_ROWS_QUANTISED = 32

# llama.cpp asks with a batch of this many tokens whether a backend can do a product.
_TOKENS_ASKED = 512

# So many tokens are looked back at when attention is timed: ggml splits an F16 cache among threads
# from 512 on.
CACHED_TOKENS = 512
# Small caches all fit the last level together, which then costs little: few bytes, much to compute.
_MOST_CACHES = 96
_ATTENTION_TENSORS = 6  # of one attention in a graph: K, V and queries, turned, and the result
_PRECISION_F32 = 10  # GGML_PREC_F32, as llama.cpp asks for
_ANY_SCALE = 0.1  # of queries times keys; so that, of noise, many tokens count


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


class _InitParams(ctypes.Structure):
    """struct ggml_init_params (ggml.h)."""

    _fields_ = [
        ("mem_size", ctypes.c_size_t),
        ("mem_buffer", ctypes.c_void_p),
        ("no_alloc", ctypes.c_bool),
    ]


@lru_cache(maxsize=1)
def _ggml() -> Any:
    """ggml with the prototypes this module calls."""
    ggml = llama.ggml()
    pointer, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int64
    prototypes: dict[str, tuple[Any, list[Any]]] = {
        "ggml_init": (pointer, [_InitParams]),
        "ggml_free": (None, [pointer]),
        "ggml_tensor_overhead": (size, []),
        "ggml_graph_overhead_custom": (size, [size, ctypes.c_bool]),
        "ggml_new_tensor_2d": (pointer, [pointer, ctypes.c_int, number, number]),
        "ggml_new_tensor_3d": (pointer, [pointer, ctypes.c_int, number, number, number]),
        "ggml_permute": (pointer, [pointer, pointer, *[ctypes.c_int] * 4]),
        "ggml_flash_attn_ext": (pointer, [pointer] * 5 + [ctypes.c_float] * 3),
        "ggml_flash_attn_ext_set_prec": (None, [pointer, ctypes.c_int]),
        "ggml_mul_mat": (pointer, [pointer, pointer, pointer]),
        "ggml_mul_mat_id": (pointer, [pointer, pointer, pointer, pointer]),
        "ggml_new_graph_custom": (pointer, [pointer, size, ctypes.c_bool]),
        "ggml_build_forward_expand": (None, [pointer, pointer]),
        "ggml_backend_alloc_ctx_tensors_from_buft": (pointer, [pointer, pointer]),
        "ggml_backend_buffer_set_usage": (None, [pointer, ctypes.c_int]),
        "ggml_backend_buffer_free": (None, [pointer]),
        "ggml_backend_cpu_buffer_from_ptr": (pointer, [pointer, size]),
        "ggml_backend_tensor_alloc": (ctypes.c_int, [pointer, pointer, pointer]),
        "ggml_backend_buft_name": (ctypes.c_char_p, [pointer]),
        "ggml_backend_tensor_set": (None, [pointer, pointer, size, size]),
        "ggml_backend_graph_compute": (ctypes.c_int, [pointer, pointer]),
        "ggml_backend_synchronize": (None, [pointer]),
        "ggml_backend_free": (None, [pointer]),
        "ggml_backend_dev_init": (pointer, [pointer, ctypes.c_char_p]),
        "ggml_backend_dev_buffer_type": (pointer, [pointer]),
        "ggml_backend_dev_supports_op": (ctypes.c_bool, [pointer, pointer]),
        "ggml_backend_dev_backend_reg": (pointer, [pointer]),
        "ggml_backend_dev_type": (ctypes.c_int, [pointer]),
        "ggml_backend_dev_count": (size, []),
        "ggml_backend_dev_get": (pointer, [size]),
        "ggml_backend_reg_get_proc_address": (pointer, [pointer, ctypes.c_char_p]),
    }

    class Calls:
        pass

    calls: Any = Calls()
    for name, (result, arguments) in prototypes.items():
        try:
            function = getattr(ggml, name)
        except AttributeError as error:
            raise EngineError(
                f"{llama.ggml_base_path()}: has no {name}; update llama-cpp-python"
            ) from error
        function.restype, function.argtypes = result, arguments
        setattr(calls, name, function)
    return calls


class KernelBench:
    """The backends that llama.cpp would run a model on, with a number of threads.

    A GPU of this build comes first, as llama.cpp puts all layers there; then what the CPU has. A
    context manager.
    """

    def __init__(self, n_threads: int) -> None:
        g = _ggml()
        devices = [g.ggml_backend_dev_get(i) for i in range(g.ggml_backend_dev_count())]
        kinds = {device: g.ggml_backend_dev_type(device) for device in devices}
        cpu = next((d for d, kind in kinds.items() if kind == _DEVICE_CPU), None)
        if cpu is None:
            raise EngineError("this llama.cpp has no CPU backend; reinstall llama-cpp-python")
        gpus = [d for d, kind in kinds.items() if kind in llama.GPU_DEVICES][:1]
        self._backends = {d: g.ggml_backend_dev_init(d, None) for d in [*gpus, cpu]}
        self._cpu, registry = cpu, g.ggml_backend_dev_backend_reg(cpu)
        address = g.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_set_n_threads")
        set_threads = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int)(address)
        set_threads(self._backends[cpu], n_threads)
        # In llama.cpp's order: GPU, accelerators in the host's memory, repacked layouts, plain.
        plain = g.ggml_backend_dev_buffer_type(cpu)
        self._buffer_types: list[tuple[int, int]] = [
            (d, g.ggml_backend_dev_buffer_type(d))
            for d in [*gpus, *(d for d, kind in kinds.items() if kind == _DEVICE_ACCEL)]
            if g.ggml_backend_dev_buffer_type(d) != plain
        ]
        address = g.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
        if address:
            get = ctypes.CFUNCTYPE(ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p)(address)
            extra, i = get(cpu), 0
            while extra and extra[i]:
                self._buffer_types.append((cpu, extra[i]))
                i += 1
        self._buffer_types.append((cpu, plain))
        self._plain = plain

    def __enter__(self) -> KernelBench:
        return self

    def __exit__(self, *_: object) -> None:
        for backend in self._backends.values():
            _ggml().ggml_backend_free(backend)

    def layout(self, qtype: QuantType, shape: MatrixShape) -> str:
        """The name of the buffer type in which llama.cpp would keep such weights."""
        _, buffer_type = self._place(qtype, shape)
        return str(_ggml().ggml_backend_buft_name(buffer_type).decode())

    def _place(self, qtype: QuantType, shape: MatrixShape) -> tuple[int, int]:
        """(device, buffer type) that llama.cpp would choose. Raises EngineError."""
        g = _ggml()
        for device, buffer_type in self._buffer_types:
            with ExitStack() as stack:
                context = stack.enter_context(_context(8))
                weight = _weight(context, qtype, shape, min(shape.n_experts, shape.n_used))
                buffer = g.ggml_backend_alloc_ctx_tensors_from_buft(context, buffer_type)
                if not buffer:
                    continue
                stack.callback(g.ggml_backend_buffer_free, buffer)
                g.ggml_backend_buffer_set_usage(buffer, _USAGE_WEIGHTS)
                x = _activations(context, shape, _TOKENS_ASKED)
                experts = None
                if shape.n_experts:
                    experts = g.ggml_new_tensor_2d(context, _I32, shape.n_used, _TOKENS_ASKED)
                product = _product(context, weight, x, experts)
                if g.ggml_backend_dev_supports_op(device, product):
                    return device if device in self._backends else self._cpu, buffer_type
        raise EngineError(f"no backend here multiplies {qtype.name} matrices of {shape.key}")

    @contextmanager
    def weights(
        self, qtype: QuantType, shapes: Sequence[MatrixShape], total_bytes: int
    ) -> Iterator[dict[MatrixShape, KernelRun]]:
        """Copies of all `shapes` in `qtype`, about `total_bytes` together, ready to be timed."""
        with ExitStack() as stack:
            share = total_bytes // max(1, len(shapes))
            yield {shape: stack.enter_context(self._run(qtype, shape, share)) for shape in shapes}

    @contextmanager
    def attention(
        self, shape: HeadShape, types: tuple[QuantType, QuantType], total_bytes: int
    ) -> Iterator[AttentionRun]:
        """KV caches of one layer in `types` (K, V), at most `total_bytes` together, to be timed.

        Raises EngineError where no backend attends over such a cache.
        """
        g, rows = _ggml(), shape.n_kv_heads * CACHED_TOKENS
        lengths = shape.k_length, shape.v_length
        one_bytes = sum(t.size_bytes((n, rows)) for t, n in zip(types, lengths, strict=True))
        with ExitStack() as stack:
            n_copies = min(_MOST_CACHES, max(1, total_bytes // one_bytes))
            context = stack.enter_context(_context(2 * n_copies))
            caches = [
                tuple(_cache(context, t, n, shape) for t, n in zip(types, lengths, strict=True))
                for _ in range(n_copies)
            ]
            device = self._attending(shape, caches[0])
            buffer_type = g.ggml_backend_dev_buffer_type(device)
            buffer = g.ggml_backend_alloc_ctx_tensors_from_buft(context, buffer_type)
            if not buffer:
                raise EngineError(f"no memory for {n_copies * one_bytes / 1e6:.0f} MB of KV cache")
            stack.callback(g.ggml_backend_buffer_free, buffer)
            for i, (qtype, length) in enumerate(zip(types, lengths, strict=True)):
                content = np.resize(_noise(qtype, length), qtype.size_bytes((length, rows)))
                for pair in caches:
                    g.ggml_backend_tensor_set(pair[i], content.ctypes.data, 0, content.nbytes)
            run = AttentionRun(
                self._backends[device],
                buffer_type,
                shape,
                caches,
                str(g.ggml_backend_buft_name(buffer_type).decode()),
            )
            stack.callback(run.close)
            yield run

    def _attending(self, shape: HeadShape, cache: tuple[int, ...]) -> int:
        """The first device that attends over such a cache. Raises EngineError."""
        with _context(2 * _ATTENTION_TENSORS) as context:
            attended = _attention(context, cache, *_queries(context, shape, 1))
            for device in self._backends:
                if _ggml().ggml_backend_dev_supports_op(device, attended):
                    return int(device)
        raise EngineError(f"no backend here attends with heads of {shape.key} over this cache")

    @contextmanager
    def _run(self, qtype: QuantType, shape: MatrixShape, share: int) -> Iterator[KernelRun]:
        device, buffer_type = self._place(qtype, shape)
        # A matrix larger than its share is timed by a part of its rows: products are linear in
        # them. Of many experts as many are made as the share holds.
        row_bytes = qtype.size_bytes((shape.row_length, 1))
        n_experts = min(shape.n_experts, max(shape.n_used, share // (row_bytes * shape.n_rows)))
        part = shape.n_rows
        if row_bytes * shape.n_rows * max(1, n_experts) > share:
            part = min(part, max(256, share // (row_bytes * max(1, n_experts)) // 64 * 64))
        timed = MatrixShape(shape.row_length, part, n_experts, shape.n_used, shape.inputs_per_token)
        one_bytes = row_bytes * part * max(1, n_experts)
        n_copies = max(1, share // one_bytes)
        with ExitStack() as stack:
            context = stack.enter_context(_context(n_copies))
            copies = [_weight(context, qtype, timed, n_experts) for _ in range(n_copies)]
            content = np.resize(_noise(qtype, shape.row_length), one_bytes)
            if buffer_type == self._plain and hasattr(os, "memfd_create"):
                stack.enter_context(_mapped(copies, content))
            else:
                stack.enter_context(_allocated(context, buffer_type, copies, content))
            run = KernelRun(
                self._backends[device],
                _ggml().ggml_backend_dev_buffer_type(device),
                timed,
                copies,
                shape.n_rows / part,
                self.layout(qtype, shape),
            )
            stack.callback(run.close)
            yield run


@contextmanager
def _allocated(
    context: int, buffer_type: int, copies: Sequence[int], content: Bytes
) -> Iterator[None]:
    """The tensors in memory of that type, repacked if it is one that repacks."""
    g = _ggml()
    buffer = g.ggml_backend_alloc_ctx_tensors_from_buft(context, buffer_type)
    if not buffer:
        raise EngineError(f"no memory for {len(copies) * content.nbytes / 1e6:.0f} MB of weights")
    try:
        g.ggml_backend_buffer_set_usage(buffer, _USAGE_WEIGHTS)
        for copy in copies:
            g.ggml_backend_tensor_set(copy, content.ctypes.data, 0, content.nbytes)
        yield
    finally:
        g.ggml_backend_buffer_free(buffer)


@contextmanager
def _mapped(copies: Sequence[int], content: Bytes) -> Iterator[None]:
    """The tensors in a map of a file (in memory), as llama.cpp maps what it does not repack."""
    g, step = _ggml(), -(-content.nbytes // _ALIGNMENT) * _ALIGNMENT
    handle = os.memfd_create("apreqel-weights")
    try:
        os.truncate(handle, step * len(copies))
        place = mmap.mmap(handle, step * len(copies))
    finally:
        os.close(handle)
    view = np.frombuffer(place, np.uint8)
    address = view.ctypes.data
    del view
    buffer = g.ggml_backend_cpu_buffer_from_ptr(address, step * len(copies))
    try:
        for i, copy in enumerate(copies):
            place[i * step : i * step + content.nbytes] = content.tobytes()
            g.ggml_backend_tensor_alloc(buffer, copy, address + i * step)
        yield
    finally:
        g.ggml_backend_buffer_free(buffer)
        place.close()


class TimedRun:
    """One operation over copies of what it reads; `seconds` runs it over them in turn."""

    def __init__(self, backend: int, plain: int, scale: float, layout: str) -> None:
        self.layout = layout
        self._backend, self._plain, self._scale = backend, plain, scale
        self._graphs: dict[tuple[int, int], tuple[int, ExitStack]] = {}

    def close(self) -> None:
        for _, stack in self._graphs.values():
            stack.close()

    def seconds(self, n_tokens: int, n_products: int | None = None) -> float:
        """Seconds of one product with `n_tokens` tokens: of all copies in turn, or `n_products`."""
        g = _ggml()
        count = n_products or self._products_per_round()
        if (n_tokens, count) not in self._graphs:
            self._graphs[n_tokens, count] = self._graph(n_tokens, count)
        graph, _ = self._graphs[n_tokens, count]
        started = time.perf_counter()
        code = g.ggml_backend_graph_compute(self._backend, graph)
        g.ggml_backend_synchronize(self._backend)
        elapsed = time.perf_counter() - started
        if code:
            raise EngineError(f"ggml_backend_graph_compute ended with {code}")
        return elapsed / count * self._scale

    def _products_per_round(self) -> int:
        raise NotImplementedError

    def _graph(self, n_tokens: int, count: int) -> tuple[int, ExitStack]:
        raise NotImplementedError

    def _inputs(self, context: int, stack: ExitStack) -> None:
        """Memory for every tensor of the context that has none."""
        buffer = _ggml().ggml_backend_alloc_ctx_tensors_from_buft(context, self._plain)
        if not buffer:
            raise EngineError("no memory for the activations of a timed product")
        stack.callback(_ggml().ggml_backend_buffer_free, buffer)


class KernelRun(TimedRun):
    """Copies of one matrix; `seconds` multiplies them in turn."""

    def __init__(
        self,
        backend: int,
        plain: int,
        shape: MatrixShape,
        copies: Sequence[int],
        scale: float,
        layout: str,
    ) -> None:
        super().__init__(backend, plain, scale, layout)
        self._shape, self._copies = shape, copies

    def _products_per_round(self) -> int:
        """So many that all weights were read once, experts included."""
        experts = max(1, self._shape.n_experts) // max(1, self._shape.n_used)
        return len(self._copies) * max(1, experts)

    def _graph(self, n_tokens: int, count: int) -> tuple[int, ExitStack]:
        g, stack = _ggml(), ExitStack()
        size = 3 * count + 1  # nodes and leaves are counted apart
        context = stack.enter_context(_context(size, graph_nodes=size))
        graph = g.ggml_new_graph_custom(context, size, False)
        activations, chosen = _activations(context, self._shape, n_tokens), []
        for i in range(count):
            weight, experts = self._copies[i % len(self._copies)], None
            if self._shape.n_experts:
                experts = g.ggml_new_tensor_2d(context, _I32, self._shape.n_used, n_tokens)
                chosen.append(experts)
            product = _product(context, weight, activations, experts)
            g.ggml_build_forward_expand(graph, product)
        self._inputs(context, stack)
        random = np.random.default_rng(0)
        per_token = max(1, self._shape.inputs_per_token)
        x = random.standard_normal((n_tokens, per_token, self._shape.row_length), np.float32)
        g.ggml_backend_tensor_set(activations, x.ctypes.data, 0, x.nbytes)
        for experts in chosen:
            order = random.random((n_tokens, self._shape.n_experts)).argsort(axis=1)
            used = np.ascontiguousarray(order[:, : self._shape.n_used], np.int32)
            g.ggml_backend_tensor_set(experts, used.ctypes.data, 0, used.nbytes)
        return graph, stack


class AttentionRun(TimedRun):
    """KV caches of one layer; `seconds`, of one cached token, attends over them in turn."""

    def __init__(
        self,
        backend: int,
        plain: int,
        shape: HeadShape,
        caches: Sequence[tuple[int, ...]],
        layout: str,
    ) -> None:
        super().__init__(backend, plain, 1 / CACHED_TOKENS, layout)
        self._shape, self._caches = shape, caches

    def _products_per_round(self) -> int:
        return len(self._caches)

    def _graph(self, n_tokens: int, count: int) -> tuple[int, ExitStack]:
        g, stack = _ggml(), ExitStack()
        size = _ATTENTION_TENSORS * (count + 1)
        context = stack.enter_context(_context(size, graph_nodes=size))
        graph = g.ggml_new_graph_custom(context, size, False)
        queries, mask = _queries(context, self._shape, n_tokens)
        for i in range(count):
            cache = self._caches[i % len(self._caches)]
            g.ggml_build_forward_expand(graph, _attention(context, cache, queries, mask))
        self._inputs(context, stack)
        rows = n_tokens * self._shape.n_heads, self._shape.k_length
        noise = np.random.default_rng(0).standard_normal(rows, np.float32)
        g.ggml_backend_tensor_set(queries, noise.ctypes.data, 0, noise.nbytes)
        nothing = np.zeros((n_tokens, CACHED_TOKENS), np.float16)
        g.ggml_backend_tensor_set(mask, nothing.ctypes.data, 0, nothing.nbytes)
        return graph, stack


@contextmanager
def _context(n_tensors: int, graph_nodes: int = 0) -> Iterator[int]:
    g = _ggml()
    needed = g.ggml_tensor_overhead() * (n_tensors + 1)
    if graph_nodes:
        needed += g.ggml_graph_overhead_custom(graph_nodes, False)
    context = g.ggml_init(_InitParams(needed, None, True))
    if not context:
        raise EngineError("ggml_init failed")
    try:
        yield context
    finally:
        g.ggml_free(context)


def _weight(context: int, qtype: QuantType, shape: MatrixShape, n_experts: int) -> int:
    g = _ggml()
    if shape.n_experts:
        made = g.ggml_new_tensor_3d(
            context, qtype.ggml_id, shape.row_length, shape.n_rows, n_experts
        )
    else:
        made = g.ggml_new_tensor_2d(context, qtype.ggml_id, shape.row_length, shape.n_rows)
    return int(made)


def _activations(context: int, shape: MatrixShape, n_tokens: int) -> int:
    g = _ggml()
    if not shape.n_experts:
        return int(g.ggml_new_tensor_2d(context, _F32, shape.row_length, n_tokens))
    length, inputs = shape.row_length, shape.inputs_per_token
    return int(g.ggml_new_tensor_3d(context, _F32, length, inputs, n_tokens))


def _product(context: int, weight: int, activations: int, experts: int | None) -> int:
    g = _ggml()
    if experts is None:
        return int(g.ggml_mul_mat(context, weight, activations))
    return int(g.ggml_mul_mat_id(context, weight, activations, experts))


def _cache(context: int, qtype: QuantType, length: int, shape: HeadShape) -> int:
    """Keys or values as llama.cpp keeps them: a token's heads lie together."""
    g = _ggml()
    made = g.ggml_new_tensor_3d(context, qtype.ggml_id, length, shape.n_kv_heads, CACHED_TOKENS)
    return int(made)


def _queries(context: int, shape: HeadShape, n_tokens: int) -> tuple[int, int]:
    """Queries of `n_tokens` tokens, and which cached tokens they may look at."""
    g = _ggml()
    queries = g.ggml_new_tensor_3d(context, _F32, shape.k_length, shape.n_heads, n_tokens)
    return int(queries), int(g.ggml_new_tensor_2d(context, _F16, CACHED_TOKENS, n_tokens))


def _attention(context: int, cache: tuple[int, ...], queries: int, mask: int) -> int:
    g = _ggml()
    by_head = [g.ggml_permute(context, tensor, 0, 2, 1, 3) for tensor in (queries, *cache)]
    attended = g.ggml_flash_attn_ext(context, *by_head, mask, _ANY_SCALE, 0.0, 0.0)
    g.ggml_flash_attn_ext_set_prec(attended, _PRECISION_F32)
    return int(attended)


@lru_cache(maxsize=256)
def _noise(qtype: QuantType, row_length: int) -> Bytes:
    """Bytes of a few rows of noise in `qtype`."""
    rows = np.random.default_rng(0).standard_normal((_ROWS_QUANTISED, row_length), np.float32)
    return llama.quantize_rows(rows, qtype, np.ones(row_length, np.float32))
