"""The only module that touches llama.cpp: load, evaluate, listen, time, quantise.

Everything here goes through the shared libraries that llama-cpp-python installs, so that what
apreqel measures is what the user runs. Nothing is loaded before it is needed. llama.cpp's own log
is kept in memory and shown only as the reason of a failure.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from apreqel.errors import EngineError, UnsupportedModelError, printable

if TYPE_CHECKING:
    from apreqel.model.qtypes import QuantType

Floats = npt.NDArray[np.float32]
Tokens = npt.NDArray[np.int32]

_GGML_MAX_DIMS, _GGML_MAX_SRC, _GGML_MAX_NAME, _GGML_MAX_OP_PARAMS = 4, 10, 64, 64
_OP_PARAMS_WORDS = _GGML_MAX_OP_PARAMS // 4
_LOG_LINES_KEPT = 40
_LOG_LEVEL_WARN = 3


class _GgmlTensor(ctypes.Structure):
    """struct ggml_tensor (ggml.h), the fields before `extra`."""

    _fields_ = [
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * _GGML_MAX_DIMS),
        ("nb", ctypes.c_size_t * _GGML_MAX_DIMS),
        ("op", ctypes.c_int),
        ("op_params", ctypes.c_int32 * _OP_PARAMS_WORDS),
        ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * _GGML_MAX_SRC),
        ("view_src", ctypes.c_void_p),
        ("view_offs", ctypes.c_size_t),
        ("data", ctypes.c_void_p),
        ("name", ctypes.c_char * _GGML_MAX_NAME),
    ]


def _tensor_at(pointer: int) -> Any:
    return ctypes.cast(pointer, ctypes.POINTER(_GgmlTensor)).contents


# --- the libraries -------------------------------------------------------------------------------

_log: deque[str] = deque(maxlen=_LOG_LINES_KEPT)
_log_lines: list[str] | None = None  # everything llama.cpp says, while someone wants it
_log_callback: Any = None


@lru_cache(maxsize=1)
def library() -> Any:
    """The `llama_cpp.llama_cpp` module, silenced and initialised. Raises EngineError."""
    global _log_callback
    try:
        from llama_cpp import llama_cpp
    except (ImportError, OSError, RuntimeError) as error:
        raise EngineError(
            f"llama-cpp-python cannot be loaded ({error}); run: pip install llama-cpp-python"
        ) from error

    def keep(level: int, text: bytes, _user_data: object) -> None:
        if level >= _LOG_LEVEL_WARN:
            _log.append(text.decode("utf-8", "replace").strip())
        if _log_lines is not None:
            _log_lines.append(text.decode("utf-8", "replace"))

    _log_callback = llama_cpp.llama_log_callback(keep)
    llama_cpp.llama_log_set(_log_callback, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    return llama_cpp


def ggml() -> ctypes.CDLL:
    """The ggml that the loaded llama.cpp itself uses, found through what libllama links.

    Never by its file: a wheel holds each library several times (libggml.so, libggml.so.0, ...), and
    another of these would be a second ggml, with a list of devices of its own.
    """
    return ctypes.CDLL(library()._lib._name)


@lru_cache(maxsize=1)
def _ggml() -> ctypes.CDLL:
    """ggml with the prototypes this module calls."""
    base = ggml()
    base.ggml_quantize_chunk.argtypes = [
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_void_p,
    ]
    base.ggml_quantize_chunk.restype = ctypes.c_size_t
    base.ggml_quantize_init.argtypes = [ctypes.c_int]
    base.ggml_op_name.argtypes = [ctypes.c_int]
    base.ggml_op_name.restype = ctypes.c_char_p
    base.ggml_get_type_traits.argtypes = [ctypes.c_int]
    base.ggml_get_type_traits.restype = ctypes.POINTER(_TypeTraits)
    base.ggml_backend_buffer_is_host.argtypes = [ctypes.c_void_p]
    base.ggml_backend_buffer_is_host.restype = ctypes.c_bool
    base.ggml_backend_dev_by_type.argtypes = [ctypes.c_int]
    base.ggml_backend_dev_by_type.restype = ctypes.c_void_p
    base.ggml_backend_dev_description.argtypes = [ctypes.c_void_p]
    base.ggml_backend_dev_description.restype = ctypes.c_char_p
    base.ggml_backend_tensor_get.argtypes = [
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_size_t,
    ]
    return base


def ggml_base_path() -> Path:
    """libggml-base of the installed llama-cpp-python, found without loading it."""
    from importlib.util import find_spec

    spec = find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        raise EngineError("llama-cpp-python is not installed; run: pip install llama-cpp-python")
    folder = Path(spec.origin).parent / "lib"
    for pattern in ("libggml-base.so", "libggml-base.dylib", "libggml-base.*"):
        for found in sorted(folder.glob(pattern)):
            return found
    raise EngineError(f"{folder} holds no libggml-base; reinstall llama-cpp-python 0.3.36 or newer")


def build_info() -> str:
    """The version of llama-cpp-python and the CPU features its llama.cpp was built with."""
    import llama_cpp

    features = library().llama_print_system_info().decode().strip()
    return f"llama-cpp-python {llama_cpp.__version__}; {features}"


@contextmanager
def _listen_to_log(lines: list[str]) -> Iterator[None]:
    global _log_lines
    _log_lines = lines
    try:
        yield
    finally:
        _log_lines = None


@contextmanager
def _interrupts_deferred() -> Iterator[list[int]]:
    """Note Ctrl-C while C code runs that calls back into Python; raise it once that has returned.

    An exception that starts inside a ctypes callback is printed and lost, and a signal's handler
    runs at the first bytecode of the next callback, which is just there.
    """
    noted: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield noted
        return
    kinds = signal.SIGINT, signal.SIGTERM
    before = {kind: signal.getsignal(kind) for kind in kinds}
    for kind in kinds:
        signal.signal(kind, lambda number, _frame: noted.append(number))
    try:
        yield noted
    finally:
        for kind, handler in before.items():
            signal.signal(kind, signal.SIG_DFL if handler is None else handler)
    if noted:
        raise KeyboardInterrupt


def reason() -> str:
    """Why llama.cpp failed: the first error it wrote since the log was cleared, for messages."""
    lines = [line for line in _log if line]
    errors = [line for line in lines if "error" in line or "fail" in line] or lines
    return printable(errors[0], 200) if errors else "llama.cpp gave no reason"


GPU_DEVICES = (1, 2)  # enum ggml_backend_dev_type: GPU, IGPU
_ALL_LAYERS = 999
_FLASH_ATTENTION_ON = 1  # LLAMA_FLASH_ATTN_TYPE_ENABLED


def gpu_name() -> str:
    """The GPU that llama.cpp puts layers on; '' where it was built for none, or none is there."""
    for kind in GPU_DEVICES:
        if device := _ggml().ggml_backend_dev_by_type(kind):
            return str(_ggml().ggml_backend_dev_description(device).decode("utf-8", "replace"))
    return ""


# --- quant types in ggml -------------------------------------------------------------------------


class _TypeTraits(ctypes.Structure):
    """struct ggml_type_traits (ggml.h)."""

    _fields_ = [
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
    ]


def supports(qtype: QuantType) -> bool:
    """Whether this llama.cpp's ggml knows the type with the size that the registry gives."""
    try:
        traits = _ggml().ggml_get_type_traits(qtype.ggml_id).contents
    except ValueError:
        return False
    same = traits.blck_size == qtype.block_size and traits.type_size == qtype.block_bytes
    return bool(same and (not qtype.is_quantized or traits.to_float))


