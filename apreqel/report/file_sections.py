"""Whole files in a report: size against closeness and speed, and how far single tokens are off."""

from __future__ import annotations

from collections.abc import Sequence

from apreqel.estimates import Range
from apreqel.evaluate.verify import KLD_PARTS, Measured
from apreqel.report import charts
from apreqel.report.charts import HALF, Dot, Plot
from apreqel.report.facts import MeasuredOnCheck, Missing, ModelReport, PredictedFile, Verified
from apreqel.report.sections import (
    Section,
    Table,
    between,
    estimated,
    megabytes,
    missing_of,
    number,
    ranged,
)

# A plot of sizes shows what lies so near to the front; its table shows all.
_FROM, _TO = 0.9, 1.15


def front(report: ModelReport) -> Section:
    predicted, checked, verified = report.predicted, report.checked, report.verified
    dots: list[Dot] = []
    tables: list[Table] = []
    line: list[Dot] = []
    if not isinstance(predicted, Missing):
        found = [charts.predicted_dot(f, _predicted_text(f)) for f in predicted]
        line = [d for d, f in zip(found, predicted, strict=True) if f.kind == "closest"]
        dots += found
        tables.append(_predicted_table(predicted))
    if not isinstance(checked, Missing):
        dots += [charts.checked_dot(f, _checked_text(f)) for f in checked]
        tables.append(_checked_table(checked))
    if not isinstance(verified, Missing):
        dots += [_verified_dot(f) for f in verified.quantised]
        tables.append(_verified_table(verified))
    plot = Plot(
        "Size against KL divergence",
        "File sizes in MB against KL divergence from the original in nats per token, on a "
        f"logarithmic axis: {len(dots)} files with 95% intervals. The line joins the closest plans "
        "that are predicted for each size. Lower is closer. All values are in the tables below.",
        charts.over_size(
            _in_view(dots, line), line, "KL divergence, nats per token", is_logarithmic=True
        ),
    )
    text = [
        "What can be had: the least KL divergence from the original for each size, as predicted, "
        "within what else was asked of the plan, beside real files. Predictions and the check text "
        "are for text like that of calibration; the verification text is another. Intervals are of "
        "95%."
    ]
    return Section(
        "Size against closeness",
        text,
        [plot] if dots else [],
        tables,
        missing_of(predicted, report.rounding, checked, verified),
    )


def _in_view(dots: Sequence[Dot], line: Sequence[Dot]) -> list[Dot]:
    """Those near the front, if there is one: others would leave no room for it."""
    if not line:
        return list(dots)
    sizes = [d.size_bytes for d in line]
    low, high = _FROM * min(sizes), _TO * max(sizes)
    worst = 2 * max(d.value for d in line)
    return [d for d in dots if low <= d.size_bytes <= high and d.value <= worst]


_KIND_NAMES = {
    "plan": "the plan",
    "closest": "front: closest",
    "fast": "front: fast",
    "stock": "stock preset",
    "uniform": "one type",
}


def _predicted_text(file: PredictedFile) -> str:
    kind = _KIND_NAMES[file.kind]
    name = kind if file.label in file.kind or file.kind == "plan" else f"{kind} {file.label}"
    return (
        f"{name}, predicted: {megabytes(file.size_bytes)}, {number(file.nats)} nats "
        f"({between(file.interval)})"
    )


def _predicted_table(files: Sequence[PredictedFile]) -> Table:
    rows = [
        (
            _KIND_NAMES[f.kind],
            "" if f.kind in ("plan", "closest", "fast") else f.label,
            f"{f.size_bytes:,}",
            number(f.nats),
            between(f.interval),
            f"{f.share:.0%}" if f.kind == "uniform" else "",
        )
        for f in files
    ]
    columns = "file", "name", "bytes", "KLD, nats", "95%", "weights in that type"
    return Table("Predicted files", columns, rows)


def _checked_text(file: MeasuredOnCheck) -> str:
    return (
        f"{file.label}, measured on check text: {megabytes(file.size_bytes)}, "
        f"{estimated(file.kld)} nats, {file.kld.count} chunks"
    )


def _checked_table(files: Sequence[MeasuredOnCheck]) -> Table:
    rows = [
        (
            f.label,
            f"{f.size_bytes:,}",
            number(f.kld.mean),
            between(f.kld.interval),
            str(f.kld.count),
            number(f.kld_p999),
            f"{f.ratio[0]:.3f} ({between(f.ratio[1:])})" if f.ratio else "",
        )
        for f in files
    ]
    columns = "file", "bytes", "KLD, nats", "95%", "n, chunks", "99.9%", "plan / this, paired"
    return Table("Real files, measured on check text", columns, rows)


def _verified_dot(file: Measured) -> Dot:
    kind = "ours" if file.label == "apreqel" else "stock" if "stock" in file.label else "other"
    low, high = file.kld.interval
    text = (
        f"{file.label}, verified on held-out text: {megabytes(file.size_bytes)}, "
        f"{estimated(file.kld)} nats, {file.kld.count} tokens"
    )
    low = max(low, charts.least(file.kld.mean))
    whose, how = charts.whose(kind), "verified on held-out text"
    return Dot(file.label, whose, how, file.size_bytes, file.kld.mean, low, high, text)


