"""Which family says a model."""

from __future__ import annotations

from typing import Any

import pytest
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from megasparse.checkpoint.hf.families import FAMILIES, family_for, family_of
from megasparse.checkpoint.hf.megasparse import MEGASPARSE
from megasparse.config import Model
from tests import small

GPT2 = {"normalization": "LayerNorm", "position_embedding": "learned", "bias": "all", "num_query_groups": 4}
SIGMOID = {"score_function": "sigmoid", "bias_update_rate": 0.001}
FIRST: list[tuple[str, dict[str, Any], dict[str, Any] | None]] = [  # the first family, and what the model has
    ("gpt2", {**GPT2, "activation": "gelu"}, None),
    ("gpt2", {**GPT2, "activation": "gelu_tanh", "tie_embeddings": True}, None),
    ("llama", {}, None),
    ("llama", {"head_dim": 16, "rope": {"scaling": "linear", "factor": 2.0}}, None),
    ("qwen2", {"bias": "qkv"}, None),
    ("qwen3", {"qk_norm": "head"}, None),
    ("olmo2", {"qk_norm": "full", "norm_placement": "post"}, None),
    ("mixtral", {}, {}),
    ("olmoe", {"qk_norm": "full"}, {}),
    ("olmoe", {"qk_norm": "full"}, {"normalize_scores": False}),
    ("qwen3_moe", {"qk_norm": "head"}, {}),
    ("qwen3_moe", {"qk_norm": "head"}, {"layers": 2}),
    ("glm4_moe", {}, SIGMOID),
    ("glm4_moe", {"qk_norm": "head", "bias": "qkv"}, {**SIGMOID, "shared_expert_ffn_hidden_size": 96}),
    ("glm4_moe", {}, {**SIGMOID, "num_groups": 4, "top_k_groups": 2, "layers": [0, 1]}),
    ("megasparse", {**GPT2, "activation": "swiglu"}, None),
    ("glm4_moe", {"hidden_size": 36, "num_attention_heads": 8, "head_dim": 16}, SIGMOID),  # 36 / 8 is no number
    ("megasparse", {"bias": "all"}, None),
    ("megasparse", {"qk_norm": "full"}, None),
    ("megasparse", {"bias": "qkv", "head_dim": 16}, None),  # a qwen2 has hidden_size / heads
    ("megasparse", {}, {"score_scale": 2.0}),
    ("megasparse", {}, {"layers": 2}),  # a mixtral has experts everywhere
    ("megasparse", {}, {"score_function": "sigmoid"}),  # and a glm4_moe biases
    ("megasparse", {}, {**SIGMOID, "shared_expert_ffn_hidden_size": 40}),  # as wide as so many experts
    ("megasparse", {}, {**SIGMOID, "layers": [1, 0]}),  # and its dense layers first
    ("megasparse", {"sparse_attention": {"selector": "local", "block_size": 4}}, None),
]


def model_of(model: dict[str, Any], moe: dict[str, Any] | None) -> Model:
    return small.recipe(model, moe).model


@pytest.mark.parametrize(("name", "model", "moe"), FIRST, ids=lambda value: str(value))
def test_the_first_that_can_say_it(name: str, model: dict[str, Any], moe: dict[str, Any] | None) -> None:
    said = model_of(model, moe)
    family, config = family_for(said, 90, 64)
    assert family.model_type == name
    assert family_for(said, 90, 64, name) == (family, config)
    for other in FAMILIES[: FAMILIES.index(family)]:
        with pytest.raises(ValueError, match=r"^model\.|^transformers refuses the config|^the model of config"):
            other.config(said, 90, 64)


def test_every_family_is_the_first_of_some_model() -> None:
    """But for Mistral, which has nothing that Llama has not."""
    assert {family.model_type for family in FAMILIES} - {name for name, _, _ in FIRST} == {"mistral"}
    family, _ = family_for(model_of({}, None), 90, 64, "mistral")
    assert family.model_type == "mistral"


def test_names() -> None:
    names = [family.model_type for family in FAMILIES]
    assert len(set(names)) == len(names)
    assert FAMILIES[-1] is MEGASPARSE, "it says any model"
    for family in FAMILIES[:-1]:
        assert MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family.model_type] == family.architecture
        assert family_of(family.model_type, {}) is family


def test_mla_is_said_by_name() -> None:
    with pytest.raises(ValueError, match="model_type='deepseek_v3' and has kv_lora_rank=512, multi-head latent"):
        family_of("deepseek_v3", {"kv_lora_rank": 512})


@pytest.mark.parametrize("name", ["gemma3_text", "Llama", ""])
def test_others_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"model_type='{name}': only gpt2, llama, .*, megasparse can be converted"):
        family_of(name, {"hidden_size": 3})
    with pytest.raises(ValueError, match="can be converted"):
        family_for(model_of({}, None), 90, 64, name)