def fake_quantize(
    weights: Floats, qtype: QuantType, imatrix: Floats | None, out: Floats | None = None
) -> Floats:
    """`weights` [rows, row length] as they read back from `qtype`; `imatrix` [row length].

    Goes through ggml itself, so that the values are those of the real file.
    """
    packed = quantize_rows(weights, qtype, imatrix)
    values = np.empty_like(weights) if out is None else out
    read_values(packed, qtype, values)
    return values


def quantize_rows(
    weights: Floats, qtype: QuantType, imatrix: Floats | None
) -> npt.NDArray[np.uint8]:
    """Bytes of `weights` [rows, row length] in `qtype`; `imatrix` [row length]."""
    rows, row_length = weights.shape
    assert weights.dtype == np.float32 and weights.flags.c_contiguous
    packed = np.empty(qtype.size_bytes((row_length, rows)), np.uint8)
    weight_pointer = None if imatrix is None else imatrix.ctypes.data
    _ggml().ggml_quantize_chunk(
        qtype.ggml_id, weights.ctypes.data, packed.ctypes.data, 0, rows, row_length, weight_pointer
    )
    return packed


def read_values(packed: npt.NDArray[np.uint8], qtype: QuantType, out: Floats) -> None:
    """Dequantise whole blocks into `out` (any shape of as many weights as `packed` holds)."""
    if qtype.name == "F32":
        out.reshape(-1)[:] = packed.view(np.float32).reshape(-1)
    elif qtype.name == "F16":
        out.reshape(-1)[:] = packed.view(np.float16).reshape(-1)
    elif qtype.name == "BF16":
        wide = packed.view(np.uint16).reshape(-1).astype(np.uint32) << 16
        out.reshape(-1)[:] = wide.view(np.float32)
    else:
        traits = _ggml().ggml_get_type_traits(qtype.ggml_id).contents
        traits.to_float(packed.ctypes.data, out.ctypes.data, out.size)


