"""The `apreqel` command: the work in a child process, so that even its death is one line.

The line names the model, the step and llama.cpp's last words, and nothing is left lying about.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from apreqel import last_words
from apreqel.errors import EngineError, Interrupted, Killed

# Nothing is imported from the folder where it is called.
_COMMAND = f"""\
import sys
sys.path = [{str(Path(__file__).parent.parent)!r}, *filter(None, sys.path)]
sys.argv[0] = "apreqel"
try:
    from apreqel.cli import main
except KeyboardInterrupt:
    sys.exit({Interrupted.exit_code})
main()
"""


def main() -> NoReturn:
    code, said = watched([sys.executable, "-c", _COMMAND, *sys.argv[1:]])
    if code >= 0:
        sys.exit(code)
    if -code in last_words.STOPPING:  # before the child could take them
        print(f"apreqel: {Interrupted.message}", file=sys.stderr)
        sys.exit(Interrupted.exit_code)
    if "folder" in said:
        from apreqel.workspace import sweep

        sweep(Path(said["folder"]))
    left_behind = "\n" if sys.stderr.isatty() else ""  # a moving line of progress
    print(f"{left_behind}apreqel: {obituary(-code, said)}", file=sys.stderr)
    sys.exit(Killed.exit_code if -code == signal.SIGKILL else EngineError.exit_code)


def watched(command: list[str]) -> tuple[int, dict[str, str]]:
    """Run `command`: its exit code, below 0 for the signal that it died of, and its last words.

    What stops this process is passed on to it, once, and it does not outlive this process.
    """
    _open_standard_streams()
    read, told = os.pipe()
    alive, _ours = os.pipe()
    for descriptor in (told, alive):
        os.set_inheritable(descriptor, True)
    # llama.cpp would start a debugger on itself when it aborts.
    environment = {"GGML_NO_BACKTRACE": "1", **os.environ, last_words.VARIABLE: f"{told},{alive}"}
    # Files that a shell opened for us, as `<(...)` does, are the child's too.
    child = subprocess.Popen(command, env=environment, close_fds=False)
    for number in last_words.heeded():
        signal.signal(number, lambda number, _frame: os.kill(child.pid, number))
    os.close(told)
    os.close(alive)
    with open(read, "rb") as lines:
        said = last_words.heard(lines)
    return child.wait(), said


def _open_standard_streams() -> None:
    """To nowhere those that the shell closed, as `>&-` does: no file is to take their place."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)


def obituary(number: int, said: Mapping[str, str]) -> str:
    """Why the command died of signal `number`, and what to do."""
    what = said.get("call") or said.get("step") or "starting"
    kept = "finished measurements are kept"
    where, name = f"{said['model']}: " if "model" in said else "", signal.Signals(number).name
    if number == signal.SIGKILL:
        return (
            f"{where}killed while {what}, as a system does that is out of memory; close other "
            f"programs, or use a smaller model or a machine with more memory; {kept}"
        )
    if number == signal.SIGILL:
        return (
            f"{where}{name} while {what}: llama-cpp-python was built for another CPU; build it "
            "here: pip install --force-reinstall --no-binary llama-cpp-python llama-cpp-python"
        )
    if number == signal.SIGBUS:
        return (
            f"{where}{name} while {what}: a file was cut short or its disk failed while it was "
            f"read; {kept}"
        )
    reason = said.get("reason") or "it gave no reason"
    return f"{where}llama.cpp died of {name} while {what}: {reason}; {kept}"


if __name__ == "__main__":
    main()
