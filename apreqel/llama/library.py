"""llama.cpp's shared libraries: found, loaded, asked what they are; their log kept in memory.

They are those that llama-cpp-python installs, so that what apreqel measures is what the user runs.
Nothing is loaded before it is needed. The log is shown only as the reason of a failure.
"""

from __future__ import annotations

import ctypes
import re
import signal
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from apreqel import last_words
from apreqel.errors import EngineError, printable

_GPU_DEVICES = (1, 2)  # enum ggml_backend_dev_type: GPU, IGPU

_LOG_LINES_KEPT, _LOG_LEVEL_WARN, _LOG_LEVEL_ERROR = 40, 3, 4

# --- ggml, as its headers declare it --------------------------------------------------------------

# ggml.h: GGML_MAX_DIMS, GGML_MAX_SRC, GGML_MAX_NAME, GGML_MAX_OP_PARAMS in words
_MAX_DIMS, _MAX_SRC, _MAX_NAME, _OP_PARAMS_WORDS = 4, 10, 64, 16
_pointer, _string, _bool = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_bool
_int, _int64, _size = ctypes.c_int, ctypes.c_int64, ctypes.c_size_t


class GgmlTensor(ctypes.Structure):
    """struct ggml_tensor (ggml.h), the fields before `extra`."""

    _fields_ = [
        ("type", _int),
        ("buffer", _pointer),
        ("ne", _int64 * _MAX_DIMS),
        ("nb", _size * _MAX_DIMS),
        ("op", _int),
        ("op_params", ctypes.c_int32 * _OP_PARAMS_WORDS),
        ("flags", ctypes.c_int32),
        ("src", _pointer * _MAX_SRC),
        ("view_src", _pointer),
        ("view_offs", _size),
        ("data", _pointer),
        ("name", ctypes.c_char * _MAX_NAME),
    ]


class GgmlTypeTraits(ctypes.Structure):
    """struct ggml_type_traits (ggml.h)."""

    _fields_ = [
        ("type_name", _string),
        ("blck_size", _int64),
        ("blck_size_interleave", _int64),
        ("type_size", _size),
        ("is_quantized", _bool),
        ("to_float", ctypes.CFUNCTYPE(None, _pointer, _pointer, _int64)),
    ]


class GgmlInitParams(ctypes.Structure):
    """struct ggml_init_params (ggml.h)."""

    _fields_ = [("mem_size", _size), ("mem_buffer", _pointer), ("no_alloc", _bool)]


_abort_callback = ctypes.CFUNCTYPE(None, _string)

# The result and the arguments of each function.
_PROTOTYPES: dict[str, tuple[Any, list[Any]]] = {
    "ggml_set_abort_callback": (_pointer, [_abort_callback]),
    "ggml_init": (_pointer, [GgmlInitParams]),
    "ggml_free": (None, [_pointer]),
    "ggml_op_name": (_string, [_int]),
    "ggml_get_type_traits": (ctypes.POINTER(GgmlTypeTraits), [_int]),
    "ggml_quantize_chunk": (_size, [_int, _pointer, _pointer, _int64, _int64, _int64, _pointer]),
    "ggml_tensor_overhead": (_size, []),
    "ggml_graph_overhead_custom": (_size, [_size, _bool]),
    "ggml_new_tensor": (_pointer, [_pointer, _int, _int, ctypes.POINTER(_int64)]),
    "ggml_permute": (_pointer, [_pointer, _pointer, _int, _int, _int, _int]),
    "ggml_flash_attn_ext": (_pointer, [_pointer] * 5 + [ctypes.c_float] * 3),
    "ggml_flash_attn_ext_set_prec": (None, [_pointer, _int]),
    "ggml_mul_mat": (_pointer, [_pointer, _pointer, _pointer]),
    "ggml_mul_mat_id": (_pointer, [_pointer, _pointer, _pointer, _pointer]),
    "ggml_new_graph_custom": (_pointer, [_pointer, _size, _bool]),
    "ggml_build_forward_expand": (None, [_pointer, _pointer]),
    "ggml_backend_alloc_ctx_tensors_from_buft": (_pointer, [_pointer, _pointer]),
    "ggml_backend_buffer_set_usage": (None, [_pointer, _int]),
    "ggml_backend_buffer_is_host": (_bool, [_pointer]),
    "ggml_backend_buffer_free": (None, [_pointer]),
    "ggml_backend_cpu_buffer_from_ptr": (_pointer, [_pointer, _size]),
    "ggml_backend_buft_name": (_string, [_pointer]),
    "ggml_backend_tensor_alloc": (_int, [_pointer, _pointer, _pointer]),
    "ggml_backend_tensor_get": (None, [_pointer, _pointer, _size, _size]),
    "ggml_backend_tensor_set": (None, [_pointer, _pointer, _size, _size]),
    "ggml_backend_graph_compute": (_int, [_pointer, _pointer]),
    "ggml_backend_synchronize": (None, [_pointer]),
    "ggml_backend_free": (None, [_pointer]),
    "ggml_backend_dev_init": (_pointer, [_pointer, _string]),
    "ggml_backend_dev_buffer_type": (_pointer, [_pointer]),
    "ggml_backend_dev_supports_op": (_bool, [_pointer, _pointer]),
    "ggml_backend_dev_backend_reg": (_pointer, [_pointer]),
    "ggml_backend_dev_by_type": (_pointer, [_int]),
    "ggml_backend_dev_description": (_string, [_pointer]),
    "ggml_backend_dev_type": (_int, [_pointer]),
    "ggml_backend_dev_count": (_size, []),
    "ggml_backend_dev_get": (_pointer, [_size]),
    "ggml_backend_reg_get_proc_address": (_pointer, [_pointer, _string]),
}

