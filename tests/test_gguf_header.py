"""The header reader against damaged, hostile and mistaken files, each crafted here byte by byte."""

from __future__ import annotations

import struct
import time
from collections.abc import Sequence
from pathlib import Path

import gguf
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from apreqel.errors import ModelFileError
from apreqel.model.gguf_header import TensorRecord, encode_header, encode_kv, read_header


def string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def kv(key: str, kind: int, body: bytes) -> bytes:
    return string(key) + struct.pack("<I", kind) + body


def tensor(name: str | bytes, dims: list[int], kind: int = 0, offset: int = 0) -> bytes:
    shape = b"".join(struct.pack("<Q", d) for d in dims)
    return string(name) + struct.pack("<I", len(dims)) + shape + struct.pack("<IQ", kind, offset)


def gguf_bytes(
    pairs: Sequence[bytes] = (),
    tensors: Sequence[bytes] = (),
    data: int = 0,
    *,
    version: int = 3,
    n_kv: int | None = None,
    n_tensors: int | None = None,
    alignment: int = 32,
) -> bytes:
    n_kv = len(pairs) if n_kv is None else n_kv
    n_tensors = len(tensors) if n_tensors is None else n_tensors
    head = b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_kv) + b"".join([*pairs, *tensors])
    return head + bytes(-len(head) % alignment + data)


ARCH = kv("general.architecture", 8, string("llama"))
GOOD = gguf_bytes([ARCH], [tensor("a.weight", [32, 2])], 256)

BAD = {
    "nul bytes": (bytes(512), "NUL bytes"),
    "html page": (b"<!DOCTYPE html><html>" + bytes(64), "HTML page"),
    "lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00", "Git LFS"),
    "zip": (b"PK\x03\x04" + bytes(64), "zip or PyTorch"),
    "safetensors": (struct.pack("<Q", 40) + b'{"a":1}' + bytes(64), "safetensors"),
    "old format": (b"lmgg" + bytes(64), "old GGML"),
    "short": (b"GGUF", "too short"),
    "version 0": (gguf_bytes(version=0), "version 0"),
    "version 1": (gguf_bytes(version=1), "version 1"),
    "future version": (gguf_bytes(version=9), "newer"),
    "byte-swapped": (gguf_bytes(version=0x03000000), "big-endian"),
    "too many pairs": (gguf_bytes(n_kv=2**61), "metadata count"),
    "too many tensors": (gguf_bytes([ARCH], n_tensors=2**62), "tensor count"),
    "key length 2^63": (gguf_bytes([struct.pack("<Q", 2**63) + bytes(40)]), "length"),
    "string length 2^63": (gguf_bytes([kv("a", 8, struct.pack("<Q", 2**63))], data=64), "needs"),
    "array length 2^63": (gguf_bytes([kv("a", 9, struct.pack("<IQ", 4, 2**63))], data=64), "needs"),
    "strings past the end": (
        gguf_bytes([kv("a", 9, struct.pack("<IQQ", 8, 1, 2**40))], data=64),
        "needs",
    ),
    "nested array": (gguf_bytes([kv("a", 9, struct.pack("<IQ", 9, 1) * 3)]), "array of arrays"),
    "unknown value type": (gguf_bytes([kv("a", 77, b"")], data=64), "value type 77"),
    "unknown element type": (gguf_bytes([kv("a", 9, struct.pack("<IQ", 55, 1))], data=64), "55"),
    "duplicate key": (gguf_bytes([ARCH, ARCH]), "appears twice"),
    "duplicate tensor": (
        gguf_bytes([ARCH], [tensor("a", [32]), tensor("a", [32], offset=128)], 256),
        "appears twice",
    ),
    "alignment 0": (gguf_bytes([kv("general.alignment", 4, struct.pack("<I", 0))]), "power of two"),
    "alignment 24": (gguf_bytes([kv("general.alignment", 4, struct.pack("<I", 24))]), "is 24"),
    "alignment too large": (
        gguf_bytes([kv("general.alignment", 4, struct.pack("<I", 1 << 17))]),
        "up to 65536",
    ),
    "alignment of a wrong type": (
        gguf_bytes([kv("general.alignment", 10, struct.pack("<Q", 32))]),
        "value type 10",
    ),
    "five dimensions": (gguf_bytes([ARCH], [tensor("a", [1] * 5)], 64), "5 dimensions"),
    "no dimensions": (gguf_bytes([ARCH], [tensor("a", [])], 64), "0 dimensions"),
    "overflowing shape": (gguf_bytes([ARCH], [tensor("a", [2**40, 2**40])], 64), "overflows"),
    "empty dimension": (gguf_bytes([ARCH], [tensor("a", [32, 0])], 64), "empty dimension"),
    "unknown type": (gguf_bytes([ARCH], [tensor("odd.weight", [32], kind=250)], 64), "odd.weight"),
    "removed type": (gguf_bytes([ARCH], [tensor("a", [32], kind=4)], 64), "type id 4"),
    "row not whole blocks": (gguf_bytes([ARCH], [tensor("a", [33], kind=8)], 64), "rows of 33"),
    "overlap": (
        gguf_bytes([ARCH], [tensor("a", [32]), tensor("b", [32], offset=64)], 256),
        "overlaps",
    ),
    "gap": (
        gguf_bytes([ARCH], [tensor("a", [32]), tensor("b", [32], offset=160)], 512),
        "leaves a gap",
    ),
    "data cut": (gguf_bytes([ARCH], [tensor("a", [32, 8])], 512), "cut short"),
    "trailing bytes": (GOOD + b"x" * 64, "64 bytes follow"),
    "shards joined with cat": (GOOD + GOOD, "must not be joined with cat"),
    "long name": (gguf_bytes([ARCH], [tensor("n" * 64, [32])], 128), "over 63"),
    "path as name": (gguf_bytes([ARCH], [tensor("../../etc/passwd", [32])], 128), "slashes"),
    "newline in name": (gguf_bytes([ARCH], [tensor("a\nb", [32])], 128), r"a\nb"),
    "terminal escape in name": (gguf_bytes([ARCH], [tensor("\x1b[31m", [32])], 128), r"\x1b[31m"),
    "name not utf-8": (gguf_bytes([ARCH], [tensor(b"\xff\xfe", [32])], 128), "not UTF-8"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_file_is_refused_with_its_reason(name: str, tmp_path: Path) -> None:
    content, reason = BAD[name]
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    started = time.monotonic()
    with pytest.raises(ModelFileError) as caught:
        read_header(path)
    message = str(caught.value)
    assert reason in message
    assert message.startswith(str(path)) and "\n" not in message and "\x1b" not in message
    assert time.monotonic() - started < 1


def test_every_truncation_of_a_good_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    for length in range(len(GOOD)):
        path.write_bytes(GOOD[:length])
        with pytest.raises(ModelFileError):
            read_header(path)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "none.gguf", tmp_path):
        with pytest.raises(ModelFileError, match="cannot be"):
            read_header(path)


