"""How much the model suffers from each tensor in each quant type: measured, and resumable.

Damage is KL divergence from the unquantised model, in nats per token. Every tensor gets at least
one probe; its other types are predicted from that probe by KLD(t) = a e(t), with e(t) the relative
output error (see `probing.OutputErrors`). Where that would decide a plan, further probes are made:
for plans along a ladder of sizes, the (tensor, type) pairs that carry most predicted damage.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from apreqel import artifacts, calibration, llama, probing
from apreqel import imatrix as imatrices
from apreqel.artifacts import Provenance
from apreqel.errors import ArtifactError, CalibrationError, Interrupted
from apreqel.knapsack import Limit, solve
from apreqel.metrics import Estimate, estimate
from apreqel.qtypes import QuantType, lookup

if TYPE_CHECKING:
    from collections.abc import Iterator

    from apreqel.calibration import Text, TokenSet
    from apreqel.imatrix import Coverage, Imatrix
    from apreqel.inventory import Inventory
    from apreqel.probing import ProbeBench, Reference

SENSITIVITY_FILE, IMATRIX_FILE = "sensitivity.json", "imatrix.gguf"

# Every tensor is first probed near this size: large enough an effect to rise above the noise of
# 1,000 tokens, small enough to stay in the range where tensors add up.
_FIRST_PROBE_BITS = 4.5
# Plans from which further probes are chosen, in bits per weight of the quantised tensors.
_LADDER_BITS = (4.0, 4.5, 5.0, 5.5, 6.0, 6.75, 7.5)
_PROBES_PER_ROUND = 15
_SAVE_EVERY_SECONDS = 10.0


@dataclass(frozen=True)
class ProbeSettings:
    """What a measurement depends on; another value means another measurement."""

    imatrix_chunks: int = 48
    imatrix_ctx: int = 512
    probe_chunks: int = 8
    probe_ctx: int = 128
    further_probes: int = 48
    seed: int = 0


@dataclass(frozen=True)
class TensorSensitivity:
    """`errors`: relative output error by type. `probes`: measured KLD in nats by type."""

    errors: Mapping[str, float]
    probes: Mapping[str, Estimate]

    def damage(self, type_name: str) -> float:
        """KLD in nats of this tensor alone in this type; never negative.

        A probed type is its own measurement. Otherwise a = KLD / e is interpolated between the
        nearest probes, in log e, and held constant beyond them.
        """
        if type_name in self.probes:
            return max(0.0, self.probes[type_name].mean)
        error = self.errors[type_name]
        known = sorted(
            (math.log(self.errors[t]), math.log(p.mean / self.errors[t]))
            for t, p in self.probes.items()
            if p.mean > 0 and self.errors.get(t, 0) > 0
        )
        if not known or error <= 0:
            return 0.0
        x, y = zip(*known, strict=True)
        return error * math.exp(float(np.interp(math.log(error), x, y)))


@dataclass
class Sensitivity:
    """The measurement as it stands; `complete` once all wanted probes are done."""

    provenance: Provenance
    tensors: dict[str, TensorSensitivity]
    coverage: Coverage | None = None
    imatrix_sha256: str = ""
    excluded: dict[str, str] = field(default_factory=dict)  # "tensor TYPE" -> reason
    self_kld_nats: float = 0.0
    seconds: float = 0.0
    complete: bool = False

    @property
    def n_probes(self) -> int:
        return sum(len(t.probes) for t in self.tensors.values())

    def save(self, path: Path) -> None:
        data: dict[str, Any] = {
            "tensors": {
                name: {
                    "errors": dict(t.errors),
                    "probes": {kind: asdict(p) for kind, p in t.probes.items()},
                }
                for name, t in self.tensors.items()
            },
            "coverage": asdict(self.coverage) if self.coverage else None,
            "imatrix_sha256": self.imatrix_sha256,
            "excluded": self.excluded,
            "self_kld_nats": self.self_kld_nats,
            "seconds": self.seconds,
            "complete": self.complete,
        }
        artifacts.save(path, "sensitivity", self.provenance, data)

    @classmethod
    def load(cls, path: Path, model_sha256: str) -> Sensitivity:
        """Raises ArtifactError."""
        provenance, data = artifacts.load(path, "sensitivity", model_sha256)
        try:
            tensors = {
                name: TensorSensitivity(
                    dict(t["errors"]), {kind: Estimate(**p) for kind, p in t["probes"].items()}
                )
                for name, t in data["tensors"].items()
            }
            coverage = imatrices.Coverage(**data["coverage"]) if data["coverage"] else None
            return cls(
                provenance,
                tensors,
                coverage,
                data["imatrix_sha256"],
                data["excluded"],
                data["self_kld_nats"],
                data["seconds"],
                data["complete"],
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ArtifactError(f"{path}: damaged sensitivity data ({error}); delete it") from error


# (what is being done, steps done, steps in all)
Progress = Callable[[str, int, int], None]


def measure(
    inventory: Inventory,
    model_sha256: str,
    folder: Path,
    *,
    texts: Sequence[Text],
    settings: ProbeSettings,
    n_threads: int,
    imatrix_file: Path | None = None,
    on_progress: Progress = lambda what, done, total: None,
) -> Sensitivity:
    """Collect the imatrix and probe every tensor, continuing what `folder` already holds.

    Leaves `imatrix.gguf` and `sensitivity.json` in `folder`. One model load in all. Raises
    Interrupted on Ctrl-C with everything measured saved, CalibrationError, EngineError,
    OutputError.
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
    if state.complete:
        return state
    marks = artifacts.file_marks(inventory.files)
    started, before = time.monotonic(), state.seconds
    saved_at = started

    def keep(force: bool = False) -> None:
        nonlocal saved_at
        now = time.monotonic()
        if force or now - saved_at > _SAVE_EVERY_SECONDS:
            state.seconds, saved_at = before + now - started, now
            state.save(path)

    on_progress("writing the scratch copy", 0, 1)
    with probing.scratch_copy(inventory, folder, n_threads) as scratch:
        artifacts.source_is_unchanged(inventory.files, marks)
        try:
            with llama.LoadedModel(scratch, patchable=True) as model:
                run = _Run(inventory, model, scratch, folder, settings, n_threads, on_progress)
                run.measure(state, texts, imatrix_file, keep)
        except KeyboardInterrupt:
            keep(force=True)
            raise Interrupted(
                f"stopped with {state.n_probes} probes done; run the same command to continue"
            ) from None
    state.complete = True
    keep(force=True)
    return state


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
    n_threads: int
    on_progress: Progress

    def measure(
        self,
        state: Sensitivity,
        texts: Sequence[Text],
        imatrix_file: Path | None,
        keep: Callable[..., None],
    ) -> None:
        s = self.settings
        fitting, probe_tokens = calibration.split_for_calibration(
            self.model,
            texts,
            imatrix_chunks=s.imatrix_chunks,
            imatrix_ctx=s.imatrix_ctx,
            probe_chunks=s.probe_chunks,
            probe_ctx=s.probe_ctx,
        )
        imatrix = self._imatrix(state, fitting, imatrix_file)
        keep(force=True)
        candidates = probing.candidate_types(self.inventory, imatrix)
        with self._bench(probe_tokens, imatrix) as bench:
            self._errors(state, bench, candidates, probe_tokens)
            keep(force=True)
            reference = bench.reference(probe_tokens, self.scratch.parent)
            state.self_kld_nats = float(bench.compare(reference).kld_nats.mean())
            self._first_probes(state, bench, candidates, reference, keep)
            self._further_probes(state, bench, reference, keep)

    @contextmanager
    def _bench(
        self, tokens: TokenSet, imatrix: Imatrix, listener: llama.Listener | None = None
    ) -> Iterator[ProbeBench]:
        n = probing.sequences_at_once(tokens.n_ctx, self.model.n_vocab, tokens.n_chunks)
        with self.model.context(tokens.n_ctx, n, self.n_threads, listener) as context:
            bench = probing.ProbeBench(self.scratch, context, self.n_threads)
            bench.imatrix = imatrix
            try:
                yield bench
            finally:
                bench.close()

    def _imatrix(self, state: Sensitivity, fitting: TokenSet, given: Path | None) -> Imatrix:
        """Read, or collect and write, `imatrix.gguf`."""
        target = self.folder / IMATRIX_FILE
        if state.imatrix_sha256:
            imatrix = imatrices.read_imatrix(target, self.inventory)
        elif given is not None:
            imatrix = imatrices.read_imatrix(given, self.inventory)
            imatrices.write_imatrix(target, imatrix)
        else:
            n = probing.sequences_at_once(fitting.n_ctx, self.model.n_vocab, fitting.n_chunks)
            collector = imatrices.ImatrixCollector(imatrices.n_matrices(self.inventory))
            with self.model.context(fitting.n_ctx, n, self.n_threads, collector) as context:
                imatrix = imatrices.collect(
                    context,
                    collector,
                    fitting,
                    lambda done, total: self.on_progress("collecting the imatrix", done, total),
                )
            imatrices.write_imatrix(target, imatrix)
        state.imatrix_sha256 = artifacts.file_sha256(target)
        state.coverage = imatrix.coverage
        return imatrix

    def _errors(
        self,
        state: Sensitivity,
        bench: ProbeBench,
        candidates: Mapping[str, Sequence[QuantType]],
        tokens: TokenSet,
    ) -> None:
        """Fill in the output errors, in one evaluation of the first probe tokens."""
        if len(state.tensors) == len(candidates):
            return
        total = len(candidates)
        listener = probing.OutputErrors(
            candidates,
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

    def _first_probes(
        self,
        state: Sensitivity,
        bench: ProbeBench,
        candidates: Mapping[str, Sequence[QuantType]],
        reference: Reference,
        keep: Callable[..., None],
    ) -> None:
        wanted = []
        for name, kinds in candidates.items():
            if kinds and not state.tensors[name].probes:
                wanted.append((name, first_type(kinds, state.tensors[name].errors)))
        done = len(candidates) - len(wanted)
        for i, (name, kind) in enumerate(wanted):
            self.on_progress("probing tensors", done + i, len(candidates))
            self._probe(state, bench, name, kind, reference)
            keep()
        self.on_progress("probing tensors", len(candidates), len(candidates))

    def _further_probes(
        self,
        state: Sensitivity,
        bench: ProbeBench,
        reference: Reference,
        keep: Callable[..., None],
    ) -> None:
        extra = self.settings.further_probes
        done = max(0, state.n_probes - len(state.tensors))
        while done < extra:
            wanted = decisive_pairs(state, self.inventory, min(_PROBES_PER_ROUND, extra - done))
            if not wanted:
                return
            for name, type_name in wanted:
                self.on_progress("probing what decides plans", done, extra)
                self._probe(state, bench, name, lookup(type_name), reference)
                keep()
                done += 1
        self.on_progress("probing what decides plans", extra, extra)

    def _probe(
        self,
        state: Sensitivity,
        bench: ProbeBench,
        name: str,
        kind: QuantType,
        reference: Reference,
    ) -> None:
        """One probe; a result that is not finite is tried once more, then excluded."""
        for _ in range(2):
            result = bench.probe({name: kind}, reference)
            if result.is_finite:
                tensor = state.tensors[name]
                measured = estimate(result.kld_nats, reference.tokens.n_chunks)
                state.tensors[name] = TensorSensitivity(
                    tensor.errors, {**tensor.probes, kind.name: measured}
                )
                return
        state.excluded[f"{name} {kind.name}"] = "the probe gave NaN or Inf twice"


def first_type(kinds: Sequence[QuantType], errors: Mapping[str, float]) -> QuantType:
    """The type nearest to 4.5 bits per weight; among equals the one with the least error."""
    return min(kinds, key=lambda q: (abs(q.bits_per_weight - _FIRST_PROBE_BITS), errors[q.name]))


def decisive_pairs(state: Sensitivity, inventory: Inventory, count: int) -> list[tuple[str, str]]:
    """Unprobed (tensor, type) pairs that carry most predicted damage in plans along the ladder."""
    names = [n for n, t in state.tensors.items() if t.probes]
    options = {
        n: [t for t in state.tensors[n].errors if f"{n} {t}" not in state.excluded] for n in names
    }
    sizes = [
        np.array([lookup(t).size_bytes(inventory.by_name[n].shape) for t in options[n]], float)
        for n in names
    ]
    damages = [np.array([state.tensors[n].damage(t) for t in options[n]]) for n in names]
    n_weights = sum(inventory.by_name[n].n_elements for n in names)
    scores: dict[tuple[str, str], float] = {}
    for bits in _LADDER_BITS:
        budget = bits * n_weights / 8
        if budget < sum(s.min() for s in sizes):
            continue
        solution = solve(damages, [Limit("size", sizes, budget)])
        for name, chosen, row in zip(names, solution.choice, damages, strict=True):
            pair = name, options[name][chosen]
            share = float(row[chosen]) / max(solution.objective, 1e-12)
            if pair[1] not in state.tensors[name].probes and share > 0:
                scores[pair] = scores.get(pair, 0.0) + share
    return sorted(scores, key=lambda pair: -scores[pair])[:count]


def require_probed(state: Sensitivity, inventory: Inventory) -> None:
    """Raise CalibrationError where a quantisable tensor has no usable probe at all."""
    for tensor in inventory.quantizable:
        known = state.tensors.get(tensor.name)
        if known is None or (known.errors and not known.probes):
            raise CalibrationError(
                f"tensor {tensor.name}: no usable probe; run apreqel probe again"
            )
