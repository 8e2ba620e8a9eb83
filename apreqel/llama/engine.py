"""A model in llama.cpp: loaded, evaluated, timed."""

from __future__ import annotations

import ctypes
import os
import time
import timeit
from collections.abc import Mapping
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from apreqel import last_words
from apreqel.arrays import Floats, Tokens
from apreqel.errors import EngineError, UnsupportedModelError
from apreqel.llama.activations import Listener, show_node
from apreqel.llama.library import c_call, gpu_name, library, reason
from apreqel.model.qtypes import QuantType

_ALL_LAYERS = 999
_FLASH_ATTENTION_ON = 1  # LLAMA_FLASH_ATTN_TYPE_ENABLED
_LOAD_WITHOUT_MAP = 0  # LLAMA_LOAD_MODE_NONE


class LoadedModel(AbstractContextManager["LoadedModel"]):
    """One model in llama.cpp. A context manager; use its contexts one thread at a time."""

    def __init__(
        self,
        path: Path,
        *,
        patchable: bool = False,
        offload: bool = False,
        simulated: bool = False,
        shown: str = "",
        overrides: Mapping[str, int] | None = None,
    ) -> None:
        """Load `path`, on the CPU unless `offload`. Raises EngineError where llama.cpp cannot.

        `patchable` keeps the weights in the file's map (not repacked), so that writes to the file
        reach the next evaluation. `offload` puts all layers on a GPU where this build has one.
        `simulated` reads no weights and allocates nothing: llama.cpp only says what it would.
        `shown` is what messages call it, where that is not the path.
        `overrides` are integers of the metadata to take instead of the file's, by key.
        """
        self.shown, self.on_gpu = shown or str(path), offload and bool(gpu_name())
        c = library()
        params = c.llama_model_default_params()
        params.n_gpu_layers = _ALL_LAYERS if self.on_gpu else 0
        params.use_extra_bufts = not patchable
        if simulated:
            params.no_alloc, params.load_mode = True, _LOAD_WITHOUT_MAP
        if overrides:
            # An array whose last entry, with an empty key, ends it.
            params.kv_overrides = table = (c.llama_model_kv_override * (len(overrides) + 1))()
            for row, (key, value) in zip(table, overrides.items(), strict=False):
                row.tag, row.key = c.LLAMA_KV_OVERRIDE_TYPE_INT, key.encode()
                row.value.val_i64 = value
        last_words.note(call="loading a model")
        with c_call():
            self._model = c.llama_model_load_from_file(os.fsencode(path), params)
        last_words.note(call="")
        if not self._model:
            if "unknown model architecture" not in reason():
                raise EngineError(f"{self.shown}: llama.cpp cannot load it: {reason()}")
            raise UnsupportedModelError(
                f"{self.shown}: {reason()}; this llama.cpp cannot run it, only apreqel inspect "
                "works; update llama-cpp-python"
            )
        self._vocab = c.llama_model_get_vocab(self._model)
        self.n_vocab = int(c.llama_vocab_n_tokens(self._vocab))

    def __exit__(self, *_: object) -> None:
        if self._model:
            library().llama_model_free(self._model)
        self._model = None

    @property
    def context_length(self) -> int:
        """The context the model was trained for, in tokens."""
        return int(library().llama_model_n_ctx_train(self._model))

    @property
    def bos_token(self) -> int | None:
        """The token that starts a text, where the model wants one."""
        token = int(library().llama_vocab_bos(self._vocab))
        return token if library().llama_vocab_get_add_bos(self._vocab) and token >= 0 else None

    def why_no_next_tokens(self) -> str:
        """Why llama.cpp gives no logits of the next token at any position; '' where it does."""
        c = library()
        if c.llama_model_is_diffusion(self._model):
            return "a diffusion model, which fills in masks instead of going on"
        if c.llama_model_has_encoder(self._model):
            return "has an encoder, which apreqel does not run"
        if c.llama_vocab_type(self._vocab) == c.LLAMA_VOCAB_TYPE_NONE:
            return "has no vocabulary of its own: a draft, or part of another model"
        with self.context(32, 1, 1) as context:
            has_memory = bool(c.llama_get_memory(context._context))
        return "" if has_memory else "gives embeddings, not tokens"

    def tokenize(self, text: str) -> Tokens:
        """The tokens of `text`, without special tokens."""
        c, raw = library(), text.encode()
        buffer = np.empty(len(raw) + 16, np.int32)
        pointer = buffer.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
        count = c.llama_tokenize(self._vocab, raw, len(raw), pointer, len(buffer), False, False)
        if count < 0:
            raise EngineError(f"{self.shown}: llama.cpp cannot tokenise the text")
        return buffer[:count].copy()

    def context(
        self,
        n_ctx: int,
        n_sequences: int,
        n_threads: int,
        listener: Listener | None = None,
        *,
        as_users_run: bool = False,
        cache_types: tuple[QuantType, QuantType] | None = None,
    ) -> Context:
        """A context, to be entered, for `n_sequences` independent sequences of `n_ctx` tokens each.

        It evaluates all of them at once; `as_users_run` keeps llama.cpp's own batch sizes, which
        its speed and memory depend on. `cache_types` are those of K and V, with flash attention.
        """
        params = library().llama_context_default_params()
        params.n_ctx, params.n_seq_max = n_ctx * n_sequences, n_sequences
        if cache_types is not None:
            params.type_k, params.type_v = (qtype.ggml_id for qtype in cache_types)
            params.flash_attn_type = _FLASH_ATTENTION_ON
        if not as_users_run:
            params.n_batch = params.n_ubatch = params.n_ctx
        params.n_threads = params.n_threads_batch = n_threads
        params.offload_kqv = params.op_offload = self.on_gpu
        params.no_perf = True
        return Context(self, params, listener)


