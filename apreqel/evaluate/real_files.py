"""Quantised files measured on a text, against the original, as llama.cpp runs them.

Whole maps are tried here as real files, on a part of the calibration text that neither the imatrix
nor the probes saw; what was measured once is kept and not measured again.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from apreqel import artifacts, llama
from apreqel.errors import EngineError, UnsupportedModelError, VerificationError
from apreqel.quantize import quantize_model
from apreqel.sensitivity.bench import ReferenceRun, compared, evaluated, sequences_at_once
from apreqel.sensitivity.calibration import TokenSet, check_set
from apreqel.sensitivity.damage import Knot
from apreqel.sensitivity.gptq import VERSION
from apreqel.sensitivity.measure import measured_before, provenance_of
from apreqel.sensitivity.metrics import Comparison, Estimate, Reference, estimate, ratio_interval

if TYPE_CHECKING:
    from apreqel.model.imatrix import Imatrix
    from apreqel.model.inventory import Inventory
    from apreqel.sensitivity.gptq import Feedback
    from apreqel.sensitivity.measure import Sensitivity

Progress = Callable[[str, int, int], None]

TRIALS_FILE = "trials.json"

# Labels of apreqel's own maps.
_OWN = ("plan", "ladder")


# --- files on a text -----------------------------------------------------------------------------


@contextmanager
def running(
    path: Path, n_ctx: int, n_threads: int
) -> Iterator[tuple[llama.LoadedModel, llama.Context]]:
    """A file as users run it. Raises UnsupportedModelError where `n_ctx` is beyond its training."""
    with llama.LoadedModel(path) as model:
        if model.context_length and model.context_length < n_ctx:
            raise UnsupportedModelError(
                f"{path}: trained for {model.context_length} tokens of context, verification uses "
                f"{n_ctx}; lower it with --ctx"
            )
        n = sequences_at_once(n_ctx, model.n_vocab, 2)
        with model.context(n_ctx, n, n_threads) as context:
            yield model, context


@contextmanager
def on_text(
    original: Path,
    cut: Callable[[llama.LoadedModel], TokenSet],
    n_ctx: int,
    folder: Path,
    n_threads: int,
    on_progress: Progress = lambda what, done, total: None,
) -> Iterator[OnText]:
    """Evaluate the original on the tokens that `cut` makes with its tokenizer.

    Its logits are kept in a file in `folder` meanwhile. Raises EngineError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(prefix="text-", dir=folder) as scratch,
        ThreadPoolExecutor(n_threads) as pool,
    ):
        with running(original, n_ctx, n_threads) as (model, context):
            tokens = cut(model)
            shape = tokens.n_scored, model.n_vocab
            artifacts.require_space(folder, 4 * shape[0] * shape[1], "the original's logits")
            store = np.memmap(Path(scratch) / "reference.f32", np.float32, "w+", shape=shape)
            on_progress("evaluating the original", 0, tokens.n_scored)
            for rows, logits in evaluated(context, tokens):
                on_progress("evaluating the original", rows.stop, tokens.n_scored)
                if not np.isfinite(logits).all():
                    raise EngineError(f"{original}: gives NaN or Inf logits")
                store[rows] = logits
        yield OnText(ReferenceRun(tokens, Reference.of(store, pool)), n_threads, pool)


@dataclass(frozen=True)
class OnText:
    """The original at all scored positions of a text, and other files against it."""

    reference: ReferenceRun
    n_threads: int
    pool: ThreadPoolExecutor

    @property
    def tokens(self) -> TokenSet:
        return self.reference.tokens

    def compare(self, path: Path) -> Comparison:
        """Raises EngineError (NaN, or it does not load), VerificationError for another model."""
        with running(path, self.tokens.n_ctx, self.n_threads) as (model, context):
            n_vocab = self.reference.rows.logits.shape[1]
            if model.n_vocab != n_vocab:
                raise VerificationError(
                    f"{path}: has {model.n_vocab} tokens in its vocabulary, the original "
                    f"{n_vocab}; it is another model"
                )
            result = compared(context, self.reference, self.pool)
        if not result.is_finite:
            raise EngineError(f"{path}: gives NaN or Inf logits")
        return result


