"""Matrix products and attention in ggml, timed by shape and type, as llama.cpp would run them.

Weights lie in the buffer type that llama.cpp itself would choose for them: the backends are asked
in its order (make_cpu_buft_list and weight_buft_supported in llama.cpp's src), so that a layout
repacked for this CPU is timed as such. The copies of a set together are larger than the last-level
cache and are used in turn: when a product runs again, its weights have left the cache, as they have
between two tokens of a real model.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from itertools import takewhile

import numpy as np

from apreqel.arrays import Bytes
from apreqel.errors import EngineError
from apreqel.llama import graphs
from apreqel.llama.graphs import CACHED_TOKENS, HeadShape, MatrixShape
from apreqel.llama.library import ggml, gpu_device, readable
from apreqel.llama.quants import quantize_rows
from apreqel.model.gguf_header import DEFAULT_ALIGNMENT, padded
from apreqel.model.qtypes import QuantType

_DEVICE_CPU, _DEVICE_ACCEL = 0, 3
_USAGE_WEIGHTS = 1

# Rows are quantised from noise once and repeated: kernels do the same work whatever the values,
# but look-up tables must be hit all over, as by real weights.
_ROWS_QUANTISED = 32

# llama.cpp asks with a batch of this many tokens whether a backend can do a product.
_TOKENS_ASKED = 512

# Small caches all fit the last level together, which then costs little: few bytes, much to compute.
_MOST_CACHES = 96


class KernelBench(AbstractContextManager["KernelBench"]):
    """The backends that llama.cpp would run a model on, with a number of threads.

    A GPU of this build comes first, as llama.cpp puts all layers there; then what the CPU has. A
    context manager.
    """

    def __init__(self, n_threads: int) -> None:
        g = ggml()
        devices = map(g.ggml_backend_dev_get, range(g.ggml_backend_dev_count()))
        accelerators = [d for d in devices if g.ggml_backend_dev_type(d) == _DEVICE_ACCEL]
        gpus, cpu = [d for d in (gpu_device(),) if d], g.ggml_backend_dev_by_type(_DEVICE_CPU)
        if not cpu:
            raise EngineError("this llama.cpp has no CPU backend; reinstall llama-cpp-python")
        self._backends = {d: g.ggml_backend_dev_init(d, None) for d in [*gpus, cpu]}
        self._cpu, registry = cpu, g.ggml_backend_dev_backend_reg(cpu)
        address = g.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_set_n_threads")
        set_threads = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int)(address)
        set_threads(self._backends[cpu], n_threads)
        # In llama.cpp's order: GPU, accelerators in the host's memory, repacked layouts, plain.
        self._plain = plain = g.ggml_backend_dev_buffer_type(cpu)
        others = ((d, g.ggml_backend_dev_buffer_type(d)) for d in [*gpus, *accelerators])
        self._buffer_types: list[tuple[int, int]] = [pair for pair in others if pair[1] != plain]
        address = g.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
        if address:
            get = ctypes.CFUNCTYPE(ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p)(address)
            # Up to the first that is null.
            self._buffer_types += [(cpu, extra) for extra in takewhile(bool, get(cpu) or ())]
        self._buffer_types.append((cpu, plain))

    def __exit__(self, *_: object) -> None:
        for backend in self._backends.values():
            ggml().ggml_backend_free(backend)

    def layout(self, qtype: QuantType, shape: MatrixShape) -> str:
        """The name of the buffer type in which llama.cpp would keep such weights."""
        return _name(self._place(qtype, shape)[1])

    def _place(self, qtype: QuantType, shape: MatrixShape) -> tuple[int, int]:
        """(device, buffer type) that llama.cpp would choose. Raises EngineError."""
        g = ggml()
        for device, buffer_type in self._buffer_types:
            with suppress(EngineError), graphs.tensor_context(8) as context:
                asked = replace(shape, n_experts=min(shape.n_experts, shape.n_used))
                weight = graphs.weight_tensor(context, qtype, asked)
                with graphs.allocated(context, buffer_type, "one matrix") as buffer:
                    g.ggml_backend_buffer_set_usage(buffer, _USAGE_WEIGHTS)
                    (product,), _ = graphs.products(asked, [weight], context, _TOKENS_ASKED, 1)
                    if g.ggml_backend_dev_supports_op(device, product):
                        return device if device in self._backends else self._cpu, buffer_type
        raise EngineError(f"no backend here multiplies {qtype.name} matrices of {shape.key}")

    @contextmanager
    def weights(
        self, qtype: QuantType, shapes: Sequence[MatrixShape], total_bytes: int
    ) -> Iterator[dict[MatrixShape, TimedRun]]:
        """Copies of all `shapes` in `qtype`, about `total_bytes` together, ready to be timed."""
        with ExitStack() as stack:
            share = total_bytes // max(1, len(shapes))
            yield {shape: stack.enter_context(self._run(qtype, shape, share)) for shape in shapes}

    @contextmanager
    def _run(self, qtype: QuantType, shape: MatrixShape, share: int) -> Iterator[TimedRun]:
        device, buffer_type = self._place(qtype, shape)
        # A matrix larger than its share is timed by a part of its rows: products are linear in
        # them. Of many experts as many are made as the share holds.
        row_bytes = qtype.size_bytes((shape.row_length, 1))
        n_experts = min(shape.n_experts, max(shape.n_used, share // (row_bytes * shape.n_rows)))
        part, n_matrices = shape.n_rows, max(1, n_experts)
        if row_bytes * part * n_matrices > share:
            part = min(part, max(256, share // (row_bytes * n_matrices) // 64 * 64))
        timed = replace(shape, n_rows=part, n_experts=n_experts)
        one_bytes = row_bytes * part * n_matrices
        n_copies = max(1, share // one_bytes)
        with ExitStack() as stack:
            context = stack.enter_context(graphs.tensor_context(n_copies))
            copies = [graphs.weight_tensor(context, qtype, timed) for _ in range(n_copies)]
            content = np.resize(_noise(qtype, shape.row_length), one_bytes)
            if buffer_type == self._plain and hasattr(os, "memfd_create"):
                stack.enter_context(_mapped(copies, content))
            else:
                what = f"{n_copies * one_bytes / 1e6:.0f} MB of weights"
                buffer = stack.enter_context(graphs.allocated(context, buffer_type, what))
                ggml().ggml_backend_buffer_set_usage(buffer, _USAGE_WEIGHTS)
                for copy in copies:
                    graphs.fill(copy, content)
            # A round reads all weights once, experts included.
            count = n_copies * max(1, n_matrices // max(1, shape.n_used))
            scale, build = shape.n_rows / part, partial(graphs.products, timed, copies)
            backend = self._backends[device]
            yield TimedRun(_name(buffer_type), backend, device, build, count, scale, stack)

    @contextmanager
    def attention(
        self, shape: HeadShape, types: tuple[QuantType, QuantType], total_bytes: int
    ) -> Iterator[TimedRun]:
        """KV caches of one layer in `types` (K, V), at most `total_bytes` together, to be timed.

        By the cached token. Raises EngineError where no backend attends over such a cache.
        """
        rows, lengths = shape.n_kv_heads * CACHED_TOKENS, (shape.k_length, shape.v_length)
        sizes = [t.size_bytes((n, rows)) for t, n in zip(types, lengths, strict=True)]
        n_copies = min(_MOST_CACHES, max(1, total_bytes // sum(sizes)))
        with ExitStack() as stack:
            context = stack.enter_context(graphs.tensor_context(2 * n_copies))
            caches = [graphs.cache_tensors(context, types, shape) for _ in range(n_copies)]
            device = self._attending(shape, caches[0])
            buffer_type = ggml().ggml_backend_dev_buffer_type(device)
            what = f"{n_copies * sum(sizes) / 1e6:.0f} MB of KV cache"
            stack.enter_context(graphs.allocated(context, buffer_type, what))
            for i, (qtype, length) in enumerate(zip(types, lengths, strict=True)):
                content = np.resize(_noise(qtype, length), sizes[i])
                for cache in caches:
                    graphs.fill(cache[i], content)
            backend, build = self._backends[device], partial(graphs.attentions, shape, caches)
            scale = 1 / CACHED_TOKENS
            yield TimedRun(_name(buffer_type), backend, device, build, n_copies, scale, stack)

    def _attending(self, shape: HeadShape, cache: tuple[int, ...]) -> int:
        """The first device that attends over such a cache. Raises EngineError."""
        with graphs.tensor_context(2 * graphs.TENSORS_EACH) as context:
            (attended,), _ = graphs.attentions(shape, [cache], context, 1, 1)
            for device in self._backends:
                if ggml().ggml_backend_dev_supports_op(device, attended):
                    return int(device)
        raise EngineError(f"no backend here attends with heads of {shape.key} over this cache")


@dataclass
class TimedRun:
    """One operation over copies of what it reads; `seconds` runs it over them in turn."""

    layout: str
    _backend: int
    _device: int
    _build: Callable[[int, int, int], graphs.Operations]  # in a context, of n tokens, so many
    _per_round: int  # operations that read every copy once
    _scale: float  # of the seconds that are told
    _stack: ExitStack  # its graphs live as long as the copies
    _graphs: dict[tuple[int, int], int] = field(default_factory=dict)

    def seconds(self, n_tokens: int, n_products: int | None = None) -> float:
        """Seconds of one product with `n_tokens` tokens: of all copies in turn, or `n_products`."""
        g, count = ggml(), n_products or self._per_round
        graph = self._graphs.get((n_tokens, count)) or self._graph(n_tokens, count)
        started = time.perf_counter()
        code = g.ggml_backend_graph_compute(self._backend, graph)
        g.ggml_backend_synchronize(self._backend)
        elapsed = time.perf_counter() - started
        if code:
            raise EngineError(f"ggml_backend_graph_compute ended with {code}")
        return elapsed / count * self._scale

    def _graph(self, n_tokens: int, count: int) -> int:
        g, size = ggml(), graphs.TENSORS_EACH * (count + 1)  # nodes and leaves are counted apart
        context = self._stack.enter_context(graphs.tensor_context(size))
        graph = g.ggml_new_graph_custom(context, size, False)
        results, inputs = self._build(context, n_tokens, count)
        for result in results:
            g.ggml_build_forward_expand(graph, result)
        buffer_type = g.ggml_backend_dev_buffer_type(self._device)
        self._stack.enter_context(graphs.allocated(context, buffer_type, "what a product reads"))
        for tensor, values in inputs:
            graphs.fill(tensor, values)
        self._graphs[n_tokens, count] = graph
        return int(graph)


@contextmanager
def _mapped(copies: Sequence[int], content: Bytes) -> Iterator[None]:
    """The tensors in a map of a file (in memory), as llama.cpp maps what it does not repack."""
    g, step = ggml(), padded(content.nbytes, DEFAULT_ALIGNMENT)
    size = step * len(copies)
    with open(os.memfd_create("apreqel-weights"), "r+b") as file:
        file.truncate(size)
        place = mmap.mmap(file.fileno(), size)
    address = np.frombuffer(place, np.uint8).ctypes.data
    buffer = g.ggml_backend_cpu_buffer_from_ptr(address, size)
    try:
        for i, copy in enumerate(copies):
            place[i * step : i * step + content.nbytes] = content.tobytes()
            g.ggml_backend_tensor_alloc(buffer, copy, address + i * step)
        yield
    finally:
        g.ggml_backend_buffer_free(buffer)
        place.close()


def _name(buffer_type: int) -> str:
    return readable(ggml().ggml_backend_buft_name(buffer_type))


@lru_cache(maxsize=256)
def _noise(qtype: QuantType, row_length: int) -> Bytes:
    """Bytes of a few rows of noise in `qtype`."""
    rows = np.random.default_rng(0).standard_normal((_ROWS_QUANTISED, row_length), np.float32)
    return quantize_rows(rows, qtype, np.ones(row_length, np.float32))
