"""Qwen3-MoE: Qwen3 with experts in some or all layers."""

from __future__ import annotations

from megasparse.checkpoint.hf.family import Family, Fields
from megasparse.checkpoint.hf.llama import ATTENTION, FIELDS, MLP, OURS, PRE_NORM, QK_NORM, TOP
from megasparse.checkpoint.hf.olmoe import EXPERTS
from megasparse.checkpoint.hf.qwen2 import full_attention
from megasparse.config import Model


def _read(config: Fields) -> Fields:
    full_attention(config)
    dense, step = config["mlp_only_layers"] or [], config["decoder_sparse_step"]
    layers = range(config["num_hidden_layers"])
    return {"moe.layers": [int(layer not in dense and (layer + 1) % step == 0) for layer in layers]}


def _write(model: Model) -> Fields:
    dense = [layer for layer, moe in enumerate(model.moe_layers) if not moe]
    return {"mlp_only_layers": dense, "decoder_sparse_step": 1, "use_sliding_window": False}


QWEN3_MOE = Family(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    fields={
        **FIELDS,
        "moe_intermediate_size": "moe.ffn_hidden_size",
        "num_experts": "moe.num_experts",
        "num_experts_per_tok": "moe.top_k",
        "norm_topk_prob": "moe.normalize_scores",
    },
    fixed={"hidden_act": ("silu",), "attention_bias": (False,)},
    ours={**OURS, "qk_norm": "head"},
    top=TOP,
    layer={**PRE_NORM, **ATTENTION, **QK_NORM, **MLP, **EXPERTS},
    read=_read,
    write=_write,
    reads=("mlp_only_layers", "decoder_sparse_step", "use_sliding_window", "sliding_window", "max_window_layers"),
)
