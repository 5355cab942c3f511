"""Layouts: their notation, what each impossible one breaks, the nearest possible ones, the layers of each stage."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest

from megasparse.config import parse_recipe
from megasparse.layout import Layout, check_layout, nearest_layouts, notes, stage_layers
from tests import small

# The notation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "layout", "world"),
    [
        ("single", Layout(), 1),
        ("tp2pp2ep2", Layout(tp=2, pp=2, ep=2), 4),
        ("tp2pp2ep2dp2", Layout(tp=2, pp=2, ep=2, dp=2), 8),
        ("ep4dp4", Layout(ep=4, dp=4), 4),
        ("tp2ep4dp2+sp", Layout(tp=2, ep=4, dp=2, sequence_parallel=True), 4),
        ("pp2vp2cp2", Layout(pp=2, vp=2, cp=2), 4),
        ("dp2+zero2", Layout(dp=2, zero_stage=2), 2),
        ("single+zero0", Layout(zero_stage=0), 1),
        ("tp2+sp+zero0+offload", Layout(tp=2, sequence_parallel=True, zero_stage=0, offload_optimizer=True), 2),
    ],
)
def test_notation(text: str, layout: Layout, world: int) -> None:
    assert Layout.parse(text) == layout
    assert str(layout) == text
    assert layout.world_size == world


@pytest.mark.parametrize(
    ("short", "long"), [("ep4", "ep4dp4"), ("tp2ep4", "tp2ep4dp2"), ("cp2ep2", "cp2ep2"), ("pp2ep2", "pp2ep2dp2")]
)
def test_data_parallelism_that_experts_need(short: str, long: str) -> None:
    assert str(Layout.parse(short)) == long


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not a layout: write it like tp2pp2ep2"),
        ("tp", "is not a layout"),
        ("tp0", "is not a layout"),
        ("xp2", "is not a layout"),
        ("tp2tp4", "says tp twice"),
        ("tp2+fast", "unknown flag 'fast'"),
    ],
)
def test_what_is_no_notation(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Layout.parse(text)


def test_a_recipe_and_a_world_are_a_layout() -> None:
    recipe = small.recipe(moe={}, parallel={"tp": 2, "ep": 4})
    assert str(check_layout(recipe, 4)) == "tp2ep4dp2"
    assert str(check_layout(recipe, 8)) == "tp2ep4dp4"
    again = parse_recipe({**recipe.model_dump(mode="json"), "parallel": Layout.parse("tp2ep4").parallel()})
    assert again == recipe


# What is possible ---------------------------------------------------------------------------------------------------

DENSE = {"model.moe": None}
BY_QUERY_BLOCKS = {"selector": "local", "block_size": 5, "query_block_size": 5}
TILES = {"model.head_dim": 64}
TWO_FOUR = {"sparsity.weights": {"method": "ste", "targets": ["."]}}
WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("tp4", {}, "model.num_query_groups=2 is not divisible by tp=4"),
    ("tp2", {"model.ffn_hidden_size": 49}, "model.ffn_hidden_size=49 is not divisible by tp=2"),
    (
        "tp2",
        {"model.moe.shared_expert_ffn_hidden_size": 7},
        "model.moe.shared_expert_ffn_hidden_size=7 is not divisible by tp=2",
    ),
    ("single+sp", {}, "sequence_parallel=true needs tp > 1"),
    *[
        (layout, {"training.fp8": {"recipe": "block"}, **changes}, message)
        for layout, changes, message in (
            ("tp2", {"model.head_dim": 48}, "(num_attention_heads + 2 num_query_groups)=384 is not divisible by 128 x"),
            ("tp2", {"model.head_dim": 32}, "head_dim x num_attention_heads=128 is not divisible by 128 x tp=2: "),
            ("tp2", TILES, None),
            ("tp2", {**TILES, **DENSE, "model.ffn_hidden_size": 384}, "ffn_hidden_size=384 is not divisible by 128 x"),
            (
                "tp2",
                {**TILES, "model.moe.shared_expert_ffn_hidden_size": 64},
                "moe.shared_expert_ffn_hidden_size=64 is not divisible by 128 x tp=2: training.fp8 has such tiles",
            ),
            ("cp2", {"data.seq_length": 128}, "data.seq_length=128 / (2 * cp=4) x training.micro_batch_size=2 is not"),
            ("cp2", {"data.seq_length": 256}, None),
            ("ep2", {}, None),
        )
    ],
    ("cp2", {"data.seq_length": 26}, "data.seq_length=26 is not divisible by 2 * cp=4"),
    ("tp2", {"data.seq_length": 25}, "data.seq_length=25 / cp=1 is not divisible by tp=2"),
    ("tp2cp2", {"data.seq_length": 8 * 3 + 4}, None),  # 28 / 2 = 14 is even
    (
        "cp2",
        {"model.sparse_attention": BY_QUERY_BLOCKS},
        "query_block_size=5 does not divide data.seq_length=24 / (2 * ",
    ),
    ("cp2", {"model.sparse_attention": {**BY_QUERY_BLOCKS, "query_block_size": 3}}, None),
    ("tp2", TWO_FOUR | {"model.ffn_hidden_size": 52, **DENSE}, "model.ffn_hidden_size=52 is not divisible by 4 x tp=2"),
    ("tp2", TWO_FOUR | {"model.ffn_hidden_size": 52}, None),  # no layer has one
    ("tp2", TWO_FOUR | {"model.hidden_size": 30, "model.head_dim": 8}, "model.hidden_size=30 is not divisible by 4: "),
    ("single", TWO_FOUR | {"model.moe.ffn_hidden_size": 46}, "model.moe.ffn_hidden_size=46 is not divisible by 4: "),
    (
        "tp2",
        TWO_FOUR | {"model.moe.shared_expert_ffn_hidden_size": 12},
        "model.moe.shared_expert_ffn_hidden_size=12 is not divisible by 4 x tp=2",
    ),
    (
        "tp2",
        TWO_FOUR | {"model.num_attention_heads": 2, "model.head_dim": 2},
        "head_dim x (num_attention_heads + 2 num_query_groups)=12 is not divisible by 4 x tp=2",
    ),
    ("ep2", DENSE, "ep=2 needs model.moe: a dense model has no experts"),
    ("ep3", {}, "model.moe.num_experts=8 is not divisible by ep=3"),
    ("ep4dp2", {}, "ep=4 does not divide the 2 processes of a pipeline stage"),
    ("vp2", {}, "vp=2 needs pp > 1"),
    ("pp4vp2", {}, "pp * vp = 8 stages are more than model.num_layers=4"),
    ("pp2", {"parallel.layers_per_stage": [1, 2]}, "parallel.layers_per_stage=[1, 2] must have pp * vp = 2 numbers"),
    ("pp2", {"parallel.layers_per_stage": [4]}, "parallel.layers_per_stage=[4] must have pp * vp = 2 numbers"),
    ("pp2", {"parallel.layers_per_stage": [1, 3]}, None),
    ("dp8", {}, "training.global_batch_size=8 is not divisible by micro_batch_size=2 x dp=8"),
    ("pp4vp2", {"model.num_layers": 8, "training.micro_batch_size": 4}, "needs micro-batches in multiples of pp=4"),
    ("pp2", {"model.moe.aux_loss_scope": "all_layers"}, "it needs pp=1"),
    ("single+zero0", {"training.precision": "bf16"}, "training.precision=bf16 needs zero_stage >= 1"),
    ("single+zero0+offload", {}, "offload_optimizer=true needs zero_stage >= 1"),
    ("pp2+zero2", {}, "zero_stage=2 needs pp=1, not 2: it reduces gradients in each backward pass"),
    ("dp2+zero3", {}, "zero_stage=3 is not possible: DeepSpeed gathers ZeRO-3 weights in its own forward"),
]


def four_layers(layout: Layout, changes: dict[str, Any]) -> Any:
    raw = small.recipe({"num_layers": 4}, {}).model_dump(mode="json")
    raw["parallel"] = layout.parallel()
    for path, value in changes.items():
        *parents, leaf = path.split(".")
        node = raw
        for key in parents:
            node = node[key]
        node[leaf] = value
    return parse_recipe(raw)


@pytest.mark.parametrize(("text", "changes", "message"), WRONG, ids=[f"{w[0]} {w[2]}" for w in WRONG])
def test_rules(text: str, changes: dict[str, Any], message: str | None) -> None:
    layout = Layout.parse(text)
    recipe = four_layers(layout, changes)
    if message is None:
        assert check_layout(recipe, layout.world_size) == layout
        return
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        check_layout(recipe, layout.world_size)
    assert str(error.value).startswith(f"layout {layout} on {layout.world_size} processes: ")
    assert "\n" not in str(error.value)


def test_a_world_that_cannot_be_split() -> None:
    """The global batch of 8 is not for 3 replicas either."""
    message = (
        "layout tp2 on 3 processes: tp=2 x pp=1 x cp=1 do not divide them: start a multiple of 2 (the nearest possi"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        check_layout(four_layers(Layout(tp=2), {}), 3)


@pytest.mark.parametrize(
    ("text", "changes", "nearest"),
    [
        ("tp4", {}, ["tp2dp2", "dp4", "tp2cp2"]),
        ("pp2+zero2", {}, ["pp2", "dp2+zero2", "cp2+zero2"]),
        ("ep2", DENSE, ["dp2", "cp2", "pp2"]),
        ("dp8", {}, ["cp2dp4", "ep2cp2dp4", "pp2dp4"]),
    ],
)
def test_the_nearest_possible_layouts(text: str, changes: dict[str, Any], nearest: list[str]) -> None:
    layout = Layout.parse(text)
    recipe = four_layers(layout, changes)
    found = nearest_layouts(recipe, layout, layout.world_size)
    assert found[0] == Layout.parse(nearest[0])
    for candidate in found:  # each of them passes the same check
        assert candidate.world_size == layout.world_size
        possible = four_layers(candidate, changes)
        assert check_layout(possible, layout.world_size) == replace(candidate)
    with pytest.raises(ValueError, match=f"the nearest possible: {re.escape(str(found[0]))}"):
        check_layout(recipe, layout.world_size)


@pytest.mark.parametrize(
    ("parallel", "layers", "expected"),
    [
        ({}, 5, [5]),
        ({"pp": 2}, 4, [2, 2]),
        ({"pp": 2}, 5, [3, 2]),
        ({"pp": 2, "vp": 2}, 6, [2, 2, 1, 1]),
        ({"pp": 2, "loss_weight": 2.0}, 6, [4, 2]),
        ({"pp": 4, "embedding_weight": 1.0, "loss_weight": 1.0}, 14, [3, 4, 4, 3]),
        ({"pp": 4, "embedding_weight": 0.5, "loss_weight": 2.5}, 13, [4, 4, 4, 1]),
        ({"pp": 2, "layers_per_stage": [1, 5]}, 6, [1, 5]),
    ],
)
def test_layers_of_each_stage(parallel: dict[str, Any], layers: int, expected: list[int]) -> None:
    recipe = small.recipe({"num_layers": layers}, parallel=parallel)
    assert stage_layers(recipe.parallel, layers) == expected


# What a user should know -------------------------------------------------------------------------------------------


def test_what_dropout_follows_is_said() -> None:
    assert notes(small.recipe(), 1) == []
    (fp8,) = notes(small.recipe(training={"fp8": {"recipe": "block", "num_layers_at_end_in_bf16": 1}}), 1)
    assert "training.fp8: 4 of 8 weights of linear layers and experts are multiplied in FP8 with block" in fp8
    assert "emulated" in fp8
    (note,) = notes(small.recipe({"hidden_dropout": 0.1}), 1)
    assert "model.hidden_dropout=0.1: dropout masks follow the ranks" in note


def test_another_world_than_the_recipes_is_said() -> None:
    recipe = small.recipe(parallel={"world_size": 16})
    assert notes(recipe, 16) == []
    assert notes(recipe, 8) == ["parallel.world_size=16: the recipe is written for so many processes, not 8"]
