"""This device's profile, with what it lacks for a model measured and kept."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from apreqel import artifacts
from apreqel.device import timing
from apreqel.device.profile import DeviceProfile
from apreqel.device.shapes import standard_model
from apreqel.device.store import load_named, store_folder, stored_profile
from apreqel.device.threads import tune_threads, tuned_threads, with_threads
from apreqel.model.inventory import Inventory
from apreqel.progress import Progress
from apreqel.workspace import Workspace, opened


def profile_of(space: Workspace, *, again: bool = False, quick: bool = False) -> DeviceProfile:
    """This device's profile with this model in it: the stored one, completed where it lacks.

    A `quick` one is measured in fewer rounds, and anew where more are wanted later. Raises
    LockedError where another apreqel is timing: two would disturb each other.
    """
    with artifacts.lock(store_folder() / ".lock"):
        tuning = None
        if space.tune_threads and (again or not tuned_threads(space.inventory)):
            tuning = tune_threads(space)
            space = replace(space, n_threads=tuning.n_threads)
        known = stored_profile(space.n_threads)
        again |= bool(known and not quick and timing.was_quick(known, space.inventory))
        if known and not again and known.is_complete(space.inventory):
            measured = known
        else:
            earlier = None if again else known
            measured = timing.measure_profile(space, known=earlier, quick=quick)
            measured = known.merged(measured) if known else measured
        if tuning:
            measured = measured.with_tuning(tuning)
        if measured is not known:
            measured.save(store_folder() / f"{measured.name}.json")
    return measured


def profile_for(space: Workspace, name: str | None, *, needed: bool) -> DeviceProfile | None:
    """The profile to plan with: a named device's, this one's, or what there is of this one."""
    if name is not None:
        return load_named(name)
    if needed:
        return profile_of(space)
    known = stored_profile(space.n_threads)
    return known if known and known.covers(space.inventory) else None


def profile_model(
    model: str | None, folder: Path | None, n_threads: int | None, again: bool, progress: Progress
) -> tuple[DeviceProfile, Inventory]:
    """This device's profile with `model` in it, or with shapes of common small models."""
    if model is not None:
        with opened(model, folder, allow_requantize=True, progress=progress) as space:
            return profile_of(with_threads(space, n_threads), again=again), space.inventory
    with standard_model() as inventory:
        space = Workspace(inventory, "", inventory.files[0].parent, progress=progress)
        return profile_of(with_threads(space, n_threads), again=again), inventory
