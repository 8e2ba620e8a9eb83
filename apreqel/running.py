"""How to run a written file here: as it was planned for, or as this device runs its like."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from ipaddress import ip_address
from pathlib import Path

from apreqel.device.machine import detect, usable_cores
from apreqel.device.store import load_named
from apreqel.device.threads import threads_for
from apreqel.errors import ApreqelError, ArtifactError, ModelFileError
from apreqel.llama import flags, serving
from apreqel.llama.flags import RunSettings
from apreqel.llama.library import gpu_name
from apreqel.model.inventory import read_inventory
from apreqel.plan.plan import Plan
from apreqel.publish.card import settings_of
from apreqel.publish.records import planned_file


@dataclass(frozen=True)
class Run:
    """A file, what it is run with, and where that comes from, in words."""

    path: Path
    settings: RunSettings
    why: str

    @property
    def commands(self) -> Mapping[str, str]:
        """Ready to paste, by program."""
        return flags.commands(str(self.path), flags.ollama_name(self.path.stem), self.settings)


def planned_run(path: Path, made: Plan) -> Run:
    """Of a file whose plan is at hand. Raises ModelFileError."""
    return Run(path, settings_of(made, read_inventory(path)), f"as planned ({made.prefer})")


def run_of(path: Path, workdir: Path | None = None, n_threads: int | None = None) -> Run:
    """With the plan that was found by the digest in the file; `n_threads` goes before its own.

    Raises ModelFileError; ArtifactError where `workdir` is given and does not hold the plan.
    """
    inventory = read_inventory(path)
    try:
        made = planned_file(path, workdir=workdir).plan
    except (ArtifactError, ModelFileError):
        if workdir is not None:
            raise
        n, why = threads_for(inventory)
        usual = settings_of(None, inventory)
        found = Run(
            path, replace(usual, n_threads=n), f"no plan of it was found; {n} threads, {why}"
        )
    else:
        found = planned_run(path, made)
        if not found.settings.n_threads or _is_elsewhere(made):
            n, why = threads_for(inventory)
            told = f"{found.why}, but {n} threads, {why}"
            found = Run(path, replace(found.settings, n_threads=n), told)
    if n_threads is not None:
        found = replace(found, settings=replace(found.settings, n_threads=n_threads))
    return found


def _is_elsewhere(made: Plan) -> bool:
    """Whether the plan's threads are those of another device, as far as that can be told."""
    if made.n_threads and made.n_threads > usable_cores():
        return True
    with suppress(ApreqelError):
        return bool(made.device) and load_named(made.device).device.cpu != detect().cpu
    return False


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches it."""
    with suppress(ValueError):
        return ip_address(host).is_loopback
    return host == "localhost"


def run(found: Run, host: str, port: int, announce: Callable[[int], None]) -> None:
    """Serve it until the process is stopped. Raises what `serving.serve` raises."""
    keywords = found.settings.keywords(all_on_gpu=bool(gpu_name()))
    with suppress(KeyboardInterrupt):  # how a server ends
        serving.serve(found.path, keywords, host, port, announce)