# --- loading and evaluating ----------------------------------------------------------------------

# Called with the weight's name, its activations [tokens, row length] and, for a mixture of
# experts, the chosen experts [tokens, experts used] (else None). Also with the hidden states
# [tokens, embedding length] that go into the first layer and come out of each: "l_out-0", ...
Listener = Callable[[str, Floats, "Tokens | None"], None]

# llama-graph.cpp names the embedding (scaled in Gemma) and what leaves each layer so.
_HIDDEN_STATE = re.compile(rb"embd|l_out-\d+")


class LoadedModel:
    """One model in llama.cpp. A context manager; use its contexts one thread at a time."""

    def __init__(
        self,
        path: Path,
        *,
        patchable: bool = False,
        offload: bool = False,
        overrides: Mapping[str, int] | None = None,
    ) -> None:
        """Load `path`, on the CPU unless `offload`. Raises EngineError where llama.cpp cannot.

        `patchable` keeps the weights in the file's map (not repacked), so that writes to the file
        reach the next evaluation. `offload` puts all layers on a GPU where this build has one.
        `overrides` are integers of the metadata to take instead of the file's, by key.
        """
        self.path, self.on_gpu = path, offload and bool(gpu_name())
        c = library()
        _log.clear()
        params = c.llama_model_default_params()
        params.n_gpu_layers = _ALL_LAYERS if self.on_gpu else 0
        params.use_extra_bufts = not patchable
        if overrides:
            params.kv_overrides = _integer_overrides(overrides)
        with _interrupts_deferred():
            self._model = c.llama_model_load_from_file(os.fsencode(path), params)
        if not self._model and "unknown model architecture" in reason():
            raise UnsupportedModelError(
                f"{path}: {reason()}; this llama.cpp cannot run it, only apreqel inspect works; "
                "update llama-cpp-python"
            )
        if not self._model:
            raise EngineError(f"{path}: llama.cpp cannot load it: {reason()}")
        self._vocab = c.llama_model_get_vocab(self._model)
        self.n_vocab = int(c.llama_vocab_n_tokens(self._vocab))

    def __enter__(self) -> LoadedModel:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._model:
            library().llama_model_free(self._model)
        self._model = None

    @property
    def context_length(self) -> int:
        """The context the model was trained for, in tokens."""
        return int(library().llama_model_n_ctx_train(self._model))

    @property
    def bos_token(self) -> int | None:
        """The token that starts a text, where the model wants one."""
        c = library()
        wants = c.llama_vocab_get_add_bos(self._vocab)
        token = int(c.llama_vocab_bos(self._vocab))
        return token if wants and token >= 0 else None

    def tokenize(self, text: str) -> Tokens:
        """The tokens of `text`, without special tokens."""
        c, raw = library(), text.encode()
        buffer = np.empty(len(raw) + 16, np.int32)
        pointer = buffer.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
        count = c.llama_tokenize(self._vocab, raw, len(raw), pointer, len(buffer), False, False)
        if count < 0:
            raise EngineError(f"{self.path}: llama.cpp cannot tokenise the text")
        return buffer[:count].copy()

    @contextmanager
    def context(
        self,
        n_ctx: int,
        n_sequences: int,
        n_threads: int,
        listener: Listener | None = None,
        *,
        as_users_run: bool = False,
        cache_types: tuple[QuantType, QuantType] | None = None,
    ) -> Iterator[Context]:
        """A context for `n_sequences` independent sequences of `n_ctx` tokens each.

        It evaluates all of them at once; `as_users_run` keeps llama.cpp's own batch sizes, which
        its speed and memory depend on. `cache_types` are those of K and V, with flash attention.
        """
        context = Context(self, n_ctx, n_sequences, n_threads, listener, as_users_run, cache_types)
        try:
            yield context
        finally:
            context.close()


