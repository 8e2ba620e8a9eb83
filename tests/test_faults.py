"""The operating system fails, at every place in turn: one line, an exit code, and nothing lost."""

from __future__ import annotations

import builtins
import errno
import fcntl
import io
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support import LITTLE, SHORT, texts

from apreqel import cli, errors
from apreqel.pipeline import open_workspace
from apreqel.progress import silent
from apreqel.sensitivity import measure as sensitivity

# What opens, looks at, makes, locks, moves or removes.
TOUCHING = [
    (builtins, "open"), (io, "open"), (os, "open"), (os, "stat"), (os, "lstat"), (os, "mkdir"),
    (os, "listdir"), (os, "scandir"), (os, "unlink"), (os, "replace"), (os, "link"),
    (os, "fsync"), (fcntl, "flock"), (shutil, "disk_usage"),
]  # fmt: skip
FAILURES = errno.EACCES, errno.EIO, errno.ENOSPC
CODES = {0} | {error.exit_code for error in errors.all_errors()}


class Fault:
    """Lets the call number `at` fail of those that touch `folder`, and counts them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.count, self.at = str(folder), 0, -1

    def instead_of(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **named: Any) -> Any:
            first = arguments[0] if arguments else ""
            name = os.fsdecode(first) if isinstance(first, str | bytes | os.PathLike) else None
            if name is None or self.folder in name:  # what is no name is an open file
                self.count += 1
                if self.count - 1 == self.at:
                    number = FAILURES[self.at % len(FAILURES)]
                    raise OSError(number, os.strerror(number), name)
            return call(*arguments, **named)

        return run


@pytest.fixture(scope="module")
def folder(llama_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that was probed."""
    place = tmp_path_factory.mktemp("faults")
    model = str(shutil.copy(llama_model, place / "m.gguf"))
    with open_workspace(model, folder=None, allow_requantize=False, progress=silent) as space:
        sensitivity.measure(space, texts=texts(), settings=SHORT, effort=LITTLE)
    return place


@pytest.fixture
def kept_handlers() -> Iterator[None]:
    numbers = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def run(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["apreqel", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def meaning(content: bytes) -> object:
    """What a file says: of a plan its types, beside which it also tells how long solving took."""
    return json.loads(content)["data"]["types"] if content.startswith(b"{") else content


@pytest.mark.parametrize(
    "arguments",
    [
        ["inspect", "m.gguf"],
        ["plan", "m.gguf", "--unchecked", "--any-speed", "-q", "-o", "p.json"],
        ["quantize", "p.json", "-o", "out.gguf", "-q", "--force"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_every_place_where_the_system_may_fail(
    arguments: list[str],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    kept_handlers: None,
) -> None:
    monkeypatch.chdir(folder)
    whole = [str(folder / a) if "." in a else a for a in arguments]
    assert run(whole, monkeypatch) == 0
    before = {p: p.read_bytes() for p in folder.iterdir() if p.is_file()}
    fault = Fault(folder)
    with monkeypatch.context() as patch:
        for module, name in TOUCHING:
            patch.setattr(module, name, fault.instead_of(getattr(module, name)))
        assert run(whole, patch) == 0
        n_calls = fault.count
        assert n_calls > 2
        for i in range(n_calls):
            fault.at, fault.count = i, 0
            capsys.readouterr()
            code = run(whole, patch)
            fault.at, told = -1, capsys.readouterr().err
            assert code in CODES, told
            assert "Traceback" not in told
            assert code == 0 or told.strip().splitlines()[-1].startswith("apreqel: "), told
            for path, content in before.items():  # an output is replaced whole, or not at all
                assert meaning(path.read_bytes()) == meaning(content), (path, i, told)
    left = {p.name for p in folder.iterdir() if p.is_file()} - {p.name for p in before}
    assert not {name for name in left if not name.startswith(".")}
