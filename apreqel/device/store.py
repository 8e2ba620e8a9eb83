"""Device profiles at hand: measured here, taken over from other machines, come with apreqel.

The user's own are kept in the data folder that the system has for such files, one a device and
number of threads.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from apreqel.device.machine import this_device
from apreqel.device.profile import DeviceProfile
from apreqel.device.shapes import standard_model
from apreqel.errors import ArtifactError, UsageError, printable
from apreqel.model.inventory import Inventory, find_model, read_inventory


def store_folder() -> Path:
    """Where measured and imported profiles are kept, by the system's custom."""
    base = Path.home() / "Library" / "Application Support"
    if sys.platform != "darwin":
        base = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share")
    return base / "apreqel" / "profiles"


def bundled_folder() -> Path:
    """Profiles of common devices that come with apreqel."""
    installed = Path(__file__).parents[1] / "device_profiles"
    return installed if installed.is_dir() else Path(__file__).parents[2] / "device_profiles"


def safe_name(name: str) -> str:
    """A profile's name as a file's name: an imported one is not to be trusted."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip(".-")[:80] or "imported"


def list_profiles() -> list[tuple[str, Path]]:
    """(name, file) of every profile at hand, the user's own first."""
    found: dict[str, Path] = {}
    for folder in (store_folder(), bundled_folder()):
        for path in sorted(folder.glob("*.json")):
            found.setdefault(path.stem, path)
    return [(name, path) for name, path in found.items() if name != "schema"]


def load_named(name: str) -> DeviceProfile:
    """A profile by its name or file. Raises UsageError, ArtifactError."""
    if name.endswith(".json"):
        return DeviceProfile.load(Path(name))
    at_hand = dict(list_profiles())
    if name not in at_hand:
        known = ", ".join(at_hand) or "none yet"
        raise UsageError(f"device {printable(name)!r}: no such profile; there are: {known}")
    return DeviceProfile.load(at_hand[name])


def named_profile(name: str, model: str | None) -> tuple[DeviceProfile, Inventory]:
    """A profile at hand and the model to predict for: standard shapes where none is given."""
    found = load_named(name)
    if model is not None:
        return found, read_inventory(find_model(model))
    with standard_model() as inventory:
        return found, inventory


def import_profile(path: Path) -> tuple[str, Path]:
    """Check another device's profile and keep it under its own name. Raises ArtifactError."""
    found = DeviceProfile.load(path)
    target = store_folder() / f"{safe_name(found.name)}.json"
    found.save(target)
    return target.stem, target


def own_profiles(n_threads: int | str = "*") -> Iterator[DeviceProfile]:
    """What was measured on this very device with this llama.cpp, with any number of threads.

    A file that this apreqel cannot read is none: it is measured again, and replaced.
    """
    if any(store_folder().glob("*.json")):
        _, fingerprint = this_device()
        for path in sorted(store_folder().glob(f"*-{n_threads}t-{fingerprint[:6]}.json")):
            with suppress(ArtifactError):
                if (found := DeviceProfile.load(path)).fingerprint == fingerprint:
                    yield found


def stored_profile(n_threads: int) -> DeviceProfile | None:
    """What was measured on this very device with so many threads."""
    return next(own_profiles(n_threads), None)
