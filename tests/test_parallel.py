"""Any layout, one answer: every layout's losses, norms, weights and routes over real updates, against one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megasparse.checkpoint.save import Saver
from megasparse.config import Recipe, parse_recipe
from megasparse.engine import Engine
from megasparse.layout import Layout
from megasparse.model import build_model
from tests import small
from tests.helpers import assert_close, relative_error, run_distributed
from tests.parity import MOE, VOCAB, compare, reference_of, run

STEPS = 3  # nothing here has a schedule

# Every layout ---------------------------------------------------------------------------------------------------------

DROPLESS = small.recipe(
    {"num_layers": 4, "tie_embeddings": True, "qk_norm": "head", "head_dim": 12},
    {**MOE, "layers": [0, 1, 1, 1], "bias_update_rate": 0.01},
    {"micro_batch_size": 1},
    data={"document_mask": True},
)
LAYOUTS = (
    "tp2 tp2+sp pp2 pp2vp2 pp4 ep2 ep4 cp2 cp4 dp2+zero0 dp2 dp2+zero2 dp2+offload single+offload tp2ep2 tp2ep4+sp "
    "pp2ep2 cp2ep2 tp2dp2+zero2 tp2cp2+sp tp2pp2ep2 tp2pp2ep2dp2 tp2pp2vp2ep2 tp2pp2cp2 pp2+zero0 ep2+zero0"
)


@pytest.mark.parametrize("layout", LAYOUTS.split())
def test_every_layout_equals_one_process(layout: str) -> None:
    """Tied embeddings of an odd vocabulary, documents and uneven loss masks, a stage without experts (pp4), router
    biases that move, clipping; one sequence a micro-batch."""
    compare(DROPLESS, layout, masked=True, steps=STEPS)


EVERYTHING = small.recipe(
    {"num_layers": 4, "qk_norm": "full", "bias": "qkv"},
    {
        "layers": [0, 1, 0, 1],
        "aux_loss_scope": "global_batch",
        "aux_loss_coefficient": 0.05,
        "bias_update_rate": 0.01,
        "jitter": 0.1,
        "capacity_factor": 1.0,
        "shared_expert_ffn_hidden_size": 16,
        "score_function": "sigmoid",
        "num_groups": 4,
        "top_k_groups": 2,
    },
    {"recompute": "full"},
)


@pytest.mark.parametrize("layout", ["tp2+sp", "pp2", "cp2", "ep2", "dp2+zero2", "tp2ep4", "tp2pp2ep2"])
def test_with_everything_on(layout: str) -> None:
    """Global-batch statistics, router bias, jitter, capacity, shared and dense layers together, under recompute."""
    compare(EVERYTHING, layout, steps=STEPS)


POSITION = small.recipe({"norm_placement": "post"}, {**MOE, "capacity_factor": 1.25, "drop_policy": "position"})


@pytest.mark.parametrize("layout", ["tp2", "cp2", "tp2cp2", "ep2dp4"])
def test_a_capacity_over_the_whole_micro_batch(layout: str) -> None:
    """Which tokens an expert drops depends on all of the micro-batch, wherever its tokens are."""
    compare(POSITION, layout, steps=STEPS)


GPT2 = small.recipe(
    {
        "num_layers": 4,
        "num_query_groups": 4,
        "position_embedding": "learned",
        "normalization": "LayerNorm",
        "bias": "all",
        "activation": "gelu",
        "tie_embeddings": True,
    },
    data={"document_mask": True, "reset_position_ids": True},
)


@pytest.mark.parametrize("layout", ["tp2+sp", "pp2vp2", "cp2", "dp2+zero2", "tp2pp2cp2"])
def test_gpt2(layout: str) -> None:
    """Learned positions, biases, LayerNorm."""
    compare(GPT2, layout, masked=True, steps=STEPS)


@pytest.mark.parametrize(
    ("layout", "parallel"),
    [
        ("pp2", {"layers_per_stage": [1, 3]}),
        ("pp3", {"loss_weight": 1.0, "embedding_weight": 0.5}),
        ("tp2pp2", {"layers_per_stage": [3, 1]}),
    ],
    ids=str,
)
def test_uneven_stages(layout: str, parallel: dict[str, Any]) -> None:
    compare(DROPLESS, layout, masked=True, steps=STEPS, **parallel)


# A teacher ------------------------------------------------------------------------------------------------------------

TEACHER = small.recipe(
    {"num_layers": 6, "hidden_size": 48, "bias": "qkv", "init_std": 0.2},
    {"num_experts": 4, "layers": [0, 1, 0, 1, 0, 1], "shared_expert_ffn_hidden_size": 16},
    {"steps": 4},
    sparsity={"weights": {"method": "s_ste", "dense_start": 0.25}},
)


def save(raw: dict[str, Any], folder: Path) -> None:
    """A checkpoint after two steps."""
    recipe = parse_recipe(raw)
    place = small.start(recipe)
    engine = Engine(recipe, place, *build_model(recipe, place, VOCAB))
    for step in range(2):
        engine.train_step(small.batches(recipe, step), step, 3e-3)
    Saver(engine, folder, "", small.TOKENIZER).save(2)


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """DROPLESS with a teacher of another size, with other experts and 2:4 weights."""
    folder = tmp_path_factory.mktemp("teacher")
    run_distributed(save, 1, TEACHER.model_dump(mode="json"), folder)
    raw = DROPLESS.model_dump(mode="json")
    raw["training"]["teacher"] = {"checkpoint": str(folder / "step_2")}
    return parse_recipe(raw)


@pytest.mark.parametrize("layout", ["tp2+sp", "pp2vp2", "cp2", "tp2ep2", "dp2+zero2"])
def test_a_teacher(taught: Recipe, layout: str) -> None:
    """Its logits of each micro-batch meet the student's, over a padded vocabulary that tensor parallelism splits."""
    compare(taught, layout, masked=True, steps=STEPS)


