"""The header of a GGUF file: a strict reader that trusts nothing, and the matching writer.

Layout (little-endian; version 2 and 3 are alike):

    "GGUF"  version:u32  n_tensors:u64  n_kv:u64
    n_kv times      key:string  value_type:u32  value
    n_tensors times name:string n_dims:u32 dims:u64[n_dims] type:u32 offset:u64
    zero padding to the alignment, then the tensor data

    string = length:u64 bytes;  array = element_type:u32 length:u64 elements

The reader takes the file in blocks and checks every length against the bytes that are left before
it allocates anything. It never reads tensor data. Values are kept as the bytes they are.
"""

from __future__ import annotations

import math
import os
import re
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NoReturn

from apreqel.errors import ModelFileError, printable
from apreqel.model.qtypes import QuantType, by_id

MAGIC = b"GGUF"
WRITTEN_VERSION = 3
DEFAULT_ALIGNMENT = 32
ALIGNMENT_KEY = "general.alignment"

# ggml.h and gguf.cpp
MAX_DIMS, MAX_NAME_BYTES, MAX_KEY_BYTES, MAX_ALIGNMENT = 4, 63, 64 << 10, 64 << 10
_MAX_ELEMENTS = 2**63 - 1
# enum gguf_type: the numbers, in order of their codes, and the codes that are written here.
_CODES, _FORMATS = (*range(8), 10, 11, 12), "BbHhIif?Qqd"
SCALARS = {code: struct.Struct(f"<{c}") for code, c in zip(_CODES, _FORMATS, strict=True)}
UINT32, FLOAT32, STRING, ARRAY = 4, 6, 8, 9

_U32, _U64 = SCALARS[4], SCALARS[10]
_BLOCK_BYTES = 1 << 20
_MOST_PADDING = 1 << 20
# As files are cut for upload, by hand or by split: joined again with cat.
_PART = re.compile(r"\.(part[0-9]+(of[0-9]+)?|part[a-z]{2}|[0-9]{3})$")
# The least that a key-value pair or a tensor record can take: for counts that cannot be true.
_LEAST_KV_BYTES, _LEAST_TENSOR_BYTES = 8 + 4 + 1, 8 + 4 + 4 + 8

Scalar = int | float | bool | str


@dataclass(frozen=True)
class KeyValue:
    """One metadata pair; `raw` is the whole record as it stands in the file."""

    key: str
    value_type: int
    raw: bytes

    @cached_property
    def value(self) -> Scalar | list[Scalar]:
        """Decoded when asked for; text that is not UTF-8 is shown with replacement signs."""
        if self.value_type != ARRAY:
            return next(_values(self.raw, self._start, self.value_type, 1))
        (element,) = _U32.unpack_from(self.raw, self._start)
        return list(_values(self.raw, self._start + 12, element, self.array_length))

    @property
    def array_length(self) -> int:
        """How many elements, without decoding them; 0 for what is no array."""
        return _U64.unpack_from(self.raw, self._start + 4)[0] if self.value_type == ARRAY else 0

    @property
    def _start(self) -> int:
        return 8 + len(self.key.encode()) + 4


@dataclass(frozen=True)
class TensorRecord:
    """Shape in ggml order (row length first); `offset` counts from the start of the data."""

    name: str
    shape: tuple[int, ...]
    ggml_type: int
    offset: int


@dataclass(frozen=True)
class GgufHeader:
    path: Path
    version: int
    metadata: Mapping[str, KeyValue]
    tensors: tuple[TensorRecord, ...]
    alignment: int
    data_start: int
    file_size: int

    def get(self, key: str, default: object = None) -> object:
        found = self.metadata.get(key)
        return default if found is None else found.value

    def integer(self, key: str, default: int = 0) -> int:
        """An integer value; the default where it is absent or something else."""
        value = self.get(key)
        return value if isinstance(value, int) and not isinstance(value, bool) else default

    def text(self, key: str, default: str = "") -> str:
        value = self.get(key)
        return value if isinstance(value, str) else default


# --- reading -------------------------------------------------------------------------------------


