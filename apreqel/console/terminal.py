"""Progress on stderr, results on stdout as text, tables or JSON. All views print through this."""

from __future__ import annotations

import atexit
import io
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TextIO

from apreqel import last_words
from apreqel.artifacts import output_error, plain
from apreqel.errors import printable

if TYPE_CHECKING:
    from rich.table import Table

    from apreqel.estimates import Range

# Without a terminal, a progress line this often: enough for a log, not a flood.
_SECONDS_BETWEEN_LINES = 15.0
_BAR_CELLS = 16
_CLEAR_LINE = "\r\033[2K"

# What a shell reports of any filter whose reader went away.
READER_GONE = 128 + signal.SIGPIPE


class Reporter:
    """Progress with the time left: one moving line on a terminal, a line now and then elsewhere."""

    def __init__(self, quiet: bool = False) -> None:
        self._quiet, self._live = quiet, sys.stderr.isatty()
        self._what, self._started, self._first, self._printed = "", 0.0, 0, 0.0
        atexit.register(self.finish)

    def __call__(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if what != self._what:
            last_words.note(step=what)
            self.finish()
            self._what, self._started, self._first, self._printed = what, now, done, 0.0
        pause = (0.1 if done < total else 0.0) if self._live else _SECONDS_BETWEEN_LINES
        if not self._quiet and now - self._printed >= pause:
            self._printed = now
            line = f"{what}{self._amount(done, total, now)}"
            _put(f"{_CLEAR_LINE}{line}" if self._live else f"{line}\n", sys.stderr)

    def _amount(self, done: int, total: int, now: float) -> str:
        if total <= 1:
            return " ..."
        text = f": {done} of {total}" if total < 10**7 else f": {100 * done // total}%"
        if not self._first < done < total:
            return text
        left = (now - self._started) / (done - self._first) * (total - done)
        return f"{text}, {duration(left)} left"

    def finish(self) -> None:
        """Leave the moving line behind."""
        if self._live and self._what and not self._quiet:
            _put(_CLEAR_LINE, sys.stderr)


def answer(
    as_json: bool,
    show: Callable[..., None],
    *found: Any,
    data: Callable[..., Any] = lambda first, *_: first,
) -> None:
    """What a command found: shown, or as JSON what `data` makes of it (the first value itself)."""
    if as_json:
        _put(json.dumps(plain(data(*found)), indent=1) + "\n", sys.stdout)
    else:
        show(*found)


def write(*parts: str | Table) -> None:
    """Lines and tables on stdout."""
    from rich.console import Console

    # A pipe or a log has no width: tables are not cut there, and text is never broken up.
    live, text = sys.stdout.isatty(), io.StringIO()
    console = Console(file=text, force_terminal=live, highlight=False, width=None if live else 160)
    safe = (_safe(part) if isinstance(part, str) else part for part in parts)
    console.print(*safe, markup=False, soft_wrap=all(isinstance(part, str) for part in parts))
    _put(text.getvalue(), sys.stdout)


def remark(text: str) -> None:
    """A line on stderr that is to be seen also where progress is not."""
    _put(f"apreqel: {_safe(text)}\n", sys.stderr)


def table(*columns: str, rows: Iterable[Sequence[str]]) -> Table:
    """Numbers to the right, words and bars (columns without a name) to the left."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    made = Table(box=SIMPLE_HEAD, pad_edge=False)
    for i, column in enumerate(columns):
        left = i == 0 or not column or column == "remarks"
        made.add_column(column, justify="left" if left else "right", overflow="fold")
    for row in rows:
        made.add_row(*map(_safe, row))
    return made


def _safe(text: str) -> str:
    """Names come from files that may hold anything: control characters are escaped."""
    return "\n".join(printable(line, sys.maxsize) for line in text.split("\n"))


def _put(text: str, stream: TextIO) -> None:
    """Write at once; where nobody reads any more (`| head -1`), end the command without a word.

    Raises OutputError where it cannot be written.
    """
    try:
        stream.write(text)
        stream.flush()
    except OSError as error:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())  # Python flushes what is left when it ends
        if isinstance(error, BrokenPipeError):
            sys.exit(READER_GONE)
        raise output_error(stream.name, error) from error


# --- values --------------------------------------------------------------------------------------


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60} min"


def size(size_bytes: float) -> str:
    return f"{size_bytes / 1e9:.2f} GB" if size_bytes >= 1e9 else f"{size_bytes / 1e6:.1f} MB"


def span(interval: tuple[float, float], digits: int = 5) -> str:
    return f"{interval[0]:.{digits}f} to {interval[1]:.{digits}f}"


def with_interval(value: Range, digits: int = 1) -> str:
    return f"{value.value:.{digits}f} ({value.low:.{digits}f}-{value.high:.{digits}f})"


def bar(part: float) -> str:
    return "█" * max(1, round(_BAR_CELLS * part))