class Context(AbstractContextManager["Context"]):
    """Evaluates batches of whole sequences; with a listener, shows it every matrix product."""

    def __init__(self, model: LoadedModel, params: Any, listener: Listener | None) -> None:
        self.model, self.n_sequences, self._listener = model, int(params.n_seq_max), listener
        self._failure: BaseException | None = None
        self._interrupts: list[int] = []
        c = library()
        self._callback = c.ggml_backend_sched_eval_callback(self._on_eval)
        if listener is not None:
            params.cb_eval = self._callback
        self._context = c.llama_init_from_model(model._model, params)
        if not self._context:
            raise EngineError(f"{model.shown}: llama.cpp cannot make a context: {reason()}")
        self._n_batch = int(c.llama_n_batch(self._context))
        self._batch = c.llama_batch_init(params.n_ctx, 0, 1)

    def __exit__(self, *_: object) -> None:
        if self._context:
            library().llama_batch_free(self._batch)
            library().llama_free(self._context)
        self._context = None

    def evaluate(self, tokens: Tokens, positions: Tokens) -> Floats:
        """Logits [sequences x scored positions, vocabulary] of `tokens` [sequences, length].

        `positions` [sequences, scored positions] are those wanted, ascending. A view into
        llama.cpp's own memory, valid until the next call. Sequences are independent. Raises
        EngineError, or whatever the listener raised.
        """
        batch, (n_sequences, length) = self._batch, tokens.shape
        assert tokens.size <= self._n_batch, "more tokens than the context was made for"
        wanted = np.zeros(tokens.shape, np.int8)
        np.put_along_axis(wanted, positions, 1, axis=1)
        batch.n_tokens = tokens.size
        for target, values in (
            (batch.token, np.ascontiguousarray(tokens, np.int32)),
            (batch.pos, np.tile(np.arange(length, dtype=np.int32), n_sequences)),
            (batch.n_seq_id, np.ones(tokens.size, np.int32)),
            (batch.logits, wanted),
        ):
            ctypes.memmove(target, values.ctypes.data, values.nbytes)
        for i in range(tokens.size):
            batch.seq_id[i][0] = i // length
        self._forget()
        self._decode()
        logits = library().llama_get_logits(self._context)
        return np.ctypeslib.as_array(logits, shape=(positions.size, self.model.n_vocab))

    def _forget(self) -> None:
        library().llama_memory_clear(library().llama_get_memory(self._context), True)

    def _decode(self) -> None:
        with c_call() as self._interrupts:
            code = library().llama_decode(self._context, self._batch)
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure
        if code:
            raise EngineError(f"{self.model.shown}: llama_decode ended with {code}: {reason()}")

    def seconds(self, n_prompt: int, n_generated: int) -> tuple[float, float]:
        """Seconds for a prompt of `n_prompt` tokens, and for `n_generated` one by one after it."""
        self._forget()
        started = time.perf_counter()
        for first in range(0, n_prompt, self._n_batch):
            self._run(first, min(self._n_batch, n_prompt - first))
        prompted = time.perf_counter()
        for i in range(n_generated):
            self._run(n_prompt + i, 1)
        return prompted - started, time.perf_counter() - prompted

    def sampling_seconds(self, repetitions: int = 5) -> float:
        """Seconds to pick one token from the last logits, as llama-cli does unless told otherwise.

        Top-k 40, top-p 0.95, min-p 0.05, temperature 0.8. The least of `repetitions`.
        """
        c = library()
        chain = c.llama_sampler_chain_init(c.llama_sampler_chain_default_params())
        for sampler in (
            c.llama_sampler_init_top_k(40),
            c.llama_sampler_init_top_p(0.95, 1),
            c.llama_sampler_init_min_p(0.05, 1),
            c.llama_sampler_init_temp(0.8),
            c.llama_sampler_init_dist(0),
        ):
            c.llama_sampler_chain_add(chain, sampler)
        try:
            sample = partial(c.llama_sampler_sample, chain, self._context, -1)
            return min(timeit.repeat(sample, timer=time.perf_counter, number=1, repeat=repetitions))
        finally:
            c.llama_sampler_free(chain)

    def _run(self, start: int, count: int) -> None:
        batch = self._batch
        batch.n_tokens = count
        for i in range(count):
            # Any token will do: speed does not depend on which; a spread avoids one hot row.
            batch.token[i] = (start + i) * 7919 % self.model.n_vocab
            batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = start + i, 1, 0
            batch.logits[i] = i == count - 1
        self._decode()
        library().llama_synchronize(self._context)

    def _on_eval(self, pointer: int, ask: bool, _user_data: object) -> bool:
        """ggml_backend_sched_eval_callback: asked first, then called with the data there."""
        if self._interrupts:
            return False  # ends the evaluation
        try:
            return show_node(pointer, None if ask else self._listener) or not ask
        except BaseException as error:  # must not unwind through C
            self._failure = error
            return False