def read_header(path: Path) -> GgufHeader:
    """Read and check a header. Raises ModelFileError: one line with what is wrong and where."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise ModelFileError(f"{path}: cannot be opened ({error.strerror})") from error
    try:
        return _Reader(path, descriptor).read()
    except OSError as error:
        raise ModelFileError(f"{path}: cannot be read ({error.strerror})") from error
    finally:
        os.close(descriptor)


class _Reader:
    """A cursor over the file, with all of the header read so far in `_seen`."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path, self._descriptor = path, descriptor
        self.file_size = os.fstat(descriptor).st_size
        self._seen = bytearray()
        self.at = 0

    def fail(self, message: str) -> NoReturn:
        raise ModelFileError(f"{self.path}: {message}")

    def whole_again(self, found: str) -> str:
        """How to come by the whole file."""
        if _PART.search(self.path.name):
            return "it is one part of a file; join the parts with cat"
        return f"{found}; download it again"

    def need(self, count: int, what: str) -> None:
        """Make the next `count` bytes available; refuse where the file does not have them."""
        end = self.at + count
        if end > self.file_size:
            self.fail(
                f"{what} at byte {self.at} needs {count} bytes, {self.file_size - self.at} are "
                f"left; {self.whole_again('the file is cut short or damaged')}"
            )
        while (seen := len(self._seen)) < end:
            wanted = min(max(_BLOCK_BYTES, end - seen), 1 << 24)
            if not (block := os.pread(self._descriptor, wanted, seen)):
                self.fail(f"{what}: the file was cut short while it was read")
            self._seen += block

    def take(self, count: int, what: str) -> int:
        """Step over the next `count` bytes, which must be there; where they start."""
        self.need(count, what)
        self.at += count
        return self.at - count

    def u32(self, what: str) -> int:
        return int(_U32.unpack_from(self._seen, self.take(4, what))[0])

    def u64(self, what: str) -> int:
        return int(_U64.unpack_from(self._seen, self.take(8, what))[0])

    def string(self, what: str, at_most: int) -> str:
        length = self.u64(f"{what} length")
        if length > at_most:
            self.fail(f"{what} at byte {self.at - 8} has a length of {length}, over {at_most}")
        start = self.take(length, what)
        raw = bytes(self._seen[start : self.at])
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            self.fail(f"{what} at byte {start} is not UTF-8: {printable(repr(raw), 60)}")

    # -- the parts --

    def read(self) -> GgufHeader:
        version = self._magic_and_version()
        n_tensors, n_kv = self.u64("tensor count"), self.u64("metadata count")
        left = self.file_size - self.at
        needs = ("metadata", n_kv, _LEAST_KV_BYTES), ("tensor", n_tensors, _LEAST_TENSOR_BYTES)
        for what, count, least in needs:
            if count > left // least:
                self.fail(
                    f"{what} count {count} cannot fit in the {left} bytes left; damaged header"
                )
        metadata: dict[str, KeyValue] = {}
        for i in range(n_kv):
            start, key = self.at, self.string(f"key {i}", MAX_KEY_BYTES)
            value_type = self.u32(f"type of key '{printable(key)}'")
            self._skip_value(key, value_type)
            if key in metadata:
                self.fail(f"key '{printable(key)}' appears twice; damaged header")
            metadata[key] = KeyValue(key, value_type, bytes(self._seen[start : self.at]))
        alignment = self._alignment(metadata)
        records: dict[str, TensorRecord] = {}
        for i in range(n_tensors):
            record = self._tensor(i)
            if record.name in records:
                self.fail(f"tensor '{printable(record.name)}' appears twice; damaged header")
            records[record.name] = record
        places = alignment, padded(self.at, alignment), self.file_size
        header = GgufHeader(self.path, version, metadata, tuple(records.values()), *places)
        self._check_extents(header)
        return header

    def _magic_and_version(self) -> int:
        if self.file_size < 24:
            self.fail(f"{self.file_size} bytes: too short for a GGUF file")
        self.need(24, "header")
        start = bytes(self._seen[:512])
        if not start.startswith(MAGIC):
            self.fail(f"{_what_is_it(start)}, not a GGUF file")
        self.at = 4
        version = self.u32("version")
        if version in (2, 3):
            return version
        if int.from_bytes(_U32.pack(version), "big") in (1, 2, 3):
            self.fail(
                "a big-endian GGUF file (version bytes are swapped); convert it to little-endian"
            )
        if version < 2:
            self.fail(f"GGUF version {version} is no longer read; convert the model again")
        return self.fail(
            f"GGUF version {version} is newer than this apreqel knows (3); update apreqel"
        )

    def _skip_value(self, key: str, value_type: int) -> None:
        """Check the extent of a value and step over it."""
        shown = f"key '{printable(key)}'"
        what = f"value of {shown}"
        if value_type == STRING:
            self.take(self.u64(what), what)
        elif value_type in SCALARS:
            self.take(SCALARS[value_type].size, what)
        elif value_type != ARRAY:
            self.fail(f"{shown} has the unknown value type {value_type}")
        else:
            element, length = self.u32(what), self.u64(what)
            if element == STRING:
                self._skip_strings(what, length)
            elif element in SCALARS:
                self.take(length * SCALARS[element].size, what)
            elif element == ARRAY:
                self.fail(f"{shown} is an array of arrays, which no model uses; damaged")
            else:
                self.fail(f"{shown} is an array of unknown type {element}")

    def _skip_strings(self, what: str, count: int) -> None:
        self.need(8 * count, what)  # each takes at least its length
        unpack, seen, at = _U64.unpack_from, self._seen, self.at
        for _ in range(count):
            if at + 8 > len(seen):
                self.at = at
                self.need(8, what)
            end = at + 8 + unpack(seen, at)[0]
            if end > len(seen):
                self.at = at
                self.need(end - at, what)
            at = end
        self.at = at

    def _alignment(self, metadata: Mapping[str, KeyValue]) -> int:
        pair = metadata.get(ALIGNMENT_KEY)
        if pair is None:
            return DEFAULT_ALIGNMENT
        if pair.value_type != UINT32:
            self.fail(
                f"{ALIGNMENT_KEY} has value type {pair.value_type}, expected {UINT32} (uint32)"
            )
        (value,) = _U32.unpack(pair.raw[-4:])
        if value == 0 or value & (value - 1) or value > MAX_ALIGNMENT:
            self.fail(f"{ALIGNMENT_KEY} is {value}, expected a power of two up to {MAX_ALIGNMENT}")
        return int(value)

    def _tensor(self, i: int) -> TensorRecord:
        name = self.string(f"name of tensor {i}", MAX_NAME_BYTES)
        shown = f"tensor '{printable(name)}'"
        if not name or not name.isprintable() or "/" in name or "\\" in name:
            self.fail(
                f"{shown}: a tensor name must be printable, without slashes; damaged or hostile"
            )
        n_dims = self.u32(f"{shown} dimensions")
        if not 1 <= n_dims <= MAX_DIMS:
            self.fail(f"{shown} has {n_dims} dimensions, expected 1 to {MAX_DIMS}")
        shape = tuple(self.u64(f"{shown} shape") for _ in range(n_dims))
        for i, length in enumerate(shape, 1):
            if length == 0:
                self.fail(f"{shown} has an empty dimension: {list(shape)}")
            if math.prod(shape[:i]) > _MAX_ELEMENTS:
                self.fail(f"{shown} has a shape that overflows: {list(shape)}")
        ggml_type, offset = self.u32(f"{shown} type"), self.u64(f"{shown} offset")
        qtype = by_id().get(ggml_type)
        if qtype is None:
            self.fail(f"{shown} has type id {ggml_type}, which is unknown or was removed from GGUF")
        if not qtype.holds_row(shape[0]):
            self.fail(
                f"{shown} has rows of {shape[0]}, not a multiple of the {qtype.block_size} that "
                f"{qtype.name} needs"
            )
        return TensorRecord(name, shape, ggml_type, offset)

    def _is_zero_from(self, start: int) -> bool:
        """Whether only padding follows, which llama.cpp ignores."""
        rest = self.file_size - start
        return rest <= _MOST_PADDING and not any(os.pread(self._descriptor, rest, start))

    def _check_extents(self, header: GgufHeader) -> None:
        """Tensors must follow each other, padded, in the order of the header, to the file's end."""
        expected = 0
        for tensor in header.tensors:
            shown = f"tensor '{printable(tensor.name)}'"
            if tensor.offset != expected:
                kind = "overlaps the one before" if tensor.offset < expected else "leaves a gap"
                self.fail(f"{shown} {kind}: offset {tensor.offset}, expected {expected}")
            size = by_id()[tensor.ggml_type].size_bytes(tensor.shape)
            end = header.data_start + expected + size
            if end > self.file_size:
                self.fail(
                    f"{shown} ends at byte {end}, the file has {self.file_size}; "
                    f"{self.whole_again('it is cut short')}"
                )
            expected += padded(size, header.alignment)
        end = header.data_start + expected
        if end < self.file_size and not self._is_zero_from(end):
            why = "; damaged, or joined from parts"
            if os.pread(self._descriptor, 4, end) == MAGIC:
                why = (
                    ": another GGUF file; shards must not be joined with cat, give the first shard"
                )
            self.fail(f"{self.file_size - end} bytes follow the last tensor{why}")


