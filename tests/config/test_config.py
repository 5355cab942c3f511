"""The recipe: round trip, overrides, what goes together, and one line for each thing a user can get wrong."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from megasparse.config import Recipe, dump_recipe, load_recipe, parse_recipe
from tests.config.recipes import assert_refused, raw
from tests.helpers import REPOSITORY


def write(folder: Path, recipe: dict[str, Any]) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def test_round_trip(tmp_path: Path):
    recipe = parse_recipe(raw())
    path = tmp_path / "resolved.yaml"
    path.write_text(dump_recipe(recipe))
    assert load_recipe(path) == recipe


def test_derived_numbers():
    recipe = parse_recipe(raw())
    assert (recipe.tokens_per_step, recipe.total_tokens) == (512, 5120)


def test_overrides(tmp_path: Path):
    path = write(tmp_path, raw())
    overrides = [
        "model.num_layers=8",
        "optimizer.lr=1e-3",  # YAML 1.1 reads this as a string, pydantic as the number meant
        "data.sets.0.weight=2",
        "model.moe.capacity_factor=1.25",
        "model.moe.capacity_factor=null",
        "name=other",
    ]
    recipe = load_recipe(path, overrides)
    assert recipe.model.num_layers == 8
    assert recipe.optimizer.lr == 1e-3
    assert recipe.data.sets[0].weight == 2
    assert recipe.model.moe is not None
    assert recipe.model.moe.capacity_factor is None
    assert recipe.name == "other"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.num_layer=4", "model.num_layer: unknown key"),
        ("num_layers", "override 'num_layers' is not of the form section.key=value"),
        ("=4", "is not of the form"),
        ("name.first=x", "override 'name.first=x': name is not a section"),
        ("data.sets.3.weight=1", "'3' is not an index below 1"),
        ("model.num_layers=[", "the value is not YAML"),
    ],
)
def test_wrong_override(tmp_path: Path, override: str, message: str):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        load_recipe(write(tmp_path, raw()), [override])
    assert "\n" not in str(error.value)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"name": "a/b"}, "name = 'a/b': "),
    ({"training.micro_batch_size": 3}, "global_batch_size=8 is not divisible by training.micro_batch_size=3"),
    ({"data.reset_position_ids": True}, "needs model.position_embedding=learned"),
    (
        {"model.position_embedding": "learned", "model.max_position_embeddings": 32},
        "data.seq_length=64 is more than model.max_position_embeddings=32",
    ),
    ({"schedule.warmup_tokens": 6000}, "is more than the run's 5120 tokens"),
    ({"training.recompute": "full", "model.moe.aux_loss_scope": "all_layers"}, "set recompute=none"),
    (
        {"training.fp8": {"recipe": "delayed", "num_layers_at_start_in_bf16": 1, "num_layers_at_end_in_bf16": 3}},
        "_start_in_bf16=1 and num_layers_at_end_in_bf16=3 leave none of model.num_layers=4 in FP8: lower one",
    ),
    ({"training.fp8": {"recipe": "block", "experts": False}, "model.moe": None}, "experts=false without model.moe"),
    ({"sparsity.weights": {"method": "asp"}}, "method=asp prunes a trained model: set training.initial_checkpoint, or"),
    (
        {"sparsity.weights": {"method": "ste", "targets": ["router"]}},
        "sparsity.weights.targets: 'router' is in no name of decoder.layers.0.self_attention.linear_qkv.weight, ",
    ),
]


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=[message for _, message in WRONG])
def test_what_is_wrong_is_said(changes: dict[str, Any], message: str):
    assert_refused(changes, message)


def test_every_wrong_field_is_named():
    with pytest.raises(ValueError, match="modle: unknown key") as error:
        parse_recipe(raw(**{"modle": 1, "training.steps": 0}))
    assert "training.steps = 0" in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"), [("a: [", "is not YAML"), ("- 1", "is not a recipe"), ("", "is not a recipe")]
)
def test_wrong_file(tmp_path: Path, text: str, message: str):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        load_recipe(path)
    assert "\n" not in str(error.value)


def test_no_file(tmp_path: Path):
    with pytest.raises(ValueError, match="no recipe at"):
        load_recipe(tmp_path / "none.yaml")


def test_sparse_weights_are_chosen_by_name():
    """The names are those of the model's parameters: tests/layers/test_linear.py."""
    moe = {"model.moe.layers": [0, 1, 1, 0], "model.moe.shared_expert_ffn_hidden_size": 32}
    default = parse_recipe(raw(**moe, **{"sparsity.weights": {"method": "ste"}})).sparse_weights
    assert [name for name in default if ".layers.0." in name] == [
        f"decoder.layers.0.mlp.linear_fc{i}.weight" for i in (1, 2)
    ]
    assert [name.removeprefix("decoder.layers.1.mlp.") for name in default if ".layers.1." in name] == [
        *(f"experts.w{i}" for i in (1, 2, 3)),
        *(f"shared_experts.linear_fc{i}.weight" for i in (1, 2)),
    ]
    chosen = {"method": "ste", "targets": [r"layers\.[02].*qkv", "proj"]}
    found = parse_recipe(raw(**moe, **{"sparsity.weights": chosen})).sparse_weights
    assert [name.split(".")[2:5:2] for name in found] == [
        *(["0", "linear_qkv"], ["0", "linear_proj"], ["1", "linear_proj"]),
        *(["2", "linear_qkv"], ["2", "linear_proj"], ["3", "linear_proj"]),
    ]
    assert parse_recipe(raw()).sparse_weights == []


def test_examples_are_valid():
    for path in (REPOSITORY / "examples").glob("*.yaml"):
        assert isinstance(load_recipe(path), Recipe), path
