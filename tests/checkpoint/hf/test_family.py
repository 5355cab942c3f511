"""Configs as they were published, there and back, and what they say against transformers' own models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from megasparse.checkpoint.hf.families import family_for, family_of
from megasparse.checkpoint.hf.family import Family, bearing, differences, read_rope, resolved, write_rope
from megasparse.checkpoint.hf.folder import Folder
from megasparse.checkpoint.hf.from_hf import open_source
from megasparse.checkpoint.hf.llama import LLAMA
from megasparse.checkpoint.hf.qwen2 import QWEN2
from megasparse.config import Model
from megasparse.layout import Layout
from megasparse.parameters import parameter_count

LLAMA3_ROPE = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
COMMON: dict[str, Any] = {
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.0",
    "use_cache": True,
}
QWEN = {**COMMON, "bos_token_id": 151643, "eos_token_id": 151645, "rms_norm_eps": 1e-06, "use_sliding_window": False}
MISTRAL = {
    **{**COMMON, "bos_token_id": 1, "eos_token_id": 2, "hidden_size": 4096, "intermediate_size": 14336},
    **{"max_position_embeddings": 32768, "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8},
    **{"rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "sliding_window": None},
}
CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": {
        **{"activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1},
        **{"bos_token_id": 50256, "embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02},
        **{"layer_norm_epsilon": 1e-05, "model_type": "gpt2", "n_ctx": 1024, "n_embd": 768, "n_head": 12},
        **{"n_layer": 12, "n_positions": 1024, "resid_pdrop": 0.1, "summary_activation": None},
        **{"summary_first_dropout": 0.1, "summary_proj_to_labels": True, "summary_type": "cls_index"},
        **{"summary_use_proj": True, "vocab_size": 50257},
        "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    },
    "Llama-3.1-8B": {
        **{**COMMON, "architectures": ["LlamaForCausalLM"], "attention_bias": False, "bos_token_id": 128000},
        **{"eos_token_id": 128001, "hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 131072},
        **{"mlp_bias": False, "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 32},
        **{"num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": LLAMA3_ROPE},
        **{"rope_theta": 500000.0, "vocab_size": 128256},
    },
    "Mistral-7B-v0.3": {
        **{**MISTRAL, "architectures": ["MistralForCausalLM"], "model_type": "mistral", "vocab_size": 32768},
    },
    "Qwen2.5-7B": {
        **{**QWEN, "architectures": ["Qwen2ForCausalLM"], "eos_token_id": 151643, "hidden_size": 3584},
        **{"intermediate_size": 18944, "max_position_embeddings": 131072, "max_window_layers": 28},
        **{"model_type": "qwen2", "num_attention_heads": 28, "num_hidden_layers": 28, "num_key_value_heads": 4},
        **{"rope_theta": 1000000.0, "sliding_window": 131072, "use_mrope": False, "vocab_size": 152064},
    },
    "Qwen3-8B": {
        **{**QWEN, "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "head_dim": 128},
        **{"hidden_size": 4096, "intermediate_size": 12288, "max_position_embeddings": 40960},
        **{"max_window_layers": 36, "model_type": "qwen3", "num_attention_heads": 32, "num_hidden_layers": 36},
        **{"num_key_value_heads": 8, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None},
        "vocab_size": 151936,
    },
    "OLMo-2-1124-7B": {
        **{**COMMON, "architectures": ["Olmo2ForCausalLM"], "attention_bias": False, "eos_token_id": 100257},
        **{"hidden_size": 4096, "intermediate_size": 11008, "max_position_embeddings": 4096, "model_type": "olmo2"},
        **{"num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32, "pad_token_id": 100277},
        **{"rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 500000, "vocab_size": 100352},
        "torch_dtype": "float32",
    },
    "Mixtral-8x7B-v0.1": {
        **{**MISTRAL, "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_experts_per_tok": 2},
        **{"num_local_experts": 8, "output_router_logits": False, "router_aux_loss_coef": 0.02, "vocab_size": 32000},
    },
    "Qwen3-30B-A3B": {
        **{**QWEN, "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": False, "decoder_sparse_step": 1},
        **{"head_dim": 128, "hidden_size": 2048, "intermediate_size": 6144, "max_position_embeddings": 40960},
        **{"max_window_layers": 48, "mlp_only_layers": [], "model_type": "qwen3_moe", "moe_intermediate_size": 768},
        **{"norm_topk_prob": True, "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8},
        **{"num_hidden_layers": 48, "num_key_value_heads": 4, "output_router_logits": False, "rope_scaling": None},
        **{"rope_theta": 1000000.0, "router_aux_loss_coef": 0.001, "sliding_window": None, "vocab_size": 151936},
    },
    "OLMoE-1B-7B-0924": {
        **{**COMMON, "architectures": ["OlmoeForCausalLM"], "attention_bias": False, "clip_qkv": None},
        **{"eos_token_id": 50279, "hidden_size": 2048, "intermediate_size": 1024, "max_position_embeddings": 4096},
        **{"model_type": "olmoe", "norm_topk_prob": False, "num_attention_heads": 16, "num_experts": 64},
        **{"num_experts_per_tok": 8, "num_hidden_layers": 16, "num_key_value_heads": 16, "pad_token_id": 1},
        **{"output_router_logits": False, "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 10000.0},
        **{"router_aux_loss_coef": 0.01, "vocab_size": 50304},
    },
    "GLM-4.5-Air": {
        **{**COMMON, "architectures": ["Glm4MoeForCausalLM"], "attention_bias": True, "pad_token_id": 151329},
        **{"eos_token_id": [151329, 151336, 151338], "head_dim": 128, "hidden_size": 4096, "n_group": 1},
        **{"partial_rotary_factor": 0.5, "intermediate_size": 10944, "max_position_embeddings": 131072},
        **{"model_type": "glm4_moe", "moe_intermediate_size": 1408, "norm_topk_prob": True, "topk_group": 1},
        **{"num_attention_heads": 96, "n_routed_experts": 128, "n_shared_experts": 1, "num_experts_per_tok": 8},
        **{"routed_scaling_factor": 1.0, "first_k_dense_replace": 1, "num_hidden_layers": 46, "rope_scaling": None},
        **{"num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 1000000, "num_nextn_predict_layers": 1},
        **{"use_qk_norm": False, "vocab_size": 151552},
    },
    "SmolLM2-135M": {
        **{**COMMON, "architectures": ["LlamaForCausalLM"], "attention_bias": False, "bos_token_id": 0},
        **{"eos_token_id": 0, "hidden_size": 576, "initializer_range": 0.041666666666666664, "rope_scaling": None},
        **{"intermediate_size": 1536, "is_llama_config": True, "max_position_embeddings": 8192, "model_type": "llama"},
        **{"num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3, "pretraining_tp": 1},
        **{"rms_norm_eps": 1e-05, "rope_interleaved": False, "rope_theta": 100000, "tie_word_embeddings": True},
        "vocab_size": 49152,
    },
}
TOTAL = {
    "gpt2": 124_439_808,
    "Llama-3.1-8B": 8_030_261_248,
    "Mistral-7B-v0.3": 7_248_023_552,
    "Qwen2.5-7B": 7_615_616_512,
    "Qwen3-8B": 8_190_735_360,
    "OLMo-2-1124-7B": 7_298_617_344,
    "Mixtral-8x7B-v0.1": 46_702_792_704,
    "Qwen3-30B-A3B": 30_532_122_624,
    "OLMoE-1B-7B-0924": 6_919_161_856,
    "SmolLM2-135M": 134_515_008,
}
ACTIVE = {"Mixtral-8x7B-v0.1": 12.9, "Qwen3-30B-A3B": 3.3, "OLMoE-1B-7B-0924": 1.3}  # billions, as they say
SAID: dict[str, dict[str, Any]] = {  # what the recipe has to say, besides sizes
    "gpt2": {"activation": "gelu_tanh", "position_embedding": "learned", "bias": "all", "tie_embeddings": True},
    "Llama-3.1-8B": {"rope.scaling": "llama3", "rope.factor": 8.0, "rope.original_max_position_embeddings": 8192},
    "Mistral-7B-v0.3": {"rope.theta": 1e6, "num_query_groups": 8, "bias": "none"},
    "Qwen2.5-7B": {"bias": "qkv", "norm_epsilon": 1e-6, "rope.theta": 1e6},
    "Qwen3-8B": {"qk_norm": "head", "head_dim": 128},
    "OLMo-2-1124-7B": {"qk_norm": "full", "norm_placement": "post"},
    "Mixtral-8x7B-v0.1": {"moe.num_experts": 8, "moe.normalize_scores": True, "moe.ffn_hidden_size": 14336},
    "Qwen3-30B-A3B": {"moe.top_k": 8, "moe.layers": [1] * 48, "head_dim": 128, "moe.normalize_scores": True},
    "OLMoE-1B-7B-0924": {"moe.top_k": 8, "moe.normalize_scores": False, "qk_norm": "full"},
    "GLM-4.5-Air": {"moe.score_function": "sigmoid", "moe.layers": [0] + [1] * 45, "rope.percent": 0.5, "bias": "qkv"},
    "SmolLM2-135M": {"tie_embeddings": True, "rope.theta": 1e5, "num_query_groups": 3},
}


def folder_of(path: Path, config: dict[str, Any]) -> Path:
    """Without weights."""
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    save_file({}, path / "model.safetensors")
    return path


def read(path: Path, config: dict[str, Any], *ignored: str) -> tuple[Family, Model]:
    folder = Folder(folder_of(path, config))
    family = family_of(config["model_type"], folder.raw_config())
    return family, family.model(folder.config(family.fields), frozenset(ignored))


def dig(said: Any, path: str) -> Any:
    for key in path.split("."):
        said = said[key]
    return said


@pytest.mark.parametrize("name", CONFIGS)
def test_published_configs_there_and_back(tmp_path: Path, name: str) -> None:
    """Config -> model -> config -> model; what they have is in what is written."""
    family, model = read(tmp_path, CONFIGS[name])
    vocab_size, positions = model.vocab_size, model.max_position_embeddings
    assert vocab_size == CONFIGS[name]["vocab_size"]
    assert positions is not None
    said = resolved(model, vocab_size, positions)
    for path, value in SAID[name].items():
        assert dig(said, path) == value, path
    written = family.config(model, vocab_size, positions)
    theirs = AutoConfig.from_pretrained(tmp_path).to_dict()
    back = AutoConfig.for_model(family.model_type, **written).to_dict()
    unsaid = {"architectures", "dtype", "transformers_version", "_name_or_path", "initializer_range"}  # of the exporter
    unsaid |= {"bos_token_id", "eos_token_id", "pad_token_id", "router_aux_loss_coef", *family.neutral}
    unsaid |= {"sliding_window", "max_window_layers"} if family is QWEN2 else {"max_window_layers"}  # no window is used
    changed = {field: (value, back.get(field)) for field, value in theirs.items() if value != back.get(field)}
    unsaid |= {name for name in ("n_inner", "head_dim") if theirs.get(name, 0) is None}  # 4 x n_embd, width / heads
    assert {field: both for field, both in changed.items() if field not in unsaid} == {}
    again = family.model(family.read_back(written))
    assert differences(bearing(said), bearing(resolved(again, vocab_size, positions))) == []


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_of_published_configs(tmp_path: Path, name: str) -> None:
    """As published, and as transformers counts them in its own model."""
    _, model = read(tmp_path, CONFIGS[name])
    assert model.vocab_size is not None
    count = parameter_count(model, model.vocab_size, 2048)
    if name in TOTAL:
        assert count.total == TOTAL[name]
    if name in ACTIVE:
        assert round(count.active / 1e9 - 0.05, 1) <= ACTIVE[name] <= round(count.active / 1e9 + 0.05, 1)
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    assert count.total == sum(weight.numel() for weight in theirs.parameters())


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "Mistral-7B-v0.3"])
def test_published_models_go_back_to_their_family(tmp_path: Path, name: str) -> None:
    """But for Mistral, which is a Llama."""
    family, model = read(tmp_path, CONFIGS[name])
    assert family_for(model, CONFIGS[name]["vocab_size"], 2048)[0] is family


@pytest.mark.parametrize("name", ["gpt2", "GLM-4.5-Air"])
def test_a_folder_without_weights_says_which_it_lacks(tmp_path: Path, name: str) -> None:
    """The first of the table, by its name and shape."""
    config = CONFIGS[name]
    embedding = "wte" if name == "gpt2" else r"model\.embed_tokens"
    size = config["vocab_size"], config["n_embd"] if name == "gpt2" else config["hidden_size"]
    with pytest.raises(ValueError, match=rf"has no .*{embedding}\.weight \[{size[0]}, {size[1]}\]"):
        open_source(folder_of(tmp_path, config), frozenset(), Layout())


# Refusals -------------------------------------------------------------------------------------------------------------

SMALL = {"model_type": "llama", "hidden_size": 32, "num_attention_heads": 4, "vocab_size": 90, "num_hidden_layers": 1}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"attention_bias": True}, "attention_bias=True, which no recipe can say: only False can be converted"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"pretraining_tp": 2}, "pretraining_tp=2"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'.*only 'silu'"),
        ({"logits_scaling": 8.0}, "logits_scaling=8.0, which this version does not know in a llama.*--ignore"),
        ({"new_switch": False}, "new_switch=False, which this version does not know"),
        ({"model_type": "mistral", "sliding_window": 4096}, "sliding_window=4096"),
        ({"model_type": "qwen3", "use_sliding_window": True, "max_window_layers": 0}, "layer_types with sliding"),
        ({"model_type": "olmoe", "clip_qkv": 8.0}, "clip_qkv=8.0"),
        ({"model_type": "glm4_moe", "hidden_act": "relu"}, "hidden_act='relu'"),
        ({"model_type": "gpt2", "activation_function": "relu"}, "activation_function='relu': only 'gelu_new' or"),
        ({"model_type": "gpt2", "scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
        ({"model_type": "qwen3", "num_key_value_heads": 3}, "num_query_groups=3"),
    ],
)
def test_refused_by_field(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        read(tmp_path, {**SMALL, **changes})


def test_what_is_ignored(tmp_path: Path) -> None:
    plain = read(tmp_path, SMALL)
    for changes in ({"attention_bias": True}, {"new_switch": 3}, {"hidden_act": "relu"}):
        assert read(tmp_path, {**SMALL, **changes}, *changes) == plain
    assert read(tmp_path, {**SMALL, "new_switch": None}) == plain, "what is null says nothing"


# Rotary embedding -----------------------------------------------------------------------------------------------------

YARN = {"factor": 4.0, "original_max_position_embeddings": 2048}
ROPES: list[dict[str, Any]] = [
    {"theta": 5e5},
    {"theta": 1e4, "percent": 0.5},
    {"scaling": "linear", "factor": 3.0},
    {"scaling": "llama3", "factor": 8.0, "low_freq_factor": 2.0, "high_freq_factor": 5.0, **{**YARN, "factor": 8.0}},
    {"scaling": "yarn", **YARN},
    {"scaling": "yarn", **YARN, "beta_fast": 16.0, "beta_slow": 2.0, "attention_factor": 1.25},
]


@pytest.mark.parametrize("rope", ROPES)
def test_rope_there_and_back(rope: dict[str, Any]) -> None:
    fields = {"num_layers": 1, "hidden_size": 32, "num_attention_heads": 4, "max_position_embeddings": 4096}
    model = Model.model_validate({**fields, "rope": rope})
    written = write_rope(model)
    assert written["rope_theta"] == model.rope.theta
    read_back = {**fields, "rope": read_rope({"rope_parameters": written, "max_position_embeddings": 4096})}
    assert Model.model_validate(read_back) == model
    assert LLAMA.config(model, 90, 64)["rope_parameters"] == written


def test_yarn_without_an_original_length(tmp_path: Path) -> None:
    """transformers takes max_position_embeddings; the exported config says it."""
    config = {**SMALL, "max_position_embeddings": 1024, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}
    _, model = read(tmp_path, {**config, "rope_theta": 1e6})
    assert model.rope.original_max_position_embeddings == 1024
    assert (model.rope.scaling, model.rope.theta, model.rope.factor) == ("yarn", 1e6, 4.0)
    assert model.rope.attention_factor is None
    written = LLAMA.config(model, 90, 64)["rope_parameters"]
    assert written["original_max_position_embeddings"] == 1024


def test_yarn_of_a_config_that_is_not_filled_in() -> None:
    theirs = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": None}
    ours = read_rope({"rope_parameters": theirs, "max_position_embeddings": 512})
    assert ours["original_max_position_embeddings"] == 512


def test_yarn_of_an_older_config(tmp_path: Path) -> None:
    """Qwen2.5's card: the type as ``type``."""
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    _, model = read(tmp_path, {**CONFIGS["Qwen2.5-7B"], "rope_scaling": scaling})
    assert (model.rope.scaling, model.rope.original_max_position_embeddings) == ("yarn", 32768)


@pytest.mark.parametrize(
    ("scaling", "reason"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, "rope_type='dynamic': only 'default' or 'linear' or"),
        ({"rope_type": "yarn", "factor": 2.0, "truncate": False}, "rope_parameters.truncate=False for rope_type=yarn"),
        ({"rope_type": "yarn", "factor": 2.0, "mscale": 0.7}, "rope_parameters.mscale=0.7 for rope_type=yarn"),
        ({"rope_type": "linear", "factor": 2.0, "beta_fast": 3.0}, "rope_parameters.beta_fast=3.0"),
    ],
)
def test_rope_that_no_recipe_can_say(tmp_path: Path, scaling: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        read(tmp_path, {**SMALL, "rope_scaling": scaling})