def _what_is_it(start: bytes) -> str:
    """What a file that is not GGUF looks like, from its first bytes."""
    if not start.strip(b"\0"):
        return "starts with NUL bytes (an unfinished download)"
    text = start.lstrip().lower()
    if text.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer (run git lfs pull)"
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "an HTML page (a failed download)"
    if start.startswith(b"PK\x03\x04"):
        return "a zip or PyTorch file (convert it with convert_hf_to_gguf.py)"
    if start[8:9] == b"{":
        return "a safetensors file (convert it with convert_hf_to_gguf.py)"
    if start.startswith(MAGIC[::-1]):
        return "byte-swapped"
    if start.startswith((b"ggml", b"lmgg", b"ggjt", b"tjgg", b"fmgg")):
        return "a model in the old GGML format (convert it again)"
    return f"starts with {start[:4]!r}"


def _values(raw: bytes, at: int, value_type: int, count: int) -> Iterator[Scalar]:
    """Values of one type one after the other, whose extent `_skip_value` has checked."""
    if value_type != STRING:
        kind = SCALARS[value_type]
        yield from (v for (v,) in kind.iter_unpack(raw[at : at + kind.size * count]))
        return
    for _ in range(count):
        start = at + 8
        at = start + _U64.unpack_from(raw, at)[0]
        yield raw[start:at].decode("utf-8", "replace")


