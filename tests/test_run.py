"""`apreqel run`: the server really started, asked and stopped; the commands that are shown."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import models
import pytest
from support import COMMAND, Finished, apreqel, expect, finished

from apreqel.device.memory import MemoryUse
from apreqel.errors import ArtifactError, EngineError
from apreqel.llama.flags import RunSettings, commands, ollama_name
from apreqel.model.qtypes import KV_TYPES, lookup
from apreqel.plan.plan import Plan
from apreqel.plan.request import PlanRequest
from apreqel.running import is_loopback, run, run_of

_PARTS = ("uvicorn", "fastapi", "sse_starlette", "starlette_context", "pydantic_settings")
needs_server = pytest.mark.skipif(
    not all(map(find_spec, _PARTS)), reason="the extra 'server' is not installed"
)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Planned for a context of 256, a KV cache in Q8_0 and one thread."""
    model = models.build(tmp_path_factory.mktemp("run") / "tiny.gguf")
    made = finished(model, PlanRequest(target_bpw=8.0, plain=True, any_speed=True))
    memory, caches = MemoryUse(256, 1, 1, 1, 1), ("Q8_0", "Q8_0")
    planned = replace(Plan.load(made.plan), memory=memory, cache_types=caches, n_threads=1)
    planned.save(made.plan)
    return made


@contextmanager
def serving(*arguments: object, **environment: str) -> Iterator[str]:
    """The command and the address it tells, until it is stopped."""
    command = [*COMMAND, "run", *map(str, arguments)]
    asked: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env={**os.environ, **environment}, **asked) as process:
        assert process.stdout is not None and process.stderr is not None
        told = process.stdout.readline() + process.stdout.readline()
        address = re.search(r"http://\S+?:\d+", told)
        assert address is not None, told + process.stderr.read()
        try:
            yield address[0]
        finally:
            process.send_signal(signal.SIGINT)
            rest = process.stderr.read()
            assert process.wait(30) == 0, rest
            assert "Traceback" not in rest