def test_many_empty_strings_are_refused_fast(tmp_path: Path) -> None:
    path = tmp_path / "strings.gguf"
    path.write_bytes(gguf_bytes([kv("a", 9, struct.pack("<IQ", 8, 120_000))], data=950_000))
    started = time.monotonic()
    with pytest.raises(ModelFileError):
        read_header(path)
    assert time.monotonic() - started < 1


def test_agrees_with_gguf_py(llama_model: Path) -> None:
    ours, theirs = read_header(llama_model), gguf.GGUFReader(llama_model)
    for record, other in zip(ours.tensors, theirs.tensors, strict=True):
        assert (record.name, list(record.shape)) == (other.name, other.shape.tolist())
        assert record.ggml_type == int(other.tensor_type)
        assert ours.data_start + record.offset == other.data_offset
    for key, field in theirs.fields.items():
        if not key.startswith("GGUF."):
            assert ours.get(key) == field.contents(), key


def test_written_header_reads_back(llama_model: Path, tmp_path: Path) -> None:
    source = read_header(llama_model)
    metadata = [pair.raw for pair in source.metadata.values()]
    metadata.append(encode_kv("apreqel.test", 9, ["a", "ü"]))
    header = encode_header(metadata, source.tensors, 32)
    path = tmp_path / "copy.gguf"
    path.write_bytes(header + llama_model.read_bytes()[source.data_start :])
    theirs = gguf.GGUFReader(path)
    assert theirs.fields["apreqel.test"].contents() == ["a", "ü"]
    assert [t.name for t in theirs.tensors] == [t.name for t in source.tensors]
    again = read_header(path)
    assert again.tensors == source.tensors
    assert all(again.metadata[k].raw == pair.raw for k, pair in source.metadata.items())


def test_hostile_chat_template_is_only_bytes(tmp_path: Path) -> None:
    template = "{{ ''.__class__.__mro__[1].__subclasses__() }}\x1b]0;x\x07"
    path = tmp_path / "t.gguf"
    pairs = [ARCH, kv("tokenizer.chat_template", 8, string(template))]
    path.write_bytes(gguf_bytes(pairs, [tensor("a", [32])], 128))
    header = read_header(path)
    assert header.metadata["tokenizer.chat_template"].raw == pairs[1]


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    cuts=st.lists(
        st.tuples(st.integers(0, len(GOOD) - 1), st.binary(min_size=0, max_size=9)), max_size=4
    )
)
def test_mutations_are_read_or_refused(cuts: list[tuple[int, bytes]], tmp_path_factory) -> None:
    content = bytearray(GOOD)
    for at, patch in cuts:
        content[at : at + len(patch)] = patch
    path = tmp_path_factory.getbasetemp() / "mutated.gguf"
    path.write_bytes(content)
    try:
        header = read_header(path)
    except ModelFileError:
        return
    for pair in header.metadata.values():
        pair.value  # decodes without failing  # noqa: B018


def test_written_header_is_the_format_byte_by_byte() -> None:
    record = TensorRecord("a.weight", (32, 2), 0, 0)
    assert encode_header([ARCH], [record], 32) == GOOD[:-256]


def test_padding_after_the_last_tensor_is_ignored(tmp_path: Path) -> None:
    path = tmp_path / "padded.gguf"
    path.write_bytes(GOOD + bytes(5000))
    assert read_header(path).tensors
    path.write_bytes(GOOD + bytes(5000) + b"x")
    with pytest.raises(ModelFileError, match="5001 bytes follow"):
        read_header(path)
