"""What the command is at, told to the process that watches it: all that is left when it dies.

llama.cpp aborts on what it was not written for, and a system short of memory kills: neither is an
exception. So the command runs in a child of `__main__`, which reads what is noted here.
"""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterable
from contextlib import suppress

# In the child's environment: where to tell, and a pipe that ends when the watching process does.
VARIABLE = "APREQEL_WATCHED"

# What stops a command, all of them as Ctrl-C does.
STOPPING = signal.SIGINT, signal.SIGTERM, signal.SIGHUP

_told: int | None = None


def heeded() -> list[signal.Signals]:
    """Of these those that are not ignored, as nohup lets SIGHUP be."""
    return [n for n in STOPPING if signal.getsignal(n) is not signal.SIG_IGN]


def begin() -> None:
    """In the child: tell from now on, and die with the process that watches."""
    global _told
    if value := os.environ.pop(VARIABLE, ""):
        _told, alive = map(int, value.split(","))
        for descriptor in (_told, alive):
            os.set_inheritable(descriptor, False)  # not the quantiser's
        threading.Thread(target=_follow, args=(alive,), daemon=True).start()


def _follow(alive: int) -> None:
    os.read(alive, 1)
    os.kill(os.getpid(), signal.SIGKILL)


def note(**said: object) -> None:
    """From now on `model`, its `folder`, the `step`, the `call` of C in it, or the `reason` is so.

    Nothing where no process watches.
    """
    if _told is not None:
        os.write(_told, json.dumps({k: str(v) for k, v in said.items()}).encode() + b"\n")


def heard(lines: Iterable[bytes]) -> dict[str, str]:
    """What was noted last of each, once the child has ended; half a line is not taken."""
    said: dict[str, str] = {}
    for line in lines:
        with suppress(ValueError):
            said |= json.loads(line)
    return said
