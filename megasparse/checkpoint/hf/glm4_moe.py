"""GLM-4-MoE (GLM-4.5 and 4.6): sigmoid scores in groups, selection biases, shared experts, half-rotated heads."""

from __future__ import annotations

from megasparse.checkpoint.hf.family import BIAS_UPDATE_RATE, Family, Fields, write_rope
from megasparse.checkpoint.hf.llama import ATTENTION, FIELDS, MLP, OURS, PRE_NORM, QK_NORM, QKV_BIAS, TOP
from megasparse.checkpoint.hf.olmoe import EXPERTS
from megasparse.checkpoint.hf.tensors import Halves, Same
from megasparse.config import Model


def _read(config: Fields) -> Fields:
    layers, dense = config["num_hidden_layers"], config["first_k_dense_replace"]
    return {
        "moe.layers": [int(layer >= dense) for layer in range(layers)],
        "moe.shared_expert_ffn_hidden_size": (config["n_shared_experts"] or 0) * config["moe_intermediate_size"],
    }


def _write(model: Model) -> Fields:
    assert model.moe is not None
    return {
        "rope_parameters": {**write_rope(model), "partial_rotary_factor": model.rope.percent},  # theirs is 0.5 else
        "first_k_dense_replace": model.moe_layers.index(True),
        "num_nextn_predict_layers": 0,
        "n_shared_experts": model.moe.shared_expert_ffn_hidden_size // model.moe.ffn_hidden_size,
        "n_group": model.moe.num_groups or 1,
        "topk_group": model.moe.top_k_groups or 1,
    }


GLM4_MOE = Family(
    model_type="glm4_moe",
    architecture="Glm4MoeForCausalLM",
    fields={
        **FIELDS,
        "moe_intermediate_size": "moe.ffn_hidden_size",
        "n_routed_experts": "moe.num_experts",
        "num_experts_per_tok": "moe.top_k",
        "norm_topk_prob": "moe.normalize_scores",
        "routed_scaling_factor": "moe.score_scale",
        "n_group": "moe.num_groups",
        "topk_group": "moe.top_k_groups",
        "use_qk_norm": ("qk_norm", {True: "head", False: "none"}),
        "attention_bias": ("bias", {True: "qkv", False: "none"}),
    },
    fixed={"hidden_act": ("silu",)},
    ours={
        **{name: value for name, value in OURS.items() if name != "bias"},
        "moe.score_function": "sigmoid",
        "moe.bias_update_rate": BIAS_UPDATE_RATE,
    },
    top=TOP,
    layer={
        **PRE_NORM,
        **ATTENTION,
        **QKV_BIAS,
        **QK_NORM,
        **MLP,
        **EXPERTS,
        "mlp.router.bias": Same("mlp.gate.e_score_correction_bias"),
        "mlp.shared_experts.linear_fc1.weight": Halves(
            "mlp.shared_experts.gate_proj.weight", "mlp.shared_experts.up_proj.weight"
        ),
        "mlp.shared_experts.linear_fc2.weight": Same("mlp.shared_experts.down_proj.weight"),
    },
    read=_read,
    write=_write,
    reads=("first_k_dense_replace", "n_shared_experts"),
    neutral=("num_nextn_predict_layers",),  # their layers, where a folder has some, must be left out by --ignore
)
