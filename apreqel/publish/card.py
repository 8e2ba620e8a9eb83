"""The model card: README.md of a folder to publish, in Markdown.

All figures are those of verification.json; what was not measured is said to be predicted. Text that
comes from a model is escaped, so that it is neither Markdown nor HTML.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from apreqel.device.memory import DEFAULT_CONTEXT
from apreqel.estimates import Estimate
from apreqel.evaluate.verify import Measured, VerificationReport
from apreqel.llama.flags import HOST, RunSettings, commands, ollama_name
from apreqel.model.inventory import Inventory
from apreqel.plan.plan import Plan
from apreqel.publish.naming import FileName, one_line
from apreqel.publish.records import PlannedFile, without_paths
from apreqel.publish.request_command import command_of

RECIPE_END = ".tensor-types.txt"
_COLUMNS = (
    "file", "bytes", "bits/weight", "KLD, nats (95%)", "KLD 99.9%", "perplexity (95%)",
    "same top-1 (95%)", "prefill tokens/s", "decode tokens/s",
)  # fmt: skip
# Free memory that devices have, in GB: which file is for which.
_MEMORIES = (0.25, 0.5, 1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)


@dataclass(frozen=True)
class Published:
    """One file of the folder; `recipe` is what its lists of types and its plan are called after."""

    found: PlannedFile
    name: FileName
    recipe: str = "plan"

    @property
    def settings(self) -> RunSettings:
        return settings_of(self.found.plan, self.found.inventory)


def settings_of(made: Plan | None, inventory: Inventory) -> RunSettings:
    """What a file was planned for; without a planned context a usual one that the model has."""
    n_ctx = min(DEFAULT_CONTEXT, inventory.context_length or DEFAULT_CONTEXT)
    planned = made.run_settings if made else RunSettings()
    return RunSettings(planned.n_ctx or n_ctx, planned.cache_types, planned.n_threads)


def card(
    files: Sequence[Published], report: VerificationReport | None, extra: Sequence[str]
) -> str:
    """The text below the front matter. `extra` are further files of the folder, each with a word.

    `report` measured all of them: the original, then the files in order, then what else there was.
    """
    first = files[0]
    inventory = first.found.inventory
    parts = [
        f"# {escaped(inventory.name)}, GGUF",
        "Made with apreqel, which measures how much each tensor matters and how fast each quant "
        "type is on a device, and chooses a type for every tensor. An ordinary GGUF: llama.cpp, "
        "Ollama and llama-cpp-python run it.",
        *(_measured(files, report) if report else _predicted(files)),
        *(_which(files) if len(files) > 1 else []),
        *_names(files),
        *_running(files),
        *_making(files),
        *_listed(files, extra),
    ]
    return "\n\n".join(parts) + "\n"


def escaped(text: str) -> str:
    """One line of text that Markdown and HTML leave as it is."""
    shown = one_line(without_paths(text)).replace("&", "&amp;").replace("<", "&lt;")
    shown = shown.replace(">", "&gt;").replace("@", "&commat;").replace("://", "&colon;//")
    return re.sub(r"([\\`*_\[\]#|~$])", r"\\\1", shown)


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


# --- what it gives -------------------------------------------------------------------------------


def _measured(files: Sequence[Published], report: VerificationReport) -> Iterator[str]:
    labels = ["original", *(f"**`{file.name.file}`**" for file in files)]
    labels += [escaped(row.label) for row in report.files[len(labels) :]]
    rows = [
        _cells(label, row, i == 0)
        for i, (label, row) in enumerate(zip(labels, report.files, strict=True))
    ]
    yield "## Measured"
    yield _table(_COLUMNS, rows)
    yield (
        "KLD: KL divergence of the next token's probabilities from the original's, per token, over "
        f"the full vocabulary, on {report.n_scored:,} scored tokens of "
        f"{_text_name(report.text)}, with 95% intervals; lower is closer.{_of_speeds(report)}"
    )
    for versus in report.versus if len(files) == 1 else ():
        yield f"{escaped(versus.verdict[:1].upper() + versus.verdict[1:])}."


def _text_name(name: str) -> str:
    own = name == "heldout.txt"
    return "apreqel's held-out text" if own else f"the text {escaped(name)}"


def _of_speeds(report: VerificationReport) -> str:
    counts = [row.speed.repetitions for row in report.files if row.speed]
    if not counts:
        return ""
    return (
        f" Speeds: median of {counts[0]} paired runs on the machine that verified it, with their "
        "deviation."
    )


def _cells(label: str, row: Measured, is_original: bool) -> Sequence[str]:
    low, high = row.perplexity_interval
    speed = row.speed
    return (
        label,
        f"{row.size_bytes:,}",
        f"{row.bits_per_weight:.2f}",
        "0" if is_original else _with_interval(row.kld, 1, 5),
        "0" if is_original else f"{row.kld_p999:.3f}",
        f"{row.perplexity:.2f} ({low:.2f} to {high:.2f})",
        "100%" if is_original else _with_interval(row.top1, 100, 1, "%"),
        f"{speed.prefill:.0f} ({speed.prefill_deviation:.0f})" if speed else "-",
        f"{speed.decode:.1f} ({speed.decode_deviation:.1f})" if speed else "-",
    )


def _with_interval(value: Estimate, times: float, digits: int, unit: str = "") -> str:
    mean, low, high = (f"{times * v:.{digits}f}" for v in (value.mean, *value.interval))
    return f"{mean}{unit} ({low} to {high})"


def _predicted(files: Sequence[Published]) -> Iterator[str]:
    rows = []
    for file in files:
        made, (low, high) = file.found.plan, file.found.plan.damage_interval
        decode = f"{made.speed.decode.value:.1f}" if made.speed else "-"
        closeness = f"{made.damage_nats:.5f} ({low:.5f} to {high:.5f})"
        name = f"**`{file.name.file}`**"
        rows.append(
            [name, f"{made.size_bytes:,}", f"{made.bits_per_weight:.2f}", closeness, decode]
        )
    yield "## Predicted"
    yield "Not measured as a file; these are the plan's predictions (95% intervals)."
    columns = ("file", "bytes", "bits/weight", "KLD, nats", "decode tokens/s")
    yield _table(columns, rows)


def _which(files: Sequence[Published]) -> Iterator[str]:
    """Of a ladder: by memory the largest, which is the closest."""
    needs = [file.found.plan.memory for file in files]
    known = all(needs)
    sizes = [
        n.total_bytes if n else f.found.inventory.size_bytes
        for n, f in zip(needs, files, strict=True)
    ]
    rows: list[list[str]] = []
    for memory in _MEMORIES:
        fitting = [i for i, size in enumerate(sizes) if size <= memory * 1e9]
        if fitting and (not rows or rows[-1][1] != f"`{files[fitting[-1]].name.file}`"):
            rows.append([f"{memory:g} GB", f"`{files[fitting[-1]].name.file}`"])
    yield "## Which one for your device"
    what = (
        f"what a run takes as predicted, with a context of {needs[0].n_ctx} tokens filled"
        if known and needs[0]
        else "the file alone; the context comes on top"
    )
    yield (
        "The largest that fits is the closest to the original; take a smaller one where its "
        f"tokens/s matter more. Reckoned with {what}."
    )
    yield _table(("from so much free memory", "file"), rows)


# --- what it is ----------------------------------------------------------------------------------


def _names(files: Sequence[Published]) -> Iterator[str]:
    encodings = " and ".join(f"`{file.name.encoding}`" for file in files)
    yield "## The name"
    yield (
        f"{encodings} in the name: the stock preset whose size on this model is nearest (or the "
        "one type that all have), because the hub, Ollama and `llama-server -hf` find a file by "
        "such a name. Which type each tensor has is in the lists named below."
    )


def _running(files: Sequence[Published]) -> Iterator[str]:
    file = files[len(files) // 2]
    settings, name = file.settings, ollama_name(f"{file.name.stem}-{file.name.encoding}")
    lines = commands(file.name.file, name, settings)
    ollama = (
        lines["Ollama"]
        if len(files) > 1
        else f"ollama create {name} -f Modelfile && ollama run {name}"
    )
    planned = file.found.plan.run_flags
    yield "## Run it"
    if planned:
        yield f"Planned for `{planned}`: the figures of memory and speed hold with these."
    yield _fenced("sh", lines["llama-server"], lines["llama-cli"], ollama)
    yield _fenced("python", *lines["Python"].split("; "))
    yield (
        f"With apreqel beside it, `apreqel run {file.name.file}` serves it so on {HOST} only."
        + (f" In Ollama: {escaped(settings.ollama_caches)}." if settings.ollama_caches else "")
    )


def _fenced(language: str, *lines: str) -> str:
    """Each on one line, so that nothing ends the block early."""
    return "\n".join([f"```{language}", *(" ".join(line.split()) for line in lines), "```"])


def _making(files: Sequence[Published]) -> Iterator[str]:
    made = files[0].found.plan
    yield "## How it was made"
    points = [
        f"`{f.name.file}`: "
        + ", ".join(f"{count} {kind}" for kind, count in f.found.plan.counts.items())
        for f in files
    ]
    points.append(
        "imatrix: "
        f"{made.metadata.get('quantize.imatrix.chunks_count', 0)} chunks of "
        f"{escaped(str(made.metadata.get('quantize.imatrix.dataset', '')))}"
    )
    if made.is_rounded:
        points.append(
            "weights are rounded by the whole output error (second moments of the activations on "
            "the calibration text), where ggml would round each for itself"
        )
    if made.is_equalised:
        points.append(
            "**channels are rescaled** (norms and their readers, up and down, values and output), "
            "so that they round better; the model's function is the same, checked to 1e-5 nats. "
            "**LoRA adapters made for the original do not fit this file.** The imatrix and the "
            "lists of types are the rescaled model's"
        )
    if use := made.experts:
        points.append(
            f"{use.used} of {use.n_experts} experts are active a token (the model's own count: "
            f"{use.own}); the file carries the count"
        )
    points.append(
        f"apreqel {escaped(made.provenance.apreqel_version)}, "
        f"{escaped(made.provenance.llama_build.split(';')[0])}"
    )
    yield "\n".join(f"- {point}" for point in points)
    yield "Again, from the original (F16, BF16 or F32), on any device:"
    again = [command_of(f.found.plan, "MODEL.gguf", f"{f.recipe}{RECIPE_END}") for f in files]
    yield _fenced("sh", *dict.fromkeys(again))


def _listed(files: Sequence[Published], extra: Sequence[str]) -> Iterator[str]:
    yield "## Files"
    points = []
    for file in files:
        points.append(f"`{file.name.file}`: the model")
        points.append(
            f"`{file.recipe}.json`, `{file.recipe}{RECIPE_END}`, `{file.recipe}.custom-q.txt`: its "
            "plan, and its types for `llama-quantize --tensor-type-file` and for ik\\_llama.cpp's "
            "`--custom-q`"
        )
    yield "\n".join(f"- {point}" for point in [*points, *extra])
