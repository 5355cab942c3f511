"""DeepSpeed's profilers around the real engine: what they count, and what they do not."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from typing import Any

import pytest

from megasparse import deepspeed_profilers, topology
from megasparse.config import Recipe
from megasparse.flops import flops_per_token
from tests import small
from tests.helpers import run_distributed
from tests.test_engine import engine_of


def profiled(model: dict[str, Any], moe: dict[str, Any] | None, place: topology.Topology, output: Path) -> float:
    """Multiply-adds of a forward pass of one step, as printed; the step before and after it are not profiled."""
    settings = {"flops_profiler": {"enabled": True, "detailed": False, "output_file": str(output)}}
    training = {"global_batch_size": 4, "micro_batch_size": 2}
    recipe = small.recipe({"hidden_size": 64, **model}, moe, training, parallel={"deepspeed": settings})
    engine = engine_of(recipe, place)
    for step in range(3):
        engine.train_step(small.batches(recipe, step), step, 1e-3)
        assert output.exists() == (step > 0)
    text = output.read_text()
    assert "Profile Summary at step 2:" in text
    found = re.search(r"fwd MACs per GPU: +([\d.]+) ([MK])MACs", text)
    assert found, text
    return float(found[1]) * {"M": 1e6, "K": 1e3}[found[2]]


@pytest.mark.parametrize("model", [{}, {"activation": "gelu", "bias": "all"}, {"num_layers": 3}])
def test_flops_of_a_dense_model_are_ours_but_for_causality(
    single: topology.Topology, model: dict[str, Any], tmp_path: Path
) -> None:
    found = profiled(model, None, single, tmp_path / "profile.txt")
    recipe = small.recipe({"hidden_size": 64, **model})
    tokens = 4 * small.SEQ
    ours = flops_per_token(recipe.model, small.VOCAB, small.SEQ) / 6 * tokens
    half = recipe.model.num_layers * 2 * 64 * (small.SEQ - (small.SEQ + 1) / 2) * tokens  # of scores and values
    assert found == pytest.approx(ours + half, rel=2e-3), "printed with two decimals"


def test_experts_products_are_not_counted(single: topology.Topology, tmp_path: Path) -> None:
    """As FlopsProfiler says in the recipe: routed experts multiply past torch's functions."""
    few = profiled({}, {"ffn_hidden_size": 16}, single, tmp_path / "few.txt")
    many = profiled({}, {"ffn_hidden_size": 160}, single, tmp_path / "many.txt")
    assert few == many


def messages(raw: dict[str, Any]) -> tuple[dict[str, dict[int, int]], str]:
    """Kind -> bytes of a message -> how many, of one step; and what is printed."""
    from deepspeed.comm.comm import comms_logger

    recipe = Recipe.model_validate(raw)
    place = small.start(recipe)
    engine = engine_of(recipe, place)
    comms_logger.reset_data()
    engine.train_step(small.batches(recipe, 0, place.dp_rank, place.dp), 0, 1e-3)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        deepspeed_profilers.print_messages(recipe)
    seen = {kind: {size: entry[0] for size, entry in by.items()} for kind, by in comms_logger.get_raw_data().items()}
    return seen, out.getvalue()


def logged(parallel: dict[str, Any], moe: dict[str, Any] | None, enabled: bool = True) -> list[Any]:
    settings = {"deepspeed": {"comms_logger": {"enabled": enabled}}, **parallel}
    recipe = small.recipe({}, moe, {"micro_batch_size": 1}, parallel=settings)
    return run_distributed(messages, 2, recipe.model_dump(mode="json"))


def test_messages_of_gradients_are_those_of_all_weights() -> None:
    """ZeRO-0: one all-reduce of every gradient, float32. Only the first process prints."""
    ranks = logged({"zero_stage": 0}, None)
    count = 2 * (32 * 64 + 32 * 32 + 96 * 32 + 32 * 48 + 2 * 32) + 2 * small.VOCAB * 32 + 32
    for seen, _ in ranks:
        assert sum(size * number for size, number in seen["all_reduce"].items()) == 4 * count
    (_, first), (_, second) = ranks
    assert "all_reduce" in first
    assert "Total Latency" in first
    assert second == ""


def test_experts_messages_are_seen() -> None:
    seen, text = logged({"ep": 2}, {})[0]
    assert {"all_reduce", "all_to_all_single"} <= seen.keys()
    assert "all_to_all_single" in text


def test_nothing_is_logged_unasked() -> None:
    assert logged({}, None, enabled=False) == [({}, "")] * 2
