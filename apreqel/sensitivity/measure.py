"""The probing run: collects the imatrix and measures how much each tensor matters, resumably.

Damage is KL divergence from the unquantised model, in nats per token. Each tensor is probed in one
type first; then (tensor, type) pairs are probed, or probed on more text, where what is not known
about them could change plans (`decisive`). The run returns a frozen record, saved as it goes.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from apreqel import artifacts
from apreqel.artifacts import Provenance
from apreqel.errors import Interrupted, UsageError
from apreqel.llama.engine import LoadedModel
from apreqel.llama.library import build_info
from apreqel.model.imatrix import Imatrix, read_imatrix, write_imatrix
from apreqel.model.qtypes import QuantType, lookup
from apreqel.quantize import quantize_model
from apreqel.sensitivity.bench import (
    ProbeBench,
    ReferenceRun,
    compared,
    context_for,
    evaluated,
    opened_bench,
    paging_note,
    scratch_copy,
)
from apreqel.sensitivity.calibration import Split, Text, TokenSet, split_for_calibration
from apreqel.sensitivity.decisive import decisive_pairs
from apreqel.sensitivity.imatrix_collection import ImatrixCollector, collect, n_matrices
from apreqel.sensitivity.measurement import (
    IMATRIX_FILE,
    SENSITIVITY_FILE,
    KernelLoss,
    Probe,
    ProbedModel,
    Sensitivity,
    TensorSensitivity,
)
from apreqel.sensitivity.output_errors import (
    OutputErrors,
    candidate_types,
    first_type,
    lookup_errors,
)
from apreqel.workspace import Workspace

_PROBES_PER_ROUND = 16
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

    def split(self, model: LoadedModel, texts: Sequence[Text]) -> Split:
        """Raises CalibrationError where the texts are too short."""
        wanted = asdict(self)
        del wanted["seed"]
        return split_for_calibration(model, texts, **wanted)


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
    return replace(EFFORTS[name], minutes=minutes)


def measure(
    space: Workspace,
    *,
    texts: Sequence[Text],
    settings: ProbeSettings | None = None,
    effort: Effort = EFFORTS["normal"],
    imatrix_file: Path | None = None,
) -> ProbedModel:
    """Collect the imatrix and probe every tensor, continuing what the work folder already holds.

    Leaves `imatrix.gguf` and `sensitivity.json` there. One model load in all. A greater effort
    builds on what a smaller one measured. Raises Interrupted on Ctrl-C with everything measured
    saved, CalibrationError, EngineError, OutputError.
    """
    settings = settings or ProbeSettings()
    given = artifacts.file_sha256(imatrix_file) if imatrix_file else ""
    provenance = Provenance(
        space.sha256,
        build_info(),
        settings=asdict(settings)
        | {"texts": {t.name: t.sha256 for t in texts}, "imatrix_given": given},
        seed=settings.seed,
    )
    found = resumable(space, provenance) or Sensitivity(provenance)
    if not _is_enough(found, effort):
        run = _Run(space, settings, effort, found)
        space.progress(f"writing the scratch copy{paging_note(space.inventory)}", 0, 1)
        with scratch_copy(space) as scratch:
            run.source.check()
            try:
                with LoadedModel(scratch, patchable=True) as model:
                    run.measure(scratch, model, texts, imatrix_file)
            except KeyboardInterrupt:
                run.keep(now=True)
                raise Interrupted(
                    f"stopped with {run.found.n_probes} probes done; run the same command to "
                    "continue"
                ) from None
        found = run.finished()
    return ProbedModel(space, found, read_imatrix(space.folder / IMATRIX_FILE, space.inventory))


def _is_enough(found: Sensitivity, effort: Effort) -> bool:
    """Whether `effort` would add nothing: as much was done, or nothing is left to settle."""
    if not found.complete:
        return False
    if effort.minutes is not None:
        return found.settled and not found.cut_short
    return _rank(found.effort) >= _rank(effort.name) and not found.cut_short


def _rank(effort: str) -> int:
    return list(EFFORTS).index(effort)


def resumable(space: Workspace, provenance: Provenance) -> Sensitivity | None:
    """The saved record, where it was measured in the same way and its imatrix still stands."""
    found = Sensitivity.load_same(space.folder / SENSITIVITY_FILE, provenance)
    imatrix = space.folder / IMATRIX_FILE
    if found is None or not imatrix.exists():
        return None
    return found if artifacts.file_sha256(imatrix) == found.imatrix_sha256 else None


class _Run:
    """One measurement: `found` is the record so far, a new one with everything that is measured."""

    def __init__(
        self, space: Workspace, settings: ProbeSettings, effort: Effort, found: Sensitivity
    ) -> None:
        self.space, self.found, self.source = (
            space,
            found,
            artifacts.FileMarks(space.inventory.files),
        )
        self._settings, self._effort = settings, effort
        self._started = self._saved = time.monotonic()
        self._seconds_before = found.seconds
        self._deadline = self._started + 60 * effort.minutes if effort.minutes else None

    def keep(self, now: bool = False) -> None:
        """Save what was found, every few seconds or now."""
        if now or time.monotonic() - self._saved > _SAVE_EVERY_SECONDS:
            self.source.check()
            self._saved = time.monotonic()
            seconds = self._seconds_before + self._saved - self._started
            self.found = replace(self.found, seconds=seconds)
            self.found.save(self.space.folder / SENSITIVITY_FILE)

    def finished(self) -> Sensitivity:
        effort = self._effort.name
        if self.found.effort and _rank(self.found.effort) > _rank(effort):
            effort = self.found.effort
        self.found = replace(self.found, effort=effort)
        self.keep(now=True)
        return self.found

    @property
    def _is_late(self) -> bool:
        return self._deadline is not None and time.monotonic() > self._deadline

    def measure(
        self, scratch: Path, model: LoadedModel, texts: Sequence[Text], imatrix_file: Path | None
    ) -> None:
        split = self._settings.split(model, texts)
        self.found = replace(
            self.found,
            fitting_tokens=split.fitting.tokens.tolist(),
            probe_tokens=split.probe.tokens.tolist(),
            check_tokens=split.check.tokens.tolist(),
        )
        imatrix, half = self._imatrix(model, split.fitting, imatrix_file)
        self.keep(now=True)
        candidates = candidate_types(self.space.inventory, imatrix)
        with opened_bench(self.space, scratch, model, split.probe, imatrix) as bench:
            self._errors(model, bench, candidates, split.probe, half)
            self.keep(now=True)
            reference = bench.reference(split.probe, scratch.parent)
            itself = bench.compare(reference.part(slice(0, 8)))
            self.found = replace(self.found, self_kld_nats=float(itself.kld_nats.mean()))
            self._first_probes(bench, candidates, reference)
            self._kernels(bench, reference, scratch.parent)
            self.keep(now=True)
            self._further_probes(bench, reference)
        self.found = replace(self.found, cut_short=self._is_late)

    def _imatrix(
        self, model: LoadedModel, fitting: TokenSet, given: Path | None
    ) -> tuple[Imatrix, Imatrix | None]:
        """Read, or collect and write, `imatrix.gguf`; with one of every other chunk, if at hand."""
        inventory, target, half = self.space.inventory, self.space.folder / IMATRIX_FILE, None
        if self.found.imatrix_sha256:
            imatrix = read_imatrix(target, inventory)
        elif given is not None:
            imatrix = read_imatrix(given, inventory)
            write_imatrix(target, imatrix)
        else:
            collector, n = ImatrixCollector(n_matrices(inventory)), fitting.n_chunks
            first, second = (fitting.part(slice(start, None, 2)) for start in (0, 1))
            with context_for(model, fitting, self.space.n_threads, collector) as context:
                half = collect(context, collector, first, self.space.progress, 0, n)
                imatrix = collect(
                    context, collector, second, self.space.progress, first.n_chunks, n
                )
            write_imatrix(target, imatrix)
        sha256 = artifacts.file_sha256(target)
        self.found = replace(self.found, imatrix_sha256=sha256, coverage=imatrix.coverage)
        return imatrix, half

    def _errors(
        self,
        model: LoadedModel,
        bench: ProbeBench,
        candidates: Mapping[str, Sequence[QuantType]],
        tokens: TokenSet,
        half: Imatrix | None,
    ) -> None:
        """Fill in the output errors, in one evaluation of the first probe tokens."""
        if len(self.found.tensors) == len(candidates):
            return
        listener = OutputErrors(bench, candidates, half, self._settings.seed, self.space.progress)
        with context_for(model, tokens, self.space.n_threads, listener) as context:
            next(evaluated(context, tokens))
        tensors = {}
        for tensor in self.space.inventory.quantizable:
            errors = listener.errors.get(tensor.name)
            if errors is None:  # an embedding that is only looked up, or an unused tensor
                errors = lookup_errors(bench, tensor.name, candidates[tensor.name], tokens)
            tensors[tensor.name] = TensorSensitivity(tensor.role, tensor.layer or 0, errors)
        self.found = replace(self.found, tensors=tensors, layer_cosines=listener.layer_cosines)

    def _first_probes(
        self,
        bench: ProbeBench,
        candidates: Mapping[str, Sequence[QuantType]],
        reference: ReferenceRun,
    ) -> None:
        """One type of every tensor; spread over the layers, lest time runs out on the way."""
        names = [name for name, qtypes in candidates.items() if qtypes]
        ordered = [name for first in range(4) for name in names[first::4]]
        pairs = [(name, first_type(candidates[name]).name) for name in ordered]
        wanted = [pair for pair in pairs if not self._is_probed(*pair)]
        done = len(names) - len(wanted)
        for i, (name, type_name) in enumerate(wanted):
            if self._is_late:
                return
            self.space.progress("probing tensors", done + i, len(names))
            self._probe(bench, name, type_name, reference, self._effort.first_chunks)
            self.keep()
        self.space.progress("probing tensors", len(names), len(names))

    def _is_probed(self, name: str, type_name: str) -> bool:
        known = self.found.tensors[name].probes.get(type_name)
        least = min(self._effort.first_chunks, len(self.found.probe_tokens))
        enough = known is not None and len(known.kld) >= least
        return enough or f"{name} {type_name}" in self.found.excluded

    def _kernels(self, bench: ProbeBench, reference: ReferenceRun, place: Path) -> None:
        """Whole models in one type, with dequantised weights and as real files."""
        inventory, part = self.space.inventory, reference.part(slice(0, _KERNEL_CHUNKS))
        n_weights = sum(t.n_elements for t in inventory.quantizable)
        for i, type_name in enumerate(_KERNEL_TYPES[: self._effort.kernel_types]):
            names = [n for n, t in self.found.tensors.items() if type_name in t.errors.weights]
            rare = sum(inventory.by_name[n].n_elements for n in names) < n_weights / 4
            if type_name in self.found.kernels or rare or self._is_late:
                continue
            self.space.progress("measuring what kernels lose", i, self._effort.kernel_types)
            with bench.installed({n: lookup(type_name) for n in names}):
                dequantised = float(bench.compare(part).kld_nats.mean())
            real = self._real_file(dict.fromkeys(names, type_name), part, bench, place)
            if np.isfinite([dequantised, real]).all():
                kernels = {**self.found.kernels, type_name: KernelLoss(dequantised, real)}
                self.found = replace(self.found, kernels=kernels)
            else:
                pair = f"all tensors {type_name}"
                self.found = self.found.excluding(pair, "the probe gave NaN or Inf")

    def _real_file(
        self, types: Mapping[str, str], part: ReferenceRun, bench: ProbeBench, place: Path
    ) -> float:
        """Mean KLD, on the probe text, of a file with these types as llama.cpp runs it."""
        inventory, path = self.space.inventory, place / "kernels.gguf"
        quantize_model(
            inventory,
            {**inventory.types, **types},
            path,
            imatrix=bench.imatrix,
            n_threads=self.space.n_threads,
            allow_requantize=True,
        )
        with (
            LoadedModel(path) as model,
            context_for(model, part.tokens, self.space.n_threads) as context,
        ):
            found = float(compared(context, part, bench.pool).kld_nats.mean())
        path.unlink()
        return found

    def _further_probes(self, bench: ProbeBench, reference: ReferenceRun) -> None:
        """Until enough were made, time is up, or nothing is left that could change plans."""
        tensors = self.found.tensors
        extra = round(self._effort.further_per_tensor * len(tensors))
        done = sum(max(0, len(t.probes) - 1) for t in tensors.values())
        while done < extra and not self._is_late:
            count = min(_PROBES_PER_ROUND, extra - done)
            wanted = decisive_pairs(self.found, self.space.inventory, count)
            self.found = replace(self.found, settled=not wanted)
            if not wanted:
                break
            for name, type_name in wanted:
                if self._is_late:
                    return
                self.space.progress("probing what decides plans", done, extra)
                known = self.found.tensors[name].probes.get(type_name)
                n_chunks = 2 * len(known.kld) if known else self._effort.first_chunks
                self._probe(bench, name, type_name, reference, n_chunks)
                self.keep()
                done += 1
        self.space.progress("probing what decides plans", extra, extra)

    def _probe(
        self,
        bench: ProbeBench,
        name: str,
        type_name: str,
        reference: ReferenceRun,
        n_chunks: int,
    ) -> None:
        """Probe a pair up to `n_chunks` chunks; not finite twice excludes it."""
        before = self.found.tensors[name].probes.get(type_name, Probe())
        part = reference.part(slice(len(before.kld), n_chunks))
        if not part.tokens.n_chunks:
            return
        for _ in range(2):
            result = bench.probe(name, lookup(type_name), part)
            if result.is_finite:
                kld, change = (
                    values.reshape(part.tokens.n_chunks, -1).mean(axis=1).tolist()
                    for values in (result.kld_nats, result.nll_change_nats)
                )
                probe = Probe([*before.kld, *kld], [*before.nll_change, *change])
                self.found = self.found.with_probe(name, type_name, probe)
                return
        reason = "the probe gave NaN or Inf twice"
        self.found = self.found.excluding(f"{name} {type_name}", reason)
