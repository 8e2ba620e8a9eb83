"""Measure what a file really is: its divergence from the original and its speed, beside rivals.

All files are evaluated by llama.cpp as a user would run them (repacked weights, quantised
activations) on text that calibration never saw. Comparisons are paired: same positions, and
timings taken in turn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from apreqel.artifacts import Provenance, Record
from apreqel.device.real_runs import time_file
from apreqel.errors import UnsupportedModelError, VerificationError
from apreqel.estimates import Estimate
from apreqel.evaluate.text_run import on_text
from apreqel.llama.engine import LoadedModel
from apreqel.llama.library import build_info
from apreqel.model.inventory import Inventory, read_inventory
from apreqel.sensitivity.measurement import SENSITIVITY_FILE, Sensitivity
from apreqel.sensitivity.metrics import Comparison, estimate, ratio_interval
from apreqel.sensitivity.texts import Text, TokenSet, bundled_texts, verification_set
from apreqel.workspace import Workspace

# Parts of the scored tokens at which a file's divergence is kept: its tail tells where it fails.
KLD_PARTS = (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999)


@dataclass(frozen=True)
class VerifySettings:
    """llama-perplexity's convention: chunks of 512 tokens, scored in their second half."""

    n_ctx: int = 512
    n_scored: int = 3060
    n_prompt: int = 256
    repetitions: int = 5
    with_speed: bool = True


@dataclass(frozen=True)
class Trial:
    """How a file is measured: on which text, and beside which stock presets.

    Where none is named `auto` takes the one that the plan is set against.
    """

    text: Text
    against: Sequence[str]
    settings: VerifySettings


@dataclass(frozen=True)
class MeasuredSpeed:
    """Tokens/s with the standard deviation over `repetitions` runs."""

    prefill: float
    prefill_deviation: float
    decode: float
    decode_deviation: float
    repetitions: int


@dataclass(frozen=True)
class Measured:
    """One file. Divergences in nats per token, against the original."""

    label: str
    path: str
    size_bytes: int
    bits_per_weight: float
    kld: Estimate
    kld_median: float
    kld_p999: float
    kld_quantiles: tuple[float, ...]  # at `KLD_PARTS`
    perplexity: float
    perplexity_interval: tuple[float, float]
    top1: Estimate
    speed: MeasuredSpeed | None = None


@dataclass(frozen=True)
class Versus:
    """Ours against a rival, paired: ratios ours / rival with 95% intervals."""

    rival: str
    kld_ratio: float
    kld_ratio_interval: tuple[float, float]
    size_ratio: float
    prefill_ratio: float | None
    decode_ratio: float | None

    @property
    def verdict(self) -> str:
        """One plain sentence."""
        low, high = self.kld_ratio_interval
        ratio = f"({self.kld_ratio:.2f} x its"
        if high < 1:
            quality = f"closer to the original {ratio} KL divergence)"
        elif low > 1:
            quality = f"NOT better: farther from the original {ratio} divergence)"
        else:
            interval = f"95% interval {low:.2f} to {high:.2f}"
            quality = f"not shown to be closer or farther {ratio} KL divergence, {interval})"
        text = f"against {self.rival}: {quality}, at {self.size_ratio:.3f} x its bytes"
        if self.prefill_ratio is not None and self.decode_ratio is not None:
            text += (
                f", prefill {self.prefill_ratio:.2f} x and decode {self.decode_ratio:.2f} x as fast"
            )
        return text


@dataclass(frozen=True)
class VerificationReport(Record):
    """`files` are the original first, then ours, then rivals."""

    KIND = "verification"
    ADVICE = "verify again"

    text: str
    n_scored: int
    files: Sequence[Measured]
    versus: Sequence[Versus]
    predicted_nats: float | None = None


def check_types(path: Path, types: Mapping[str, str]) -> None:
    """Re-read `path`; raise VerificationError naming a tensor whose type is not the planned one."""
    found = read_inventory(path).types
    for name in sorted(found.keys() | types.keys()):
        is_now, planned = found.get(name, "absent"), types.get(name, "absent")
        if is_now != planned:
            raise VerificationError(f"{path}: tensor {name} is {is_now}, the plan says {planned}")


def provenance_of(space: Workspace, settings: VerifySettings, text: Text) -> Provenance:
    """Of a verification with these settings on this text."""
    settings_on_text = asdict(settings) | {"text_sha256": text.sha256}
    return Provenance(space.sha256, build_info(), settings=settings_on_text)


