"""OLMo2: norms after the sublayers in place of before, and of queries and keys over all heads together."""

from __future__ import annotations

from megasparse.checkpoint.hf.family import Family
from megasparse.checkpoint.hf.llama import ATTENTION, FIELDS, MLP, OURS, QK_NORM, TOP
from megasparse.checkpoint.hf.tensors import Same

POST_NORM = {
    "self_attention.post_layernorm.weight": Same("post_attention_layernorm.weight"),
    "mlp.post_layernorm.weight": Same("post_feedforward_layernorm.weight"),
}
OLMO2 = Family(
    model_type="olmo2",
    architecture="Olmo2ForCausalLM",
    fields={name: ours for name, ours in FIELDS.items() if name != "head_dim"},
    fixed={"hidden_act": ("silu",), "attention_bias": (False,)},
    ours={**OURS, "qk_norm": "full", "norm_placement": "post"},
    top=TOP,
    layer={**POST_NORM, **ATTENTION, **QK_NORM, **MLP},
)