# Precisions -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("precision", "layout"),
    [
        *[("bf16", layout) for layout in ("tp2+sp", "pp2vp2", "cp2", "ep2", "dp2+zero2", "dp2+offload", "tp2pp2ep2")],
        *[("fp16", layout) for layout in ("tp2+sp", "dp2+zero2", "dp2+offload", "tp2pp2ep2")],
    ],
)
def test_a_layout_moves_less_than_the_precision_itself(precision: str, layout: str) -> None:
    """In bf16 and fp16 sums in another order round otherwise. The bound is what the precision costs by itself: the
    worst difference of loss and norm between one process in it and one in fp32, over the same five updates."""
    training = {"micro_batch_size": 1, "precision": precision, "loss_scale": 1024.0}
    recipe = small.recipe({"num_layers": 4, "tie_embeddings": True}, {**MOE, "layers": [0, 1, 1, 1]}, training)
    exact, single = reference_of(recipe, False, precision="fp32"), reference_of(recipe, False)
    for rank in run(recipe, layout, False):
        for key in ("loss", "norm"):
            bound = max(
                relative_error(torch.tensor(a[key]), torch.tensor(b[key]))
                for a, b in zip(single["steps"], exact["steps"], strict=True)
            )
            assert_close([s[key] for s in rank["steps"]], [s[key] for s in single["steps"]], bound, key)


# Dropout --------------------------------------------------------------------------------------------------------------

DROPOUT = {"num_layers": 4, "hidden_dropout": 0.2, "attention_dropout": 0.2}


@pytest.mark.parametrize("layout", ["single", "tp2", "tp2+sp", "pp2vp2", "cp2"])
def test_recompute_draws_the_same_dropout_in_every_layout(layout: str) -> None:
    """The masks of the first pass, whatever other micro-batches drew in between."""
    plain, recomputed = (
        run(small.recipe(DROPOUT, {**MOE, "layers": [0, 1, 0, 1]}, {"recompute": recompute}), layout, False, STEPS)
        for recompute in ("none", "full")
    )
    for ours, reference in zip(recomputed, plain, strict=True):
        assert_close(ours["steps"], reference["steps"], 1e-6)
    without = reference_of(small.recipe({"num_layers": 4}, {**MOE, "layers": [0, 1, 0, 1]}), False, STEPS)
    assert relative_error(torch.tensor(plain[0]["steps"][0]["norm"]), torch.tensor(without["steps"][0]["norm"])) > 1e-3


def test_dropout_follows_ranks_not_experts_or_optimizers() -> None:
    """Masks are the ranks': layouts that differ in expert parallelism, ZeRO or offload alone draw the same ones."""
    recipe = small.recipe(DROPOUT, MOE)
    reference, *others = (
        run(recipe, layout, False, STEPS) for layout in ("dp2+zero0", "dp2", "dp2+zero2", "ep2", "dp2+offload")
    )
    for ranks in others:
        for ours, theirs in zip(ranks, reference, strict=True):
            assert_close(ours["steps"], theirs["steps"], 1e-6)


# Overflow -------------------------------------------------------------------------------------------------------------


def scales(raw: dict[str, Any]) -> list[tuple[bool, float]]:
    """(skipped, loss scale) of each step from a scale that is far too large."""
    recipe = parse_recipe(raw)
    place = small.start(recipe)
    engine = Engine(recipe, place, *build_model(recipe, place, VOCAB))
    results = [engine.train_step(small.batches(recipe, s, place.dp_rank, place.dp), s, 3e-3) for s in range(10)]
    return [(result.skipped, result.loss_scale) for result in results]


@pytest.mark.parametrize("layout", ["tp2pp2", "ep2", "cp2", "dp2+zero2", "dp2+offload"])
def test_an_overflow_on_one_rank_is_skipped_by_all(layout: str) -> None:
    training = {"precision": "fp16", "loss_scale": 2.0**24, "micro_batch_size": 1}
    raw = small.recipe(moe={"layers": [0, 1]}, training=training).model_dump(mode="json")
    (alone,) = run_distributed(scales, 1, raw)
    assert alone[0][0], "the first step overflows"
    assert not alone[-1][0], "a smaller scale is found"
    parsed = Layout.parse(layout)
    ranks = run_distributed(scales, parsed.world_size, {**raw, "parallel": parsed.parallel()})
    assert all(rank == ranks[0] for rank in ranks)
    assert ranks[0][0][0]
    assert not ranks[0][-1][0]
    assert [scale for _, scale in ranks[0]] == sorted((scale for _, scale in ranks[0]), reverse=True)
