"""What a person sees: progress on stderr, tables on stdout. Only this and cli.py print."""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

    from apreqel.device.profile import DeviceProfile, Range
    from apreqel.evaluate.verify import Measured, VerificationReport
    from apreqel.model.inventory import Inventory
    from apreqel.pipeline import Everything
    from apreqel.plan.explain import Exchange, OptionPrice, RoleShare
    from apreqel.plan.front import Front
    from apreqel.plan.plan import Plan
    from apreqel.quantize import QuantizedModel
    from apreqel.sensitivity.measure import Sensitivity

# Without a terminal, a progress line this often: enough for a log, not a flood.
_SECONDS_BETWEEN_LINES = 15.0
_BAR_CELLS = 16


class Reporter:
    """Progress with the time left: one moving line on a terminal, a line now and then elsewhere."""

    def __init__(self, quiet: bool = False) -> None:
        self._quiet, self._live = quiet, sys.stderr.isatty()
        self._what, self._started, self._first = "", 0.0, 0
        self._printed = 0.0

    def __call__(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if what != self._what:
            self.finish()
            self._what, self._started, self._first, self._printed = what, now, done, 0.0
        if self._quiet or (not self._live and now - self._printed < _SECONDS_BETWEEN_LINES):
            return
        if self._live and now - self._printed < 0.1 and done < total:
            return
        self._printed = now
        line = f"{what}{self._amount(done, total, now)}"
        print(
            f"\r\033[2K{line}" if self._live else line,
            end="" if self._live else "\n",
            file=sys.stderr,
            flush=True,
        )

    def _amount(self, done: int, total: int, now: float) -> str:
        if total <= 1:
            return " ..."
        text = f": {done} of {total}" if total < 10**7 else f": {100 * done // total}%"
        steps = done - self._first
        if steps > 0 and done < total:
            left = (now - self._started) / steps * (total - done)
            text += f", {duration(left)} left"
        return text

    def finish(self) -> None:
        """Leave the moving line behind."""
        if self._live and self._what and not self._quiet:
            print("\r\033[2K", end="", file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return (
        f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
    )


def size(size_bytes: float) -> str:
    return f"{size_bytes / 1e9:.2f} GB" if size_bytes >= 1e9 else f"{size_bytes / 1e6:.1f} MB"


def write_json(value: Any) -> None:
    print(json.dumps(_plain(value), indent=1))


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value


def _print(*parts: Any) -> None:
    from rich.console import Console

    # A pipe or a log has no width: tables are not cut there, and text is never broken up.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    console.print(*parts, markup=False, soft_wrap=all(isinstance(part, str) for part in parts))


def _table(*columns: str, title: str | None = None) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(title=title, box=SIMPLE_HEAD, title_justify="left", pad_edge=False)
    for i, column in enumerate(columns):
        left = i == 0 or not column or column == "remarks"  # bars and words
        table.add_column(column, justify="left" if left else "right", overflow="fold")
    return table


# --- inspect -------------------------------------------------------------------------------------


def inventory_json(inventory: Inventory) -> dict[str, Any]:
    return {
        "files": [str(f) for f in inventory.files],
        "name": inventory.name,
        "architecture": inventory.architecture,
        "n_layers": inventory.n_layers,
        "n_weights": inventory.n_weights,
        "size_bytes": inventory.size_bytes,
        "bits_per_weight": inventory.bits_per_weight,
        "vocabulary_size": inventory.vocabulary_size,
        "context_length": inventory.context_length,
        "n_experts": inventory.n_experts,
        "n_experts_used": inventory.n_experts_used,
        "tied_embeddings": inventory.tied_embeddings,
        "quantized_source": inventory.is_quantized_source,
        "bytes_by_type": bytes_by_type(inventory),
        "tensors": [
            {
                "name": t.name,
                "shape": t.shape,
                "type": t.qtype.name,
                "role": t.role,
                "layer": t.layer,
                "size_bytes": t.size_bytes,
                "legal_types": t.legal_types,
                "keep_reason": t.keep_reason,
            }
            for t in inventory.tensors
        ],
    }


def bytes_by_type(inventory: Inventory) -> dict[str, dict[str, int]]:
    """For each type: how many tensors can hold it, and the file's bytes with those in it."""
    from apreqel.model.qtypes import registry

    result = {}
    for name in registry():
        holders = [t for t in inventory.quantizable if name in t.legal_types]
        if holders:
            types = inventory.types
            types |= {t.name: name for t in holders}
            result[name] = {"tensors": len(holders), "file_bytes": inventory.output_size(types)}
    return result


def show_inventory(inventory: Inventory) -> None:
    from apreqel.model.qtypes import lookup

    tied = "tied: the output head is the token embedding" if inventory.tied_embeddings else "untied"
    experts = f", {inventory.n_experts} experts" if inventory.n_experts else ""
    if inventory.n_experts_used:
        experts += f" ({inventory.n_experts_used} active a token)"
    _print(
        f"{inventory.name}: {inventory.architecture}, {inventory.n_layers} layers{experts}, "
        f"{inventory.n_weights / 1e6:.1f} M weights, {size(inventory.size_bytes)}, "
        f"{inventory.bits_per_weight:.2f} bits per weight\n"
        f"vocabulary {inventory.vocabulary_size}, context {inventory.context_length}, "
        f"embeddings {tied}"
    )
    if len(inventory.files) > 1:
        _print(f"split into {len(inventory.files)} files")
    if inventory.is_quantized_source:
        _print("The source is quantised already; what that lost stays lost and is not counted.")
    groups = Counter((t.role, t.shape, t.qtype.name, t.keep_reason) for t in inventory.tensors)
    table = _table("role", "tensors", "shape", "type", "bytes", "can be")
    for (role, shape, kind, reason), count in groups.items():
        one = next(t for t in inventory.tensors if (t.role, t.shape) == (role, shape))
        options = f"kept: {reason}" if reason else f"{len(one.legal_types)} types"
        if not reason and one.row_length % 256:
            options += f" (rows of {one.row_length}: no K- or IQ-types but IQ4_NL)"
        dims = " x ".join(map(str, shape))
        table.add_row(role, str(count), dims, kind, f"{count * one.size_bytes:,}", options)
    _print(table)
    table = _table(
        "type", "bits/weight", "tensors that can hold it", "file with those in it, bytes"
    )
    for name, row in sorted(
        bytes_by_type(inventory).items(), key=lambda item: lookup(item[0]).bits_per_weight
    ):
        bits = f"{lookup(name).bits_per_weight:.3f}"
        holders = f"{row['tensors']} of {len(inventory.quantizable)}"
        table.add_row(name, bits, holders, f"{row['file_bytes']:,}")
    _print(table)


# --- profile -------------------------------------------------------------------------------------


def show_profile(profile: DeviceProfile, inventory: Inventory) -> None:
    """Predicted tokens/s of the model in each type, and what a token is made of."""
    from apreqel.device.profile import dominated, type_speeds
    from apreqel.model.qtypes import lookup

    _show_device(profile)
    speeds = type_speeds(profile, inventory)
    beaten = dominated(speeds)
    table = _table("type", "bits/w", "decode t/s", "", "prefill t/s", "", "remarks")
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
        table.add_row(
            name,
            f"{lookup(name).bits_per_weight:.2f}",
            _range(speed.decode),
            _bar(speed.decode.value / most_decode),
            _range(speed.prefill, 0),
            _bar(speed.prefill.value / most_prefill),
            ", ".join(remarks),
        )
    _print(table)
    _print(
        f"Predicted tokens/s of {inventory.name} with its products in that type, where rows do not "
        f"fit it in the nearest one; prompts of {profile.n_prompt} tokens; 95% intervals. "
        "Dominated: the other type is no larger and no slower."
    )
    _show_overhead(profile, inventory)


def profile_json(profile: DeviceProfile, inventory: Inventory) -> dict[str, Any]:
    from apreqel.device.profile import dominated, type_speeds

    speeds = type_speeds(profile, inventory)
    return {
        "profile": profile.to_json(),
        "model": inventory.name,
        "types": {
            name: {"share": share, **asdict(speed)} for name, (speed, share) in speeds.items()
        },
        "dominated": dominated(speeds),
    }


def _show_device(profile: DeviceProfile) -> None:
    device = profile.device
    gpu = f"all layers on {device.gpu}; " if device.gpu else ""
    _print(
        f"{profile.name}: {device.cpu}, {device.usable_cores} usable cores, "
        f"{size(device.memory_bytes)} memory, {device.system}; {profile.n_threads} threads; {gpu}"
        f"fingerprint {profile.fingerprint}"
    )
    if profile.thread_seconds:
        tried = ", ".join(
            f"{n}: {1 / decode:.0f} and {1 / prefill:.0f}"
            for n, (decode, prefill) in profile.thread_seconds.items()
        )
        _print(f"threads tried (decode and prefill tokens/s): {tried}")
    readings = [k for shapes in profile.kernels.values() for k in shapes.values()]
    unsteady = sum("unsteady" in k.flags for k in readings)
    if unsteady:
        _print(
            f"{unsteady} of {len(readings)} readings vary by more than 3% (unsteady machine); "
            "their medians are used and the intervals are wider for it"
        )


def _show_overhead(profile: DeviceProfile, inventory: Inventory) -> None:
    if not profile.covers(inventory):
        _print("This model never ran there: what is not products is unknown, intervals are wide.")
        return
    overhead = profile.overhead(inventory)
    _print(
        "Beside its products a generated token takes "
        f"{1e3 * overhead.decode_rest:.2f} ms, and {1e3 * overhead.attention * 1000:.2f} ms for "
        f"each 1,000 tokens of context; picking it (not counted above) takes "
        f"{1e3 * overhead.sampling:.2f} ms."
    )


def _range(value: Range, digits: int = 1) -> str:
    return f"{value.value:.{digits}f} ({value.low:.{digits}f}-{value.high:.{digits}f})"


def _bar(part: float) -> str:
    return "█" * max(1, round(_BAR_CELLS * part))


def show_profiles(profiles: Sequence[tuple[str, Path]]) -> None:
    """Names for --device, with their files."""
    from apreqel.device.profile import DeviceProfile

    table = _table("name", "device", "threads", "models", "file")
    for name, path in profiles:
        profile = DeviceProfile.load(path)
        models = ", ".join(sorted({o.model for o in profile.overheads.values()})) or "-"
        table.add_row(name, profile.device.cpu, str(profile.n_threads), models, str(path))
    _print(table if profiles else "no device profiles yet; apreqel profile MODEL makes one")


# --- probe ---------------------------------------------------------------------------------------


def sensitivity_json(state: Sensitivity) -> dict[str, Any]:
    from apreqel.sensitivity.measure import report

    return {
        "effort": state.effort,
        "settled": state.settled,
        "probes": state.n_probes,
        "seconds": state.seconds,
        "self_kld_nats": state.self_kld_nats,
        "coverage": _plain(state.coverage),
        "excluded": state.excluded,
        "kernels": _plain(state.kernels),
        "report": _plain(report(state)),
        "tensors": {
            name: {
                kind: {
                    "kld_nats": damage.nats,
                    "interval": damage.interval,
                    "is_probed": damage.is_probed,
                    "is_resolved": damage.is_resolved,
                    "output_error": tensor.errors.weights[kind],
                }
                for kind, damage in state.model.table(name).items()
            }
            for name, tensor in state.tensors.items()
        },
    }


def show_sensitivity(state: Sensitivity, count: int = 12) -> None:
    from apreqel.sensitivity.measure import report

    coverage, found = state.coverage, report(state)
    _print(
        f"{state.n_probes} probes of {len(state.tensors)} tensors in {duration(state.seconds)} "
        f"({state.effort}); the original against itself: {state.self_kld_nats:.1e} nats"
    )
    if coverage:
        _print(
            f"imatrix: {coverage.n_tensors} tensors, {coverage.n_zero_columns} zero columns "
            f"substituted, {coverage.n_unseen_experts} of {coverage.n_experts} experts unseen"
        )
        _print(
            f"text: errors are {found.fitted - 1:+.1%} on text that the imatrix was not fitted on; "
            f"with an imatrix from half the text {found.half_text - 1:+.1%}"
        )
    table = _table("most sensitive tensors", "probed as", "KL divergence, nats", "95% interval")
    for name, kind, damage in found.most_sensitive[:count]:
        low, high = damage.interval
        table.add_row(name, kind, f"{damage.nats:.6f}", f"{low:.6f} to {high:.6f}")
    _print(table)
    for kind, loss in state.kernels.items():
        _print(
            f"all in {kind}: {loss.dequantised_nats:.5f} nats dequantised, {loss.real_nats:.5f} as "
            "its kernels run it"
        )
    correlations = ", ".join(f"{name} {value:.2f}" for name, value in found.correlations.items())
    if correlations:
        _print(f"rank correlation with KL divergence: {correlations}")
    for knot in state.knots:
        if knot.feedback:
            continue  # what it gives is known to plans that ask for it
        raw = state.model.raw_total(knot.types)
        _print(
            f"a plan as a real file: {knot.kld.mean:.5f} nats; its tensors' damages sum to "
            f"{raw:.5f}"
        )
    if found.n_unresolved:
        _print(f"{found.n_unresolved} tensors' effects are below the noise: unresolved, not ranked")
    if not state.settled and state.effort != "thorough":
        _print("more probes could still improve plans a little: --effort thorough")
    for pair, reason in state.excluded.items():
        _print(f"left out: {pair}: {reason}")


# --- plan, quantize, verify ----------------------------------------------------------------------


_METRIC_NAMES = {"kld": "KL divergence", "perplexity": "change of the loss"}


def show_plan(plan: Plan, path: Path) -> None:
    kinds = ", ".join(f"{count} {name}" for name, count in plan.counts.items())
    _print(
        f"{plan.prefer}: {size(plan.size_bytes)} ({plan.size_bytes:,} bytes), "
        f"{plan.bits_per_weight:.3f} bits per weight\n"
        f"tensors: {kinds}\n"
        f"predicted {_METRIC_NAMES[plan.metric]}: {plan.kld_nats:.5f} nats (95%: "
        f"{plan.kld_interval[0]:.5f} to {plan.kld_interval[1]:.5f})\n"
        f"solved in {plan.solver_seconds:.2f} s, proven within {plan.gap:.1e} of the optimum"
    )
    _show_experts(plan)
    if plan.speed:
        _print(
            f"predicted on {plan.device}: decode {_range(plan.speed.decode)}, prefill "
            f"{_range(plan.speed.prefill, 0)} tokens/s (95%)"
        )
    if plan.memory:
        memory, kinds = plan.memory, "/".join(plan.cache_types)
        _print(
            f"predicted memory with a context of {memory.n_ctx}: {size(memory.total_bytes)} "
            f"(file {size(memory.file_bytes)}, repacked copies {size(memory.copied_bytes)}, KV "
            f"cache {size(memory.kv_bytes)} in {kinds}, buffers {size(memory.rest_bytes)})"
        )
        if memory.copied_bytes > memory.file_bytes // 20:
            _print(f"with --no-mmap in llama.cpp: {size(memory.without_map_bytes)}")
    _show_trials(plan)
    _show_binding(plan)
    if plan.run_flags:
        _print(f"run it with: llama-cli -m FILE {plan.run_flags}")
    for note in plan.notes:
        _print(f"note: {note}")
    _print(f"written: {path} and {path.with_suffix('.tensor-types.txt').name}")


def _show_trials(plan: Plan) -> None:
    """Real files on text that was kept apart, the plan's first."""
    if not plan.trials:
        return
    table = _table("measured as real files", "bytes", "KLD, nats", "99.9%", "plan / this (95%)")
    for trial in plan.trials:
        low, high = trial.ratio_interval
        table.add_row(
            trial.label,
            f"{trial.size_bytes:,}",
            f"{trial.kld.mean:.5f}",
            f"{trial.kld_p999:.3f}",
            f"{trial.ratio:.3f} ({low:.3f} to {high:.3f})",
        )
    _print(table)


def _show_experts(plan: Plan) -> None:
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
    _print(
        f"experts: {use.used} of {use.n_experts} active a token (the model's own count: "
        f"{use.own}), {use.damage_nats:.5f} nats of the predicted KL divergence (95% interval "
        f"{low:.5f} to {high:.5f}){speeds}; the file carries the count"
    )


def show_front(front: Front) -> None:
    """The front as a table and a picture, with the stock presets beside it."""
    table = _table("plan", "size", "KLD, nats", "decode t/s", "prefill t/s")
    rows = [*front.points, *front.stock]
    for point in sorted(rows, key=lambda p: p.size_bytes):
        label = f"stock {point.label}" if point in front.stock else point.label
        speed = point.speed
        table.add_row(
            label,
            size(point.size_bytes),
            f"{point.kld_nats:.5f}",
            f"{speed.decode.value:.1f}" if speed else "-",
            f"{speed.prefill.value:.0f}" if speed else "-",
        )
    _print(table)
    _print(_picture(front))
    _print(
        "Predicted, from the weights alone. closest: the least damage of its size; fast: the "
        "fastest that does little more. Plans that another beats in everything are left out."
    )


def _picture(front: Front, columns: int = 64, lines: int = 14) -> str:
    """Size across, damage down (logarithmic): o closest, f fast, S stock presets."""
    from math import log

    marked = [(p, "S") for p in front.stock]
    marked += [(p, "o" if p.label == "closest" else "f") for p in front.points]
    marked = [(p, mark) for p, mark in marked if p.kld_nats > 0]
    x = [p.size_bytes for p, _ in marked]
    y = [log(p.kld_nats) for p, _ in marked]
    grid = [[" "] * columns for _ in range(lines)]
    for (_, mark), across, up in zip(marked, x, y, strict=True):
        column = round((columns - 1) * (across - min(x)) / max(1, max(x) - min(x)))
        line = round((lines - 1) * (max(y) - up) / max(1e-9, max(y) - min(y)))
        grid[line][column] = mark
    edge = [f"{max(p.kld_nats for p, _ in marked):8.4f} "] + [" " * 9] * (lines - 2)
    edge.append(f"{min(p.kld_nats for p, _ in marked):8.4f} ")
    rows = [f"{left}|{''.join(row)}" for left, row in zip(edge, grid, strict=True)]
    rows.append(" " * 9 + "+" + "-" * columns)
    ends = size(min(x)), size(max(x))
    rows.append(" " * 10 + ends[0] + ends[1].rjust(columns - len(ends[0])))
    rows.append(" " * 10 + "KLD in nats over size; o closest, f fast, S stock presets")
    return "\n".join(rows)


def show_ladder(made: Sequence[tuple[Plan, Path]]) -> None:
    table = _table("plan", "size", "bits/w", "KLD, nats", "decode t/s", "prefill t/s")
    for plan, path in made:
        speed = plan.speed
        table.add_row(
            path.name,
            size(plan.size_bytes),
            f"{plan.bits_per_weight:.3f}",
            f"{plan.kld_nats:.5f}",
            f"{speed.decode.value:.1f}" if speed else "-",
            f"{speed.prefill.value:.0f}" if speed else "-",
        )
    _print(table)
    _print(f"written to {made[0][1].parent}; apreqel quantize makes a file of each")


def show_explained(plan: Plan, shares: Sequence[RoleShare], exchanges: Sequence[Exchange]) -> None:
    """What each role takes, which limits bind, and which choices were close."""
    table = _table("role", "tensors", "size", "damage, nats", "of all", "types")
    total = sum(share.kld_nats for share in shares) or 1.0
    for share in shares:
        table.add_row(
            share.role,
            str(share.n_tensors),
            size(share.size_bytes),
            f"{share.kld_nats:.5f}",
            f"{share.kld_nats / total:.0%}",
            ", ".join(share.types),
        )
    _print(table)
    _show_binding(plan)
    table = _table("closest choices", "has", "next", "dearer by", "changes at")
    for e in exchanges:
        at = f"{e.at_price:.2f} x the price" if e.at_price is not None else "-"
        table.add_row(e.tensor, e.chosen, e.other, f"{e.regret:.2e}", at)
    _print(table)
    _print("apreqel explain PLAN TENSOR shows one tensor in every type.")


def show_explained_tensor(
    plan: Plan, name: str, rows: Sequence[OptionPrice], exchange: Exchange | None
) -> None:
    table = _table(
        "type", "bytes", "damage, nats", "95% interval", "decode us", "prefill us", "dearer"
    )
    for row in rows:
        low, high = row.interval
        measured = f"{low:.6f} to {high:.6f}{'' if row.is_probed else ' (not probed)'}"
        table.add_row(
            ("> " if row.is_chosen else "  ") + row.type_name,
            f"{row.size_bytes:,}",
            f"{row.kld_nats:.6f}",
            measured,
            f"{1e6 * row.decode_seconds:.1f}" if row.decode_seconds is not None else "-",
            f"{1e6 * row.prefill_seconds:.2f}" if row.prefill_seconds is not None else "-",
            f"{row.regret:.2e}",
        )
    _print(table)
    _show_binding(plan)
    if exchange and exchange.at_price is not None:
        _print(
            f"{name} would change from {exchange.chosen} to {exchange.other} at "
            f"{exchange.at_price:.2f} times that price"
        )


def _show_binding(plan: Plan) -> None:
    for b in plan.binding:
        _print(f"binding: {b.limit} {b.at_most}; {b.one_more} would save {b.buys:.3g} {b.of}")


def show_quantized(model: QuantizedModel) -> None:
    _print(
        f"{model.path}: {size(model.size_bytes)} ({model.size_bytes:,} bytes) in "
        f"{duration(model.seconds)}, peak memory {size(model.peak_rss_bytes)}; every tensor "
        "re-read and as planned"
    )


def show_verification(report: VerificationReport) -> None:
    table = _table(
        "file",
        "size",
        "bits/w",
        "KLD mean",
        "median",
        "99.9%",
        "perplexity",
        "same top-1",
        "prefill t/s",
        "decode t/s",
    )
    for row in report.files:
        table.add_row(*_measured_cells(row, is_original=row is report.files[0]))
    _print(table)
    _print(
        f"KLD: KL divergence from the original in nats per token (± 95%), {report.n_scored} scored "
        f"tokens of {report.text}; lower is closer. Speeds: median of paired runs (± deviation)."
    )
    if report.predicted_kld_nats is not None and len(report.files) > 1:
        _print(
            f"predicted {report.predicted_kld_nats:.5f}, measured {report.files[1].kld.mean:.5f}"
        )
    for versus in report.versus:
        _print(versus.verdict)


def _measured_cells(row: Measured, is_original: bool) -> Sequence[str]:
    low, high = row.kld.interval
    low_ppl, high_ppl = row.perplexity_interval
    speed = row.speed
    return (
        row.label,
        size(row.size_bytes),
        f"{row.bits_per_weight:.2f}",
        "0" if is_original else f"{row.kld.mean:.5f} ± {(high - low) / 2:.5f}",
        "0" if is_original else f"{row.kld_median:.5f}",
        "0" if is_original else f"{row.kld_p999:.3f}",
        f"{row.perplexity:.2f} ± {(high_ppl - low_ppl) / 2:.2f}",
        f"{100 * row.top1.mean:.1f}%",
        f"{speed.prefill:.0f} ± {speed.prefill_deviation:.0f}" if speed else "-",
        f"{speed.decode:.1f} ± {speed.decode_deviation:.1f}" if speed else "-",
    )


def show_everything(result: Everything) -> None:
    kinds = ", ".join(f"{count} {name}" for name, count in result.plan.counts.items())
    _print(f"plan ({result.plan.prefer}): {kinds}")
    _show_experts(result.plan)
    for note in result.plan.notes:
        _print(f"note: {note}")
    show_verification(result.report)
    _print(f"The file: {result.output}")