def _integer_overrides(values: Mapping[str, int]) -> Any:
    """An array of llama_model_kv_override; its last entry, with an empty key, ends it."""
    c = library()
    table = (c.llama_model_kv_override * (len(values) + 1))()
    for row, (key, value) in zip(table, values.items(), strict=False):
        row.tag, row.key = c.LLAMA_KV_OVERRIDE_TYPE_INT, key.encode()
        row.value.val_i64 = value
    return table


class Context:
    """Evaluates batches of whole sequences; with a listener, shows it every matrix product."""

    def __init__(
        self,
        model: LoadedModel,
        n_ctx: int,
        n_sequences: int,
        n_threads: int,
        listener: Listener | None,
        as_users_run: bool,
        cache_types: tuple[QuantType, QuantType] | None,
    ) -> None:
        self.model, self.n_ctx, self.n_sequences = model, n_ctx, n_sequences
        self._listener = listener
        self._failure: BaseException | None = None
        self._interrupts: list[int] = []
        c = library()
        params = c.llama_context_default_params()
        params.n_ctx = n_ctx * n_sequences
        if cache_types is not None:
            params.type_k, params.type_v = (kind.ggml_id for kind in cache_types)
            params.flash_attn_type = _FLASH_ATTENTION_ON
        if not as_users_run:
            params.n_batch = params.n_ubatch = params.n_ctx
        params.n_seq_max = n_sequences
        params.n_threads = params.n_threads_batch = n_threads
        params.offload_kqv = params.op_offload = model.on_gpu
        params.no_perf = True
        self._callback = c.ggml_backend_sched_eval_callback(self._on_eval)
        if listener is not None:
            params.cb_eval = self._callback
        self._context = c.llama_init_from_model(model._model, params)
        if not self._context:
            raise EngineError(f"{model.path}: llama.cpp cannot make a context: {reason()}")
        self._n_batch = int(c.llama_n_batch(self._context))
        self._batch = c.llama_batch_init(n_ctx * n_sequences, 0, 1)

    def close(self) -> None:
        c = library()
        if self._context:
            c.llama_batch_free(self._batch)
            c.llama_free(self._context)
        self._context = None

    def evaluate(self, tokens: Tokens, positions: Tokens) -> Floats:
        """Logits [sequences x scored positions, vocabulary] of `tokens` [sequences, length].

        `positions` [sequences, scored positions] are those wanted, ascending. A view into
        llama.cpp's own memory, valid until the next call. Sequences are independent. Raises
        EngineError, or whatever the listener raised.
        """
        c, (n_sequences, length) = library(), tokens.shape
        wanted = np.zeros(tokens.shape, np.int8)
        np.put_along_axis(wanted, positions, 1, axis=1)
        batch = self._batch
        batch.n_tokens = tokens.size
        for target, values in (
            (batch.token, np.ascontiguousarray(tokens, np.int32)),
            (batch.pos, np.tile(np.arange(length, dtype=np.int32), n_sequences)),
            (batch.n_seq_id, np.ones(tokens.size, np.int32)),
            (batch.logits, wanted),
        ):
            ctypes.memmove(target, values.ctypes.data, values.nbytes)
        for i in range(tokens.size):
            batch.seq_id[i][0] = i // length
        c.llama_memory_clear(c.llama_get_memory(self._context), True)
        self._decode()
        logits = c.llama_get_logits(self._context)
        return np.ctypeslib.as_array(logits, shape=(positions.size, self.model.n_vocab))

    def _decode(self) -> None:
        with _interrupts_deferred() as self._interrupts:
            code = library().llama_decode(self._context, self._batch)
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure
        if code:
            raise EngineError(f"{self.model.path}: llama_decode ended with {code}: {reason()}")

    def seconds(self, n_prompt: int, n_generated: int) -> tuple[float, float]:
        """Seconds for a prompt of `n_prompt` tokens, and for `n_generated` one by one after it."""
        c = library()
        c.llama_memory_clear(c.llama_get_memory(self._context), True)
        started = time.perf_counter()
        for first in range(0, n_prompt, self._n_batch):
            self._fill(first, min(self._n_batch, n_prompt - first))
            self._run()
        prompted = time.perf_counter()
        for i in range(n_generated):
            self._fill(n_prompt + i, 1)
            self._run()
        return prompted - started, time.perf_counter() - prompted

    def sampling_seconds(self, repetitions: int = 5) -> float:
        """Seconds to pick one token from the last logits, as llama-cli does unless told otherwise.

        Top-k 40, top-p 0.95, min-p 0.05, temperature 0.8. The least of `repetitions`.
        """
        c = library()
        chain = c.llama_sampler_chain_init(c.llama_sampler_chain_default_params())
        for sampler in (
            c.llama_sampler_init_top_k(40),
            c.llama_sampler_init_top_p(0.95, 1),
            c.llama_sampler_init_min_p(0.05, 1),
            c.llama_sampler_init_temp(0.8),
            c.llama_sampler_init_dist(0),
        ):
            c.llama_sampler_chain_add(chain, sampler)
        taken = []
        try:
            for _ in range(repetitions):
                started = time.perf_counter()
                c.llama_sampler_sample(chain, self._context, -1)
                taken.append(time.perf_counter() - started)
        finally:
            c.llama_sampler_free(chain)
        return min(taken)

    def _fill(self, start: int, count: int) -> None:
        batch = self._batch
        batch.n_tokens = count
        for i in range(count):
            # Any token will do: speed does not depend on which; a spread avoids one hot row.
            batch.token[i] = (start + i) * 7919 % self.model.n_vocab
            batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = start + i, 1, 0
            batch.logits[i] = i == count - 1

    def _run(self) -> None:
        self._decode()
        library().llama_synchronize(self._context)

    # -- listening to matrix products --

    def _on_eval(self, pointer: int, ask: bool, _user_data: object) -> bool:
        """ggml_backend_sched_eval_callback: asked first, then called with the data there."""
        if self._interrupts:
            return False  # ends the evaluation
        try:
            node = _tensor_at(pointer)
            operation = _operation_name(node.op)
            if _HIDDEN_STATE.fullmatch(node.name):
                if not ask and self._listener is not None:
                    values = _read_tensor(pointer, np.dtype(np.float32))
                    self._listener(node.name.decode(), values, None)
                return True
            if operation not in ("MUL_MAT", "MUL_MAT_ID"):
                return not ask
            weight, activation = _tensor_at(node.src[0]), _tensor_at(node.src[1])
            name = weight.name.decode("utf-8", "replace")
            if not name.endswith(".weight") or activation.type != 0:
                return not ask
            if not ask and self._listener is not None:
                experts = None
                if operation == "MUL_MAT_ID":
                    experts = _read_tensor(node.src[2], np.dtype(np.int32))
                    experts = experts.reshape(experts.shape[-2:])
                values = _read_tensor(node.src[1], np.dtype(np.float32))
                self._listener(name, values, experts)
            return True
        except BaseException as error:  # must not unwind through C
            self._failure = error
            return False


