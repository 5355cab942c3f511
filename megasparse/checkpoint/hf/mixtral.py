"""Mixtral: experts in every layer, a softmax over the chosen ones."""

from __future__ import annotations

from megasparse.checkpoint.hf.family import Family
from megasparse.checkpoint.hf.llama import ATTENTION, FIELDS, OURS, PRE_NORM, TOP
from megasparse.checkpoint.hf.tensors import Experts, Same

MIXTRAL = Family(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    fields={
        **{name: ours for name, ours in FIELDS.items() if name != "intermediate_size"},
        "intermediate_size": "moe.ffn_hidden_size",
        "num_local_experts": "moe.num_experts",
        "num_experts_per_tok": "moe.top_k",
    },
    fixed={"hidden_act": ("silu",), "sliding_window": (None,)},
    ours=OURS,
    top=TOP,
    layer={
        **PRE_NORM,
        **ATTENTION,
        "mlp.router.weight": Same("block_sparse_moe.gate.weight"),
        "mlp.experts.w1": Experts("block_sparse_moe.experts.{}.w1.weight"),
        "mlp.experts.w2": Experts("block_sparse_moe.experts.{}.w2.weight"),
        "mlp.experts.w3": Experts("block_sparse_moe.experts.{}.w3.weight"),
    },
    neutral=("router_jitter_noise",),
)
