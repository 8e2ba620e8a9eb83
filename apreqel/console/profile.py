"""`apreqel profile`: tokens/s of a model in each type, what a token is made of, known profiles."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from apreqel.console.terminal import bar, size, table, with_interval, write
from apreqel.device.profile import DeviceProfile, dominated, type_speeds
from apreqel.model.inventory import Inventory
from apreqel.model.qtypes import lookup


def show(profile: DeviceProfile, inventory: Inventory) -> None:
    """Predicted tokens/s of the model in each type, and what a token is made of."""
    _show_device(profile)
    columns = "type", "bits/w", "decode t/s", "", "prefill t/s", "", "remarks"
    write(table(*columns, rows=_type_rows(profile, inventory)))
    write(
        f"Predicted tokens/s of {inventory.name} with its products in that type, where rows do not "
        f"fit it in the nearest one; prompts of {profile.n_prompt} tokens; 95% intervals. "
        "Dominated: the other type is as close (to normally distributed weights), no larger and no "
        "slower."
    )
    _show_overhead(profile, inventory)


def _type_rows(profile: DeviceProfile, inventory: Inventory) -> Iterator[Sequence[str]]:
    speeds = type_speeds(profile, inventory)
    beaten = dominated(speeds)
    most_decode = max(speed.decode.value for speed, _ in speeds.values())
    most_prefill = max(speed.prefill.value for speed, _ in speeds.values())
    for name in sorted(speeds, key=lambda n: lookup(n).bits_per_weight):
        speed, share = speeds[name]
        flags = {f for kernel in profile.kernels[name].values() for f in kernel.flags}
        remarks = sorted(flags - {"unsteady"})
        if share < 0.999:
            remarks.append(f"fits {share:.0%} of the weights")
        if name in beaten:
            remarks.append(f"dominated by {beaten[name]}")
        decode = with_interval(speed.decode), bar(speed.decode.value / most_decode)
        prefill = with_interval(speed.prefill, 0), bar(speed.prefill.value / most_prefill)
        bits = f"{lookup(name).bits_per_weight:.2f}"
        yield name, bits, *decode, *prefill, ", ".join(remarks)


def _show_device(profile: DeviceProfile) -> None:
    device = profile.device
    gpu = f"all layers on {device.gpu}; " if device.gpu else ""
    write(
        f"{profile.name}: {device.cpu}, {device.usable_cores} usable cores, "
        f"{size(device.memory_bytes)} memory, {device.system}; {profile.n_threads} threads; {gpu}"
        f"fingerprint {profile.fingerprint}"
    )
    for tuning in profile.tunings:
        tried = ", ".join(
            f"{n}: {1 / decode:.0f} and {1 / prefill:.0f}"
            for n, (decode, prefill) in tuning.seconds.items()
        )
        write(
            f"threads tried with {tuning.n_weights / 1e6:.0f}M weights (decode and prefill "
            f"tokens/s): {tried}"
            if tried
            else f"threads for {tuning.n_weights / 1e6:.0f}M weights could not be tuned: other "
            "programs were at work; one a physical core was taken, the next run tries again"
        )
    readings = [k for shapes in profile.kernels.values() for k in shapes.values()]
    if unsteady := sum("unsteady" in k.flags for k in readings):
        write(
            f"{unsteady} of {len(readings)} readings vary by more than 3% (unsteady machine); "
            "their medians are used and the intervals are wider for it"
        )


def _show_overhead(profile: DeviceProfile, inventory: Inventory) -> None:
    if not profile.covers(inventory):
        write("This model never ran there: what is not products is unknown, intervals are wide.")
        return
    overhead = profile.overhead(inventory)
    write(
        "Beside its products a generated token takes "
        f"{1e3 * overhead.decode_rest:.2f} ms, and {1e3 * overhead.attention * 1000:.2f} ms for "
        f"each 1,000 tokens of context; picking it (not counted above) takes "
        f"{1e3 * overhead.sampling:.2f} ms."
    )


def as_json(profile: DeviceProfile, inventory: Inventory) -> dict[str, Any]:
    speeds = type_speeds(profile, inventory)
    return {
        "profile": profile,
        "model": inventory.name,
        "types": {
            name: {"share": share, **asdict(speed)} for name, (speed, share) in speeds.items()
        },
        "dominated": dominated(speeds),
    }


def show_list(profiles: Sequence[tuple[str, Path]]) -> None:
    """Names for --device, with their files."""
    rows = []
    for name, path in profiles:
        profile = DeviceProfile.load(path)
        models = ", ".join(sorted({o.model for o in profile.overheads.values()})) or "-"
        rows.append((name, profile.device.cpu, str(profile.n_threads), models, str(path)))
    listed = table("name", "device", "threads", "models", "file", rows=rows)
    write(listed if profiles else "no device profiles yet; apreqel profile MODEL makes one")


def list_json(profiles: Sequence[tuple[str, Path]]) -> list[dict[str, Any]]:
    return [{"name": name, "path": path} for name, path in profiles]