@lru_cache(maxsize=256)
def _operation_name(op: int) -> str:
    return str(_ggml().ggml_op_name(op).decode())


def _read_tensor(pointer: int, dtype: np.dtype[Any]) -> Any:
    """A tensor's values as a numpy array, its ggml dimensions reversed; copied off a device."""
    tensor, ggml = _tensor_at(pointer), _ggml()
    shape = tuple(int(n) for n in reversed(tensor.ne))
    strides = tuple(int(n) for n in reversed(tensor.nb))
    extent = sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) + dtype.itemsize
    if ggml.ggml_backend_buffer_is_host(_buffer_of(tensor)):
        raw = (ctypes.c_char * extent).from_address(tensor.data)
    else:
        raw = (ctypes.c_char * extent)()
        ggml.ggml_backend_tensor_get(pointer, raw, 0, extent)
    return np.ndarray(shape, dtype, memoryview(raw), strides=strides)


def _buffer_of(tensor: Any) -> int:
    """A view has the buffer of what it looks into."""
    return int(_tensor_at(tensor.view_src).buffer if tensor.view_src else tensor.buffer)


# --- memory --------------------------------------------------------------------------------------

_BUFFER_LINE = re.compile(r"^\S+: +(\S+) +(\S+) buffer size = +([\d.]+) MiB", re.MULTILINE)
_KV_LINE = re.compile(
    r"^llama_kv_cache\S*: size = +([\d.]+) MiB"
    r"(?:.*K \(\S+\): +([\d.]+) MiB, V \(\S+\): +([\d.]+) MiB)?",
    re.MULTILINE,
)
_LOAD_WITHOUT_MAP = 0  # LLAMA_LOAD_MODE_NONE