# --- trials of maps ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trial:
    """A map as a real file: mean KLD in nats by chunk of the check text, and its 99.9% quantile."""

    label: str
    types: Mapping[str, str]
    size_bytes: int
    kld_by_chunk: tuple[float, ...]
    kld_p999: float
    feedback: int = 0  # the version of feedback by which its weights were moved, if they were

    @property
    def kld(self) -> Estimate:
        return estimate(np.array(self.kld_by_chunk), len(self.kld_by_chunk))

    def ratio(self, rival: Trial) -> tuple[float, float, float]:
        """This file's KLD over the rival's, paired, with its 95% interval."""
        ours, theirs = np.array(self.kld_by_chunk), np.array(rival.kld_by_chunk)
        return ratio_interval(ours, theirs, len(ours))


class Trials(AbstractContextManager["Trials"]):
    """Measures maps, each once. A context manager; the text is evaluated when first needed."""

    def __init__(
        self,
        inventory: Inventory,
        imatrix: Imatrix,
        state: Sensitivity,
        folder: Path,
        n_threads: int,
        on_progress: Progress = lambda what, done, total: None,
        feedback: Feedback | None = None,
    ) -> None:
        """With `feedback` apreqel's own maps are written with moved weights, rivals as they are.

        Raises ArtifactError where what was measured before cannot be read.
        """
        self._feedback = feedback
        self._inventory, self._imatrix, self._folder = inventory, imatrix, folder
        self._n_threads, self._on_progress = n_threads, on_progress
        self._tokens = check_set(state.check_tokens)
        self._provenance = provenance_of(state)
        self._known = read_trials(folder, state)
        self._stack = ExitStack()
        self._text: OnText | None = None

    def __exit__(self, *_: object) -> None:
        self._text = None
        self._stack.close()

    @property
    def knots(self) -> list[Knot]:
        return knots(self._known)

    def measure(self, label: str, types: Mapping[str, str]) -> Trial:
        """Write the file, compare it with the original, delete it. Raises EngineError."""
        feedback = self._feedback if label in _OWN else None
        version = VERSION if feedback else 0
        key = _trial_key(types, version)
        found = self._known.get(key)
        if found is not None:
            if found.label != label and label in _OWN:
                self._known[key] = found = replace(found, label=label)
            return replace(found, label=label)
        if self._text is None:
            evaluated_original = on_text(
                self._inventory.files[0],
                lambda _: self._tokens,
                self._tokens.n_ctx,
                self._folder,
                self._n_threads,
                self._on_progress,
            )
            self._text = self._stack.enter_context(evaluated_original)
        with (
            tempfile.TemporaryDirectory(prefix="trial-", dir=self._folder) as place,
            feedback.moved(types) if feedback else nullcontext(self._inventory) as source,
        ):
            path = Path(place) / "trial.gguf"
            self._on_progress(f"trying a real file: {label}", 0, 1)
            quantize_model(
                source,
                types,
                path,
                imatrix=self._imatrix,
                n_threads=self._n_threads,
                allow_requantize=True,
            )
            result = self._text.compare(path)
            chunks = result.kld_nats.reshape(self._text.tokens.n_chunks, -1).mean(axis=1)
            trial = Trial(
                label,
                dict(types),
                path.stat().st_size,
                tuple(chunks.tolist()),
                float(np.quantile(result.kld_nats, 0.999)),
                version,
            )
        self._known[key] = trial
        artifacts.save(
            self._folder / TRIALS_FILE,
            "trials",
            self._provenance,
            {"trials": [asdict(trial) for trial in self._known.values()]},
        )
        return trial


def read_trials(folder: Path, state: Sensitivity) -> dict[str, Trial]:
    """What was measured before in the same way. Raises ArtifactError."""
    path = folder / TRIALS_FILE
    if (data := measured_before(path, "trials", state)) is None:
        return {}
    with artifacts.understood(f"{path}"):
        trials = [
            Trial(**{**row, "kld_by_chunk": tuple(row["kld_by_chunk"])}) for row in data["trials"]
        ]
    return {_trial_key(trial.types, trial.feedback): trial for trial in trials}


def _trial_key(types: Mapping[str, str], feedback: int) -> str:
    return f"{map_key(types)} {feedback}"


def knots(trials: Mapping[str, Trial]) -> list[Knot]:
    """What was measured of apreqel's own plans, for the damage model's totals."""
    own = [t for t in trials.values() if t.label in _OWN and t.feedback in (0, VERSION)]
    return [Knot(t.types, t.kld, bool(t.feedback)) for t in own]


def map_key(types: Mapping[str, str]) -> str:
    """A digest of a map of types."""
    return hashlib.sha256(json.dumps(sorted(types.items())).encode()).hexdigest()
