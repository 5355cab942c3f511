"""Llama, and Mistral, which has the same tensors; what most other families have, too."""

from __future__ import annotations

from megasparse.checkpoint.hf.family import Family
from megasparse.checkpoint.hf.tensors import Halves, Qkv, Same

FIELDS: dict = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "ffn_hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_query_groups",
    "head_dim": "head_dim",
    "max_position_embeddings": "max_position_embeddings",
    "rms_norm_eps": "norm_epsilon",
    "tie_word_embeddings": "tie_embeddings",
}
OURS = {"activation": "swiglu", "normalization": "RMSNorm", "position_embedding": "rope", "bias": "none"}
TOP = {
    "embedding.word_embeddings.weight": Same("model.embed_tokens.weight"),
    "decoder.final_layernorm.weight": Same("model.norm.weight"),
    "output_layer.weight": Same("lm_head.weight"),
}
ATTENTION = {
    "self_attention.linear_qkv.weight": Qkv("self_attn.{}_proj.weight"),
    "self_attention.linear_proj.weight": Same("self_attn.o_proj.weight"),
}
PRE_NORM = {
    "input_layernorm.weight": Same("input_layernorm.weight"),
    "pre_mlp_layernorm.weight": Same("post_attention_layernorm.weight"),
}
MLP = {
    "mlp.linear_fc1.weight": Halves("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "mlp.linear_fc2.weight": Same("mlp.down_proj.weight"),
}
QK_NORM = {f"self_attention.{letter}_layernorm.weight": Same(f"self_attn.{letter}_norm.weight") for letter in "qk"}
QKV_BIAS = {"self_attention.linear_qkv.bias": Qkv("self_attn.{}_proj.bias")}

LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    fields=FIELDS,
    fixed={"hidden_act": ("silu",), "attention_bias": (False,), "mlp_bias": (False,), "pretraining_tp": (1,)},
    ours=OURS,
    top=TOP,
    layer={**PRE_NORM, **ATTENTION, **MLP},
    # SmolLM2's, which transformers does not read.
    neutral=("is_llama_config", "rope_interleaved", "transformers.js_config"),
)
MISTRAL = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    fields=FIELDS,
    fixed={"hidden_act": ("silu",), "sliding_window": (None,)},
    ours=OURS,
    top=TOP,
    layer={**PRE_NORM, **ATTENTION, **MLP},
)