# --- writing -------------------------------------------------------------------------------------


def encode_kv(key: str, value_type: int, value: Scalar | Sequence[str]) -> bytes:
    """One metadata record: a scalar, a string, or (value_type ARRAY) an array of strings."""
    start = _string(key) + _U32.pack(value_type)
    if value_type == STRING:
        return start + _string(str(value))
    if value_type == ARRAY:
        assert not isinstance(value, str | int | float)
        body = b"".join(_string(text) for text in value)
        return start + _U32.pack(STRING) + _U64.pack(len(value)) + body
    return start + SCALARS[value_type].pack(value)


def _string(text: str) -> bytes:
    raw = text.encode()
    return _U64.pack(len(raw)) + raw


def encode_header(
    metadata: Sequence[bytes], tensors: Sequence[TensorRecord], alignment: int
) -> bytes:
    """A whole version 3 header from metadata records as they are, padded to the alignment."""
    counts = len(tensors), len(metadata)
    parts = [MAGIC, struct.pack("<IQQ", WRITTEN_VERSION, *counts), *metadata]
    for t in tensors:
        n_dims = len(t.shape)
        fields = struct.pack(f"<I{n_dims}QIQ", n_dims, *t.shape, t.ggml_type, t.offset)
        parts += [_string(t.name), fields]
    raw = b"".join(parts)
    return raw.ljust(padded(len(raw), alignment), b"\0")


def records_of(
    tensors: Iterable[tuple[str, tuple[int, ...], QuantType]], alignment: int
) -> tuple[list[TensorRecord], int]:
    """Records of tensors (name, shape, type) that follow each other, and their bytes in all."""
    records, offset = [], 0
    for name, shape, qtype in tensors:
        records.append(TensorRecord(name, shape, qtype.ggml_id, offset))
        offset += padded(qtype.size_bytes(shape), alignment)
    return records, offset


def padded(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment


SHARD_NAME = re.compile(r"^(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf$")
