"""The page: a report's facts as one HTML file that asks for nothing from anywhere.

Plots are drawn as SVG beforehand, for a phone and for a desk. Every text is escaped, and a content
security policy lets no script run but the page's own, which shows what marks say.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from apreqel import artifacts
from apreqel.errors import OutputError, UsageError
from apreqel.progress import Progress
from apreqel.report import file_sections, plan_sections
from apreqel.report.charts import HALF, NARROW, Plot, drawn
from apreqel.report.facts import DeviceFacts, Missing, ModelReport, PlanFacts
from apreqel.report.gather import opened
from apreqel.report.sections import Section, between, megabytes, number

# What tells a page of apreqel's own, which may be replaced.
_START = b'<!DOCTYPE html>\n<html lang="en" data-made-by="apreqel report">'
_NEEDED = "jinja2", "vl_convert"
_FOLDER = Path(__file__).parent


def require_extra() -> None:
    """Raise UsageError where what pages are made with is not installed."""
    if any(find_spec(name) is None for name in _NEEDED):
        raise UsageError(
            "report: what pages are made with is not installed; run: pip install 'apreqel[report]'"
        )


def check_output(path: Path, force: bool, inputs: Sequence[Path], folder: Path) -> None:
    """Raise OutputError where `path` is no place for a page.

    That is an input or another file in the work `folder`, whatever is said; and without `force`
    whatever is there already, but for an earlier page.
    """
    try:
        if not path.exists():
            return
        if not path.is_file():
            raise OutputError(f"{path}: is no ordinary file; choose another output")
        with open(path, "rb") as file:
            is_page = file.read(len(_START)) == _START
        if is_page:
            return
        is_input = any(path.samefile(i) for i in inputs if i.exists())
        if is_input or folder.resolve() in path.resolve().parents:
            raise OutputError(f"{path}: is what the report is made from; choose another output")
    except OSError as error:
        raise artifacts.output_error(path, error) from error
    if not force:
        raise OutputError(f"{path}: exists and is no report; use --force or another output")


def written(
    target: str, workdir: Path | None, output: Path, force: bool, progress: Progress
) -> ModelReport:
    """Write the page about a model, or a plan for it, and give what it tells.

    Raises OutputError, and what `gathered` raises.
    """
    with opened(target, workdir, progress) as source:
        check_output(output, force, source.inputs(target), source.space.folder)
        progress("reading what was measured", 0, 1)
        report = source.report()
        progress("drawing", 0, 1)
        html = page(report)
        check_output(output, force, source.inputs(target), source.space.folder)
        artifacts.write_atomically(output, html.encode())
    return report


def page(report: ModelReport) -> str:
    """The HTML: the same facts give the same text."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    loader = FileSystemLoader(_FOLDER)
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    script = (_FOLDER / "page.js").read_text()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template("page.html.jinja").render(
        report=report,
        head=_head(report),
        sections=_sections(report),
        # Drawn from escaped texts; style and script are apreqel's own.
        draw=lambda plot: [Markup(svg) for svg in _both_widths(plot)],
        half=HALF,
        style=Markup((_FOLDER / "page.css").read_text()),
        script=Markup(script),
        script_digest=digest,
    )


def _sections(report: ModelReport) -> list[Section]:
    return [
        file_sections.front(report),
        file_sections.speed(report),
        *plan_sections.parts(report.parts),
        file_sections.tail(report.verified),
        plan_sections.kernels(report.kernels),
        plan_sections.memory(report),
    ]


def _both_widths(plot: Plot) -> tuple[str, str]:
    return drawn(plot.drawing.spec(NARROW)), drawn(plot.drawing.spec(plot.width))


def _head(report: ModelReport) -> dict[str, Any]:
    """What stands at the top: facts by name, sentences, and what is missing."""
    model, device, plan, verified = report.model, report.device, report.plan, report.verified
    facts = {
        "Model": f"{model.name} ({model.architecture}, {model.n_layers} layers, "
        f"{model.n_weights / 1e6:,.1f} M weights)",
        "Original": f"{megabytes(model.size_bytes)}, {model.bits_per_weight:.2f} bits per weight "
        f"({', '.join(model.types)})"
        + ("; channels rescaled before anything was measured" if model.is_equalised else ""),
    }
    if isinstance(device, DeviceFacts):
        facts["Device"] = _device(device)
    if not isinstance(verified, Missing):
        facts["File"] = verified.file_name
    if isinstance(plan, PlanFacts):
        types = ", ".join(f"{n} {name}" for name, n in plan.counts.items())
        facts["Size"] = (
            f"{megabytes(plan.size_bytes)} ({plan.size_bytes:,} bytes), "
            f"{plan.bits_per_weight:.3f} bits per weight; preferred: {plan.prefer}"
        )
        facts["Tensors"] = types
        what = "KL divergence" if plan.metric == "kld" else "change of the loss"
        facts["Predicted"] = (
            f"{what} {number(plan.nats)} nats per token (95%: {between(plan.interval)})"
        )
        if plan.binding:
            facts["Limits that bind"] = "; ".join(plan.binding)
    if not isinstance(verified, Missing):
        ours = verified.files[1]
        facts["Measured"] = (
            f"KL divergence {number(ours.kld.mean)} nats per token (95%: "
            f"{between(ours.kld.interval)}), n = {verified.n_scored} tokens of {verified.text}"
        )
    parts = (device, plan, verified)
    verdicts = [] if isinstance(verified, Missing) else verified.verdicts
    missing = [part for part in parts if isinstance(part, Missing)]
    return {"facts": facts, "verdicts": verdicts, "missing": missing}


def _device(device: DeviceFacts) -> str:
    gpu = f", all layers on {device.gpu}" if device.gpu else ""
    return (
        f"{device.name}: {device.cpu}, {device.usable_cores} usable cores, "
        f"{device.memory_bytes / 1e9:.1f} GB memory, {device.system}; {device.n_threads} threads"
        f"{gpu}"
    )
