"""Measure what a file really is: its divergence from the original and its speed, beside rivals.

All files are evaluated by llama.cpp as a user would run them (repacked weights, quantised
activations) on text that calibration never saw. Comparisons are paired: same positions, and
timings taken in turn.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from apreqel import artifacts, llama
from apreqel.artifacts import Provenance
from apreqel.device.timing import time_file
from apreqel.errors import UnsupportedModelError, VerificationError
from apreqel.evaluate.real_files import on_text
from apreqel.model.inventory import Inventory, read_inventory
from apreqel.sensitivity import calibration
from apreqel.sensitivity.calibration import Text
from apreqel.sensitivity.metrics import Comparison, Estimate, estimate, ratio_interval

if TYPE_CHECKING:
    from apreqel.model.imatrix import Imatrix

Progress = Callable[[str, int, int], None]

VERIFICATION_FILE = "verification.json"


@dataclass(frozen=True)
class VerifySettings:
    """llama-perplexity's convention: chunks of 512 tokens, scored in their second half."""

    n_ctx: int = 512
    n_scored: int = 3060
    n_prompt: int = 256
    repetitions: int = 5
    with_speed: bool = True


@dataclass(frozen=True)
class Speed:
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
    perplexity: float
    perplexity_interval: tuple[float, float]
    top1: Estimate
    speed: Speed | None = None


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
        if high < 1:
            quality = f"closer to the original ({self.kld_ratio:.2f} x its KL divergence)"
        elif low > 1:
            quality = (
                f"NOT better: farther from the original ({self.kld_ratio:.2f} x its divergence)"
            )
        else:
            quality = (
                f"not shown to be closer or farther ({self.kld_ratio:.2f} x its KL divergence, "
                f"95% interval {low:.2f} to {high:.2f})"
            )
        text = f"against {self.rival}: {quality}, at {self.size_ratio:.3f} x its bytes"
        if self.prefill_ratio is not None and self.decode_ratio is not None:
            text += (
                f", prefill {self.prefill_ratio:.2f} x and decode {self.decode_ratio:.2f} x as fast"
            )
        return text


@dataclass(frozen=True)
class VerificationReport:
    provenance: Provenance
    text: str
    n_scored: int
    files: Sequence[Measured]  # the original first, then ours, then rivals
    versus: Sequence[Versus]
    predicted_kld_nats: float | None = None
    notes: Sequence[str] = field(default_factory=tuple)

    def save(self, path: Path) -> None:
        data = {k: v for k, v in asdict(self).items() if k != "provenance"}
        artifacts.save(path, "verification", self.provenance, data)

    @classmethod
    def load(cls, path: Path) -> VerificationReport:
        """Raises ArtifactError."""
        provenance, data = artifacts.load(path, "verification")
        with artifacts.understood(f"{path}: report", "verify again"):
            data["files"] = [_loaded(row) for row in data["files"]]
            data["versus"] = [
                Versus(**{**row, "kld_ratio_interval": tuple(row["kld_ratio_interval"])})
                for row in data["versus"]
            ]
            return cls(provenance, **data)


def _loaded(row: dict[str, Any]) -> Measured:
    row["kld"], row["top1"] = Estimate(**row["kld"]), Estimate(**row["top1"])
    row["perplexity_interval"] = tuple(row["perplexity_interval"])
    row["speed"] = Speed(**row["speed"]) if row["speed"] else None
    return Measured(**row)


def check_types(path: Path, types: Mapping[str, str]) -> None:
    """Re-read `path`; raise VerificationError naming a tensor whose type is not the planned one."""
    found = read_inventory(path).types
    for name in sorted(found.keys() | types.keys()):
        if found.get(name) != types.get(name):
            raise VerificationError(
                f"{path}: tensor {name} is {found.get(name, 'absent')}, the plan says "
                f"{types.get(name, 'absent')}"
            )


