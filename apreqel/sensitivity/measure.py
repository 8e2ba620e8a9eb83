"""How much the model suffers from each tensor in each quant type: measured, and resumable.

Damage is KL divergence from the unquantised model, in nats per token. Each tensor is probed in one
type first; then (tensor, type) pairs are probed, or probed on more text, where what is not known
about them could change plans along a ladder of sizes. `damage` makes a model of it all.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from apreqel import artifacts, llama
from apreqel.artifacts import Provenance
from apreqel.errors import CalibrationError, Interrupted, UsageError
from apreqel.model import imatrix as imatrices
from apreqel.model.qtypes import QuantType, lookup
from apreqel.quantize import quantize_model
from apreqel.sensitivity import bench as probing
from apreqel.sensitivity import calibration, imatrix_collection
from apreqel.sensitivity.bench import TensorErrors, first_type
from apreqel.sensitivity.damage import (
    Damage,
    DamageModel,
    Exchange,
    KernelLoss,
    Knot,
    Place,
    Probe,
    expected_gain,
)
from apreqel.solver.knapsack import Limit, solve

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from apreqel.model.imatrix import Coverage, Imatrix
    from apreqel.model.inventory import Inventory
    from apreqel.sensitivity.bench import ProbeBench, ReferenceRun
    from apreqel.sensitivity.calibration import Split, Text, TokenSet

SENSITIVITY_FILE, IMATRIX_FILE = "sensitivity.json", "imatrix.gguf"

# Plans whose choices further probes are to settle, in bits per weight of the quantised tensors.
LADDER_BITS = (3.5, 4.0, 4.5, 5.0, 5.5, 6.0, 6.75, 7.5)
_PROBES_PER_ROUND = 16
# No more probes once no pair is expected to gain this part of a ladder plan's damage.
_SETTLED = 2e-5
_SAVE_EVERY_SECONDS = 10.0
_KERNEL_CHUNKS = 8
# One type for each way in which kernels round activations.
_KERNEL_TYPES = ("Q8_0", "Q5_1", "Q6_K")


@dataclass(frozen=True)
class ProbeSettings:
    """The text that is measured on; another value means another measurement."""

    fitting_chunks: int = 64
    probe_chunks: int = 32
    check_chunks: int = 8
    n_ctx: int = 512
    probe_ctx: int = 64
    seed: int = 0

    def split(self, model: llama.LoadedModel, texts: Sequence[Text]) -> Split:
        """Raises CalibrationError where the texts are too short."""
        return calibration.split_for_calibration(
            model,
            texts,
            fitting_chunks=self.fitting_chunks,
            probe_chunks=self.probe_chunks,
            check_chunks=self.check_chunks,
            n_ctx=self.n_ctx,
            probe_ctx=self.probe_ctx,
        )


@dataclass(frozen=True)
class Effort:
    """How long to go on: chunks of text for a first probe, and further probes a tensor."""

    name: str
    first_chunks: int
    further_per_tensor: float
    kernel_types: int  # how many of `_KERNEL_TYPES` to measure
    minutes: float | None = None  # stop then, whatever is left


EFFORTS = {
    effort.name: effort
    for effort in (
        Effort("quick", 4, 0.1, 0),
        Effort("normal", 8, 1.25, 3),
        Effort("thorough", 16, 4.0, 3),
    )
}


def effort_from(name: str, minutes: float | None = None) -> Effort:
    """Raises UsageError."""
    if name not in EFFORTS:
        raise UsageError(f"--effort {name!r}: choose one of {', '.join(EFFORTS)}")
    found = EFFORTS[name]
    return replace(found, minutes=minutes)


@dataclass(frozen=True)
class TensorSensitivity:
    """Output errors by type, and what was probed."""

    errors: TensorErrors
    probes: Mapping[str, Probe]


@dataclass
class Sensitivity:
    """The measurement as it stands; `effort` is the greatest that was made, or ''."""

    provenance: Provenance
    tensors: dict[str, TensorSensitivity]
    places: dict[str, Place] = field(default_factory=dict)
    coverage: Coverage | None = None
    imatrix_sha256: str = ""
    excluded: dict[str, str] = field(default_factory=dict)  # "tensor TYPE" -> reason
    kernels: dict[str, KernelLoss] = field(default_factory=dict)
    layer_cosines: list[float] = field(default_factory=list)
    self_kld_nats: float = 0.0
    seconds: float = 0.0
    effort: str = ""
    cut_short: bool = False  # by --minutes
    settled: bool = False  # whether further probes were not expected to change plans
    check_tokens: list[list[int]] = field(default_factory=list)  # of texts, for real files
    probe_tokens: list[list[int]] = field(default_factory=list)  # of texts, for exchanges
    fitting_tokens: list[list[int]] = field(default_factory=list)  # of texts, for error feedback
    exchanges: Sequence[Exchange] = ()  # around the plan at hand, for `model`; not kept
    metric: str = "kld"  # what `model` calls damage
    knots: Sequence[Knot] = ()  # real files, for `model`; kept in another file
    gains: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # of feedback; likewise

    @property
    def complete(self) -> bool:
        return bool(self.effort)

    @property
    def n_probes(self) -> int:
        return sum(len(t.probes) for t in self.tensors.values())

    @cached_property
    def model(self) -> DamageModel:
        """Damages as they follow from what is measured now."""
        return DamageModel(
            {name: t.errors for name, t in self.tensors.items()},
            {name: t.probes for name, t in self.tensors.items()},
            self.places,
            self.kernels,
            self.knots,
            self.exchanges,
            self.metric,
            self.gains,
        )

    def renew_model(self) -> DamageModel:
        """`model` after more was measured."""
        self.__dict__.pop("model", None)
        return self.model

    def learn_totals(self, knots: Sequence[Knot]) -> None:
        """Let real files tell how damages add up."""
        self.knots = knots
        self.renew_model()

    def learn_exchanges(self, exchanges: Sequence[Exchange]) -> None:
        """Let exchanges around a plan tell what its tensors' other types do in it."""
        self.exchanges = exchanges
        self.renew_model()

    def learn_gains(self, gains: Mapping[str, Mapping[str, float]]) -> None:
        """Let `model` speak of files written with error feedback; none: of files without."""
        self.gains = gains
        self.renew_model()

    def save(self, path: Path) -> None:
        kept = {k: v for k, v in self.__dict__.items() if k not in _NOT_SAVED}
        kept["tensors"] = {name: asdict(t) for name, t in self.tensors.items()}
        for name in ("places", "kernels"):
            kept[name] = {key: asdict(value) for key, value in kept[name].items()}
        kept["coverage"] = asdict(self.coverage) if self.coverage else None
        artifacts.save(path, "sensitivity", self.provenance, kept)

    @classmethod
    def load(cls, path: Path, model_sha256: str) -> Sensitivity:
        """Raises ArtifactError."""
        provenance, data = artifacts.load(path, "sensitivity", model_sha256)
        with artifacts.understood(f"{path}: sensitivity"):
            data["tensors"] = {
                name: TensorSensitivity(
                    TensorErrors(**t["errors"]),
                    {kind: Probe(**p) for kind, p in t["probes"].items()},
                )
                for name, t in data["tensors"].items()
            }
            data["places"] = {name: Place(**p) for name, p in data["places"].items()}
            data["kernels"] = {kind: KernelLoss(**k) for kind, k in data["kernels"].items()}
            if data["coverage"]:
                data["coverage"] = imatrices.Coverage(**data["coverage"])
            return cls(provenance, **data)


