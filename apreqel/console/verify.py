"""`apreqel verify`, `compare`, `quantize` and `auto`: real files, measured side by side."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from apreqel.console.plan import show_experts, show_notes
from apreqel.console.terminal import duration, size, table, write
from apreqel.evaluate.verify import Measured, VerificationReport
from apreqel.pipeline import Everything
from apreqel.quantize import QuantizedModel
from apreqel.running import planned_run


def show(report: VerificationReport) -> None:
    closeness = "KLD mean", "median", "99.9%", "perplexity", "same top-1"
    rows = (_measured_cells(row, is_original=row is report.files[0]) for row in report.files)
    write(table("file", "size", "bits/w", *closeness, "prefill t/s", "decode t/s", rows=rows))
    write(
        f"KLD: KL divergence from the original in nats per token (± 95%), {report.n_scored} scored "
        f"tokens of {report.text}; lower is closer. Speeds: median of paired runs (± deviation)."
    )
    if report.predicted_nats is not None and len(report.files) > 1:
        write(f"predicted {report.predicted_nats:.5f}, measured {report.files[1].kld.mean:.5f}")
    for versus in report.versus:
        write(versus.verdict)


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


def show_quantized(model: QuantizedModel) -> None:
    write(
        f"{model.path}: {size(model.size_bytes)} ({model.size_bytes:,} bytes) in "
        f"{duration(model.seconds)}, peak memory {size(model.peak_rss_bytes)}; every tensor "
        "re-read and as planned"
    )


def show_everything(result: Everything) -> None:
    types = ", ".join(f"{count} {name}" for name, count in result.plan.counts.items())
    write(f"plan ({result.plan.prefer}): {types}")
    show_experts(result.plan)
    show_notes(result.plan)
    show(result.report)
    write(f"The file: {result.output}")
    for program, command in planned_run(result.output, result.plan).commands.items():
        write(f"{program}: {command}")
    write(f"or: apreqel run {shlex.quote(str(result.output))}")