def verify(
    original: Inventory,
    model_sha256: str,
    files: Mapping[str, Path],
    *,
    text: Text,
    calibration_sha256: Collection[str],
    settings: VerifySettings,
    n_threads: int,
    folder: Path,
    predicted_kld_nats: float | None = None,
    on_progress: Progress = lambda what, done, total: None,
) -> VerificationReport:
    """Measure `files` (label -> path, ours first) against `original`.

    Raises UnsupportedModelError where `text` was used for calibration, CalibrationError where it
    is too short, EngineError where a file does not load or gives NaN.
    """
    if text.sha256 in calibration_sha256:
        raise UnsupportedModelError(
            f"{text.name}: was used for calibration; verify on another text"
        )
    labels = ["original", *files]
    paths = [original.files[0], *files.values()]
    inventories = [original, *(read_inventory(p) for p in files.values())]
    comparisons: list[Comparison] = []
    with on_text(
        paths[0],
        lambda model: calibration.verification_set(model, text, settings.n_ctx, settings.n_scored),
        settings.n_ctx,
        folder,
        n_threads,
        on_progress,
    ) as text_run:
        tokens = text_run.tokens
        for i, (label, path) in enumerate(zip(labels, paths, strict=True)):
            on_progress(f"evaluating {label}", i, len(labels))
            comparisons.append(text_run.compare(path))
    on_progress("evaluating", len(labels), len(labels))
    speeds: list[Speed | None] = [None] * len(paths)
    if settings.with_speed:
        speeds = list(_speeds(paths, settings, n_threads, on_progress))
    measured = [
        _measured(label, inventory, comparison, tokens.n_chunks, speed)
        for label, inventory, comparison, speed in zip(
            labels, inventories, comparisons, speeds, strict=True
        )
    ]
    versus = [
        _versus(measured[1], comparisons[1], rival, comparison, tokens.n_chunks)
        for rival, comparison in zip(measured[2:], comparisons[2:], strict=True)
    ]
    provenance = Provenance(
        model_sha256, llama.build_info(), settings=asdict(settings) | {"text_sha256": text.sha256}
    )
    return VerificationReport(
        provenance, text.name, tokens.n_scored, measured, versus, predicted_kld_nats
    )


def _measured(
    label: str, inventory: Inventory, result: Comparison, n_chunks: int, speed: Speed | None
) -> Measured:
    nll = estimate(result.nll_nats, n_chunks)
    low, high = nll.interval
    return Measured(
        label,
        str(inventory.files[0]),
        inventory.size_bytes,
        inventory.bits_per_weight,
        estimate(result.kld_nats, n_chunks),
        float(np.median(result.kld_nats)),
        float(np.quantile(result.kld_nats, 0.999)),
        float(np.exp(nll.mean)),
        (float(np.exp(low)), float(np.exp(high))),
        estimate(result.same_top1.astype(np.float64), n_chunks),
        speed,
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
    paths: Sequence[Path], settings: VerifySettings, n_threads: int, on_progress: Progress
) -> Iterator[Speed]:
    """Tokens/s of each file, the files taken in turn so that drift meets all alike."""
    prefill: list[list[float]] = [[] for _ in paths]
    decode: list[list[float]] = [[] for _ in paths]
    for repetition in range(settings.repetitions):
        for i, path in enumerate(paths):
            on_progress("timing", repetition * len(paths) + i, settings.repetitions * len(paths))
            run, _ = time_file(path, n_threads, settings.n_prompt)
            prefill[i].append(1 / run.prefill)
            decode[i].append(1 / run.decode)
    on_progress("timing", 1, 1)
    for p, d in zip(prefill, decode, strict=True):
        yield Speed(
            float(np.median(p)), _spread(p), float(np.median(d)), _spread(d), settings.repetitions
        )


def _spread(values: Sequence[float]) -> float:
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def build_preset(
    original: Inventory, preset: str, imatrix: Imatrix, folder: Path, n_threads: int
) -> Path:
    """The stock preset's file, made by llama.cpp itself with the same imatrix; kept in `folder`."""
    path = folder / f"stock-{preset.upper()}.gguf"
    if path.exists():
        return path
    artifacts.require_space(folder, original.size_bytes, f"the stock {preset} file")
    part = path.with_suffix(".part")
    weights = {name: w for name in imatrix.entries if (w := imatrix.weights(name)) is not None}
    try:
        llama.stock_quantize(
            original.files[0],
            part,
            preset,
            imatrix=weights,
            n_threads=n_threads,
            allow_requantize=True,
        )
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return path
