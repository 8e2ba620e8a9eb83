"""Texts, tokens, and which of them may be used for what.

Calibration text comes with apreqel (`calib_data/`) or from the user. Its chunks are dealt out to
three sets that share no token: to fit the imatrix, to judge errors and probe damage, and to try
whole files on.
Verification reads another text altogether (`heldout.txt`), or the user's own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
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

# Fewer chunks than this cannot be shared out between three uses.
_LEAST_CHUNKS = 8
# Tokens of one piece of the probe text: many short pieces say more than a few long ones, as how
# much a tensor matters differs from place to place of a text far more than from token to token.
_PIECE = 64


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
    no next one, is never among them. A chunk may be put together of `n_pieces` from other places
    of the text, each scored at as many positions.
    """

    name: str
    tokens: Tokens
    positions: Tokens
    n_pieces: int = 1

    @staticmethod
    def scored_from(first: int, name: str, tokens: Tokens) -> TokenSet:
        """Scored at every position from `first` on."""
        row = np.arange(first, tokens.shape[1] - 1, dtype=np.int32)
        return TokenSet(name, tokens, np.tile(row, (len(tokens), 1)))

    def part(self, chunks: slice | Tokens) -> TokenSet:
        """Some of the chunks."""
        return replace(self, tokens=self.tokens[chunks], positions=self.positions[chunks])

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
    def n_draws(self) -> int:
        """How many places of the text it shows."""
        return self.n_chunks * self.n_pieces

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


def _n_tokens(model: LoadedModel, texts: Sequence[Text]) -> int:
    return sum(len(model.tokenize(text.content)) for text in texts)


@dataclass(frozen=True)
class Split:
    """Disjoint parts of the calibration text.

    `fitting` is what the imatrix is collected on, `probe` what single tensors' damage is measured
    on, `check` for whole quantised files.
    """

    fitting: TokenSet
    probe: TokenSet
    check: TokenSet


def split_for_calibration(
    model: LoadedModel,
    texts: Sequence[Text],
    *,
    fitting_chunks: int = 64,
    probe_chunks: int = 16,
    check_chunks: int = 16,
    n_ctx: int = 512,
) -> Split:
    """Disjoint sets, each spread evenly over all texts; as many chunks as asked, or there are.

    Where there are too few for all, at most a quarter is checked on, and a quarter probed on.
    Raises CalibrationError where the texts are too short, with the tokens needed and found.
    """
    if model.context_length:
        n_ctx = min(n_ctx, model.context_length)
    chunks = chunks_of(model, texts, n_ctx)
    name = ", ".join(text.name for text in texts) or "no text"
    if len(chunks) < _LEAST_CHUNKS:
        raise CalibrationError(
            f"{name}: {_n_tokens(model, texts)} tokens; at least {_LEAST_CHUNKS * n_ctx} are "
            "needed to calibrate; give more text"
        )
    checked = spread(len(chunks), min(check_chunks, len(chunks) // 4))
    rest = np.delete(chunks, checked, axis=0)
    probed = spread(len(rest), min(probe_chunks, len(chunks) // 4))
    left = np.delete(rest, probed, axis=0)
    return Split(
        fitting_set(left[spread(len(left), fitting_chunks)], name),
        probe_set(_mixed(rest[probed], model.bos_token is not None), name),
        check_set(chunks[checked], name),
    )


def _mixed(chunks: Tokens, has_bos: bool) -> Tokens:
    """The chunks with their pieces dealt out, so that each holds some from all over the text."""
    n_pieces, length = _pieces_of(chunks.shape[1])
    step = max(1, len(chunks) // n_pieces)
    mixed: Tokens = chunks.copy()
    for i in range(n_pieces):
        part = slice(max(i * length, int(has_bos)), (i + 1) * length)
        mixed[:, part] = np.roll(chunks[:, part], i * step, axis=0)
    return mixed


def _pieces_of(n_ctx: int) -> tuple[int, int]:
    """How many pieces a chunk of the probe text has, and their tokens."""
    n_pieces = max(1, n_ctx // _PIECE)
    return n_pieces, n_ctx // n_pieces


def fitting_set(chunks: npt.ArrayLike, name: str = "calibration text") -> TokenSet:
    """`Split.fitting` from its chunks [chunks, tokens per chunk]."""
    return TokenSet.scored_from(0, name, np.ascontiguousarray(chunks, np.int32))


def probe_set(chunks: npt.ArrayLike, name: str = "calibration text") -> TokenSet:
    """`Split.probe` from its chunks.

    The first piece of several is not scored: near the start of a context, with its huge
    activations, tensors matter otherwise than later on (SmolLM2-135M: up to four times as much in
    the FFN of early layers, two thirds in q and k). Nor are of a piece the first eighth, where the
    text is new, and the last token, after which another piece begins.
    """
    tokens = np.ascontiguousarray(chunks, np.int32)
    n_pieces, length = _pieces_of(tokens.shape[1])
    scored = np.arange(n_pieces)[min(1, n_pieces - 1) :]
    row = length * scored[:, None] + np.arange(length // 8, length - 1)
    positions = np.tile(row.reshape(-1).astype(np.int32), (len(tokens), 1))
    return TokenSet(name, tokens, positions, len(scored))


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
            f"{text.name}: {_n_tokens(model, [text])} tokens; scoring {n_scored} needs "
            f"{wanted * n_ctx}; give a longer text or score fewer tokens"
        )
    return check_set(chunks[spread(len(chunks), wanted)], text.name)
