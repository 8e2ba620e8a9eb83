"""Texts, tokens, and which of them may be used for what.

Calibration text comes with apreqel (`calib_data/`) or from the user. Its chunks are dealt out to
three sets that share no token: to fit the imatrix, to judge errors and probe damage, and to try
whole files on.
Verification reads another text altogether (`heldout.txt`), or the user's own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from apreqel.arrays import Tokens, Whole
from apreqel.errors import CalibrationError

if TYPE_CHECKING:
    from apreqel.llama.engine import LoadedModel


HELDOUT_NAME = "heldout.txt"

# Fewer long chunks than this cannot be shared out between three uses.
_LEAST_STRETCHES = 8
_PROBE_STRIDE = 8


@dataclass(frozen=True)
class Text:
    """One text file: its name for reports, its content and its SHA-256."""

    name: str
    content: str
    sha256: str


@dataclass(frozen=True)
class TokenSet:
    """Independent chunks `tokens` [chunks, tokens per chunk], scored at `positions`.

    `positions` [chunks, scored per chunk] ascend in each row; the last token of a chunk, which has
    no next one, is never among them.
    """

    name: str
    tokens: Tokens
    positions: Tokens

    @staticmethod
    def scored_from(first: int, name: str, tokens: Tokens) -> TokenSet:
        """Scored at every position from `first` on."""
        row = np.arange(first, tokens.shape[1] - 1, dtype=np.int32)
        return TokenSet(name, tokens, np.tile(row, (len(tokens), 1)))

    def part(self, chunks: slice | Tokens) -> TokenSet:
        """Some of the chunks."""
        return TokenSet(self.name, self.tokens[chunks], self.positions[chunks])

    @property
    def n_chunks(self) -> int:
        return len(self.tokens)

    @property
    def n_ctx(self) -> int:
        return int(self.tokens.shape[1])

    @property
    def n_scored(self) -> int:
        return int(self.positions.size)

    @property
    def next_tokens(self) -> Tokens:
        """What follows each scored position, [chunks, scored positions]."""
        return np.take_along_axis(self.tokens, self.positions + 1, axis=1)


def read_text(path: Path) -> Text:
    """A UTF-8 text. Raises CalibrationError saying where it is not."""
    try:
        raw = path.read_bytes()
        return Text(path.name, raw.decode(), hashlib.sha256(raw).hexdigest())
    except OSError as error:
        raise CalibrationError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise CalibrationError(
            f"{path}: not UTF-8 at byte {error.start} (line {line}, value "
            f"0x{raw[error.start]:02x}); convert it, for example with iconv"
        ) from error


def bundled_texts() -> list[Text]:
    """apreqel's own calibration texts, without the held-out one."""
    names = sorted(p.name for p in _folder().glob("*.txt") if p.name != HELDOUT_NAME)
    return [read_text(_folder() / name) for name in names]


def heldout_text() -> Text:
    """apreqel's own verification text."""
    return read_text(_folder() / HELDOUT_NAME)


def _folder() -> Path:
    inside = Path(str(resources.files("apreqel") / "calib_data"))
    beside = Path(__file__).parents[2] / "calib_data"  # a source checkout
    for folder in (inside, beside):
        if folder.is_dir():
            return folder
    raise CalibrationError(f"{inside}: apreqel's calibration texts are missing; reinstall apreqel")


