"""How llama.cpp's programs, Ollama and Python are told to run a file as it was planned for.

Names of flags are those of llama.cpp's common/arg.cpp, of Ollama's Modelfile reference, and of
`llama_cpp.Llama` and its server's settings in llama-cpp-python 0.3.36.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from apreqel.errors import ArtifactError, printable
from apreqel.model.qtypes import KV_TYPES, USUAL_CACHES, lookup

HOST, PORT = "127.0.0.1", 8000
# Ollama has one type for K and V, of all models that its server runs.
_OLLAMA_CACHES = ("F16", "Q8_0", "Q4_0")
_ALL_LAYERS = -1  # in llama-cpp-python
_MOST = 2**31


@dataclass(frozen=True)
class RunSettings:
    """What the predictions for a file hold with; None is whatever llama.cpp does unasked."""

    n_ctx: int | None = None
    cache_types: Sequence[str] = USUAL_CACHES  # of K and V
    n_threads: int | None = None

    def __post_init__(self) -> None:
        """Raise ArtifactError for what cannot be: a plan may come from elsewhere."""
        counts = [n for n in (self.n_ctx, self.n_threads) if n is not None]
        if len(self.cache_types) != 2 or not set(self.cache_types) <= set(KV_TYPES):
            shown = printable(str(list(self.cache_types)))
            raise ArtifactError(f"cache_types {shown}: two of {', '.join(KV_TYPES)} are expected")
        if any(not 0 < n < _MOST for n in counts):
            raise ArtifactError(f"context and threads {counts}: cannot be; plan again")

    @property
    def has_usual_caches(self) -> bool:
        return tuple(self.cache_types) == USUAL_CACHES

    @property
    def flags(self) -> list[str]:
        """Of llama-server, llama-cli and their like."""
        found = ["-c", str(self.n_ctx)] if self.n_ctx else []
        if not self.has_usual_caches:
            k, v = (name.lower() for name in self.cache_types)
            found += ["-ctk", k, "-ctv", v, "-fa", "on"]
        return found + (["-t", str(self.n_threads)] if self.n_threads else [])

    def keywords(self, all_on_gpu: bool = False) -> dict[str, int | bool]:
        """Of `llama_cpp.Llama`, whose defaults are others than llama.cpp's.

        Flash attention is on, as llama.cpp has it unasked wherever it can; a prompt's threads are
        as many as an answer's.
        """
        found: dict[str, int | bool] = {"n_ctx": self.n_ctx or 0, "flash_attn": True}
        if self.n_threads:
            found |= {"n_threads": self.n_threads, "n_threads_batch": self.n_threads}
        if not self.has_usual_caches:
            k, v = (lookup(name).ggml_id for name in self.cache_types)
            found |= {"type_k": k, "type_v": v}
        return found | ({"n_gpu_layers": _ALL_LAYERS} if all_on_gpu else {})

    @property
    def ollama_parameters(self) -> dict[str, int]:
        """For a Modelfile's PARAMETER lines."""
        found = {"num_ctx": self.n_ctx, "num_thread": self.n_threads}
        return {name: value for name, value in found.items() if value}

    @property
    def ollama_caches(self) -> str:
        """What Ollama's own server must be started with for this KV cache, or why it cannot."""
        if self.has_usual_caches:
            return ""
        k, v = self.cache_types
        if k != v or k not in _OLLAMA_CACHES:
            return (
                f"the KV cache was planned in {k} (K) and {v} (V); Ollama has one of "
                f"{', '.join(_OLLAMA_CACHES)} for both, so memory and speed differ there"
            )
        return f"start Ollama's server with OLLAMA_KV_CACHE_TYPE={k.lower()}, as planned"


def commands(file: str, name: str, settings: RunSettings) -> Mapping[str, str]:
    """Ready to paste, by program: llama-server, llama-cli, Ollama, Python. `name` is Ollama's."""
    where, flags = shlex.quote(file), " ".join(settings.flags)
    lines = "".join(f"PARAMETER {k} {v}\\n" for k, v in settings.ollama_parameters.items())
    # A Modelfile on stdin is looked at from elsewhere, so there the path is absolute.
    absolute = where if file.startswith("/") else f'"$PWD"/{where}'
    given = ", ".join(f"{k}={v}" for k, v in settings.keywords().items())
    return {
        "llama-server": f"llama-server -m {where} {flags}".rstrip(),
        "llama-cli": f"llama-cli -m {where} {flags}".rstrip(),
        "Ollama": (
            f"printf 'FROM %s\\n{lines}' {absolute} | ollama create {name} -f /dev/stdin && "
            f"ollama run {name}"
        ),
        "Python": f"from llama_cpp import Llama; llm = Llama({file!r}, {given})",
    }


def ollama_name(stem: str) -> str:
    """A name that Ollama takes, from a file's: small letters, digits, dots, dashes."""
    return re.sub(r"[^a-z0-9._-]+", "-", stem.lower()).strip("._-")[:80] or "model"
