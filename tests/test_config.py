"""The recipe: round trip, overrides, and one line for each thing a user can get wrong."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from megasparse.config import Recipe, dump_recipe, load_recipe, parse_recipe


def raw(**changes: Any) -> dict[str, Any]:
    """A valid recipe, with dotted changes."""
    recipe: dict[str, Any] = {
        "name": "tiny",
        "data": {"sets": [{"path": "data/stdlib"}], "seq_length": 64},
        "model": {
            "num_layers": 4,
            "hidden_size": 64,
            "num_attention_heads": 4,
            "num_query_groups": 2,
            "moe": {"num_experts": 8, "top_k": 2, "ffn_hidden_size": 32},
        },
        "training": {"steps": 10, "global_batch_size": 8, "micro_batch_size": 2},
    }
    for path, value in changes.items():
        *parents, leaf = path.split(".")
        node = recipe
        for parent in parents:
            node = node.setdefault(parent, {})
        if value is None:
            node.pop(leaf, None)
        else:
            node[leaf] = value
    return recipe


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
    recipe = parse_recipe(raw(**{"model.moe.layers": 2}))
    assert (recipe.tokens_per_step, recipe.total_tokens) == (512, 5120)
    assert recipe.model.moe_layers == [False, True, False, True]
    assert (recipe.model.kv_heads, recipe.model.head_size, recipe.model.ffn_size) == (2, 16, 256)
    assert parse_recipe(raw(**{"model.moe.layers": [1, 0, 0, 1]})).model.moe_layers == [True, False, False, True]
    assert parse_recipe(raw(**{"model.moe": None})).model.moe_layers == [False] * 4


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
    ({"modle": {}}, "modle: unknown key"),
    ({"model.moe.experts": 4}, "model.moe.experts: unknown key"),
    ({"model.num_layers": None}, "model.num_layers: missing"),
    ({"model.num_layers": 0}, "model.num_layers = 0: "),
    ({"model.num_layers": "four"}, "model.num_layers = 'four': "),
    ({"name": "a/b"}, "name = 'a/b': "),
    ({"model.moe.top_k": 9}, "top_k=9 is more than num_experts=8"),
    ({"model.hidden_size": 66}, "hidden_size=66 is not divisible by num_attention_heads=4"),
    ({"model.num_query_groups": 3}, "num_attention_heads=4 is not divisible by num_query_groups=3"),
    ({"model.head_dim": 15}, "head_dim=15 is odd"),
    ({"model.normalization": "LayerNorm", "model.qk_norm": "head"}, "qk_norm=head needs normalization=RMSNorm"),
    ({"model.moe.layers": [1, 0]}, "moe.layers has 2 flags for num_layers=4"),
    ({"model.moe.layers": 5}, "moe.layers selects no layer"),
    ({"model.activation": "gelu"}, "moe experts are bias-free SwiGLU"),
    ({"model.moe.num_groups": 4}, "num_groups and top_k_groups go together"),
    ({"model.moe.num_groups": 3, "model.moe.top_k_groups": 1}, "num_experts=8 is not divisible by num_groups=3"),
    ({"model.moe.num_groups": 8, "model.moe.top_k_groups": 4}, "num_experts / num_groups must be >= 2"),
    ({"model.moe.num_groups": 4, "model.moe.top_k_groups": 5}, "top_k_groups=5 is more than num_groups=4"),
    (
        {"model.moe.num_groups": 4, "model.moe.top_k_groups": 1, "model.moe.top_k": 3},
        "top_k=3 is more than the experts in top_k_groups=1 groups",
    ),
    ({"model.rope.scaling": "yarn"}, "scaling=yarn needs original_max_position_embeddings"),
    ({"training.micro_batch_size": 3}, "global_batch_size=8 is not divisible by training.micro_batch_size=3"),
    ({"data.reset_position_ids": True}, "needs model.position_embedding=learned"),
    (
        {"model.position_embedding": "learned", "model.max_position_embeddings": 32},
        "data.seq_length=64 is more than model.max_position_embeddings=32",
    ),
    ({"schedule.warmup_tokens": 6000}, "is more than the run's 5120 tokens"),
    ({"parallel.zero_stage": 4}, "parallel.zero_stage = 4: "),
    ({"training.recompute": "full", "model.moe.aux_loss_scope": "all_layers"}, "set recompute=none"),
    ({"training.teacher": {"weight": 0.5}}, "training.teacher.checkpoint: missing"),
    ({"training.teacher": {"checkpoint": "x", "weight": 1.5}}, "training.teacher.weight = 1.5: "),
    ({"training.teacher": {"checkpoint": "x", "temperature": 0}}, "training.teacher.temperature = 0: "),
    ({"training.fp8": {"recipe": "mxfp8"}}, "training.fp8.recipe = 'mxfp8': "),
    ({"training.fp8": {"recipe": "block", "margin": 1}}, "training.fp8: margin=1 with recipe=block: it has none"),
    ({"training.fp8": {"recipe": "current", "amax_history_len": 9}}, "amax_history_len=9 with recipe=current: it has"),
    (
        {"training.fp8": {"recipe": "current", "amax_compute_algo": "most_recent"}},
        "amax_compute_algo=most_recent with recipe=current: it has none, unset it",
    ),
    (
        {"training.fp8": {"recipe": "delayed", "num_layers_at_start_in_bf16": 1, "num_layers_at_end_in_bf16": 3}},
        "_start_in_bf16=1 and num_layers_at_end_in_bf16=3 leave none of model.num_layers=4 in FP8: lower one",
    ),
    ({"training.fp8": {"recipe": "block", "experts": False}, "model.moe": None}, "experts=false without model.moe"),
    ({"sparsity.weights": {"method": "sr_ste"}}, "method=sr_ste needs decay: 6e-5 to 2e-4"),
    ({"sparsity.weights": {"method": "ste", "decay": 1e-4}}, "decay=0.0001 with method=ste: it has none, unset it"),
    ({"sparsity.weights": {"method": "s_ste", "mask": "row"}}, "mask=row with method=s_ste: it has none"),
    ({"sparsity.weights": {"method": "s_ste", "dense_end": 0.1}}, "dense_end=0.1 with method=s_ste: it has none"),
    ({"sparsity.weights": {"method": "asp", "refresh_interval": 5, "dense_start": 0.5}}, "refresh_interval=5 with "),
    ({"sparsity.weights": {"method": "asp"}}, "method=asp prunes a trained model: set training.initial_checkpoint, or"),
    (
        {"sparsity.weights": {"method": "sr_ste", "decay": 1e-4, "ramp": 0.9, "dense_end": 0.2}},
        "dense_start=0.0 + ramp=0.9 + dense_end=0.2 are more than the run",
    ),
    ({"sparsity.weights": {"method": "ast"}}, "method=ast needs decay"),
    ({"sparsity.weights": {"method": "ste", "boost": 16}}, "boost=16 with method=ste: it has none"),
    ({"sparsity.weights": {"method": "ast", "decay": 1, "boost": 16, "dense_end": 0.1}}, "boost=16 with dense_end=0.1"),
    ({"sparsity.weights": {"method": "ste", "pattern": "1:4"}}, "pattern=1:4 with method=ste: it has none"),
    ({"sparsity.weights": {"method": "mdgf", "pattern": "4:4"}}, "pattern=4:4 masks nothing"),
    ({"sparsity.weights": {"method": "mdgf", "pattern": "half"}}, "sparsity.weights.pattern = 'half': "),
    (
        {"sparsity.weights": {"method": "mdgf", "pattern": "1:8", "mask": "transposable"}},
        "mask=transposable with pattern",
    ),
    ({"sparsity.weights": {"method": "sdgf"}}, "set ramp"),
    ({"sparsity.weights": {"method": "ste", "targets": ["("]}}, "targets: '(' is not a regular expression"),
    (
        {"sparsity.weights": {"method": "ste", "targets": ["router"]}},
        "sparsity.weights.targets: 'router' is in no name of decoder.layers.0.self_attention.linear_qkv.weight, ",
    ),
]


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=[message for _, message in WRONG])
def test_wrong_recipe_is_one_line_that_says_what(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        parse_recipe(raw(**changes), source="recipe.yaml")
    assert str(error.value).startswith("recipe.yaml: ")
    assert "\n" not in str(error.value)


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


def test_values_are_fixed_once_read():
    recipe = parse_recipe(raw())
    with pytest.raises(ValueError, match="frozen"):
        recipe.name = "other"  # type: ignore[misc]


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
    for path in (Path(__file__).parent.parent / "examples").glob("*.yaml"):
        assert isinstance(load_recipe(path), Recipe), path
