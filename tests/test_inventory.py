"""Roles, legal types, exact sizes and split models, against gguf-py and llama.cpp itself."""

from __future__ import annotations

import shutil
from pathlib import Path

import gguf
import models
import pytest

from apreqel.errors import ModelFileError, UnsupportedModelError
from apreqel.llama.stock import stock_quantize, stock_types
from apreqel.model.inventory import (
    keep_reason,
    read_inventory,
    require_float_source,
    role_and_layer,
)
from apreqel.model.qtypes import lookup, nearest, registry


def test_roles_and_layers() -> None:
    assert role_and_layer("blk.12.ffn_down_exps.weight") == ("ffn_down_exps", 12)
    assert role_and_layer("token_embd.weight") == ("token_embd", None)
    assert role_and_layer("rope_freqs") == ("rope_freqs", None)


def test_type_sizes_are_gguf_pys() -> None:
    for qtype in registry().values():
        shape = (qtype.block_size * 3, 5)
        kind = gguf.GGMLQuantizationType(qtype.ggml_id)
        expected = gguf.quants.quant_shape_to_byte_shape((5, qtype.block_size * 3), kind)
        assert qtype.size_bytes(shape) == expected[0] * expected[1]
        assert not qtype.is_quantized or not qtype.holds_row(qtype.block_size + 1)


def test_the_nearest_type() -> None:
    assert nearest(["Q8_0", "Q4_0", "Q2_K"], 5) == "Q4_0"
    assert nearest(["Q4_0", "Q5_0"], 5) == "Q5_0"  # half a bit off, both
    assert nearest(["IQ4_NL", "Q4_K", "Q4_0"], 4) == "Q4_0"  # of one size: the first in ggml


def test_rows_of_576_hold_no_k_quants(rows_576_model: Path) -> None:
    inventory = read_inventory(rows_576_model)
    assert inventory.tied_embeddings
    by_name = inventory.by_name
    assert "Q4_K" not in by_name["blk.0.attn_q.weight"].legal_types
    assert {"Q4_0", "Q5_1", "IQ4_NL", "Q8_0"} <= set(by_name["blk.0.attn_q.weight"].legal_types)
    assert "Q4_K" in by_name["blk.0.ffn_down.weight"].legal_types  # rows of 1536


def test_what_is_kept_is_what_llama_cpp_keeps(moe_model: Path, tmp_path: Path) -> None:
    inventory = read_inventory(moe_model)
    output = tmp_path / "q8.gguf"
    stock_quantize(moe_model, output, "Q8_0", imatrix={}, n_threads=2)
    for tensor in gguf.GGUFReader(output).tensors:
        ours = inventory.by_name[tensor.name]
        assert (ours.keep_reason is None) == (tensor.tensor_type.name == "Q8_0"), tensor.name
    gate = inventory.by_name["blk.0.ffn_gate_inp.weight"]
    assert gate.keep_reason is not None and "router" in gate.keep_reason
    assert inventory.by_name["blk.0.ffn_up_exps.weight"].n_experts == 4


@pytest.mark.parametrize("row_length", [33, 48, 100])
def test_rows_that_fit_no_block_are_kept(row_length: int) -> None:
    reason = keep_reason("blk.0.attn_q.weight", (row_length, 64), lookup("F16"))
    assert reason is not None and str(row_length) in reason


def test_output_size_is_what_llama_cpp_writes(rows_576_model: Path, tmp_path: Path) -> None:
    inventory = read_inventory(rows_576_model)
    for preset in ("Q4_K_M", "Q2_K", "Q6_K", "IQ4_NL"):
        output = tmp_path / f"{preset}.gguf"
        stock_quantize(rows_576_model, output, preset, imatrix={}, n_threads=2)
        types = stock_types(rows_576_model, preset, has_imatrix_for=[])
        written = {t.name: t.tensor_type.name for t in gguf.GGUFReader(output).tensors}
        assert types == written
        assert inventory.output_size(types) == output.stat().st_size


def test_split_model_is_one_model(split_model: list[Path]) -> None:
    whole = read_inventory(split_model[0].with_name("parts.gguf"))
    parts = read_inventory(split_model[0])
    assert len(parts.files) == 3
    assert [(t.name, t.shape) for t in parts.tensors] == [(t.name, t.shape) for t in whole.tensors]
    own = whole.types
    header, _ = parts.output_header(own)
    assert b"split." not in header
    assert parts.output_size(own) == whole.output_size(own)


def test_faulty_split_models(split_model: list[Path], tmp_path: Path) -> None:
    copies = [Path(shutil.copy(p, tmp_path)) for p in split_model]
    with pytest.raises(ModelFileError, match=r"shard 2 of 3; give parts-00001-of-00003.gguf"):
        read_inventory(copies[1])
    copies[2].unlink()
    with pytest.raises(ModelFileError, match=r"missing shards: parts-00003-of-00003.gguf"):
        read_inventory(copies[0])
    shutil.copy(split_model[1], copies[2])
    with pytest.raises(ModelFileError, match="do not belong together"):
        read_inventory(copies[0])
    renamed = copies[0].rename(tmp_path / "model.gguf")
    with pytest.raises(ModelFileError, match="restore the shards' names"):
        read_inventory(renamed)


def test_quantised_source_only_when_asked(tmp_path: Path) -> None:
    inventory = read_inventory(models.build(tmp_path / "q8.gguf", kind="Q8_0"))
    with pytest.raises(
        UnsupportedModelError, match=r"already quantised \(Q8_0\).*--allow-requantize"
    ):
        require_float_source(inventory, allow_requantize=False)
    require_float_source(inventory, allow_requantize=True)


def test_legal_floats_follow_the_source(tmp_path: Path) -> None:
    for kind, floats in (("F32", {"F32", "F16", "BF16"}), ("F16", {"F16"}), ("BF16", {"BF16"})):
        inventory = read_inventory(models.build(tmp_path / f"{kind}.gguf", kind=kind))
        legal = inventory.by_name["blk.0.attn_q.weight"].legal_types
        assert {t for t in legal if not lookup(t).is_quantized} == floats