# --- the libraries -------------------------------------------------------------------------------

_recent_log: deque[str] = deque(maxlen=_LOG_LINES_KEPT)  # warnings and errors
_log_lines: list[str] | None = None  # everything llama.cpp says, while someone wants it
_callbacks: list[Any] = []  # C holds them, too


def readable(text: bytes | None) -> str:
    """A C string as text, whatever bytes are in it: one that is cut or odd must not raise."""
    return (text or b"").decode("utf-8", "replace")


@lru_cache(maxsize=1)
def library() -> Any:
    """The `llama_cpp.llama_cpp` module, silenced and initialised. Raises EngineError."""
    try:
        from llama_cpp import llama_cpp
    except (ImportError, OSError, RuntimeError) as error:
        raise EngineError(
            f"llama-cpp-python cannot be loaded ({error}); run: pip install llama-cpp-python"
        ) from error

    def keep(level: int, text: bytes | None, _user_data: object) -> None:
        if level >= _LOG_LEVEL_WARN:
            _recent_log.append(readable(text).strip())
        if level == _LOG_LEVEL_ERROR:
            last_words.note(reason=printable(_recent_log[-1], 200))
        if _log_lines is not None:
            _log_lines.append(readable(text))

    def last(text: bytes | None) -> None:
        last_words.note(reason=printable(re.sub(r"^\S*/", "", readable(text).strip()), 200))

    _callbacks[:] = llama_cpp.llama_log_callback(keep), _abort_callback(last)
    llama_cpp.llama_log_set(_callbacks[0], ctypes.c_void_p(0))
    _Ggml(llama_cpp._lib._name).ggml_set_abort_callback(_callbacks[1])
    llama_cpp.llama_backend_init()
    return llama_cpp


class _Ggml(ctypes.CDLL):
    """ggml, each function declared before it is first called."""

    def __getitem__(self, name: Any) -> Any:
        try:
            function = super().__getitem__(name)
        except AttributeError as error:
            raise EngineError(f"{ggml_base_path()}: no {name}; update llama-cpp-python") from error
        function.restype, function.argtypes = _PROTOTYPES[name]
        return function


@lru_cache(maxsize=1)
def ggml() -> Any:
    """The ggml that the loaded llama.cpp itself uses, found through what libllama links.

    Never by its file: a wheel holds each library several times (libggml.so, libggml.so.0, ...), and
    another of these would be a second ggml, with a list of devices of its own. A function that is
    missing raises EngineError.
    """
    return _Ggml(library()._lib._name)


def ggml_base_path() -> Path:
    """libggml-base of the installed llama-cpp-python, found without loading it."""
    spec = find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        raise EngineError("llama-cpp-python is not installed; run: pip install llama-cpp-python")
    folder = Path(spec.origin).parent / "lib"
    # The shortest name is the library itself; others have versions in them.
    if found := sorted(folder.glob("libggml-base.*"), key=lambda path: len(path.name)):
        return found[0]
    raise EngineError(f"{folder} holds no libggml-base; reinstall llama-cpp-python 0.3.36 or newer")


def build_info() -> str:
    """The version of llama-cpp-python and the CPU features its llama.cpp was built with."""
    features = readable(library().llama_print_system_info()).strip()
    import llama_cpp

    return f"llama-cpp-python {llama_cpp.__version__}; {features}"


def gpu_device() -> int | None:
    """The GPU that llama.cpp puts layers on; None where it was built for none, or none is there."""
    return next(filter(None, map(ggml().ggml_backend_dev_by_type, _GPU_DEVICES)), None)


def gpu_name() -> str:
    """That GPU's name; '' where there is none."""
    device = gpu_device()
    return readable(ggml().ggml_backend_dev_description(device)) if device else ""


@contextmanager
def listen_to_log() -> Iterator[list[str]]:
    """Everything that llama.cpp says meanwhile."""
    global _log_lines
    _log_lines = lines = list[str]()
    try:
        yield lines
    finally:
        _log_lines = None


def reason() -> str:
    """Why llama.cpp failed: the first error it wrote in the last `c_call`, for messages."""
    lines = [line for line in _recent_log if line] or ["llama.cpp gave no reason"]
    return printable(next((s for s in lines if "error" in s or "fail" in s), lines[0]), 200)


@contextmanager
def c_call() -> Iterator[list[int]]:
    """Around C code that calls back into Python: the log starts anew, and Ctrl-C is only noted.

    It is raised once the code has returned. An exception that starts inside a ctypes callback is
    printed and lost, and a signal's handler runs at the first bytecode of the next callback, which
    is just there.
    """
    _recent_log.clear()
    noted: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield noted
        return
    before = {
        number: signal.signal(number, lambda number, _frame: noted.append(number))
        for number in last_words.heeded()
    }
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
    if noted:
        signal.raise_signal(noted[0])  # to whoever was to get it
        raise KeyboardInterrupt
