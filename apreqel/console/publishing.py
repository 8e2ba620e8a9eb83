"""`apreqel export`, `run` and `doctor`."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any

from apreqel.console.terminal import remark, write
from apreqel.doctor import Finding
from apreqel.publish.folder import Exported
from apreqel.running import Run, is_loopback


def show_exported(done: Exported) -> None:
    for name in done.files:
        write(f"{name} ({done.how[name]})" if name in done.how else name)
    for note in done.remarks:
        write(f"note: {note}")
    folder = shlex.quote(str(done.folder))
    write(f"The folder: {done.folder}. Read README.md, then: hf upload ORGANISATION/NAME {folder}")


def show_run(run: Run) -> None:
    """A command a line, ready to paste."""
    write(f"{run.path}: {run.why}")
    for program, command in run.commands.items():
        write(f"{program}:\n  {command}")
    if run.settings.ollama_caches:
        write(f"Ollama: {run.settings.ollama_caches}")
    write(f"With apreqel: apreqel run {shlex.quote(str(run.path))}")


def run_json(run: Run) -> dict[str, Any]:
    return {"file": run.path, "settings": run.settings, "why": run.why, "commands": run.commands}


def show_serving(run: Run, host: str, port: int) -> None:
    where = f"[{host}]" if ":" in host else host
    flags = " ".join(run.settings.flags)
    write(f"{run.path}: {run.why}; {flags}")
    write(
        f"http://{where}:{port}/v1 (OpenAI's protocol), http://{where}:{port}/docs; Ctrl-C ends it"
    )
    if not is_loopback(host):
        remark(f"whoever reaches {host} can use it: there is no key")


def show_findings(found: Sequence[Finding]) -> None:
    """A line each: OK or !!, and what mends it."""
    for f in found:
        mend = "" if f.ok or not f.mend else f"\n   -> {f.mend}"
        write(f"{'OK' if f.ok else '!!'} {f.item}: {f.found}{mend}")
    amiss = sum(not f.ok for f in found)
    write("all is well" if not amiss else f"{amiss} of {len(found)} items are not in order")


def findings_json(found: Sequence[Finding]) -> dict[str, Any]:
    return {"ok": all(f.ok for f in found), "items": found}
