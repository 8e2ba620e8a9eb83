"""Others' programs as processes of their own: watched, stopped with us, their last words kept."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import IO

from apreqel.errors import Killed, UsageError, printable

_SECONDS_BETWEEN_LOOKS = 0.2
_SECONDS_TO_STOP = 5.0
_TAIL_BYTES = 1 << 16


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit code (below 0: the signal), and the end of what it said."""

    code: int
    out: str
    err: str

    def last_words(self, limit: int = 300) -> str:
        """What it complained of last, on one line: of a traceback the error, else the last line."""
        lines = [line.strip() for line in re.split(r"[\r\n]+", self.err)]
        starts = [i for i, line in enumerate(lines) if line.startswith("Traceback (most recent")]
        if starts:
            raw = re.split(r"[\r\n]+", self.err)[starts[-1] + 1 :]
            lines = [line for line in raw if line and not line[0].isspace()][:1]
        complaints = [line for line in lines if re.match(r"ERROR\b|[\w.]+(Error|Exit)\b", line)]
        said = (complaints or [line for line in lines if line] or ["no word"])[-1]
        return printable(re.sub(r"^ERROR:\s*([\w-]+:)?\s*", "", said), limit)


def require_packages(*packages: str) -> None:
    """Raise UsageError where packages of the extra `hf` are missing."""
    if missing := [name for name in packages if find_spec(name) is None]:
        raise UsageError(
            f"Hugging Face checkpoints need {', '.join(missing)}; run: pip install 'apreqel[hf]'"
        )


def run_python(
    what: str,
    *arguments: str | Path,
    folder: Path,
    environment: Mapping[str, str | None] | None = None,
    watch: Callable[[], None] = lambda: None,
    held: int | None = None,
) -> Ended:
    """Run `what`, this Python with `arguments`, in `folder`, calling `watch` now and then.

    Variables of `environment` that are None are left out. The process inherits a lock `held`, for
    it may outlive this one by a moment. Raises Killed where the system killed it.
    """
    variables = {**os.environ, **(environment or {})}
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        # Its own session: Ctrl-C reaches only this process, which then stops the child in order.
        with subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            cwd=folder,
            env={k: v for k, v in variables.items() if v is not None},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            pass_fds=[] if held is None else [held],
            start_new_session=True,
        ) as child:
            try:
                while (code := _waited(child, _SECONDS_BETWEEN_LOOKS)) is None:
                    watch()
            except BaseException:
                _stop(child)
                raise
        if code == -signal.SIGKILL:
            raise Killed(
                f"{what} was killed, as a system does that is out of memory; "
                "close other programs or use a machine with more memory"
            )
        return Ended(code, _tail(out), _tail(err))


def _waited(child: subprocess.Popen[bytes], seconds: float) -> int | None:
    try:
        return child.wait(seconds)
    except subprocess.TimeoutExpired:
        return None


def _stop(child: subprocess.Popen[bytes]) -> None:
    """The process and all that it started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(child.pid, number)
        except ProcessLookupError:
            return
        if _waited(child, _SECONDS_TO_STOP) is not None:
            return


def _tail(file: IO[bytes]) -> str:
    end = file.seek(0, os.SEEK_END)
    file.seek(max(0, end - _TAIL_BYTES))
    return file.read().decode("utf-8", "replace")
