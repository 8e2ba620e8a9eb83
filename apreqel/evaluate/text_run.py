"""Quantised files on a text, against the original, as llama.cpp runs them for a user."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from apreqel.artifacts import require_space
from apreqel.errors import EngineError, UnsupportedModelError, VerificationError
from apreqel.llama.engine import Context, LoadedModel
from apreqel.sensitivity.bench import (
    ReferenceRun,
    compared,
    evaluated,
    one_thread_a_product,
    sequences_at_once,
)
from apreqel.sensitivity.metrics import Comparison, Reference, compare
from apreqel.sensitivity.texts import TokenSet
from apreqel.workspace import Workspace


@contextmanager
def running(
    path: Path, n_ctx: int, n_threads: int, shown: str = ""
) -> Iterator[tuple[LoadedModel, Context]]:
    """A file as users run it. Raises UnsupportedModelError where `n_ctx` is beyond its training."""
    with LoadedModel(path, shown=shown) as model:
        if model.context_length and model.context_length < n_ctx:
            raise UnsupportedModelError(
                f"{model.shown}: trained for {model.context_length} tokens of context, "
                f"verification uses {n_ctx}; lower it with --ctx"
            )
        n = sequences_at_once(n_ctx, model.n_vocab, 2)
        with model.context(n_ctx, n, n_threads) as context:
            yield model, context


@contextmanager
def on_text(
    space: Workspace, cut: Callable[[LoadedModel], TokenSet], n_ctx: int
) -> Iterator[OnText]:
    """Evaluate the original on the tokens that `cut` makes with its tokenizer.

    Its logits are kept in a file in the work folder meanwhile. Raises EngineError.
    """
    space.folder.mkdir(parents=True, exist_ok=True)
    with (
        one_thread_a_product(),
        TemporaryDirectory(prefix="text-", dir=space.folder) as scratch,
        ThreadPoolExecutor(space.n_threads) as pool,
    ):
        with running(space.given.files[0], n_ctx, space.n_threads) as (model, context):
            tokens = cut(model)
            shape = tokens.n_scored, model.n_vocab
            require_space(space.folder, 4 * math.prod(shape), "the original's logits")
            store = np.memmap(Path(scratch) / "reference.f32", np.float32, "w+", shape=shape)
            space.progress("evaluating the original", 0, tokens.n_scored)
            for rows, logits in evaluated(context, tokens):
                space.progress("evaluating the original", rows.stop, tokens.n_scored)
                if not np.isfinite(logits).all():
                    raise EngineError(f"{space.model}: gives NaN or Inf logits")
                store[rows] = logits
        yield OnText(ReferenceRun(tokens, Reference.of(store, pool)), space.n_threads, pool)


@dataclass(frozen=True)
class OnText:
    """The original at all scored positions of a text, and other files against it."""

    reference: ReferenceRun
    n_threads: int
    pool: ThreadPoolExecutor

    @property
    def tokens(self) -> TokenSet:
        return self.reference.tokens

    def original(self) -> Comparison:
        """The original against itself: its losses, for nothing needs to be evaluated again."""
        rows, following = self.reference.rows, self.tokens.next_tokens.reshape(-1)
        return compare(rows.logits, rows, following, self.pool)

    def compare(self, path: Path, shown: str = "") -> Comparison:
        """Raises EngineError (NaN, or it does not load), VerificationError for another model."""
        with running(path, self.tokens.n_ctx, self.n_threads, shown) as (model, context):
            n_vocab = self.reference.rows.logits.shape[1]
            if model.n_vocab != n_vocab:
                raise VerificationError(
                    f"{model.shown}: has {model.n_vocab} tokens in its vocabulary, the original "
                    f"{n_vocab}; it is another model"
                )
            result = compared(context, self.reference, self.pool)
        if not result.is_finite:
            raise EngineError(f"{shown or path}: gives NaN or Inf logits")
        return result