def asked(address: str, path: str, body: dict[str, object] | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(address + path, data, {"Content-Type": "application/json"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=60) as answer:
        return json.loads(answer.read())


@needs_server
def test_the_server_answers_as_planned_and_only_here(done: Finished) -> None:
    # What the environment happens to hold means something else.
    foreign = {"HOST": "0.0.0.0", "PORT": "1", "MODEL": "x", "N_CTX": "3", "API_KEY": "secret"}
    foreign["CONFIG_FILE"] = "/nowhere"
    with serving(done.file, "--port", 0, **foreign) as address:
        assert address.startswith("http://127.0.0.1:")
        (model,) = asked(address, "/v1/models")["data"]
        assert model["id"] == done.file.name
        said = asked(address, "/v1/completions", {"prompt": "the", "max_tokens": 4})
        assert said["choices"][0]["finish_reason"] in ("length", "stop")
        assert said["usage"]["prompt_tokens"] == 1
        port = int(address.rsplit(":", 1)[1])
        others = {info[4][0] for info in socket.getaddrinfo(socket.gethostname(), None)}
        for host in others - {"127.0.0.1", "127.0.1.1", "::1"}:
            with pytest.raises(OSError), socket.create_connection((host, port), timeout=2):
                pass
        expect(2, "choose another --port", "run", done.file, "--port", port)


@needs_server
def test_a_file_that_cannot_be_loaded_is_one_line(done: Finished, tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    content = done.file.read_bytes()
    broken.write_bytes(
        content.replace(b"\x05" + bytes(7) + b"llama", b"\x05" + bytes(7) + b"LLAMA")
    )
    expect(9, "the server cannot load it: ", "run", broken, "--port", 0)


def test_without_the_extra_it_says_what_to_install(
    done: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)  # as if it were not there
    with pytest.raises(EngineError, match=r"not installed .*run: pip install 'apreqel\[server\]'"):
        run(run_of(done.file), "127.0.0.1", 0, print)


def test_what_is_shown_is_what_was_planned(done: Finished, tmp_path: Path) -> None:
    told = json.loads(apreqel("run", done.file, "--show", "--json").stdout)
    flags = "-c 256 -ctk q8_0 -ctv q8_0 -fa on -t 1"
    assert told["commands"]["llama-server"] == f"llama-server -m {done.file} {flags}"
    assert told["commands"]["llama-cli"] == f"llama-cli -m {done.file} {flags}"
    assert "num_ctx 256\\nPARAMETER num_thread 1" in told["commands"]["Ollama"]
    shown = apreqel("run", done.file, "--show").stdout
    assert "as planned (accuracy)" in shown and "OLLAMA_KV_CACHE_TYPE=q8_0" in shown
    relative = commands("a b.gguf", "n", RunSettings(512))["Ollama"].partition(" | ")[0]
    said = subprocess.run(["sh", "-c", relative], capture_output=True, text=True, cwd=tmp_path)
    assert said.stdout == f"FROM {tmp_path}/a b.gguf\nPARAMETER num_ctx 512\n"
    # Elsewhere, without its plan: what this device does with its like.
    alone = tmp_path / "it's alone.gguf"
    alone.write_bytes(done.file.read_bytes())
    found = run_of(alone)
    assert "no plan of it was found" in found.why
    assert found.settings.n_ctx == 2048 and found.settings.has_usual_caches
    assert run_of(alone, done.plan.parent).settings.n_ctx == 256
    assert run_of(alone, done.plan.parent, n_threads=7).settings.n_threads == 7
    expect(10, "give --plan or --workdir", "run", alone, "--show", "--workdir", tmp_path)
    assert shlex.split(found.commands["llama-cli"])[2] == str(alone)


def test_a_plan_of_another_device_gives_no_threads(done: Finished) -> None:
    planned = Plan.load(done.plan)
    try:
        replace(planned, n_threads=4096).save(done.plan)
        found = run_of(done.file)
        assert found.settings.n_threads not in (None, 4096) and "threads" in found.why
        assert found.settings.n_ctx == 256
    finally:
        planned.save(done.plan)


def test_python_is_told_the_same(done: Finished) -> None:
    """The line that is shown, run: llama-cpp-python takes each word, and has the planned cache."""
    import llama_cpp

    settings = run_of(done.file).settings
    line = commands(str(done.file), "x", settings)["Python"]
    assert line.startswith("from llama_cpp import Llama; llm = ")
    llm = eval(line.split("llm = ")[1].replace("1)", "1, verbose=False)"), vars(llama_cpp))
    assert llm.n_ctx() == 256
    parameters = llm.context_params
    assert (parameters.type_k, parameters.type_v) == (8, 8)  # GGML_TYPE_Q8_0
    assert (parameters.n_threads, parameters.n_threads_batch) == (1, 1)
    assert parameters.flash_attn_type == llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
    llm.close()


def test_flags_are_spelt_as_llama_cpp_spells_them() -> None:
    assert RunSettings().flags == []
    assert RunSettings(4096, ("Q8_0", "F16"), 2).flags == (
        ["-c", "4096", "-ctk", "q8_0", "-ctv", "f16", "-fa", "on", "-t", "2"]
    )
    for name in KV_TYPES:
        given = RunSettings(None, (name, "F16"), None).keywords()
        assert given.get("type_k", 1) == lookup(name).ggml_id
    assert RunSettings(8).keywords(all_on_gpu=True)["n_gpu_layers"] == -1
    assert ollama_name("Ev|il Name/../x") == "ev-il-name-..-x" and ollama_name("|") == "model"


def test_a_plan_from_elsewhere_says_nothing_that_cannot_be() -> None:
    for wrong in (
        {"cache_types": ("q8_0; rm -rf ~", "F16")},
        {"cache_types": ("F16",)},
        {"n_ctx": -1},
        {"n_threads": 2**40},
    ):
        with pytest.raises(ArtifactError):
            RunSettings(**wrong)  # type: ignore[arg-type]


def test_who_can_reach_it() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "127.0.0.2", "::1", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "192.168.0.1", "example.org")))
