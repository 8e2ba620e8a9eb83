"""`apreqel export`, `run` and `doctor`."""

from __future__ import annotations

import shlex

from apreqel.console.terminal import write
from apreqel.publish.folder import Exported


def show_exported(done: Exported) -> None:
    for name in done.files:
        write(f"{name}, a {done.how[name]}" if name in done.how else name)
    for remark in done.remarks:
        write(f"note: {remark}")
    folder = shlex.quote(str(done.folder))
    write(f"The folder: {done.folder}. Read README.md, then: hf upload ORGANISATION/NAME {folder}")
