"""llama.cpp's library: its log, its functions, Ctrl-C while it runs."""

from __future__ import annotations

import signal
from pathlib import Path

import numpy as np
import pytest

from apreqel.errors import EngineError, UnsupportedModelError
from apreqel.llama import library
from apreqel.llama.engine import LoadedModel
from apreqel.llama.footprint import measure_footprint, memory_accounting
from apreqel.model.qtypes import lookup


@pytest.mark.parametrize(
    "said", [b"error: cut in \xe2\x82", b"error: \xff\xfe\x00", b"failed \x1b[0m"]
)
def test_a_message_that_is_cut_or_odd_is_still_a_reason(said: bytes) -> None:
    library.library()
    with library.listen_to_log() as lines, library.c_call():
        library._callbacks[0](4, said, None)
        library._callbacks[0](4, None, None)
    assert library.reason().startswith(said[:5].decode()) and library.reason().isprintable()
    assert "".join(lines) == library.readable(said.split(b"\x00")[0])
    assert library.readable(None) == ""


def test_a_reason_is_that_of_the_last_call(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"cannot load it: .*failed to open"):
        LoadedModel(tmp_path / "absent.gguf")
    with library.c_call():
        pass
    assert library.reason() == "llama.cpp gave no reason"


def test_an_unknown_architecture_is_said_so(llama_model: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.gguf"
    other.write_bytes(llama_model.read_bytes().replace(b"llama", b"lxxma"))
    with pytest.raises(UnsupportedModelError, match="update llama-cpp-python"):
        LoadedModel(other)
    with pytest.raises(UnsupportedModelError, match="update llama-cpp-python"):
        memory_accounting(other, 512, lookup("F16"), lookup("F16"))
    with pytest.raises(EngineError, match="cannot be measured"):
        measure_footprint(other, 512, 32, 1)


def test_a_missing_function_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(library._PROTOTYPES, "ggml_does_not_exist", (None, []))
    with pytest.raises(EngineError, match="no ggml_does_not_exist; update llama-cpp-python"):
        _ = library.ggml().ggml_does_not_exist


def test_ctrl_c_ends_an_evaluation_and_the_next_one_runs(llama_model: Path) -> None:
    heard: list[str] = []

    def interrupt_once(name: str, values: object, experts: object) -> None:
        if not heard:
            signal.raise_signal(signal.SIGINT)
        heard.append(name)

    tokens = np.arange(5, 37, dtype=np.int32).reshape(1, 32)
    before = signal.getsignal(signal.SIGINT)
    with (
        LoadedModel(llama_model) as model,
        model.context(32, 1, 1, interrupt_once) as context,
    ):
        with pytest.raises(KeyboardInterrupt):
            context.evaluate(tokens, tokens - 5)
        cut_short = len(heard)
        assert np.isfinite(context.evaluate(tokens, tokens - 5)).all()
        assert cut_short < len(heard) - cut_short
    assert signal.getsignal(signal.SIGINT) is before


def test_a_listener_that_fails_ends_the_evaluation(llama_model: Path) -> None:
    def fail(name: str, values: object, experts: object) -> None:
        raise ValueError(f"{name}: odd")

    tokens = np.arange(5, 37, dtype=np.int32).reshape(1, 32)
    with (
        LoadedModel(llama_model) as model,
        model.context(32, 1, 1, fail) as context,
        pytest.raises(ValueError, match="odd"),
    ):
        context.evaluate(tokens, tokens - 5)
