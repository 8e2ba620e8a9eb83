"""The importance matrix: mean squared activation per column of every weight matrix.

Read and written in llama.cpp's GGUF format (tools/imatrix/imatrix.cpp).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from apreqel.arrays import Floats
from apreqel.artifacts import write_atomically
from apreqel.errors import CalibrationError, printable
from apreqel.model.gguf_header import (
    ARRAY,
    DEFAULT_ALIGNMENT,
    STRING,
    UINT32,
    encode_header,
    encode_kv,
    padded,
    read_header,
    records_of,
)
from apreqel.model.qtypes import lookup

if TYPE_CHECKING:
    from apreqel.model.inventory import Inventory


_SUMS, _COUNTS = ".in_sum2", ".counts"


@dataclass(frozen=True)
class ImatrixEntry:
    """Sums of squared activations [matrices, row length] over `counts` [matrices] tokens."""

    sums: Floats
    counts: Floats


@dataclass(frozen=True)
class Imatrix:
    entries: Mapping[str, ImatrixEntry]
    datasets: Sequence[str] = ()
    n_chunks: int = 0
    chunk_size: int = 512
    _cache: dict[str, Floats] = field(default_factory=dict, repr=False, compare=False)

    def weights(self, name: str) -> Floats | None:
        """Mean squared activations, flat [matrices x row length], or None where never seen.

        An expert that was never chosen weighs 1 everywhere, as in llama.cpp. A column that was
        always zero takes the smallest weight seen in its matrix: ggml divides by these.
        """
        entry = self.entries.get(name)
        if entry is None:
            return None
        if name not in self._cache:
            seen = entry.counts > 0
            mean = np.ones_like(entry.sums)
            mean[seen] = entry.sums[seen] / entry.counts[seen, None]
            for row in mean:
                if not row.all():
                    row[row == 0] = row[row > 0].min() if row.any() else 1.0
            self._cache[name] = np.ascontiguousarray(mean.reshape(-1), np.float32)
        return self._cache[name]

    @cached_property
    def coverage(self) -> Coverage:
        zero = sum(int((e.sums[e.counts > 0] == 0).sum()) for e in self.entries.values())
        experts = [e.counts for e in self.entries.values() if e.counts.size > 1]
        unseen = sum(int((counts == 0).sum()) for counts in experts)
        return Coverage(len(self.entries), zero, unseen, sum(counts.size for counts in experts))


@dataclass(frozen=True)
class Coverage:
    """How much of the model the calibration text reached."""

    n_tensors: int
    n_zero_columns: int
    n_unseen_experts: int
    n_experts: int


# --- llama.cpp's file ----------------------------------------------------------------------------


def write_imatrix(path: Path, imatrix: Imatrix) -> None:
    """Write the GGUF that llama-quantize --imatrix reads. Raises OutputError."""
    metadata = [
        encode_kv("general.type", STRING, "imatrix"),
        encode_kv("imatrix.datasets", ARRAY, list(imatrix.datasets)),
        encode_kv("imatrix.chunk_count", UINT32, imatrix.n_chunks),
        encode_kv("imatrix.chunk_size", UINT32, imatrix.chunk_size),
    ]
    tensors: dict[str, Floats] = {}
    for name, entry in sorted(imatrix.entries.items()):
        tensors |= {name + _SUMS: entry.sums, name + _COUNTS: entry.counts[:, None]}
    rows = ((name, values.shape[::-1], lookup("F32")) for name, values in tensors.items())
    records, _ = records_of(rows, DEFAULT_ALIGNMENT)
    raw = (np.ascontiguousarray(values, "<f4").tobytes() for values in tensors.values())
    data = b"".join(one.ljust(padded(len(one), DEFAULT_ALIGNMENT), b"\0") for one in raw)
    write_atomically(path, encode_header(metadata, records, DEFAULT_ALIGNMENT) + data)


def is_legacy(path: Path) -> bool:
    """Whether a file begins as llama.cpp's old imatrix does: a count, a length, a tensor's name."""
    try:
        with open(path, "rb") as file:
            start = file.read(8)
            count, length = struct.unpack("<ii", start)
            name = file.read(length) if 0 < length < 256 and count > 0 else b""
    except (OSError, struct.error):
        return False
    return name.endswith(b".weight")


def read_imatrix(path: Path, inventory: Inventory) -> Imatrix:
    """Read and check an imatrix against the model, GGUF or legacy.

    Raises ModelFileError, CalibrationError.
    """
    raw, found = (_read_legacy if is_legacy(path) else _read_gguf)(path)
    for name, values in raw.items():
        if not np.isfinite(values).all():
            raise CalibrationError(
                f"{path}: tensor {printable(name)} holds NaN or Inf; collect it again"
            )
    entries: dict[str, ImatrixEntry] = {}
    strange = ""
    for name, sums in ((k.removesuffix(_SUMS), v) for k, v in raw.items() if k.endswith(_SUMS)):
        counts, tensor = raw.get(name + _COUNTS), inventory.by_name.get(name)
        shown = f"{path}: tensor {printable(name)}"
        if tensor is None:
            strange = strange or shown  # a vision tower's, or of a layer that this file is without
            continue
        expected = (tensor.n_experts, tensor.row_length)
        if counts is None:
            raise CalibrationError(f"{shown}{_SUMS} has no {_COUNTS} beside it; collect it again")
        if sums.ndim == 1 and sums.size == math.prod(expected):
            sums = sums.reshape(expected)  # a legacy file has no shapes
        if sums.reshape(-1, sums.shape[-1]).shape != expected:
            raise CalibrationError(
                f"{shown} has {sums.size} values, the model needs {expected[0]} x {expected[1]}; "
                "this is another model's imatrix"
            )
        if counts.size not in (1, tensor.n_experts) or (sums < 0).any():
            raise CalibrationError(f"{shown} has damaged sums or counts")
        full = np.broadcast_to(counts.reshape(-1), (tensor.n_experts,)).copy()
        entries[name] = ImatrixEntry(sums.reshape(expected), full)
    if strange and not entries:
        raise CalibrationError(f"{strange} is not in the model; this is another model's imatrix")
    if not entries:
        raise CalibrationError(f"{path}: holds no *.in_sum2 tensors; not a usable imatrix")
    return replace(found, entries=entries)


def _read_gguf(path: Path) -> tuple[dict[str, Floats], Imatrix]:
    """The arrays of a file by name, and what it says of itself."""
    header = read_header(path)
    if header.get("general.type") != "imatrix":
        raise CalibrationError(
            f"{path}: field general.type is {header.get('general.type')!r}, not 'imatrix'; "
            "give an imatrix GGUF (llama-imatrix writes one)"
        )
    raw: dict[str, Floats] = {}
    with open(path, "rb") as file:
        for record in header.tensors:
            if record.ggml_type != lookup("F32").ggml_id:
                raise CalibrationError(f"{path}: tensor {printable(record.name)} is not F32")
            file.seek(header.data_start + record.offset)
            values = np.fromfile(file, "<f4", math.prod(record.shape)).astype(np.float32)
            raw[record.name] = values.reshape(record.shape[::-1])
    datasets = header.get("imatrix.datasets")
    return raw, Imatrix(
        {},
        tuple(map(str, datasets)) if isinstance(datasets, list) else (),
        header.integer("imatrix.chunk_count"),
        header.integer("imatrix.chunk_size", 512),
    )


def _read_legacy(path: Path) -> tuple[dict[str, Floats], Imatrix]:
    """The same of llama.cpp's imatrix.dat (save_imatrix_legacy in tools/imatrix/imatrix.cpp).

    A count; by tensor the length of its name, that, how often it was used, the number of columns,
    and their means times that often. Newer files end with the number of chunks and the text's name.
    """
    data, at, raw = path.read_bytes(), 4, dict[str, Floats]()

    def take(n_bytes: int) -> bytes:
        nonlocal at
        if not 0 <= n_bytes <= len(data) - at:
            raise CalibrationError(
                f"{path}: damaged at byte {at}: {n_bytes} more are wanted, {len(data) - at} are "
                "left; collect it again"
            )
        at += n_bytes
        return data[at - n_bytes : at]

    def number() -> int:
        return int.from_bytes(take(4), "little", signed=True)

    for _ in range(int.from_bytes(data[:4], "little", signed=True)):
        name = take(number()).decode("utf-8", "replace")
        count, n_columns = number(), number()
        raw[name + _COUNTS] = np.array([count], np.float32)
        raw[name + _SUMS] = np.frombuffer(take(4 * n_columns), "<f4").astype(np.float32)
    n_chunks = number() if at < len(data) else 0
    text = take(number()).decode("utf-8", "replace") if at < len(data) else ""
    return raw, Imatrix({}, (text,) if text else (), n_chunks)
