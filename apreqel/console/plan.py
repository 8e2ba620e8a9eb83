"""`apreqel plan`: the plan, what is predicted and measured of it; the front; the ladder."""

from __future__ import annotations

from collections.abc import Sequence
from math import log
from pathlib import Path

from apreqel.console.probe import DAMAGE
from apreqel.console.terminal import size, span, table, with_interval, write
from apreqel.device.profile import Speed
from apreqel.plan.front import Front
from apreqel.plan.plan import FileResult, Plan

_METRIC_NAMES = {"kld": "KL divergence", "perplexity": "change of the loss"}


def show(plan: Plan, path: Path) -> None:
    types = ", ".join(f"{count} {name}" for name, count in plan.counts.items())
    write(
        f"{plan.prefer}: {size(plan.size_bytes)} ({plan.size_bytes:,} bytes), "
        f"{plan.bits_per_weight:.3f} bits per weight\n"
        f"tensors: {types}\n"
        f"predicted {_METRIC_NAMES[plan.metric]}: {plan.damage_nats:.5f} nats (95%: "
        f"{span(plan.damage_interval)})\n"
        f"solved in {plan.solver_seconds:.2f} s, proven within {plan.gap:.1e} of the optimum"
    )
    show_experts(plan)
    if plan.speed:
        write(
            f"predicted on {plan.device}: decode {with_interval(plan.speed.decode)}, prefill "
            f"{with_interval(plan.speed.prefill, 0)} tokens/s (95%)"
        )
    if memory := plan.memory:
        caches = "/".join(plan.cache_types)
        write(
            f"predicted memory with a context of {memory.n_ctx}: {size(memory.total_bytes)} "
            f"(file {size(memory.file_bytes)}, repacked copies {size(memory.copied_bytes)}, KV "
            f"cache {size(memory.kv_bytes)} in {caches}, buffers {size(memory.rest_bytes)})"
        )
        if memory.copied_bytes > memory.file_bytes // 20:
            write(f"with --no-mmap in llama.cpp: {size(memory.without_map_bytes)}")
    if plan.files:
        columns = "measured as real files", "bytes", "KLD, nats", "99.9%", "plan / this (95%)"
        write(table(*columns, rows=map(_file_cells, plan.files)))
    show_binding(plan)
    if plan.run_flags:
        write(f"run it with: llama-cli -m FILE {plan.run_flags}")
    show_notes(plan)
    write(f"written: {path} and {path.with_suffix('.tensor-types.txt').name}")


def _file_cells(file: FileResult) -> Sequence[str]:
    """A real file on text that was kept apart, the plan's first."""
    against = f"{file.ratio:.3f} ({span(file.ratio_interval, 3)})"
    closeness = f"{file.kld.mean:.5f}", f"{file.kld_p999:.3f}"
    return file.label, f"{file.size_bytes:,}", *closeness, against


def show_experts(plan: Plan) -> None:
    """What the active experts cost and give, where they are not the model's own count."""
    if plan.experts is None:
        return
    use, speeds = plan.experts, ""
    if plan.speed and plan.speed_with_own_experts:
        here, own = _speed_cells(plan.speed), _speed_cells(plan.speed_with_own_experts)
        speeds = (
            f"; predicted decode {here[0]} against {own[0]}, prefill {here[1]} against {own[1]} "
            "tokens/s"
        )
    write(
        f"experts: {use.used} of {use.n_experts} active a token (the model's own count: "
        f"{use.own}), {use.damage_nats:.5f} nats of the predicted KL divergence (95% interval "
        f"{span(use.kld.interval)}){speeds}; the file carries the count"
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
    named = [(p.label, p) for p in front.points] + [(f"stock {p.label}", p) for p in front.stock]
    rows = (
        (label, size(p.size_bytes), f"{p.damage_nats:.5f}", *_speed_cells(p.speed))
        for label, p in sorted(named, key=lambda pair: pair[1].size_bytes)
    )
    write(table("plan", "size", "KLD, nats", "decode t/s", "prefill t/s", rows=rows))
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
    values = [
        (size(p.size_bytes), f"{p.bits_per_weight:.3f}", f"{p.damage_nats:.5f}") for p in plans
    ]
    rows = (
        (path.name, *cells, *_speed_cells(plan.speed))
        for path, cells, plan in zip(paths, values, plans, strict=True)
    )
    write(table("plan", "size", "bits/w", "KLD, nats", "decode t/s", "prefill t/s", rows=rows))
    write(f"written to {paths[0].parent}; apreqel quantize makes a file of each")


def _speed_cells(speed: Speed | None) -> tuple[str, str]:
    return (f"{speed.decode.value:.1f}", f"{speed.prefill.value:.0f}") if speed else ("-", "-")
