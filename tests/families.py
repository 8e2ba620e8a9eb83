"""Tiny models of many families, each with what llama's does not have; llama.cpp runs them all.

Metadata keys stand without the architecture's name, tensors of a layer without `blk.N.`; a name
that ends in `.bias` is a vector around 0, any other vector lies around 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from gguf import GGUFWriter
from models import matrix, tokenizer

E, F, N_LAYERS = 256, 512, 2  # columns, those of the feed-forward net, layers that run
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Family:
    architecture: str
    metadata: Mapping[str, int | float | bool]
    layer: Shapes
    whole: Shapes = field(default_factory=dict)  # beside the token embeddings
    extra_layer: Shapes = field(default_factory=dict)  # of one layer more, that never runs


def _norms(*names: str, bias: bool = False) -> Shapes:
    endings = (".weight", ".bias") if bias else (".weight",)
    return {name + ending: (E,) for name in names for ending in endings}


def _weights(**shapes: tuple[int, ...]) -> Shapes:
    return {f"{name}.weight": shape for name, shape in shapes.items()}


def _biases(**shapes: int) -> Shapes:
    return {f"{name}.bias": (n,) for name, n in shapes.items()}


_UNTIED = _weights(output=(-1, E))
_HEADS = {"attention.head_count": 4, "attention.head_count_kv": 2}
_RMS = {"attention.layer_norm_rms_epsilon": 1e-5}
_ROPE = {"rope.dimension_count": E // 4}
_ATTENTION = _weights(attn_q=(E, E), attn_k=(E // 2, E), attn_v=(E // 2, E), attn_output=(E, E))
_GATED = _weights(ffn_gate=(F, E), ffn_up=(F, E), ffn_down=(E, F))
_EXPERTS = _weights(
    ffn_gate_inp=(4, E), ffn_gate_exps=(4, F, E), ffn_up_exps=(4, F, E), ffn_down_exps=(4, E, F)
)
_SHARED = _weights(ffn_gate_shexp=(F, E), ffn_up_shexp=(F, E), ffn_down_shexp=(E, F))
_MIXTURE = {"expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": F}
_GLM_LAYER = {
    **_norms("attn_norm", "post_attention_norm"),
    **_ATTENTION,
    **_biases(attn_q=E, attn_k=E // 2, attn_v=E // 2, exp_probs_b=4),
    **_EXPERTS,
    **_SHARED,
}

FAMILIES = {
    # Biases, LayerNorm, learnt positions, q, k and v in one matrix, tied embeddings.
    "gpt2": Family(
        "gpt2",
        {"attention.head_count": 4, "attention.layer_norm_epsilon": 1e-5},
        {
            **_norms("attn_norm", "ffn_norm", bias=True),
            **_weights(attn_qkv=(3 * E, E), attn_output=(E, E), ffn_up=(F, E), ffn_down=(E, F)),
            **_biases(attn_qkv=3 * E, attn_output=E, ffn_up=F, ffn_down=E),
        },
        {**_norms("output_norm", bias=True), **_weights(position_embd=(2048, E))},
    ),
    # Biases on q, k and v alone.
    "qwen2": Family(
        "qwen2",
        {**_HEADS, **_RMS},
        {
            **_norms("attn_norm", "ffn_norm"),
            **_ATTENTION,
            **_biases(attn_q=E, attn_k=E // 2, attn_v=E // 2),
            **_GATED,
        },
        {**_norms("output_norm"), **_UNTIED},
    ),
    # Attention and feed-forward net side by side.
    "phi2": Family(
        "phi2",
        {"attention.head_count": 4, "attention.layer_norm_epsilon": 1e-5, **_ROPE},
        {
            **_norms("attn_norm", bias=True),
            **_weights(attn_qkv=(3 * E, E), attn_output=(E, E), ffn_up=(F, E), ffn_down=(E, F)),
            **_biases(attn_qkv=3 * E, attn_output=E, ffn_up=F, ffn_down=E),
        },
        {**_norms("output_norm", bias=True), **_UNTIED, **_biases(output=-1)},
    ),
    # Attention over a sliding window in every other layer; tied embeddings.
    "gemma2": Family(
        "gemma2",
        {
            **_HEADS,
            **_RMS,
            "attention.key_length": E // 4,
            "attention.value_length": E // 4,
            "attention.sliding_window": 32,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        {
            **_norms("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"),
            **_ATTENTION,
            **_GATED,
        },
        _norms("output_norm"),
    ),
    # No attention: a recurrent state.
    "mamba": Family(
        "mamba",
        {
            **_RMS,
            "attention.head_count": 0,
            "ssm.conv_kernel": 4,
            "ssm.inner_size": 2 * E,
            "ssm.state_size": 16,
            "ssm.time_step_rank": 32,
        },
        {
            **_norms("attn_norm"),
            **_weights(
                ssm_in=(4 * E, E),
                ssm_conv1d=(2 * E, 4),
                ssm_x=(64, 2 * E),
                ssm_dt=(2 * E, 32),
                ssm_out=(E, 2 * E),
            ),
            **_biases(ssm_conv1d=2 * E, ssm_dt=2 * E),
            "ssm_a": (2 * E, 16),
            "ssm_d": (2 * E,),
        },
        {**_norms("output_norm"), **_UNTIED},
    ),
    # No attention, either: tokens shifted into each other, matrices of low rank between.
    "rwkv7": Family(
        "rwkv7",
        {
            "attention.layer_norm_epsilon": 1e-5,
            "attention.head_count": 0,
            "attention.decay_lora_rank": 32,
            "attention.iclr_lora_rank": 32,
            "attention.value_residual_mix_lora_rank": 32,
            "attention.gate_lora_rank": 64,
            "token_shift_count": 2,
            "wkv.head_size": 64,
        },
        {
            **_norms("attn_norm", "attn_norm_2", "time_mix_ln", bias=True),
            **_norms(*(f"time_mix_{part}" for part in ("w0", "a0", "v0", "k_k", "k_a", "r_k"))),
            **_norms("channel_mix_lerp_k"),
            **_weights(
                time_mix_w1=(32, E),
                time_mix_w2=(E, 32),
                time_mix_a1=(32, E),
                time_mix_a2=(E, 32),
                time_mix_v1=(32, E),
                time_mix_v2=(E, 32),
                time_mix_g1=(64, E),
                time_mix_g2=(E, 64),
                time_mix_lerp_fused=(6, 1, 1, E),
                time_mix_receptance=(E, E),
                time_mix_key=(E, E),
                time_mix_value=(E, E),
                time_mix_output=(E, E),
                channel_mix_key=(F, E),
                channel_mix_value=(E, F),
            ),
        },
        {**_norms("token_embd_norm", "output_norm", bias=True), **_UNTIED},
    ),
    # Embeddings for every layer, streams side by side, helper matrices that stay as they are.
    "gemma3n": Family(
        "gemma3n",
        {
            **_HEADS,
            **_RMS,
            "attention.key_length": E // 4,
            "attention.value_length": E // 4,
            "attention.sliding_window": 32,
        },
        {
            **_norms("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"),
            **_norms("post_norm", "altup_correct_scale", "altup_router_norm", "laurel_post_norm"),
            "attn_q_norm.weight": (E // 4,),
            "attn_k_norm.weight": (E // 4,),
            **_ATTENTION,
            **_GATED,
            **_weights(
                inp_gate=(256, E),
                proj=(E, 256),
                laurel_l=(64, E),
                laurel_r=(E, 64),
                altup_correct_coef=(4, 4),
                altup_predict_coef=(16, 4),
                altup_router=(4, E),
            ),
        },
        {
            **_norms("output_norm"),
            "per_layer_proj_norm.weight": (256,),
            **_weights(
                altup_proj=(3, E, E),
                altup_unembd_proj=(3, E, E),
                per_layer_token_embd=(-1, 256 * N_LAYERS),
                per_layer_model_proj=(256 * N_LAYERS, E),
            ),
        },
    ),
    # Experts beside a shared one that has a gate of its own.
    "qwen2moe": Family(
        "qwen2moe",
        {**_HEADS, **_RMS, **_MIXTURE},
        {
            **_norms("attn_norm", "ffn_norm"),
            **_ATTENTION,
            **_biases(attn_q=E, attn_k=E // 2, attn_v=E // 2),
            **_EXPERTS,
            **_SHARED,
            **_norms("ffn_gate_inp_shexp"),
        },
        {**_norms("output_norm"), **_UNTIED},
    ),
    # Multi-head latent attention: 3-D weights of heads, not of experts.
    "deepseek2": Family(
        "deepseek2",
        {
            **_RMS,
            **_MIXTURE,
            "attention.head_count": 4,
            "attention.head_count_kv": 1,
            "leading_dense_block_count": 2,
            "attention.q_lora_rank": 128,
            "attention.kv_lora_rank": 128,
            "attention.key_length": 160,
            "attention.value_length": 128,
            "attention.key_length_mla": 96,
            "attention.value_length_mla": 64,
            "rope.dimension_count": 32,
            "expert_shared_count": 1,
            "expert_weights_scale": 1.0,
            "expert_gating_func": 2,
        },
        {
            **_norms("attn_norm", "ffn_norm"),
            "attn_q_a_norm.weight": (128,),
            "attn_kv_a_norm.weight": (128,),
            **_weights(
                attn_q_a=(128, E),
                attn_q_b=(4 * 96, 128),
                attn_kv_a_mqa=(160, E),
                attn_k_b=(4, 128, 64),
                attn_v_b=(4, 64, 128),
                attn_output=(E, 4 * 64),
            ),
            **_GATED,
        },
        {**_norms("output_norm"), **_UNTIED},
    ),
    # Experts, and a layer to predict the token after next, which llama.cpp loads but never runs.
    "glm4moe": Family(
        "glm4moe",
        {
            **_HEADS,
            **_RMS,
            **_MIXTURE,
            "attention.key_length": E // 4,
            "attention.value_length": E // 4,
            "rope.dimension_count": 32,
            "leading_dense_block_count": 0,
            "expert_shared_count": 1,
            "expert_weights_scale": 1.0,
            "expert_weights_norm": True,
            "expert_gating_func": 2,
            "nextn_predict_layers": 1,
        },
        _GLM_LAYER,
        {**_norms("output_norm"), **_UNTIED},
        {
            **_GLM_LAYER,
            **_weights(**{"nextn.eh_proj": (E, 2 * E), "nextn.embed_tokens": (-1, E)}),
            **_weights(**{"nextn.shared_head_head": (-1, E)}),
            **_norms("nextn.enorm", "nextn.hnorm", "nextn.shared_head_norm"),
        },
    ),
}


def build_family(path: Path, name: str) -> Path:
    """The model in F16, its vectors and routers in F32."""
    family, random = FAMILIES[name], np.random.default_rng(0)
    writer = GGUFWriter(str(path), family.architecture)
    layers = [family.layer] * N_LAYERS + [family.extra_layer] * bool(family.extra_layer)
    writer.add_block_count(len(layers))
    writer.add_context_length(2048)
    writer.add_embedding_length(E)
    writer.add_feed_forward_length(0 if name == "mamba" else F)
    for key, value in family.metadata.items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
        add[type(value)](f"{family.architecture}.{key}", value)
    n_vocab = tokenizer(writer, 0)
    shapes = {"token_embd.weight": (n_vocab, E), **family.whole}
    for i, layer in enumerate(layers):
        shapes |= {f"blk.{i}.{tensor}": shape for tensor, shape in layer.items()}
    for tensor, shape in shapes.items():
        shape = tuple(n_vocab if n < 0 else n for n in shape)
        if len(shape) == 1:
            around = 0.0 if tensor.endswith(".bias") else 1.0
            writer.add_tensor(
                tensor, (around + 0.1 * random.standard_normal(shape)).astype(np.float32)
            )
        elif tensor.endswith("ssm_a"):  # rates of decay
            writer.add_tensor(tensor, -np.exp(random.standard_normal(shape)).astype(np.float32))
        else:
            scale = {"token_embd.weight": 8.0, "output.weight": 3.0}.get(tensor, 1.0)
            scale *= 0.3 if "ssm_x" in tensor else 1.0  # else the state runs away
            small = any(
                part in tensor for part in ("gate_inp", "ssm_conv1d", "position_embd", "lerp_fused")
            )
            values = matrix(random, *shape, scale=scale)
            writer.add_tensor(tensor, values if small else values.astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
