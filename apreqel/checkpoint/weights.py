"""The weights of a checkpoint: its safetensors files, from their headers alone.

A file begins with the length of its header (8 bytes, little-endian) and the header, JSON:
`{"name": {"dtype", "shape", "data_offsets": [first, end]}}`. The data follow, and end the file.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apreqel.artifacts import understood
from apreqel.errors import ArtifactError, ModelFileError, printable

CONFIG, INDEX = "config.json", "model.safetensors.index.json"
# What the converter reads: the first the weights, the rest sizes, vocabulary and the model's card.
WEIGHT_FILES = "model*.safetensors"
READ_FILES = (WEIGHT_FILES, "*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja", "README.md")
_PICKLES = "*.bin", "*.pt", "*.pth"

# The type of the GGUF that holds each exactly. A vector becomes F32 in any.
_FLOATS = {"BF16": "bf16", "F16": "f16", "F32": "f32", "F64": "f32"}
_BYTES_PER_WEIGHT = {"bf16": 2, "f16": 2, "f32": 4}
_LONGEST_HEADER = 100_000_000  # safetensors' own limit
_PART = re.compile(r"model-(\d{5})-of-(\d{5})\.safetensors")


@dataclass(frozen=True)
class Weights:
    """`n_matrix` and `n_vector`: weights in each type of safetensors, such as BF16."""

    files: tuple[Path, ...]
    n_matrix: Mapping[str, int]
    n_vector: int

    @property
    def gguf_type(self) -> str:
        """bf16, f16 or f32: that of most of the weights in matrices.

        The converter's own guess takes F32 for F16, and the first matrix for all.
        """
        n_each = Counter[str]()
        for kind, n in self.n_matrix.items():
            if kind in _FLOATS:
                n_each[_FLOATS[kind]] += n
        return n_each.most_common(1)[0][0] if n_each else "bf16"

    @property
    def rounded(self) -> dict[str, int]:
        """Weights in other types than that of the GGUF, which may be rounded to it."""
        kept = self.gguf_type
        exact = {"F32", "BF16", "F16"} if kept == "f32" else {kept.upper()}
        return {kind: n for kind, n in self.n_matrix.items() if kind not in exact}

    @property
    def gguf_bytes(self) -> int:
        """About the size of the GGUF, rather more: what it leaves out is counted."""
        # Packed integers hold up to 8 weights in 4 bytes, or 2 in one.
        packed = {"I32": 8, "U32": 8, "U8": 2, "I8": 2}
        n = sum(n * packed.get(kind, 1) for kind, n in self.n_matrix.items())
        return n * _BYTES_PER_WEIGHT[self.gguf_type] + 4 * self.n_vector


def read_weights(folder: Path) -> Weights:
    """The weights of the checkpoint in `folder`. Raises ModelFileError."""
    files = _weight_files(folder)
    n_matrix, n_vector = Counter[str](), 0
    for path in files:
        for kind, shape in _tensors(path):
            if len(shape) > 1:
                n_matrix[kind] += math.prod(shape)
            else:
                n_vector += math.prod(shape)
    return Weights(tuple(files), n_matrix, n_vector)


def _weight_files(folder: Path) -> list[Path]:
    """All of them; those that its index or their own names speak of must be there."""
    found = {path.name: path for path in sorted(folder.glob(WEIGHT_FILES))}
    if (folder / INDEX).exists():
        needed = _indexed(folder / INDEX)
    else:
        parts = [match for name in found if (match := _PART.fullmatch(name))]
        count = max((int(part[2]) for part in parts), default=0)
        needed = {f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)}
        needed = needed if len(needed) < 10_000 else set()
    if missing := sorted(needed - found.keys()):
        named = ", ".join(printable(name) for name in missing[:4])
        more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
        raise ModelFileError(
            f"{folder}: {len(missing)} of {len(needed)} weight files are missing: {named}{more}; "
            "download them again"
        )
    if not found:
        _say_what_else(folder)
    return [found[name] for name in sorted(needed or found)]


def _indexed(path: Path) -> set[str]:
    """The files that an index names."""
    try:
        with understood(str(path)):
            names = set(json.loads(path.read_bytes())["weight_map"].values())
            # The converter opens what stands here: nothing outside the folder.
            if all(isinstance(n, str) and Path(n).name == n and n for n in names) and names:
                return names
            raise ValueError("weight_map does not name files in this folder")
    except (ArtifactError, OSError) as error:
        reason = str(error).partition(";")[0]
        raise ModelFileError(f"{printable(reason, 300)}; download it again") from error


def _say_what_else(folder: Path) -> None:
    """Raise ModelFileError: there are no weights here that are read."""
    pickles = sorted(path.name for ending in _PICKLES for path in folder.glob(ending))
    if pickles:
        raise ModelFileError(
            f"{folder}: its weights are pickles only ({printable(pickles[0])}), which may run code "
            "when they are read; take a safetensors version of the model"
        )
    if (folder / "adapter_config.json").exists():
        raise ModelFileError(f"{folder}: an adapter, not a model; give the model it is for")
    raise ModelFileError(f"{folder}: holds no {WEIGHT_FILES}; is it all downloaded?")


def _tensors(path: Path) -> list[tuple[str, tuple[int, ...]]]:
    """Type and shape of each tensor in one file, all of whose data are there."""
    name, size = printable(str(path), 300), path.stat().st_size
    try:
        with open(path, "rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if start == b"version ":
                raise ModelFileError(f"{name}: a Git LFS pointer; run git lfs pull")
            if size < 8 or length > min(size - 8, _LONGEST_HEADER):
                raise ModelFileError(
                    f"{name}: {size} bytes, cut short or not safetensors; download it again"
                )
            text = file.read(length)
    except OSError as error:
        raise ModelFileError(f"{name}: cannot be read: {error.strerror}") from error
    try:
        with understood(name):
            entries: dict[str, Any] = json.loads(text)
            entries.pop("__metadata__", None)
            found = [(str(e["dtype"]), _shape(e["shape"])) for e in entries.values()]
            end = max((int(e["data_offsets"][1]) for e in entries.values()), default=0)
    except (ArtifactError, RecursionError) as error:
        reason = str(error).partition(";")[0]
        raise ModelFileError(f"{printable(reason, 300)}; download it again") from error
    if size != 8 + length + end:
        raise ModelFileError(
            f"{name}: has {size} bytes, its header says {8 + length + end}; download it again"
        )
    return found


def _shape(value: Any) -> tuple[int, ...]:
    if all(type(n) is int and 0 <= n < 1 << 63 for n in value) and len(value) < 16:
        return tuple(value)
    raise ValueError(f"shape {value!r}")