_NOT_SAVED = {"provenance", "model", "metric", "knots", "exchanges", "gains"}

# (what is being done, steps done, steps in all)
Progress = Callable[[str, int, int], None]


# --- what is measured later with the same text and imatrix ---------------------------------------


def provenance_of(state: Sensitivity) -> Provenance:
    """Of what was measured with this sensitivity's text and imatrix."""
    measured = state.provenance
    settings = {**measured.settings, "imatrix_sha256": state.imatrix_sha256}
    return Provenance(measured.model_sha256, measured.llama_build, settings=settings)


def _same_source(provenance: Provenance, state: Sensitivity) -> bool:
    """Whether it is `provenance_of` this sensitivity, whichever version wrote it."""
    wanted = provenance_of(state)
    return replace(provenance, apreqel_version="") == replace(wanted, apreqel_version="")


def measured_before(path: Path, kind: str, state: Sensitivity) -> Mapping[str, Any] | None:
    """An artifact of this sensitivity's text and imatrix; None where there is none, or of others.

    Raises ArtifactError.
    """
    if not path.exists():
        return None
    provenance, data = artifacts.load(path, kind, state.provenance.model_sha256)
    return data if _same_source(provenance, state) else None


# --- measuring ------------------------------------------------------------------------------------


def measure(
    inventory: Inventory,
    model_sha256: str,
    folder: Path,
    *,
    texts: Sequence[Text],
    settings: ProbeSettings,
    n_threads: int,
    effort: Effort = EFFORTS["normal"],
    imatrix_file: Path | None = None,
    on_progress: Progress = lambda what, done, total: None,
) -> Sensitivity:
    """Collect the imatrix and probe every tensor, continuing what `folder` already holds.

    Leaves `imatrix.gguf` and `sensitivity.json` in `folder`. One model load in all. A greater
    effort builds on what a smaller one measured. Raises Interrupted on Ctrl-C with everything
    measured saved, CalibrationError, EngineError, OutputError.
    """
    path = folder / SENSITIVITY_FILE
    given = artifacts.file_sha256(imatrix_file) if imatrix_file else ""
    provenance = Provenance(
        model_sha256,
        llama.build_info(),
        settings=asdict(settings)
        | {"texts": {t.name: t.sha256 for t in texts}, "imatrix_given": given},
        seed=settings.seed,
    )
    state = resumable(path, provenance, folder / IMATRIX_FILE) or Sensitivity(provenance, {})
    if is_enough(state, effort):
        return state
    marks = artifacts.file_marks(inventory.files)
    started, before = time.monotonic(), state.seconds
    saved_at = started

    def keep(force: bool = False) -> None:
        nonlocal saved_at
        now = time.monotonic()
        if force or now - saved_at > _SAVE_EVERY_SECONDS:
            artifacts.source_is_unchanged(inventory.files, marks)
            state.seconds, saved_at = before + now - started, now
            state.save(path)

    on_progress(f"writing the scratch copy{probing.paging_note(inventory)}", 0, 1)
    with probing.scratch_copy(inventory, folder, n_threads) as scratch:
        artifacts.source_is_unchanged(inventory.files, marks)
        try:
            with llama.LoadedModel(scratch, patchable=True) as model:
                deadline = started + 60 * effort.minutes if effort.minutes else None
                run = _Run(
                    inventory, model, scratch, folder, settings, effort, deadline, n_threads,
                    on_progress, keep,
                )  # fmt: skip
                run.measure(state, texts, imatrix_file)
                state.cut_short = run.is_late
        except KeyboardInterrupt:
            keep(force=True)
            raise Interrupted(
                f"stopped with {state.n_probes} probes done; run the same command to continue"
            ) from None
    if not state.effort or _rank(effort.name) > _rank(state.effort):
        state.effort = effort.name
    keep(force=True)
    state.renew_model()
    return state


