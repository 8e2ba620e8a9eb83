"""`apreqel doctor`: what is in order is said so, what is not is told with how to mend it."""

from __future__ import annotations

import json
import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
from support import apreqel, workspace

from apreqel import artifacts, doctor, quantize
from apreqel.device.machine import cpu_features
from apreqel.device.store import store_folder
from apreqel.doctor import Finding, examine
from apreqel.errors import EngineError
from apreqel.model.inventory import read_inventory
from apreqel.workspace import HASH_FILE

_Usage = namedtuple("_Usage", "total used free")


def amiss(findings: list[Finding]) -> dict[str, Finding]:
    return {f.item: f for f in findings if not f.ok}


def test_all_is_well_and_nothing_is_written(llama_model: Path, tmp_path: Path) -> None:
    model = Path(shutil.copy(llama_model, tmp_path / "tiny.gguf"))
    done = apreqel("doctor", model)
    assert done.returncode == 0 and done.stderr == "", done.stdout
    assert all(line.startswith("OK ") for line in done.stdout.splitlines()[:-1])
    assert done.stdout.endswith("all is well\n") and "not there yet" in done.stdout
    told = json.loads(apreqel("doctor", "--json").stdout)
    assert told["ok"] and {"Python", "C quantiser", "disk"} <= {i["item"] for i in told["items"]}
    assert os.listdir(tmp_path) == ["tiny.gguf"]


@pytest.mark.parametrize(
    "content, told",
    [
        (None, "is not there"),
        (b"\x7fELF, but for another machine", "does not start"),
        (b"#!/bin/sh\nexit 3\n", "ended with 3"),
        (b"#!/bin/sh\nkill -SEGV $$\n", "ended with -11"),
    ],
)
def test_a_missing_or_broken_c_program(
    content: bytes | None, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "apreqel-quantize"
    if content is not None:
        program.write_bytes(content)
        program.chmod(0o755)
    monkeypatch.setattr(quantize.resources, "files", lambda _package: tmp_path)
    with pytest.raises(EngineError, match=told):
        quantize.check_program()
    found = amiss(examine())
    assert set(found) == {"C quantiser"} and told in found["C quantiser"].found
    assert "pip install" in found["C quantiser"].found + found["C quantiser"].mend


def test_a_full_disk_and_little_memory(
    llama_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        doctor.shutil, "disk_usage", lambda _path: _Usage(10**12, 10**12, 5 * 10**6)
    )
    found = amiss(examine())
    assert set(found) == {"disk"} and "free some space" in found["disk"].mend
    # The tiny model's whole way takes more than what is free, too: five times its size.
    assert 5 * llama_model.stat().st_size > 5 * 10**6
    found = amiss(examine(str(llama_model), tmp_path / "not" / "there"))
    assert set(found) == {"disk"} and str(tmp_path) in found["disk"].found
    monkeypatch.undo()
    here = doctor.detect()
    monkeypatch.setattr(
        doctor, "detect", lambda: type(here)(**{**vars(here), "available_bytes": 9})
    )
    assert set(amiss(examine())) == {"memory"}


def test_exit_code_and_how_to_mend(tmp_path: Path) -> None:
    page = tmp_path / "page.gguf"
    page.write_text("<!DOCTYPE html><html><body>404</body></html>")
    done = apreqel("doctor", page)
    assert done.returncode == 1 and done.stderr == ""
    assert "!! model: " in done.stdout and "an HTML page" in done.stdout
    assert "1 of " in done.stdout.splitlines()[-1]
    assert not json.loads(apreqel("doctor", page, "--json").stdout)["ok"]


def test_damaged_records_are_named(llama_model: Path, tmp_path: Path) -> None:
    space = workspace(read_inventory(llama_model), tmp_path / "w")
    artifacts.model_sha256(space.inventory.files, space.folder / HASH_FILE)
    before = sorted(os.listdir(space.folder))
    assert not amiss(examine(str(llama_model), space.folder))
    assert sorted(os.listdir(space.folder)) == before
    (space.folder / "plan.json").write_text("{}")
    (space.folder / "sensitivity.json").write_text('{"kind": "apreqel sensitivity"')
    found = amiss(examine(str(llama_model), space.folder))
    assert set(found) == {"work folder: plan.json", "work folder: sensitivity.json"}
    assert "delete it" in found["work folder: sensitivity.json"].mend
    profile = store_folder() / "broken.json"
    profile.parent.mkdir(parents=True, exist_ok=True)
    profile.write_text("no json")
    try:
        assert set(amiss(examine())) == {"profile broken"}
    finally:
        profile.unlink()


def test_a_build_without_this_processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nflags\t\t: fpu avx avx2 fma f16c avx512f sse4_2\n")
    has = cpu_features(cpuinfo)
    assert has == {"AVX", "AVX2", "FMA", "F16C", "AVX512"}
    assert cpu_features(tmp_path / "none") == set()
    monkeypatch.setattr(doctor, "cpu_features", lambda: has)
    build = "llama-cpp-python 0.3.36; CPU : AVX = 1 | FMA = 1 | F16C = 1 | {}REPACK = 1 |"
    monkeypatch.setattr(doctor, "build_info", lambda: build.format(""))
    found = amiss(examine())["llama.cpp"]
    assert "not built for AVX2" in found.found and "--no-binary" in found.mend
    monkeypatch.setattr(doctor, "build_info", lambda: build.format("AVX2 = 1 | "))
    (told,) = [f for f in examine() if f.item == "llama.cpp"]
    assert told.ok and "also has AVX512" in told.found