def memory_accounting(
    path: Path, n_ctx: int, type_k: QuantType, type_v: QuantType
) -> dict[str, int]:
    """Bytes that llama.cpp would reserve for `path`: {"kv", "k", "v", "compute", "output"}.

    Its own simulation (no_alloc): no weight is read, nothing is allocated. Raises EngineError.
    """
    c, lines = library(), list[str]()
    model_params, params = c.llama_model_default_params(), c.llama_context_default_params()
    model_params.n_gpu_layers, model_params.no_alloc = 0, True
    model_params.load_mode = _LOAD_WITHOUT_MAP
    params.n_ctx, params.type_k, params.type_v = n_ctx, type_k.ggml_id, type_v.ggml_id
    if type_v.is_quantized:
        params.flash_attn_type = _FLASH_ATTENTION_ON
    params.offload_kqv = params.op_offload = False
    _log.clear()
    with _listen_to_log(lines):
        model = c.llama_model_load_from_file(os.fsencode(path), model_params)
        if not model:
            raise EngineError(f"{path}: llama.cpp cannot load it: {reason()}")
        context = c.llama_init_from_model(model, params)
        if context:
            c.llama_free(context)
        c.llama_model_free(model)
    if not context:
        raise EngineError(f"{path}: llama.cpp cannot make a context of {n_ctx}: {reason()}")
    text = "".join(lines)
    kinds = dict.fromkeys(("kv", "k", "v", "compute", "output"), 0.0)
    for both, k, v in _KV_LINE.findall(text):
        for kind, size in (("kv", both), ("k", k or 0), ("v", v or 0)):
            kinds[kind] += float(size)
    for _, kind, size in _BUFFER_LINE.findall(text):
        if kind in ("compute", "output"):
            kinds[kind] += float(size)
    return {kind: int(size * 2**20) for kind, size in kinds.items()}