def is_enough(state: Sensitivity, effort: Effort) -> bool:
    """Whether `effort` would add nothing: as much was done, or nothing is left to settle."""
    if not state.complete:
        return False
    if effort.minutes is not None:
        return state.settled and not state.cut_short
    return _rank(state.effort) >= _rank(effort.name) and not state.cut_short


def _rank(effort: str) -> int:
    return list(EFFORTS).index(effort)


def resumable(path: Path, provenance: Provenance, imatrix: Path) -> Sensitivity | None:
    """The saved state, where it was measured in the same way and its imatrix still stands."""
    if not path.exists():
        return None
    state = Sensitivity.load(path, provenance.model_sha256)
    same = (state.provenance.settings, state.provenance.llama_build) == (
        provenance.settings,
        provenance.llama_build,
    )
    intact = imatrix.exists() and artifacts.file_sha256(imatrix) == state.imatrix_sha256
    return state if same and intact else None


@dataclass(frozen=True)
class _Run:
    """What stays the same through one measurement."""

    inventory: Inventory
    model: llama.LoadedModel
    scratch: Path
    folder: Path
    settings: ProbeSettings
    effort: Effort
    deadline: float | None
    n_threads: int
    on_progress: Progress
    keep: Callable[..., None]

    def measure(self, state: Sensitivity, texts: Sequence[Text], imatrix_file: Path | None) -> None:
        split = self.settings.split(self.model, texts)
        state.check_tokens = split.check.tokens.tolist()
        state.probe_tokens = split.probe.tokens.tolist()
        state.fitting_tokens = split.fitting.tokens.tolist()
        state.places = {t.name: Place(t.role, t.layer or 0) for t in self.inventory.quantizable}
        imatrix, half = self._imatrix(state, split.fitting, imatrix_file)
        self.keep(force=True)
        candidates = probing.candidate_types(self.inventory, imatrix)
        with self._bench(split.probe, imatrix) as bench:
            self._errors(state, bench, candidates, split.probe, half)
            self.keep(force=True)
            reference = bench.reference(split.probe, self.scratch.parent)
            state.self_kld_nats = float(bench.compare(reference.part(slice(0, 8))).kld_nats.mean())
            self._first_probes(state, bench, candidates, reference)
            self._kernels(state, bench, reference)
            self.keep(force=True)
            self._further_probes(state, bench, reference)

    def _bench(
        self, tokens: TokenSet, imatrix: Imatrix, listener: llama.Listener | None = None
    ) -> AbstractContextManager[ProbeBench]:
        return probing.opened_bench(
            self.inventory, self.scratch, self.model, tokens, imatrix, self.n_threads, listener
        )

    @property
    def is_late(self) -> bool:
        return self.deadline is not None and time.monotonic() > self.deadline

    def _imatrix(
        self, state: Sensitivity, fitting: TokenSet, given: Path | None
    ) -> tuple[Imatrix, Imatrix | None]:
        """Read, or collect and write, `imatrix.gguf`; with one of every other chunk, if at hand."""
        target, half = self.folder / IMATRIX_FILE, None
        if state.imatrix_sha256:
            imatrix = imatrices.read_imatrix(target, self.inventory)
        elif given is not None:
            imatrix = imatrices.read_imatrix(given, self.inventory)
            imatrices.write_imatrix(target, imatrix)
        else:
            n = probing.sequences_at_once(fitting.n_ctx, self.model.n_vocab, fitting.n_chunks)
            collector = imatrix_collection.ImatrixCollector(
                imatrix_collection.n_matrices(self.inventory)
            )
            with self.model.context(fitting.n_ctx, n, self.n_threads, collector) as context:
                half, imatrix = (
                    imatrix_collection.collect(
                        context,
                        collector,
                        fitting.part(slice(first, None, 2)),
                        lambda done, _, before=before: self.on_progress(  # type: ignore[misc]
                            "collecting the imatrix", before + done, fitting.n_chunks
                        ),
                        n_before=before,
                    )
                    for first, before in ((0, 0), (1, -(-fitting.n_chunks // 2)))
                )
            imatrices.write_imatrix(target, imatrix)
        state.imatrix_sha256 = artifacts.file_sha256(target)
        state.coverage = imatrix.coverage
        return imatrix, half

    def _errors(
        self,
        state: Sensitivity,
        bench: ProbeBench,
        candidates: Mapping[str, Sequence[QuantType]],
        tokens: TokenSet,
        half: Imatrix | None,
    ) -> None:
        """Fill in the output errors, in one evaluation of the first probe tokens."""
        if len(state.tensors) == len(candidates):
            return
        total = len(candidates)
        listener = probing.OutputErrors(
            candidates,
            half,
            seed=self.settings.seed,
            on_tensor=lambda name: self.on_progress(
                "measuring output errors", len(listener.errors), total
            ),
        )
        with self._bench(tokens, bench.imatrix or imatrices.Imatrix({}), listener) as listening:
            listener.bench = listening
            rows, _ = next(listening.logits(tokens))
            del rows
        for name, kinds in candidates.items():
            errors = listener.errors.get(name)
            if errors is None:  # an embedding that is only looked up, or an unused tensor
                errors = probing.lookup_errors(bench, name, kinds, tokens)
            state.tensors[name] = TensorSensitivity(errors, {})
        state.layer_cosines = listener.layer_cosines

    def _first_probes(
        self,
        state: Sensitivity,
        bench: ProbeBench,
        candidates: Mapping[str, Sequence[QuantType]],
        reference: ReferenceRun,
    ) -> None:
        """One type of every tensor; spread over the layers, lest time runs out on the way."""
        names = [name for name, kinds in candidates.items() if kinds]
        ordered = [name for first in range(4) for name in names[first::4]]
        wanted = [
            (name, kind)
            for name in ordered
            if not self._is_probed(state, name, kind := first_type(candidates[name]).name)
        ]
        done = len(names) - len(wanted)
        for i, (name, kind) in enumerate(wanted):
            if self.is_late:
                return
            self.on_progress("probing tensors", done + i, len(names))
            self._probe(state, bench, name, kind, reference, self.effort.first_chunks)
            self.keep()
        self.on_progress("probing tensors", len(names), len(names))

    def _is_probed(self, state: Sensitivity, name: str, kind: str) -> bool:
        known = state.tensors[name].probes.get(kind)
        enough = known is not None and len(known.kld) >= min(
            self.effort.first_chunks, len(state.probe_tokens)
        )
        return enough or f"{name} {kind}" in state.excluded

    def _kernels(self, state: Sensitivity, bench: ProbeBench, reference: ReferenceRun) -> None:
        """Whole models in one type, with dequantised weights and as real files."""
        part = reference.part(slice(0, _KERNEL_CHUNKS))
        for i, kind in enumerate(_KERNEL_TYPES[: self.effort.kernel_types]):
            names = [n for n, t in state.tensors.items() if kind in t.errors.weights]
            held = sum(self.inventory.by_name[n].n_elements for n in names)
            rare = held < sum(t.n_elements for t in self.inventory.quantizable) / 4
            if kind in state.kernels or rare or self.is_late:
                continue
            self.on_progress("measuring what kernels lose", i, self.effort.kernel_types)
            with bench.installed({n: lookup(kind) for n in names}):
                dequantised = bench.compare(part)
            path = self.scratch.parent / f"{kind}.gguf"
            quantize_model(
                self.inventory,
                self.inventory.types | dict.fromkeys(names, kind),
                path,
                imatrix=bench.imatrix,
                n_threads=self.n_threads,
                allow_requantize=True,
            )
            real = self._real_file(path, part, bench)
            path.unlink()
            loss = KernelLoss(float(dequantised.kld_nats.mean()), real)
            if np.isfinite([loss.dequantised_nats, loss.real_nats]).all():
                state.kernels[kind] = loss
            else:
                state.excluded[f"all tensors {kind}"] = "the probe gave NaN or Inf"

    def _real_file(self, path: Path, part: ReferenceRun, bench: ProbeBench) -> float:
        """Mean KLD of a file as llama.cpp runs it, on the probe text."""
        n = probing.sequences_at_once(part.tokens.n_ctx, self.model.n_vocab, part.tokens.n_chunks)
        with (
            llama.LoadedModel(path) as model,
            model.context(part.tokens.n_ctx, n, self.n_threads) as context,
        ):
            return float(probing.compared(context, part, bench.pool).kld_nats.mean())

    def _further_probes(
        self, state: Sensitivity, bench: ProbeBench, reference: ReferenceRun
    ) -> None:
        """Until enough were made, time is up, or nothing is left that could change plans."""
        extra = round(self.effort.further_per_tensor * len(state.tensors))
        done = sum(max(0, len(t.probes) - 1) for t in state.tensors.values())
        while done < extra and not self.is_late:
            wanted = decisive_pairs(state, self.inventory, min(_PROBES_PER_ROUND, extra - done))
            state.settled = not wanted
            if not wanted:
                break
            for name, kind in wanted:
                if self.is_late:
                    return
                self.on_progress("probing what decides plans", done, extra)
                known = state.tensors[name].probes.get(kind)
                chunks = 2 * len(known.kld) if known else self.effort.first_chunks
                self._probe(state, bench, name, kind, reference, chunks)
                self.keep()
                done += 1
        self.on_progress("probing what decides plans", extra, extra)

    def _probe(
        self,
        state: Sensitivity,
        bench: ProbeBench,
        name: str,
        kind: str,
        reference: ReferenceRun,
        n_chunks: int,
    ) -> None:
        """Probe a pair up to `n_chunks` chunks; not finite twice excludes it."""
        tensor = state.tensors[name]
        before = tensor.probes.get(kind, Probe([], []))
        part = reference.part(slice(len(before.kld), n_chunks))
        if not part.tokens.n_chunks:
            return
        for _ in range(2):
            result = bench.probe(name, lookup(kind), part)
            if result.is_finite:
                kld, change = (
                    values.reshape(part.tokens.n_chunks, -1).mean(axis=1).tolist()
                    for values in (result.kld_nats, result.nll_change_nats)
                )
                found = Probe([*before.kld, *kld], [*before.nll_change, *change])
                state.tensors[name] = TensorSensitivity(
                    tensor.errors, {**tensor.probes, kind: found}
                )
                return
        state.excluded[f"{name} {kind}"] = "the probe gave NaN or Inf twice"


def decisive_pairs(state: Sensitivity, inventory: Inventory, count: int) -> list[tuple[str, str]]:
    """(tensor, type) pairs whose measuring is expected to improve plans along the ladder most.

    At the price of size in a ladder plan every option of a tensor costs damage + price x bytes; a
    pair is worth the expected gain of finding that it beats the chosen one, or is beaten.
    """
    model = state.renew_model()
    names = list(state.tensors)
    options = {
        n: [t for t in state.tensors[n].errors.weights if f"{n} {t}" not in state.excluded]
        for n in names
    }
    sizes = [
        np.array([lookup(t).size_bytes(inventory.by_name[n].shape) for t in options[n]], float)
        for n in names
    ]
    tables = [[model.damage(n, t) for t in options[n]] for n in names]
    damages = [np.array([d.nats for d in row]) for row in tables]
    deviations = [np.array([d.nats * min(d.log_deviation, 1.5) for d in row]) for row in tables]
    n_weights = sum(inventory.by_name[n].n_elements for n in names)
    gains: dict[tuple[str, str], float] = {}
    for bits in LADDER_BITS:
        budget = bits * n_weights / 8
        if budget < sum(s.min() for s in sizes):
            continue
        solution = solve(damages, [Limit("size", sizes, budget)], gap_wanted=1e-3)
        for i, name in enumerate(names):
            cost = damages[i] + solution.prices[0] * sizes[i]
            chosen = solution.choice[i]
            gap = np.maximum(0.0, cost - cost[chosen])
            others = np.delete(cost, chosen)
            gap[chosen] = max(0.0, float(others.min()) - cost[chosen]) if len(others) else np.inf
            expected = expected_gain(gap, deviations[i]) / max(solution.objective, 1e-12)
            for t, gain in zip(options[name], expected, strict=True):
                gains[name, t] = max(gains.get((name, t), 0.0), float(gain))

    n_chunks = len(state.probe_tokens)

    def is_open(pair: tuple[str, str]) -> bool:
        known = state.tensors[pair[0]].probes.get(pair[1])
        return known is None or len(known.kld) < n_chunks

    best = sorted((p for p in gains if is_open(p)), key=lambda p: -gains[p])[:count]
    return [pair for pair in best if gains[pair] > _SETTLED]


@dataclass(frozen=True)
class Report:
    """What a measurement says about itself.

    `fitted` and `half_text` are medians of `TensorErrors`' ratios; `correlations` are Spearman's
    with the KL divergence of the first probes; `most_sensitive` are (tensor, first type, damage).
    """

    fitted: float
    half_text: float
    correlations: Mapping[str, float]
    most_sensitive: Sequence[tuple[str, str, Damage]]
    n_unresolved: int


def report(state: Sensitivity) -> Report:
    from scipy.stats import spearmanr

    first = {n: next(iter(t.probes.items())) for n, t in state.tensors.items() if t.probes}
    kld = {n: p.estimate().mean for n, (_, p) in first.items()}
    others = {
        "perplexity": {n: p.estimate("perplexity").mean for n, (_, p) in first.items()},
        "output error": {n: state.tensors[n].errors.weights[t] for n, (t, _) in first.items()},
    }
    if len(state.layer_cosines) > 1:
        others["layer's 1 - cosine"] = {
            n: 1 - state.layer_cosines[layer]
            for n in first
            if 0 < (layer := state.places[n].layer) < len(state.layer_cosines)
        }
    correlations = {}
    for label, values in others.items():
        if len(values) > 2:
            pairs = [(kld[n], value) for n, value in values.items()]
            correlations[label] = float(spearmanr(*zip(*pairs, strict=True)).statistic)
    ranked = sorted(
        ((n, t, state.model.damage(n, t)) for n, (t, _) in first.items()),
        key=lambda row: -row[2].nats,
    )
    errors = [t.errors for t in state.tensors.values()]
    return Report(
        float(np.median([e.fitted for e in errors])),
        float(np.median([e.half_text for e in errors])),
        correlations,
        [row for row in ranked if row[2].is_resolved],
        sum(not row[2].is_resolved for row in ranked),
    )


def require_probed(state: Sensitivity) -> None:
    """Raise CalibrationError where there is nothing to tell a tensor's damage from."""
    roles = {state.places[n].role for n, t in state.tensors.items() if t.probes}
    for name, tensor in state.tensors.items():
        if tensor.errors.weights and state.places[name].role not in roles:
            raise CalibrationError(
                f"tensor {name}: neither it nor its like was probed; run apreqel probe again, "
                "with more --minutes"
            )