def verify(
    space: Workspace, files: Mapping[str, Path], *, text: Text, settings: VerifySettings
) -> VerificationReport:
    """Measure `files` (label -> path, ours first) against the original.

    Raises UnsupportedModelError where `text` was used for calibration, CalibrationError where it
    is too short, EngineError where a file does not load or gives NaN.
    """
    if text.sha256 in _calibration_texts(space):
        raise UnsupportedModelError(
            f"{text.name}: was used for calibration; verify on another text"
        )
    paths = {"original": space.given.files[0], **files}
    inventories = [space.given, *map(read_inventory, files.values())]
    results: list[Comparison] = []

    def cut(model: LoadedModel) -> TokenSet:
        return verification_set(model, text, settings.n_ctx, settings.n_scored)

    with on_text(space, cut, settings.n_ctx) as text_run:
        tokens = text_run.tokens
        results.append(text_run.original())
        for i, (label, path) in enumerate(files.items()):
            space.progress(f"evaluating {label}", i, len(files))
            results.append(text_run.compare(path))
    space.progress("evaluating", len(files), len(files))
    speeds = _speeds(space, list(paths.values()), settings)
    rows = zip(paths, inventories, results, speeds, strict=True)
    measured = [_measured(*row, tokens.n_chunks) for row in rows]
    versus = [
        _versus(measured[1], results[1], rival, result, tokens.n_chunks)
        for rival, result in zip(measured[2:], results[2:], strict=True)
    ]
    made = provenance_of(space, settings, text)
    return VerificationReport(made, text.name, tokens.n_scored, measured, versus)


def _calibration_texts(space: Workspace) -> set[str]:
    """Of texts that calibration may have seen."""
    used, path = {t.sha256 for t in bundled_texts()}, space.folder / SENSITIVITY_FILE
    if path.exists():
        found = Sensitivity.load(path, space.sha256)
        used |= set(found.provenance.settings["texts"].values())
    return used


def _measured(
    label: str, inventory: Inventory, result: Comparison, speed: MeasuredSpeed | None, n_chunks: int
) -> Measured:
    nll, klds = estimate(result.nll_nats, n_chunks), result.kld_nats
    mean, low, high = np.exp([nll.mean, *nll.interval]).tolist()
    return Measured(
        label,
        str(inventory.files[0]),
        inventory.size_bytes,
        inventory.bits_per_weight,
        kld=estimate(klds, n_chunks),
        kld_median=float(np.median(klds)),
        kld_p999=float(np.quantile(klds, 0.999)),
        kld_quantiles=tuple(np.quantile(klds, KLD_PARTS).tolist()),
        perplexity=mean,
        perplexity_interval=(low, high),
        top1=estimate(result.same_top1.astype(np.float64), n_chunks),
        speed=speed,
    )


def _versus(
    ours: Measured, our_result: Comparison, rival: Measured, its_result: Comparison, n_chunks: int
) -> Versus:
    ratio, low, high = ratio_interval(our_result.kld_nats, its_result.kld_nats, n_chunks)
    a, b = ours.speed, rival.speed
    return Versus(
        rival.label,
        ratio,
        (low, high),
        ours.size_bytes / rival.size_bytes,
        a.prefill / b.prefill if a and b else None,
        a.decode / b.decode if a and b else None,
    )


def _speeds(
    space: Workspace, paths: Sequence[Path], settings: VerifySettings
) -> list[MeasuredSpeed] | list[None]:
    """Tokens/s of each file, the files taken in turn so that drift meets all alike."""
    if not settings.with_speed:
        return [None] * len(paths)
    turns, speeds = list(paths) * settings.repetitions, []
    for done, path in enumerate(turns):
        space.progress("timing", done, len(turns))
        run, _ = time_file(path, space.n_threads, settings.n_prompt)
        speeds.append((1 / run.prefill, 1 / run.decode))
    space.progress("timing", 1, 1)
    by_turn = np.array(speeds).reshape(settings.repetitions, len(paths), 2)
    medians = np.median(by_turn, axis=0)
    deviations = np.std(by_turn, axis=0, ddof=min(1, len(by_turn) - 1))  # of a single run: 0
    return [
        MeasuredSpeed(prefill, prefill_off, decode, decode_off, settings.repetitions)
        for (prefill, decode), (prefill_off, decode_off) in zip(
            medians.tolist(), deviations.tolist(), strict=True
        )
    ]
