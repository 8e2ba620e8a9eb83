"""The name of a file to publish: BaseName-SizeLabel-FineTune-Version-Encoding.gguf.

The convention is that of ggml's docs/gguf.md, put together by gguf-py. What a model says of itself
is cleaned first: a name never becomes a path, an option or a line of its own.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from apreqel.llama.stock import stock_types
from apreqel.model.inventory import Inventory
from apreqel.sensitivity.measurement import PRESETS_BY_SIZE

# The Hugging Face hub, and with it Ollama and llama.cpp's -hf, find a file by the name of a preset
# in its name (huggingface.js, packages/tasks/src/gguf.ts: GGUF_QUANT_RE). Smaller than the usual:
_TINY = ("IQ1_M", "IQ2_XXS", "IQ2_S")
# Types that are presets, too: a file in one of them alone is called so.
_UNIFORM = (
    "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q6_K", "IQ4_NL", "IQ4_XS", "F16", "BF16", "F32",
)  # fmt: skip
# docs/gguf.md: what a model without a version has.
_FIRST_VERSION = "v1.0"
_LONGEST_PART = 60
_SIZE_LABEL = re.compile(r"(\d+x)?\d+(\.\d+)?[KMBTQ](-[A-Za-z]+\d+(\.\d+)?[A-Za-z]+)?")


@dataclass(frozen=True)
class FileName:
    """`stem` has no encoding and no ending: it names the model."""

    stem: str
    encoding: str

    @property
    def file(self) -> str:
        return f"{self.stem}-{self.encoding}.gguf"


def one_line(text: str, limit: int = 200) -> str:
    """`text` without line breaks, control characters and runs of spaces."""
    shown = "".join(c if c.isprintable() else " " for c in text)
    return " ".join(shown.split())[:limit].strip()


def cleaned(text: object) -> str:
    """`text` as a part of a file's name: letters, digits, dots, dashes and underscores."""
    plain = unicodedata.normalize("NFKD", text if isinstance(text, str) else "")
    name = re.sub(r"[^A-Za-z0-9._]+", "-", plain.encode("ascii", "ignore").decode())
    return re.sub(r"\.{2,}", ".", name).strip("._-")[:_LONGEST_PART].strip("._-")


def model_stem(inventory: Inventory, name: str | None = None) -> str:
    """The part of a file's name that tells the model; `name` instead of what its metadata says."""
    from gguf.metadata import Metadata
    from gguf.utility import naming_convention

    header = inventory.headers[0]
    whole = cleaned(name or header.get("general.name") or inventory.files[0].stem) or "model"
    _, _, *guessed = Metadata.get_model_id_components(whole, inventory.n_weights)
    base, tune, version, size = (cleaned(part) for part in guessed)
    if name is None:
        base = cleaned(header.get("general.basename")) or base
        tune = cleaned(header.get("general.finetune")) or tune
        version = cleaned(header.get("general.version")) or version
        size = cleaned(header.get("general.size_label")) or size
    if not re.fullmatch(r"[vV]?\d+(\.\d+)*", version):
        version = _FIRST_VERSION
    version = f"v{version.lstrip('vV')}"
    if not _SIZE_LABEL.fullmatch(size):
        size = _size_label(inventory)
    return str(naming_convention(whole, base or None, tune or None, version, size, None))


def _size_label(inventory: Inventory) -> str:
    """As gguf-py counts: a mixture by its experts and what one of them and the rest hold."""
    from gguf.utility import size_label

    stacked = [t for t in inventory.tensors if t.n_experts > 1]
    experts = sum(t.n_elements for t in stacked)
    count = inventory.n_experts if stacked else 0
    shared = inventory.n_weights - experts
    return str(size_label(inventory.n_weights, shared, experts // max(1, count), count))


def preset_sizes(inventory: Inventory) -> Mapping[str, int]:
    """Bytes of this very model in the presets that files are called after. Raises EngineError.

    Only the tensors are counted, so that what the metadata of a file adds does not matter.
    """
    names = [t.name for t in inventory.quantizable]
    sizes, smallest = dict[str, int](), PRESETS_BY_SIZE[0]
    for preset in PRESETS_BY_SIZE:
        sizes[preset] = _tensor_bytes(inventory, preset, names)
    if _own_bytes(inventory) < sizes[smallest]:
        sizes |= {preset: _tensor_bytes(inventory, preset, names) for preset in _TINY}
    return sizes


def _tensor_bytes(inventory: Inventory, preset: str, names: Sequence[str]) -> int:
    types = stock_types(inventory.files[0], preset, has_imatrix_for=names)
    return inventory.output_size(types) - inventory.output_header(types)[1][0]


def _own_bytes(inventory: Inventory) -> int:
    return inventory.size_bytes - inventory.tensors[0].offset


def encoding_of(inventory: Inventory) -> str:
    """The preset that a file is called after: the one that is nearest in size. Raises EngineError.

    Where all that can be quantised has one type, that.
    """
    types = {t.qtype.name for t in inventory.quantizable}
    if len(types) == 1 and (only := types.pop()) in _UNIFORM:
        return only
    own, sizes = _own_bytes(inventory), preset_sizes(inventory)
    return min(sizes, key=lambda preset: abs(sizes[preset] - own))


def distinct(encodings: Sequence[str]) -> list[str]:
    """One each, where several files would be called alike: Q4_K_M, Q4_K_M_B, Q4_K_M_C.

    The hub reads capitals after a preset's name as a variation of it.
    """
    found: list[str] = []
    for i, encoding in enumerate(encodings):
        before = encodings[:i].count(encoding)
        found.append(f"{encoding}_{chr(ord('A') + before)}" if before else encoding)
    return found
