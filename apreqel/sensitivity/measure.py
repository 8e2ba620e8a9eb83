"""The probing run: collects the imatrix and measures how much each tensor matters, resumably.

Damage is KL divergence from the unquantised model, in nats per token. Each tensor is probed in one
type first; then (tensor, type) pairs are probed, or probed on more text, where what is not known
about them could change plans (`next_probes`). The run returns a frozen record, saved as it goes.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from apreqel.arrays import Floats, Tokens
from apreqel.artifacts import FileMarks, Provenance, file_sha256
from apreqel.errors import EngineError, Interrupted
from apreqel.llama.engine import LoadedModel
from apreqel.llama.library import build_info
from apreqel.model.imatrix import Imatrix, read_imatrix, write_imatrix
from apreqel.model.qtypes import lookup
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
    sequences_at_once,
)
from apreqel.sensitivity.effort import EFFORTS, Effort, rank
from apreqel.sensitivity.imatrix_collection import ImatrixCollector, collect, n_matrices
from apreqel.sensitivity.measurement import (
    SENSITIVITY_FILE,
    KernelLoss,
    Probe,
    ProbedModel,
    Sensitivity,
    TensorSensitivity,
)
from apreqel.sensitivity.moments import Moments
from apreqel.sensitivity.next_probes import decisive_pairs
from apreqel.sensitivity.output_errors import OutputErrors, first_type
from apreqel.sensitivity.texts import Split, Text, TokenSet, split_for_calibration
from apreqel.workspace import IMATRIX_FILE, Workspace

_PROBES_PER_ROUND = 16
_SAVE_EVERY_SECONDS = 10.0
_KERNEL_CHUNKS = 1
# The original against itself; more is not rounding.
_SAME_NATS = 1e-4


@dataclass(frozen=True)
class ProbeSettings:
    """The text that is measured on; another value means another measurement."""

    fitting_chunks: int = 64
    probe_chunks: int = 16
    check_chunks: int = 16
    n_ctx: int = 512
    seed: int = 0

    def split(self, model: LoadedModel, texts: Sequence[Text]) -> Split:
        """Raises CalibrationError where the texts are too short."""
        wanted = asdict(self)
        del wanted["seed"]
        return split_for_calibration(model, texts, **wanted)


def measure(
    space: Workspace,
    *,
    texts: Sequence[Text],
    settings: ProbeSettings | None = None,
    effort: Effort = EFFORTS["normal"],
    imatrix_file: Path | None = None,
    with_moments: bool = True,
) -> ProbedModel:
    """Collect the imatrix and probe every tensor, continuing what the work folder already holds.

    Leaves `imatrix.gguf` and `sensitivity.json` there; `with_moments` second moments, too. One
    model load in all. A greater effort builds on what a smaller one measured. Raises Interrupted on
    Ctrl-C with everything measured saved, CalibrationError, EngineError, OutputError.
    """
    settings = settings or ProbeSettings()
    facts = asdict(settings) | {
        "texts": {t.name: t.sha256 for t in texts},
        "imatrix_given": file_sha256(imatrix_file) if imatrix_file else "",
    }
    provenance = Provenance(space.sha256, build_info(), settings=facts, seed=settings.seed)
    found = resumable(space, provenance) or Sensitivity(provenance)
    if not _is_enough(found, effort):
        run = _Run(space, settings, effort, found, with_moments)
        space.progress(f"writing the scratch copy{paging_note(space.inventory)}", 0, 1)
        with scratch_copy(space) as scratch:
            run.source.check()
            try:
                with LoadedModel(scratch, patchable=True, shown=str(space.model)) as model:
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
    if not found.complete or found.cut_short:
        return False
    if effort.minutes is not None:
        return found.settled
    return rank(found.effort) >= rank(effort.name)


def resumable(space: Workspace, provenance: Provenance) -> Sensitivity | None:
    """The saved record, where it was measured in the same way and its imatrix still stands."""
    found = Sensitivity.load_same(space.folder / SENSITIVITY_FILE, provenance)
    imatrix = space.folder / IMATRIX_FILE
    if found is None or not imatrix.exists():
        return None
    return found if file_sha256(imatrix) == found.imatrix_sha256 else None


def first_pairs(
    tensors: Mapping[str, TensorSensitivity], every_layer: int
) -> list[tuple[str, str]]:
    """(tensor, type) of the first probes: of each role the first tensor and every n-th after it.

    By role and not by layer, as models may have a role in odd layers only.
    """
    pairs, seen = [], Counter[str]()
    for name, tensor in tensors.items():
        if tensor.errors.weights and tensor.errors.is_run:
            if seen[tensor.role] % every_layer == 0:
                pairs.append((name, first_type(tensor.errors.weights)))
            seen[tensor.role] += 1
    return pairs


class _Run:
    """One measurement: `found` is the record so far, a new one with everything that is measured."""

    def __init__(
        self,
        space: Workspace,
        settings: ProbeSettings,
        effort: Effort,
        found: Sensitivity,
        with_moments: bool,
    ) -> None:
        self.space, self.found, self._with_moments = space, found, with_moments
        self.source = FileMarks(space.inventory.files)
        self._settings, self._effort = settings, effort
        self._saved = time.monotonic()
        self._started = self._saved - found.seconds  # as if it had not been broken off
        self._deadline = self._saved + 60 * effort.minutes if effort.minutes else None

    def keep(self, now: bool = False) -> None:
        """Save what was found, every few seconds or now."""
        if now or time.monotonic() - self._saved > _SAVE_EVERY_SECONDS:
            self.source.check()
            self._saved = time.monotonic()
            self.found = replace(self.found, seconds=self._saved - self._started)
            self.found.save(self.space.folder / SENSITIVITY_FILE)

    def finished(self) -> Sensitivity:
        effort = max(self.found.effort, self._effort.name, key=rank)
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
        with opened_bench(self.space, scratch, model, split.probe, imatrix) as bench:
            self._errors(model, bench, split.probe, half)
            self.keep(now=True)
            # Only further probes read more than the first do.
            n_chunks = None if self._effort.further_per_tensor else self._effort.first_chunks
            text = split.probe.part(slice(0, n_chunks))
            reference = bench.reference(text, scratch.parent)
            itself = bench.compare(reference.part(slice(0, 1)))
            self.found = replace(self.found, self_kld_nats=float(itself.kld_nats.mean()))
            if not abs(self.found.self_kld_nats) <= _SAME_NATS:
                raise EngineError(
                    f"{self.space.model}: evaluated twice, it differs from itself by "
                    f"{self.found.self_kld_nats:.1e} nats; its logits cannot be measured"
                )
            self._first_probes(bench, reference)
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
            imatrix, half = self._collected(model, fitting)
            write_imatrix(target, imatrix)
        sha256 = file_sha256(target)
        self.found = replace(self.found, imatrix_sha256=sha256, coverage=imatrix.coverage)
        return imatrix, half

    def _collected(self, model: LoadedModel, fitting: TokenSet) -> tuple[Imatrix, Imatrix]:
        """The imatrix of the text, and of every other chunk; in the same pass second moments."""
        space, n = self.space, fitting.n_chunks
        collector = ImatrixCollector(n_matrices(space.inventory))
        first, second = (fitting.part(slice(start, None, 2)) for start in (0, 1))
        kept = Moments(space, fitting).collected() if self._with_moments else nullcontext()
        with kept as moments:

            def listen(name: str, values: Floats, experts: Tokens | None) -> None:
                collector(name, values, experts)
                if moments:
                    moments(name, values, experts)

            with context_for(model, fitting, space.n_threads, listen) as context:
                half = collect(context, collector, first, space.progress, 0, n)
                whole = collect(context, collector, second, space.progress, first.n_chunks, n)
        return whole, half

    def _errors(
        self, model: LoadedModel, bench: ProbeBench, tokens: TokenSet, half: Imatrix | None
    ) -> None:
        """Fill in the output errors, in one evaluation of the first probe tokens."""
        if self.found.tensors:
            return
        space = self.space
        n = sequences_at_once(tokens.n_ctx, model.n_vocab, tokens.n_chunks)
        tokens = tokens.part(slice(0, n))
        listener = OutputErrors(bench, tokens, half, self._settings.seed, space.progress)
        with context_for(model, tokens, space.n_threads, listener) as context:
            next(evaluated(context, tokens))
        tensors = {
            t.name: TensorSensitivity(t.role, t.layer or 0, listener.of(t.name, tokens))
            for t in space.inventory.quantizable
        }
        self.found = replace(self.found, tensors=tensors, layer_cosines=listener.layer_cosines)

    def _first_probes(self, bench: ProbeBench, reference: ReferenceRun) -> None:
        """One type of each tensor; spread over the layers, lest time runs out on the way."""
        pairs = first_pairs(self.found.tensors, self._effort.every_layer)
        ordered = [pair for first in range(4) for pair in pairs[first::4]]
        wanted = [pair for pair in ordered if not self._is_probed(*pair)]
        for i, pair in enumerate(wanted, len(pairs) - len(wanted)):
            if self._is_late:
                return
            self.space.progress("probing tensors", i, len(pairs))
            self._probe(bench, reference, *pair, self._effort.first_chunks)
        self.space.progress("probing tensors", len(pairs), len(pairs))

    def _is_probed(self, name: str, type_name: str) -> bool:
        known, text = self.found.tensors[name].probes.get(type_name, Probe()), self.found.probe_text
        least = text.part(slice(0, self._effort.first_chunks)).n_draws
        return len(known.kld) >= least or f"{name} {type_name}" in self.found.excluded

    def _kernels(self, bench: ProbeBench, reference: ReferenceRun, place: Path) -> None:
        """What rounding activations does, with dequantised weights and as real files.

        In blocks of 32 it does little, of the whole model; in those of 256 much, and how much
        differs by role.
        """
        found, part = self.found, reference.part(slice(0, _KERNEL_CHUNKS))
        roles = dict.fromkeys(t.role for t in found.tensors.values())
        wanted = {"Q8_0": list(found.tensors)} | {
            f"Q6_K {role}": [n for n, t in found.tensors.items() if t.role == role]
            for role in roles
        }
        for i, (key, names) in enumerate(wanted.items() if self._effort.with_kernels else ()):
            type_name = key.split()[0]
            names = [n for n in names if type_name in found.tensors[n].errors.weights]
            if not names or key in self.found.kernels or self._is_late:
                continue
            self.space.progress("measuring what kernels lose", i, len(wanted))
            with bench.installed({n: lookup(type_name) for n in names}):
                dequantised = float(bench.compare(part).kld_nats.mean())
            real = self._real_file(dict.fromkeys(names, type_name), part, bench, place)
            if np.isfinite([dequantised, real]).all():
                kernels = {**self.found.kernels, key: KernelLoss(dequantised, real)}
                self.found = replace(self.found, kernels=kernels)
            else:
                reason = "the probe gave NaN or Inf"
                self.found = self.found.excluding(f"all tensors {key}", reason)

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
            LoadedModel(path, shown=f"{inventory.files[0]} quantised") as model,
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
                n_chunks = self._effort.first_chunks
                if known:
                    n_chunks = 2 * len(known.kld) // reference.tokens.n_pieces
                self._probe(bench, reference, name, type_name, n_chunks)
                done += 1
        self.space.progress("probing what decides plans", extra, extra)

    def _probe(
        self, bench: ProbeBench, reference: ReferenceRun, name: str, type_name: str, n_chunks: int
    ) -> None:
        """Probe a pair up to `n_chunks` chunks; not finite twice excludes it."""
        before = self.found.tensors[name].probes.get(type_name, Probe())
        part = reference.part(slice(len(before.kld) // reference.tokens.n_pieces, n_chunks))
        if not part.tokens.n_chunks:
            return
        for _ in range(2):
            result = bench.probe(name, lookup(type_name), part)
            if result.is_finite:
                kld, change = (
                    values.reshape(part.tokens.n_draws, -1).mean(axis=1).tolist()
                    for values in (result.kld_nats, result.nll_change_nats)
                )
                probe = Probe([*before.kld, *kld], [*before.nll_change, *change])
                self.found = self.found.with_probe(name, type_name, probe)
                break
        else:
            reason = "the probe gave NaN or Inf twice"
            self.found = self.found.excluding(f"{name} {type_name}", reason)
        self.keep()
