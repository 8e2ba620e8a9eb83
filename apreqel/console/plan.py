"""`apreqel plan`: the plan, what is predicted and measured of it; the front; the ladder."""

from __future__ import annotations

from collections.abc import Sequence
from math import log
from pathlib import Path

from apreqel.console.probe import DAMAGE
from apreqel.console.terminal import size, table, with_interval, write
from apreqel.device.profile import Speed
from apreqel.plan.front import Front
from apreqel.plan.plan import Plan

_METRIC_NAMES = {"kld": "KL divergence", "perplexity": "change of the loss"}


def show(plan: Plan, path: Path) -> None:
    types = ", ".join(f"{count} {name}" for name, count in plan.counts.items())
    write(
        f"{plan.prefer}: {size(plan.size_bytes)} ({plan.size_bytes:,} bytes), "
        f"{plan.bits_per_weight:.3f} bits per weight\n"
        f"tensors: {types}\n"
        f"predicted {_METRIC_NAMES[plan.metric]}: {plan.damage_nats:.5f} nats (95%: "
        f"{plan.damage_interval[0]:.5f} to {plan.damage_interval[1]:.5f})\n"
        f"solved in {plan.solver_seconds:.2f} s, proven within {plan.gap:.1e} of the optimum"
    )
    show_experts(plan)
    if plan.speed:
        write(
            f"predicted on {plan.device}: decode {with_interval(plan.speed.decode)}, prefill "
            f"{with_interval(plan.speed.prefill, 0)} tokens/s (95%)"
        )
    if plan.memory:
        memory, caches = plan.memory, "/".join(plan.cache_types)
        write(
            f"predicted memory with a context of {memory.n_ctx}: {size(memory.total_bytes)} "
            f"(file {size(memory.file_bytes)}, repacked copies {size(memory.copied_bytes)}, KV "
            f"cache {size(memory.kv_bytes)} in {caches}, buffers {size(memory.rest_bytes)})"
        )
        if memory.copied_bytes > memory.file_bytes // 20:
            write(f"with --no-mmap in llama.cpp: {size(memory.without_map_bytes)}")
    _show_files(plan)
    show_binding(plan)
    if plan.run_flags:
        write(f"run it with: llama-cli -m FILE {plan.run_flags}")
    show_notes(plan)
    write(f"written: {path} and {path.with_suffix('.tensor-types.txt').name}")


def _show_files(plan: Plan) -> None:
    """Real files on text that was kept apart, the plan's first."""
    if not plan.files:
        return
    rows = table("measured as real files", "bytes", "KLD, nats", "99.9%", "plan / this (95%)")
    for file in plan.files:
        low, high = file.ratio_interval
        rows.add_row(
            file.label,
            f"{file.size_bytes:,}",
            f"{file.kld.mean:.5f}",
            f"{file.kld_p999:.3f}",
            f"{file.ratio:.3f} ({low:.3f} to {high:.3f})",
        )
    write(rows)


def show_experts(plan: Plan) -> None:
    """What the active experts cost and give, where they are not the model's own count."""
    if plan.experts is None:
        return
    use, speeds = plan.experts, ""
    low, high = use.kld.interval
    if plan.speed and plan.speed_with_own_experts:
        own = plan.speed_with_own_experts
        speeds = (
            f"; predicted decode {plan.speed.decode.value:.1f} against {own.decode.value:.1f}, "
            f"prefill {plan.speed.prefill.value:.0f} against {own.prefill.value:.0f} tokens/s"
        )
    write(
        f"experts: {use.used} of {use.n_experts} active a token (the model's own count: "
        f"{use.own}), {use.damage_nats:.5f} nats of the predicted KL divergence (95% interval "
        f"{low:.5f} to {high:.5f}){speeds}; the file carries the count"
    )


def show_binding(plan: Plan) -> None:
    for b in plan.binding:
        write(f"binding: {b.limit} {b.at_most}; {b.one_more} would save {b.buys:.3g} {b.of}")


def show_notes(plan: Plan) -> None:
    for note in plan.notes:
        write(f"note: {note}")
    if any("damage" in note for note in plan.notes):
        write(DAMAGE[plan.metric])


# --- many plans ----------------------------------------------------------------------------------


def show_front(front: Front) -> None:
    """The front as a table and a picture, with the stock presets beside it."""
    rows = table("plan", "size", "KLD, nats", "decode t/s", "prefill t/s")
    for point in sorted([*front.points, *front.stock], key=lambda p: p.size_bytes):
        label = f"stock {point.label}" if point in front.stock else point.label
        cells = size(point.size_bytes), f"{point.damage_nats:.5f}"
        rows.add_row(label, *cells, *_speed_cells(point.speed))
    write(rows)
    write(_picture(front))
    write(
        "Predicted, from the weights alone. closest: the least damage of its size; fast: the "
        "fastest that does little more. Plans that another beats in everything are left out."
    )
    write(DAMAGE["kld"])


def _picture(front: Front, columns: int = 64, lines: int = 14) -> str:
    """Size across, damage down (logarithmic): o closest, f fast, S stock presets."""
    points = [p for p in (*front.stock, *front.points) if p.damage_nats > 0]
    x, y = [p.size_bytes for p in points], [log(p.damage_nats) for p in points]
    grid = [[" "] * columns for _ in range(lines)]
    for point, across, up in zip(points, x, y, strict=True):
        column = round((columns - 1) * (across - min(x)) / max(1, max(x) - min(x)))
        line = round((lines - 1) * (max(y) - up) / max(1e-9, max(y) - min(y)))
        grid[line][column] = {"closest": "o", "fast": "f"}.get(point.label, "S")
    damages = [p.damage_nats for p in points]
    edge = [f"{max(damages):8.4f} ", *[" " * 9] * (lines - 2), f"{min(damages):8.4f} "]
    rows = [f"{left}|{''.join(row)}" for left, row in zip(edge, grid, strict=True)]
    rows.append(" " * 9 + "+" + "-" * columns)
    ends = size(min(x)), size(max(x))
    rows.append(" " * 10 + ends[0] + ends[1].rjust(columns - len(ends[0])))
    rows.append(" " * 10 + "KLD in nats over size; o closest, f fast, S stock presets")
    return "\n".join(rows)


def show_ladder(plans: Sequence[Plan], paths: Sequence[Path]) -> None:
    rows = table("plan", "size", "bits/w", "KLD, nats", "decode t/s", "prefill t/s")
    for plan, path in zip(plans, paths, strict=True):
        cells = size(plan.size_bytes), f"{plan.bits_per_weight:.3f}", f"{plan.damage_nats:.5f}"
        rows.add_row(path.name, *cells, *_speed_cells(plan.speed))
    write(rows)
    write(f"written to {paths[0].parent}; apreqel quantize makes a file of each")


def _speed_cells(speed: Speed | None) -> tuple[str, str]:
    return (f"{speed.decode.value:.1f}", f"{speed.prefill.value:.0f}") if speed else ("-", "-")
