"""Texts, tokens, and which of them may be used for what.

Calibration text comes with apreqel (`calib_data/`) or from the user. Its chunks are dealt out to
two sets that share no token: one to fit the imatrix, one to judge errors and probe damage.
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

from apreqel.errors import CalibrationError

if TYPE_CHECKING:
    from apreqel.llama import LoadedModel

Tokens = npt.NDArray[np.int32]

HELDOUT_NAME = "heldout.txt"


@dataclass(frozen=True)
class Text:
    """One text file: its name for reports, its content and its SHA-256."""

    name: str
    content: str
    sha256: str


@dataclass(frozen=True)
class TokenSet:
    """Independent chunks `tokens` [chunks, tokens per chunk], scored from `first_scored` on.

    The last position has no next token, so each chunk scores n_ctx - first_scored - 1 positions.
    """

    name: str
    tokens: Tokens
    first_scored: int
    sha256: str

    @property
    def n_chunks(self) -> int:
        return len(self.tokens)

    @property
    def n_ctx(self) -> int:
        return int(self.tokens.shape[1])

    @property
    def scored(self) -> slice:
        return slice(self.first_scored, self.n_ctx - 1)

    @property
    def n_scored(self) -> int:
        return self.n_chunks * (self.n_ctx - 1 - self.first_scored)

    @property
    def next_tokens(self) -> Tokens:
        """What follows each scored position, [chunks, scored positions]."""
        return self.tokens[:, self.first_scored + 1 :]


def read_text(path: Path) -> Text:
    """A UTF-8 text. Raises CalibrationError saying where it is not."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise CalibrationError(f"{path}: cannot be read ({error.strerror})") from error
    try:
        content = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise CalibrationError(
            f"{path}: not UTF-8 at byte {error.start} (line {line}, value "
            f"0x{raw[error.start]:02x}); convert it, for example with iconv"
        ) from error
    return Text(path.name, content, hashlib.sha256(raw).hexdigest())


def bundled_texts() -> list[Text]:
    """apreqel's own calibration texts, without the held-out one."""
    names = sorted(p.name for p in _folder().glob("*.txt") if p.name != HELDOUT_NAME)
    return [read_text(_folder() / name) for name in names]


def heldout_text() -> Text:
    """apreqel's own verification text."""
    return read_text(_folder() / HELDOUT_NAME)


def _folder() -> Path:
    inside = Path(str(resources.files("apreqel") / "calib_data"))
    beside = Path(__file__).parent.parent / "calib_data"  # a source checkout
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
    whole = len(stream) // body
    chunks = stream[: whole * body].reshape(whole, body)
    if model.bos_token is not None:
        start = np.full((len(chunks), 1), model.bos_token, np.int32)
        chunks = np.concatenate([start, chunks], axis=1)
    return np.ascontiguousarray(chunks, np.int32)


def split_for_calibration(
    model: LoadedModel,
    texts: Sequence[Text],
    *,
    imatrix_chunks: int,
    imatrix_ctx: int,
    probe_chunks: int,
    probe_ctx: int,
) -> tuple[TokenSet, TokenSet]:
    """The imatrix set and the probe set: disjoint, each spread evenly over all texts.

    Raises CalibrationError where the texts are too short, with the tokens needed and found.
    """
    per_block = imatrix_ctx // probe_ctx
    if imatrix_ctx % probe_ctx:
        raise CalibrationError(
            f"a chunk of {imatrix_ctx} tokens is not whole chunks of {probe_ctx}"
        )
    blocks = chunks_of(model, texts, imatrix_ctx)
    # One probe chunk from each of as many blocks: variety matters more than neighbourhood.
    needed_blocks = max(2, -(-probe_chunks // per_block) + 1)
    if len(blocks) < needed_blocks:
        raise CalibrationError(
            f"{names(texts)}: {len(blocks) * imatrix_ctx} tokens; at least "
            f"{needed_blocks * imatrix_ctx} are needed to calibrate; give more text"
        )
    n_probe_blocks = min(probe_chunks, len(blocks) // 2)
    chosen = np.unique(np.linspace(0, len(blocks) - 1, n_probe_blocks).round().astype(int))
    pieces = blocks[chosen].reshape(len(chosen), per_block, probe_ctx)
    probe = pieces.transpose(1, 0, 2).reshape(-1, probe_ctx)[:probe_chunks]
    if model.bos_token is not None:
        probe = probe.copy()
        probe[:, 0] = model.bos_token
    rest = np.delete(blocks, chosen, axis=0)
    kept = np.unique(
        np.linspace(0, len(rest) - 1, min(imatrix_chunks, len(rest))).round().astype(int)
    )
    digest = hashlib.sha256("".join(t.sha256 for t in texts).encode()).hexdigest()
    return (
        TokenSet(names(texts), rest[kept], 0, digest),
        TokenSet(names(texts), np.ascontiguousarray(probe), probe_first_scored(probe_ctx), digest),
    )


def probe_first_scored(n_ctx: int) -> int:
    """Positions with almost no context say little about the text: leave out the first 1/16."""
    return n_ctx // 16


def verification_set(model: LoadedModel, text: Text, n_ctx: int, n_scored: int) -> TokenSet:
    """Chunks for verification, scored in their second half as llama-perplexity does.

    Spread over the text, at least `n_scored` positions. Raises CalibrationError with the number
    of tokens found where the text is too short.
    """
    per_chunk = n_ctx - 1 - n_ctx // 2
    wanted = -(-n_scored // per_chunk)
    chunks = chunks_of(model, [text], n_ctx)
    if len(chunks) < wanted:
        raise CalibrationError(
            f"{text.name}: {len(chunks) * n_ctx} tokens; scoring {n_scored} needs "
            f"{wanted * n_ctx}; give a longer text or score fewer tokens"
        )
    kept = np.linspace(0, len(chunks) - 1, wanted).round().astype(int)
    return TokenSet(text.name, chunks[kept], n_ctx // 2, text.sha256)


def names(texts: Sequence[Text]) -> str:
    return ", ".join(text.name for text in texts) or "no text"
