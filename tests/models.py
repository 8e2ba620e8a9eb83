"""Tiny real models, built in code: llama.cpp loads them, tokenises with them and runs them.

Weights are low-rank plus noise with a few strong columns, so that tensors differ in how much
they matter and quant types differ in error, as in a trained model.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from gguf import (
    GGMLQuantizationType,
    GGUFReader,
    GGUFValueType,
    GGUFWriter,
    PoolingType,
    quants,
)

_MERGED = ["th", "the", "in", "an", "er", "re", "on", "at", "en", "nd", "and", "Ġt", "Ġa", "Ġthe"]


def byte_alphabet() -> list[str]:
    """GPT-2's printable stand-ins for the 256 bytes."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    extra = iter(range(256, 512))
    return [chr(b) if b in shown else chr(next(extra)) for b in range(256)]


def tokenizer(writer: GGUFWriter, more_tokens: int) -> int:
    tokens = byte_alphabet()
    merges = []
    for merged in _MERGED:
        for cut in range(1, len(merged)):
            left, right = merged[:cut], merged[cut:]
            if left in tokens and right in tokens:
                merges.append(f"{left} {right}")
                tokens.append(merged)
                break
    tokens.append("<|endoftext|>")
    tokens += [f"<|unused{i}|>" for i in range(-len(tokens) % 32 + more_tokens)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([1 if len(t) < 8 else 3 for t in tokens])
    writer.add_token_merges(merges)
    end = tokens.index("<|endoftext|>")
    writer.add_bos_token_id(end)
    writer.add_eos_token_id(end)
    writer.add_add_bos_token(False)
    return len(tokens)


def matrix(random: np.random.Generator, *shape: int, scale: float = 1.0) -> np.ndarray:
    """[..., rows, columns]: rank 8 plus noise, with a few columns ten times as large."""
    columns = shape[-1]
    low = random.standard_normal((*shape[:-1], 8)) @ random.standard_normal((8, columns)) / 8**0.5
    values = (low + 0.5 * random.standard_normal(shape)) / columns**0.5
    values[..., random.choice(columns, 3, replace=False)] *= 3
    return (scale * values).astype(np.float32)


def build(
    path: Path,
    *,
    n_embd: int = 256,
    n_ff: int = 512,
    n_layer: int = 2,
    n_head: int = 4,
    n_head_kv: int = 2,
    kind: str = "F16",
    tied: bool = False,
    n_expert: int = 0,
    seed: int = 0,
    context: int = 2048,
    more_tokens: int = 0,
    architecture: str = "llama",
    name: str = "tiny",
    change: Callable[[str, np.ndarray], np.ndarray] = lambda _, values: values,
) -> Path:
    """A model in `kind` (F32, F16, BF16 or a quant type that gguf-py can write).

    Of an architecture with llama's tensors; `change` may alter a tensor's values by its name.
    """
    random = np.random.default_rng(seed)
    writer = GGUFWriter(str(path), architecture)
    writer.add_name(name)
    writer.add_block_count(n_layer)
    writer.add_context_length(context)
    writer.add_embedding_length(n_embd)
    writer.add_feed_forward_length(n_ff)
    writer.add_head_count(n_head)
    writer.add_head_count_kv(n_head_kv)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(n_embd // n_head)
    if architecture == "llada":  # fills in masks
        writer.add_causal_attention(False)
        writer.add_mask_token_id(5)
    if n_expert:
        writer.add_expert_count(n_expert)
        writer.add_expert_used_count(2)
    n_vocab = tokenizer(writer, more_tokens)
    qtype = GGMLQuantizationType[kind]

    def add(name: str, values: np.ndarray) -> None:
        values = change(name, values)
        if values.ndim == 1 or "gate_inp" in name:
            writer.add_tensor(name, values.astype(np.float32))
        else:
            writer.add_tensor(name, quants.quantize(values, qtype), raw_dtype=qtype)

    n_kv = n_embd // n_head * n_head_kv
    add("token_embd.weight", matrix(random, n_vocab, n_embd, scale=8))
    add("output_norm.weight", 1 + 0.1 * random.standard_normal(n_embd))
    if not tied:
        add("output.weight", matrix(random, n_vocab, n_embd, scale=3))
    for i in range(n_layer):
        add(f"blk.{i}.attn_norm.weight", 1 + 0.1 * random.standard_normal(n_embd))
        add(f"blk.{i}.attn_q.weight", matrix(random, n_embd, n_embd))
        add(f"blk.{i}.attn_k.weight", matrix(random, n_kv, n_embd))
        add(f"blk.{i}.attn_v.weight", matrix(random, n_kv, n_embd))
        add(f"blk.{i}.attn_output.weight", matrix(random, n_embd, n_embd))
        add(f"blk.{i}.ffn_norm.weight", 1 + 0.1 * random.standard_normal(n_embd))
        if n_expert:
            add(f"blk.{i}.ffn_gate_inp.weight", matrix(random, n_expert, n_embd))
            add(f"blk.{i}.ffn_gate_exps.weight", matrix(random, n_expert, n_ff, n_embd))
            add(f"blk.{i}.ffn_up_exps.weight", matrix(random, n_expert, n_ff, n_embd))
            add(f"blk.{i}.ffn_down_exps.weight", matrix(random, n_expert, n_embd, n_ff))
        else:
            add(f"blk.{i}.ffn_gate.weight", matrix(random, n_ff, n_embd))
            add(f"blk.{i}.ffn_up.weight", matrix(random, n_ff, n_embd))
            add(f"blk.{i}.ffn_down.weight", matrix(random, n_embd, n_ff))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def build_576(path: Path) -> Path:
    """Rows of 576 and 1536 and tied embeddings, as SmolLM2-135M has."""
    return build(path, n_embd=576, n_ff=1536, n_head=9, n_head_kv=3, tied=True)


def build_moe(path: Path) -> Path:
    """A mixture of four experts, two used, in 3-D tensors."""
    return build(path, n_expert=4, n_ff=256)


def build_bert(path: Path) -> Path:
    """An encoder of one layer, which gives embeddings."""
    random, n_embd, writer = np.random.default_rng(0), 64, GGUFWriter(str(path), "bert")
    writer.add_block_count(1)
    writer.add_context_length(512)
    writer.add_embedding_length(n_embd)
    writer.add_feed_forward_length(2 * n_embd)
    writer.add_head_count(2)
    writer.add_layer_norm_eps(1e-12)
    writer.add_causal_attention(False)
    writer.add_pooling_type(PoolingType.MEAN)
    writer.add_token_type_count(2)
    n_vocab = tokenizer(writer, 0)
    square = ("attn_q", "attn_k", "attn_v", "attn_output")
    shapes = {
        "token_embd": (n_vocab, n_embd),
        "position_embd": (512, n_embd),
        "token_types": (2, n_embd),
        **{f"blk.0.{name}": (n_embd, n_embd) for name in square},
        "blk.0.ffn_up": (2 * n_embd, n_embd),
        "blk.0.ffn_down": (n_embd, 2 * n_embd),
    }
    for name, shape in shapes.items():
        kind = np.float16 if "token_embd" in name or "blk" in name else np.float32
        writer.add_tensor(f"{name}.weight", matrix(random, *shape).astype(kind))
        if "blk" in name:
            writer.add_tensor(f"{name}.bias", np.zeros(shape[0], np.float32))
    for name in ("token_embd_norm", "blk.0.attn_output_norm", "blk.0.layer_output_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(n_embd, np.float32))
        writer.add_tensor(f"{name}.bias", np.zeros(n_embd, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def split(source: Path, n_shards: int) -> list[Path]:
    """The model as llama.cpp's gguf-split lays it out: metadata in the first shard."""
    reader = GGUFReader(source)
    count = len(reader.tensors)
    names = [
        source.with_name(f"{source.stem}-{i + 1:05d}-of-{n_shards:05d}.gguf")
        for i in range(n_shards)
    ]
    for i, name in enumerate(names):
        writer = GGUFWriter(str(name), "llama")
        if i == 0:
            for key, field in reader.fields.items():
                if not key.startswith("GGUF.") and key != "general.architecture":
                    is_array = field.types[0] == GGUFValueType.ARRAY
                    sub_type = field.types[-1] if is_array else None
                    writer.add_key_value(key, field.contents(), field.types[0], sub_type)
        writer.add_uint16("split.no", i)
        writer.add_uint16("split.count", n_shards)
        writer.add_int32("split.tensors.count", count)
        for tensor in reader.tensors[i * count // n_shards : (i + 1) * count // n_shards]:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return names