def _verified_table(found: Verified) -> Table:
    rows = [
        (
            f.label,
            f"{f.size_bytes:,}",
            f"{f.bits_per_weight:.2f}",
            number(f.kld.mean),
            between(f.kld.interval),
            number(f.kld_median),
            number(f.kld_p999),
            f"{number(f.perplexity)} ({between(f.perplexity_interval)})",
            f"{100 * f.top1.mean:.1f}%",
            str(f.kld.count),
        )
        for f in found.files
    ]
    columns = (
        *("file", "bytes", "bits/weight", "KLD, nats", "95%", "median", "99.9%"),
        *("perplexity (95%)", "same top-1", "n, tokens"),
    )
    return Table(f"Verified on {found.text}", columns, rows)


# --- speed ---------------------------------------------------------------------------------------


def speed(report: ModelReport) -> Section:
    predicted, verified = report.predicted, report.verified
    files = [] if isinstance(predicted, Missing) else [f for f in predicted if f.speed]
    timed = [] if isinstance(verified, Missing) else [f for f in verified.files if f.speed]
    tables = [_speed_table(files)] if files else []
    tables += [_timed_table(timed)] if timed else []
    plots = [
        Plot(
            f"{name.capitalize()} speed against size",
            f"File sizes in MB against {name} speed in tokens per second, {len(files)} files as "
            f"predicted and {len(timed)} as measured, with intervals. Higher is faster. All values "
            "are in the tables below.",
            _speed_plot(files, timed, name == "decode"),
            HALF,
        )
        for name in ("decode", "prefill")
    ]
    n_prompt, n_answer = report.workload
    text = [
        f"Tokens/s as the device's profile predicts them, for a prompt of {n_prompt} tokens and an "
        f"answer of {n_answer}, with intervals of 95%. Measured ones are medians of paired runs, ± "
        "the standard deviation of the runs; they are of shorter contexts."
    ]
    missing = missing_of(predicted, report.device)
    if not timed and not isinstance(verified, Missing):
        text.append("The verification measured no speeds (--no-speed).")
    return Section(
        "Speed against size", text, plots if files or timed else [], tables,
        missing + missing_of(verified),
    )  # fmt: skip


def _speed_plot(
    files: Sequence[PredictedFile], timed: Sequence[Measured], is_decode: bool
) -> charts.Drawing:
    dots, what = [], "decode" if is_decode else "prefill"
    for f in files:
        if f.speed is not None:
            speed: Range = f.speed.decode if is_decode else f.speed.prefill
            text = f"{_predicted_text(f)}; {what} {ranged(speed)} tokens/s"
            place = f.size_bytes, speed.value, speed.low, speed.high
            whose, name = charts.whose(f.kind), "the plan" if f.kind == "plan" else ""
            dots.append(Dot(f.label, whose, "predicted", *place, text, name))
    for m in timed:
        if m.speed is not None and m.label != "original":
            pair = m.speed.decode, m.speed.decode_deviation
            value, off = pair if is_decode else (m.speed.prefill, m.speed.prefill_deviation)
            text = f"{m.label}, measured: {what} {number(value)} ± {number(off)} tokens/s"
            whose = _verified_dot(m).whose
            dots.append(
                Dot(m.label, whose, "measured", m.size_bytes, value, value - off, value + off, text)
            )
    line = [d for d, f in zip(dots, files, strict=False) if f.kind == "closest"]
    sizes = [d.size_bytes for d in line]
    shown = [d for d in dots if not sizes or _FROM * min(sizes) <= d.size_bytes <= _TO * max(sizes)]
    return charts.over_size(shown, [], f"{what}, tokens/s", is_logarithmic=False)


def _speed_table(files: Sequence[PredictedFile]) -> Table:
    rows = [
        (
            _KIND_NAMES[f.kind],
            "" if f.kind in ("plan", "closest", "fast") else f.label,
            f"{f.size_bytes:,}",
            ranged(f.speed.decode),
            ranged(f.speed.prefill),
        )
        for f in files
        if f.speed
    ]
    columns = "file", "name", "bytes", "decode t/s (95%)", "prefill t/s (95%)"
    return Table("Predicted speeds", columns, rows)


def _timed_table(files: Sequence[Measured]) -> Table:
    rows = [
        (
            f.label,
            f"{f.size_bytes:,}",
            f"{number(f.speed.decode)} ± {number(f.speed.decode_deviation)}",
            f"{number(f.speed.prefill)} ± {number(f.speed.prefill_deviation)}",
            str(f.speed.repetitions),
        )
        for f in files
        if f.speed
    ]
    return Table("Measured speeds", ("file", "bytes", "decode t/s", "prefill t/s", "n, runs"), rows)


# --- the tail ------------------------------------------------------------------------------------


def tail(found: Verified | Missing) -> Section:
    title = "How far single tokens are off"
    if isinstance(found, Missing):
        return Section(title, missing=[found])
    plot = Plot(
        "KL divergence of single tokens",
        f"For {len(found.quantised)} files the KL divergence of single tokens, on a logarithmic "
        "axis, against the part of the tokens that are farther off. The table below has the "
        "quantiles.",
        charts.tails(found, KLD_PARTS),
    )
    text = [
        f"The divergence at each of {found.n_scored} scored tokens of {found.text}. A mean hides "
        "its tail: of a hundred tokens one is farther off than the value at 1%."
    ]
    rows = [
        (f"{1 - part:.1%}", *(number(f.kld_quantiles[i]) for f in found.quantised))
        for i, part in enumerate(KLD_PARTS)
    ]
    rows.append(("mean", *(estimated(f.kld) for f in found.quantised)))
    columns = "tokens farther off", *(f.label for f in found.quantised)
    table = Table(f"KL divergence in nats, n = {found.n_scored} tokens", columns, rows)
    return Section(title, text, [plot], [table])