def chunks_of(model: LoadedModel, texts: Sequence[Text], n_ctx: int) -> Tokens:
    """The texts, one after another, cut into chunks of `n_ctx` tokens: [chunks, n_ctx].

    Where the model starts texts with a BOS token, each chunk does (as llama-perplexity does).
    """
    body = n_ctx - (model.bos_token is not None)
    stream = np.concatenate([np.empty(0, np.int32), *(model.tokenize(t.content) for t in texts)])
    chunks = stream[: len(stream) // body * body].reshape(-1, body)
    if model.bos_token is not None:
        chunks = np.insert(chunks, 0, model.bos_token, axis=1)
    return np.ascontiguousarray(chunks, np.int32)


@dataclass(frozen=True)
class Split:
    """Disjoint parts of the calibration text.

    `fitting` is what the imatrix is collected on, `probe` holds short chunks from many places for
    the damage of single tensors, `check` long ones for whole quantised files.
    """

    fitting: TokenSet
    probe: TokenSet
    check: TokenSet


def split_for_calibration(
    model: LoadedModel,
    texts: Sequence[Text],
    *,
    fitting_chunks: int = 64,
    probe_chunks: int = 32,
    check_chunks: int = 8,
    n_ctx: int = 512,
    probe_ctx: int = 64,
) -> Split:
    """Disjoint sets, each spread evenly over all texts; as many chunks as asked, or there are.

    The text is cut into stretches of one long chunk and a short one behind it: short ones are
    probed on. Many short chunks say more than a few long ones: how much a tensor matters differs
    from place to place of a text far more than from position to position.

    Raises CalibrationError where the texts are too short, with the tokens needed and found.
    """
    if model.context_length:
        n_ctx = min(n_ctx, model.context_length)
    stretches = chunks_of(model, texts, n_ctx + probe_ctx)
    name = ", ".join(text.name for text in texts) or "no text"
    if len(stretches) < _LEAST_STRETCHES:
        raise CalibrationError(
            f"{name}: {len(stretches) * (n_ctx + probe_ctx)} tokens; at least "
            f"{_LEAST_STRETCHES * (n_ctx + probe_ctx)} are needed to calibrate; give more text"
        )
    checked = spread(len(stretches), min(check_chunks, len(stretches) // 4))
    rest = np.delete(stretches, checked, axis=0)
    probe = rest[spread(len(rest), probe_chunks), n_ctx:].copy()
    # Neighbours in the text differ least: any first few of these come from far apart.
    probe = np.concatenate([probe[i::_PROBE_STRIDE] for i in range(_PROBE_STRIDE)])
    if model.bos_token is not None:
        probe[:, 0] = model.bos_token
    return Split(
        fitting_set(rest[spread(len(rest), fitting_chunks), :n_ctx], name),
        probe_set(probe, name),
        check_set(stretches[checked, :n_ctx], name),
    )


def fitting_set(chunks: npt.ArrayLike, name: str = "calibration text") -> TokenSet:
    """`Split.fitting` from its chunks [chunks, tokens per chunk]."""
    return TokenSet.scored_from(0, name, np.ascontiguousarray(chunks, np.int32))


def probe_set(chunks: npt.ArrayLike, name: str = "calibration text") -> TokenSet:
    """`Split.probe` from its chunks.

    Positions with almost no context say little about the text: the first 1/16 are left out.
    """
    tokens = np.ascontiguousarray(chunks, np.int32)
    return TokenSet.scored_from(tokens.shape[1] // 16, name, tokens)


def check_set(chunks: npt.ArrayLike, name: str = "calibration text") -> TokenSet:
    """`Split.check` from its chunks."""
    tokens = np.ascontiguousarray(chunks, np.int32)
    return TokenSet.scored_from(tokens.shape[1] // 2, name, tokens)


def spread(n: int, wanted: int) -> Whole:
    """At most `wanted` of range(n), evenly spread."""
    return np.unique(np.linspace(0, n - 1, min(wanted, n)).round().astype(np.intp))


def verification_set(model: LoadedModel, text: Text, n_ctx: int, n_scored: int) -> TokenSet:
    """Chunks for verification, scored in their second half as llama-perplexity does.

    Spread over the text, at least `n_scored` positions. Raises CalibrationError with the number
    of tokens found where the text is too short.
    """
    wanted = -(-n_scored // (n_ctx - 1 - n_ctx // 2))
    chunks = chunks_of(model, [text], n_ctx)
    if len(chunks) < wanted:
        raise CalibrationError(
            f"{text.name}: {len(chunks) * n_ctx} tokens; scoring {n_scored} needs "
            f"{wanted * n_ctx}; give a longer text or score fewer tokens"
        )
    return check_set(chunks[spread(len(chunks), wanted)], text.name)