# --- llama.cpp's own quantiser -------------------------------------------------------------------


def stock_presets() -> Mapping[str, int]:
    """The presets of llama_model_quantize by name, with their ftype number."""
    prefix = "LLAMA_FTYPE_MOSTLY_"
    values = vars(library())
    found = {k[len(prefix) :]: int(v) for k, v in values.items() if k.startswith(prefix)}
    return dict(sorted(found.items(), key=lambda item: item[1]))


def stock_quantize(
    source: Path,
    output: Path,
    preset: str,
    *,
    imatrix: Mapping[str, Floats],
    n_threads: int,
    tensor_types: Sequence[tuple[str, int]] = (),
    allow_requantize: bool = False,
    dry_run: bool = False,
) -> None:
    """Write `output` with `llama_model_quantize`, as `llama-quantize --imatrix` does.

    `tensor_types` are (regular expression, ggml type id) pairs, as in --tensor-type-file.
    Raises EngineError.
    """
    c = library()
    presets = stock_presets()
    if preset.upper() not in presets:
        raise EngineError(
            f"preset '{printable(preset)}' is unknown; there are {', '.join(presets)}"
        )
    params = c.llama_model_quantize_default_params()
    params.ftype, params.nthread = presets[preset.upper()], n_threads
    params.allow_requantize, params.dry_run = allow_requantize, dry_run
    entries = [(name.encode(), np.ascontiguousarray(v, np.float32)) for name, v in imatrix.items()]
    if entries:
        table = (c.llama_model_imatrix_data * (len(entries) + 1))()
        for row, (name, values) in zip(table, entries, strict=False):
            row.name, row.size = name, values.size
            row.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        params.imatrix = table
    if tensor_types:
        overrides = (c.llama_model_tensor_override * (len(tensor_types) + 1))()
        for override, (pattern, ggml_id) in zip(overrides, tensor_types, strict=False):
            override.pattern, override.type = pattern.encode(), ggml_id
        params.tt_overrides = overrides
    _log.clear()
    with _interrupts_deferred():
        code = c.llama_model_quantize(
            os.fsencode(source), os.fsencode(output), ctypes.byref(params)
        )
    if code:
        raise EngineError(f"{source}: llama_model_quantize to {preset} failed: {reason()}")


_DRY_RUN_NAME = re.compile(r"^\[ *\d+/ *\d+\] +(\S+) +- \[.*\], type = +(\S+),")
_DRY_RUN_TYPE = re.compile(r"-> +[\d.]+ MiB \((\S+)\)")


def stock_types(
    source: Path, preset: str, *, has_imatrix_for: Sequence[str], n_threads: int = 1
) -> dict[str, str]:
    """The quant type of every tensor in a stock preset, from llama.cpp's own dry run.

    `has_imatrix_for` names the tensors with importance weights: presets choose otherwise without.
    Raises EngineError.
    """
    one = np.ones(1, np.float32)
    lines: list[str] = []
    with _listen_to_log(lines):
        stock_quantize(
            source,
            source.with_name(source.name + ".dry-run"),
            preset,
            imatrix=dict.fromkeys(has_imatrix_for, one),
            n_threads=n_threads,
            allow_requantize=True,
            dry_run=True,
        )
    types: dict[str, str] = {}
    name = ""
    for line in "".join(lines).splitlines():
        if found := _DRY_RUN_NAME.match(line):
            name = found[1]
            types[name] = found[2].upper()
        if name and (changed := _DRY_RUN_TYPE.search(line)):
            types[name] = changed[1].upper()
    if not types:
        raise EngineError(f"{source}: llama.cpp's dry run of {preset} listed no tensors")
    return types
