"""OLMoE: experts in every layer, norms of queries and keys over all heads together."""

from __future__ import annotations

from megasparse.checkpoint.hf.family import Family
from megasparse.checkpoint.hf.llama import ATTENTION, FIELDS, OURS, PRE_NORM, QK_NORM, TOP
from megasparse.checkpoint.hf.tensors import Experts, Same

EXPERTS = {  # as most families name them
    "mlp.router.weight": Same("mlp.gate.weight"),
    "mlp.experts.w1": Experts("mlp.experts.{}.gate_proj.weight"),
    "mlp.experts.w2": Experts("mlp.experts.{}.down_proj.weight"),
    "mlp.experts.w3": Experts("mlp.experts.{}.up_proj.weight"),
}
OLMOE = Family(
    model_type="olmoe",
    architecture="OlmoeForCausalLM",
    fields={
        **{name: ours for name, ours in FIELDS.items() if name not in ("intermediate_size", "head_dim")},
        "intermediate_size": "moe.ffn_hidden_size",
        "num_experts": "moe.num_experts",
        "num_experts_per_tok": "moe.top_k",
        "norm_topk_prob": "moe.normalize_scores",
    },
    fixed={"hidden_act": ("silu",), "attention_bias": (False,), "clip_qkv": (None,)},
    ours={**OURS, "qk_norm": "full"},
    top=TOP,
    layer={**PRE_NORM, **ATTENTION, **QK_NORM, **EXPERTS},
)
