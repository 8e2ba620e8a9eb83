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

    from apreqel.inventory import Inventory
    from apreqel.pipeline import Everything
    from apreqel.plan import Plan
    from apreqel.profile import DeviceProfile
    from apreqel.quantize import QuantizedModel
    from apreqel.sensitivity import Sensitivity
    from apreqel.verify import Measured, VerificationReport

# Without a terminal, a progress line this often: enough for a log, not a flood.
_SECONDS_BETWEEN_LINES = 15.0
_BAR_CELLS = 24


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
        table.add_column(column, justify="left" if i == 0 else "right", overflow="fold")
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
    from apreqel.qtypes import registry

    result = {}
    for name in registry():
        holders = [t for t in inventory.quantizable if name in t.legal_types]
        if holders:
            types = {t.name: t.qtype.name for t in inventory.tensors}
            types |= {t.name: name for t in holders}
            result[name] = {"tensors": len(holders), "file_bytes": inventory.output_size(types)}
    return result


def show_inventory(inventory: Inventory) -> None:
    from apreqel.qtypes import lookup

    tied = "tied: the output head is the token embedding" if inventory.tied_embeddings else "untied"
    experts = f", {inventory.n_experts} experts" if inventory.n_experts else ""
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


def show_profile(profile: DeviceProfile) -> None:
    device = profile.device
    _print(
        f"{device.cpu}, {device.usable_cores} usable cores, {size(device.memory_bytes)} memory "
        f"({size(device.available_bytes)} free), {device.system}\n"
        f"fingerprint {profile.fingerprint}, {profile.n_threads} threads, "
        f"shapes of {profile.shapes}"
    )
    table = _table("type", "bits/weight", "prefill t/s", "decode t/s", "decode", "spread", "")
    dominated = profile.dominated()
    fastest = min(t.decode_seconds for t in profile.timings.values() if t.decode_seconds > 0)
    for name, t in sorted(profile.timings.items(), key=lambda item: item[1].bits_per_weight):
        notes = list(t.flags)
        if t.file_types.get(name, 0) < 0.999:
            notes.append(f"{t.file_types.get(name, 0):.0%} of weights fit it")
        if name in dominated:
            notes.append("dominated")
        cells = round(_BAR_CELLS * fastest / t.decode_seconds) if t.decode_seconds else 0
        table.add_row(
            name,
            f"{t.bits_per_weight:.3f}",
            _rate(t.prefill_seconds),
            _rate(t.decode_seconds),
            "█" * cells,
            f"{max(t.prefill_cv, t.decode_cv):.1%}",
            ", ".join(notes),
        )
    _print(table)
    _print(
        f"Tokens/s if all multiplied weights were in that type: prompt of {profile.n_prompt}, "
        f"{profile.n_generated} generated. Dominated: another is no larger and faster both ways."
    )


def _rate(seconds: float) -> str:
    return f"{1 / seconds:.0f}" if seconds > 0 else "-"


# --- probe ---------------------------------------------------------------------------------------


def sensitivity_json(state: Sensitivity) -> dict[str, Any]:
    return {
        "probes": state.n_probes,
        "seconds": state.seconds,
        "self_kld_nats": state.self_kld_nats,
        "coverage": _plain(state.coverage),
        "excluded": state.excluded,
        "tensors": _plain(state.tensors),
    }


def show_sensitivity(state: Sensitivity, count: int = 12) -> None:
    coverage = state.coverage
    _print(
        f"{state.n_probes} probes of {len(state.tensors)} tensors in {duration(state.seconds)}; "
        f"the original against itself: {state.self_kld_nats:.1e} nats"
    )
    if coverage:
        _print(
            f"imatrix: {coverage.n_tensors} tensors, {coverage.n_zero_columns} zero columns "
            f"substituted, {coverage.n_unseen_experts} of {coverage.n_experts} experts unseen"
        )
    rows = [
        (probe.mean, name, kind, probe)
        for name, tensor in state.tensors.items()
        for kind, probe in list(tensor.probes.items())[:1]
    ]
    table = _table("most sensitive tensors", "probed as", "KL divergence, nats", "95% interval")
    for mean, name, kind, probe in sorted(rows, reverse=True)[:count]:
        low, high = probe.interval
        table.add_row(name, kind, f"{mean:.6f}", f"{low:.6f} to {high:.6f}")
    _print(table)
    unresolved = sum(not probe.is_resolved for *_, probe in rows)
    if unresolved:
        _print(f"{unresolved} tensors' effects are below the noise: unresolved, not ranked")
    for pair, reason in state.excluded.items():
        _print(f"left out: {pair}: {reason}")


# --- plan, quantize, verify ----------------------------------------------------------------------


def show_plan(plan: Plan, path: Path) -> None:
    kinds = ", ".join(f"{count} {name}" for name, count in plan.counts.items())
    _print(
        f"{plan.prefer}: {size(plan.size_bytes)} ({plan.size_bytes:,} bytes), "
        f"{plan.bits_per_weight:.3f} bits per weight\n"
        f"tensors: {kinds}\n"
        f"predicted KL divergence from the weights alone: {plan.kld_nats:.5f} nats "
        f"(kernels add about 0.003)\n"
        f"solved in {plan.solver_seconds:.2f} s, proven within {plan.gap:.1e} of the optimum"
    )
    if plan.seconds_per_token:
        prefill, decode = plan.seconds_per_token
        _print(f"predicted speed here: prefill {1 / prefill:.0f}, decode {1 / decode:.0f} tokens/s")
    for note in plan.notes:
        _print(f"note: {note}")
    _print(f"written: {path} and {path.with_suffix('.tensor-types.txt').name}")


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
            f"predicted {report.predicted_kld_nats:.5f} (weights alone), measured "
            f"{report.files[1].kld.mean:.5f}"
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
    for note in result.plan.notes:
        _print(f"note: {note}")
    show_verification(result.report)
    _print(f"The file: {result.output}")
