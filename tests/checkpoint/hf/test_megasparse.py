"""The table of tensors and the config of our own family, against its modelling file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from megasparse.checkpoint.hf.family import resolved
from megasparse.checkpoint.hf.megasparse import AUTO_MAP, MEGASPARSE, MODELING
from megasparse.checkpoint.hf.modeling_megasparse import MegasparseConfig, MegasparseForCausalLM
from megasparse.config import Model
from tests import small

VOCAB, POSITIONS = 90, 64
SPARSE = {"block_size": 8, "blocks": 4, "local_blocks": 1}
NSA = {**SPARSE, "selector": "nsa", "compression_size": 8, "compression_stride": 4, "window_blocks": 1}
SHARED = {"shared_expert_ffn_hidden_size": 40, "bias_update_rate": 0.001, "score_function": "sigmoid"}
GPT = {"normalization": "LayerNorm", "position_embedding": "learned", "bias": "all"}
YARN = {"scaling": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    # What one model can have at once, and then what only others can.
    "all": (
        {
            "num_layers": 3,
            "qk_norm": "head",
            "bias": "qkv",
            "rope": YARN,
            "sparse_attention": {**NSA, "layers": [1, 0, 1]},
        },
        {**SHARED, "layers": [0, 1, 1], "num_groups": 4, "top_k_groups": 2},
    ),
    "layer norms, learned positions, biases": ({**GPT, "activation": "swiglu"}, None),
    "gelu, tied": ({**GPT, "activation": "gelu", "tie_embeddings": True, "max_position_embeddings": 32}, None),
    "norms after": ({"norm_placement": "post", "qk_norm": "full", "tie_embeddings": True}, {"layers": 2}),
    "layer norms after": ({**GPT, "norm_placement": "post", "activation": "gelu_tanh"}, None),
    "gate": ({"sparse_attention": {**SPARSE, "selector": "gate", "gate_dim": 8}}, {}),
    "clusters": ({"sparse_attention": {**SPARSE, "selector": "clusters", "clusters": 3}}, {"score_scale": 2.0}),
    "local": ({"sparse_attention": {"selector": "local", "block_size": 4, "layers": [0, 1]}}, None),
    "open": ({"num_query_groups": None, "ffn_hidden_size": None}, None),
}


def model_of(name: str) -> Model:
    model, moe = MODELS[name]
    return small.recipe(model, moe).model


@pytest.mark.parametrize("name", MODELS)
def test_the_table_has_the_names_and_shapes_of_the_file(name: str) -> None:
    model = model_of(name)
    config = MegasparseConfig(**MEGASPARSE.config(model, VOCAB, POSITIONS))
    with torch.device("meta"):
        theirs = MegasparseForCausalLM(config).state_dict()
    if model.tie_embeddings:
        del theirs["lm_head.weight"]
    tensors = MEGASPARSE.tensors(model, VOCAB, POSITIONS)
    parts = {part.name: part.shape for _, pieces in tensors.values() for piece in pieces for part in piece.parts}
    assert parts == {key: tuple(tensor.shape) for key, tensor in theirs.items()}
    left = {key.rsplit(".", 2)[1] for key, (_, pieces) in tensors.items() if not pieces}
    assert left == ({"router"} if model.moe else set())


def test_every_entry_of_the_table_is_used() -> None:
    used: set[str] = set()
    for name in MODELS:
        for key in MEGASPARSE.tensors(model_of(name), VOCAB, POSITIONS):
            used.add(key.split(".", 3)[3] if key.startswith("decoder.layers.") else key)
    assert {*MEGASPARSE.layer, *MEGASPARSE.top} - used == set()


@pytest.mark.parametrize("name", MODELS)
def test_configs_there_and_back(tmp_path: Path, name: str) -> None:
    """Ours, theirs, on disk, and ours again; fields left open are said."""
    model = model_of(name)
    config = MEGASPARSE.config(model, VOCAB, POSITIONS)
    assert config["auto_map"] == AUTO_MAP
    MegasparseConfig(**config, architectures=[MEGASPARSE.architecture]).save_pretrained(tmp_path)
    (tmp_path / MODELING.name).write_bytes(MODELING.read_bytes())
    on_disk = MegasparseConfig.from_pretrained(tmp_path).to_dict()
    said = resolved(model, VOCAB, POSITIONS)
    for raw in (config, on_disk):
        assert resolved(MEGASPARSE.model(raw), 1, 1) == said | {"vocab_size": 1}
        assert MEGASPARSE.model(raw).vocab_size == VOCAB
    assert None not in (said["head_dim"], said["num_query_groups"], said["ffn_hidden_size"])


def test_what_only_training_has_comes_back() -> None:
    model = small.recipe(
        {"attention_dropout": 0.1, "init_std": 0.3}, {"aux_loss_coefficient": 0.5, "jitter": 0.1}
    ).model
    config = MEGASPARSE.config(model, VOCAB, POSITIONS)
    back = MEGASPARSE.model(config)
    assert (back.attention_dropout, back.init_std) == (0.1, 0.3)
    assert back.moe is not None
    assert (back.moe.aux_loss_coefficient, back.moe.jitter) == (0.5, 0.1)


def test_automatic_classes_are_in_the_file() -> None:
    text = MODELING.read_text()
    for reference in AUTO_MAP.values():
        module, name = reference.split(".")
        assert module == MODELING.stem
        assert f"class {name}(" in text
    with pytest.raises(ValueError, match="megasparse"):
        AutoConfig.for_model("megasparse")  # transformers has none of this name


def test_fields_that_are_wrong_are_named() -> None:
    config = MEGASPARSE.config(model_of("local"), VOCAB, POSITIONS)
    with pytest.raises(ValueError, match=r"the model of config\.json: .*num_query_groups=3"):
        MEGASPARSE.model({**config, "num_query_groups": 3})
