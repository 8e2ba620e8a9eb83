"""What may be done with a tensor, from its name and shape alone: its role, and its legal types.

The types that its rows can hold, and whether llama.cpp quantises it at all.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from apreqel.model.qtypes import FLOAT_TYPES, QuantType, registry

# Every block type but those of 64, 128 and 256 weights has blocks of 32.
_LEAST_BLOCK = 32

# What llama.cpp never quantises (tensor_allows_quantization in llama-quant.cpp): part of the name,
# and why.
_TIME_MIX = r"time_mix_(first|w[012]|v[012]|a[012]|g[12]|decay_w[12]|lerp_fused)\.weight"
_VISION = r"\.position_embd|sam\.(pos_embd|neck\.|net_)|\.rel_pos|\.patch_embd|\.patch_merger"
_KEPT_BY_NAME: Sequence[tuple[str, str]] = (
    (r"_norm\.weight$", "a norm: tiny and sensitive"),
    (r"ffn_gate_inp\.weight$", "the expert router: tiny and decides everything"),
    (r"ffn_gate_tid2eid\.weight$", "a routing table of integers"),
    (r"altup|laurel|per_layer_model_proj", "a small Gemma 3n helper matrix"),
    (r"^position_embd\.weight$|^token_types\.weight$", "a position or token-type embedding"),
    (r"ssm_conv1d|shortconv\.conv\.weight", "a small convolution"),
    (r"indexer\.[kq]_proj\.weight", "a small indexer projection"),
    (_TIME_MIX, "small RWKV mix"),
    (r"attn_rel_b\.weight", "a relative position bias"),
    (_VISION, "part of the vision tower"),
    (r"a\.rvq\.codebook|mm\.a\.code_embd", "an audio codebook"),
)

_LAYER_NAME = re.compile(r"^blk\.(\d+)\.(.+)$")


def role_and_layer(name: str) -> tuple[str, int | None]:
    """'blk.3.attn_q.weight' is ('attn_q', 3); 'token_embd.weight' is ('token_embd', None)."""
    found = _LAYER_NAME.match(name)
    rest = found[2] if found else name
    role = rest.rsplit(".", 1)[0] if rest.endswith((".weight", ".bias")) else rest
    return role, int(found[1]) if found else None


def keep_reason(name: str, shape: tuple[int, ...], qtype: QuantType) -> str | None:
    """Why llama.cpp leaves this tensor as it is; None where it may be quantised."""
    if max(shape[1:], default=1) == 1:
        return "one-dimensional"
    if not name.endswith("weight"):
        return "not a weight matrix"
    if by_name := next((why for part, why in _KEPT_BY_NAME if re.search(part, name)), None):
        return by_name
    if not qtype.for_weights:
        return f"stored as {qtype.name}, which is no weight type"
    if shape[0] % _LEAST_BLOCK:
        return f"rows of {shape[0]} are no multiple of {_LEAST_BLOCK}, the smallest block"
    return None


def legal_types(row_length: int, source: QuantType) -> tuple[str, ...]:
    """Types that rows of this length can be stored in, smallest first.

    Of the float types only those that lose nothing against the source's own or are its standard
    halving (F32 to F16 or BF16).
    """
    floats = {"F32": FLOAT_TYPES}.get(source.name, (source.name,))
    by_size = sorted(registry().values(), key=lambda q: (q.bits_per_weight, q.ggml_id))
    allowed = (q for q in by_size if q.for_weights and (q.is_quantized or q.name in floats))
    return tuple(q.name for q in allowed if q.holds_row(row_length))
