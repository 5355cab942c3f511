"""The estimate of memory beside what a real engine holds: every live tensor's storage, and what autograd saved."""

from __future__ import annotations

import gc
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megasparse.config import Recipe
from megasparse.layout import Layout
from megasparse.memory import activations, memory
from tests import small
from tests.helpers import run_distributed
from tests.test_engine import engine_of

SIZES = {"hidden_size": 256, "ffn_hidden_size": 512, "vocab_size": small.VOCAB}


def storages() -> dict[int, int]:
    """Address -> bytes, of every tensor of this process; gradients are reached through their weights."""
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), Tensor)]
    tensors += [t.grad for t in tensors if t.is_leaf and t.grad is not None]
    tensors += [t.grad_accum for t in tensors if getattr(t, "grad_accum", None) is not None]
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if not t.is_meta}


def held_by_an_engine(raw: dict[str, Any]) -> tuple[float, float]:
    """Of a second step, in bytes a parameter: what is new since before the engine was built, at the fullest of the
    moments when backward is done, gradients are reduced and AdamW steps; and the estimate for these moments."""
    recipe = Recipe.model_validate(raw)
    place = small.start(recipe)
    gc.collect()
    before = storages()
    engine = engine_of(recipe, place)
    seen: list[int] = []

    def looking(function: Any) -> Any:
        def look(*args: Any, **kwargs: Any) -> Any:
            seen.append(sum(size for address, size in storages().items() if address not in before))
            return function(*args, **kwargs)

        return look

    finalize, all_reduce = engine.config.finalize_model_grads_func, dist.all_reduce

    def finalize_and_look(*args: Any, **kwargs: Any) -> None:
        dist.all_reduce = looking(all_reduce)
        looking(finalize)(*args, **kwargs)
        dist.all_reduce = all_reduce

    engine.config.finalize_model_grads_func = finalize_and_look
    engine.adam.step = looking(engine.adam.step)  # type: ignore[method-assign]
    for number in range(2):
        seen.clear()
        engine.train_step(small.batches(recipe, number, place.dp_rank, place.dp), number, 1e-3)
    estimate = replace(memory(recipe, place, engine.chunks, small.VOCAB), activations=0)
    count = sum(parameter.numel() for parameter in engine.chunks.parameters())
    return max(seen) / count, (estimate.total + estimate.host) / count


@pytest.mark.parametrize(
    ("precision", "layout", "moe"),
    [
        ("fp32", "single+zero0", None),
        ("fp32", "dp2+zero0", None),
        ("fp32", "dp2", None),
        ("fp32", "dp2+zero2", None),
        ("fp32", "dp2+offload", None),
        ("bf16", "single", None),
        ("bf16", "dp2", None),
        ("bf16", "dp2+zero2", None),
        ("bf16", "dp2+offload", None),
        ("bf16", "ep2dp2", {}),
        ("bf16", "tp2", {"layers": 2}),
        ("fp16", "dp2", None),
        ("fp16", "dp2+zero2", None),
    ],
)
def test_states_are_what_the_engine_holds(precision: str, layout: str, moe: dict[str, Any] | None) -> None:
    parsed = Layout.parse(layout)
    training = {"precision": precision, "micro_batch_size": 1}
    sparse = {"weights": {"method": "s_ste"}} if moe else {}
    recipe = small.recipe(SIZES, moe, training, parallel=parsed.parallel(), sparsity=sparse)
    for seen, estimate in run_distributed(held_by_an_engine, parsed.world_size, recipe.model_dump(mode="json")):
        assert seen == pytest.approx(estimate, abs=0.1)


@pytest.mark.parametrize("layout", ["dp2", "dp2+zero2", "dp2+offload"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_states_with_a_bucket_smaller_than_the_model(precision: str, layout: str) -> None:
    """As large models have."""
    parallel = {**Layout.parse(layout).parallel(), "deepspeed": {"reduce_bucket_size": 200_000}}
    recipe = small.recipe(SIZES, None, {"precision": precision, "micro_batch_size": 1}, parallel=parallel)
    for seen, estimate in run_distributed(held_by_an_engine, 2, recipe.model_dump(mode="json")):
        assert seen == pytest.approx(estimate, rel=0.1)


def saved_by_autograd(raw: dict[str, Any]) -> tuple[float, float]:
    """Bytes that one micro-batch's forward pass keeps for backward, weights aside; and the estimate. With LayerNorm: a
    CPU has no RMSNorm in one piece."""
    recipe = Recipe.model_validate(raw)
    place = small.start(recipe)
    engine = engine_of(recipe, place)
    weights = {p.untyped_storage().data_ptr() for p in engine.chunks.parameters()}
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved.setdefault(tensor.untyped_storage().data_ptr(), tensor)  # kept: no other gets its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        engine.train_step(small.batches(recipe, 0, place.dp_rank, place.dp)[:1], 0, 1e-3)
    kept = sum(t.untyped_storage().nbytes() for address, t in saved.items() if address not in weights)
    return kept, activations(recipe, place, place.pp_rank, small.VOCAB)


@pytest.mark.parametrize(
    ("model", "moe", "layout"),
    [
        ({}, None, "single"),
        ({"activation": "gelu", "bias": "all"}, None, "single"),
        ({"num_query_groups": 4, "num_layers": 5, "ffn_hidden_size": 512}, None, "single"),
        ({}, {"ffn_hidden_size": 128, "shared_expert_ffn_hidden_size": 64}, "single"),
        ({}, {"ffn_hidden_size": 128, "layers": 2}, "tp2+sp"),
        ({}, None, "tp2"),
        ({}, None, "cp2"),
        ({"num_query_groups": 4}, None, "cp4"),
    ],
)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_activations_are_about_what_autograd_saves(
    model: dict[str, Any], moe: dict[str, Any] | None, layout: str, precision: str
) -> None:
    parsed = Layout.parse(layout)
    training = {"precision": precision, "micro_batch_size": 2, "global_batch_size": 2}
    recipe = small.recipe(
        {"hidden_size": 128, "ffn_hidden_size": 256, "normalization": "LayerNorm", **model},
        moe,
        training,
        parallel=parsed.parallel(),
        data={"seq_length": 256},
    )
    for kept, estimate in run_distributed(saved_by_autograd, parsed.world_size, recipe.model_dump(mode="json")):
        assert 0.85 < estimate / kept < 1.25, (kept, estimate)


@pytest.mark.parametrize("layout", ["pp4", "pp4vp2", "pp8vp3"])
def test_micro_batches_in_flight(layout: str) -> None:
    """Korthikanti et al. 2022, 4.2.3: a first stage holds L layers' worth, interleaved L (1 + (p - 1) / (p m))."""
    parsed = Layout.parse(layout)
    p, m = parsed.pp, parsed.vp
    expected = p * (1 + (p - 1) / (p * m) if m > 1 else 1)
    recipe = small.recipe(
        {"num_layers": p * m, "hidden_size": 64},
        training={"global_batch_size": 64, "micro_batch_size": 1},
        parallel=parsed.parallel(),
    )
    one = small.recipe({"num_layers": 1, "hidden_size": 64}, training={"micro_batch_size": 1})
    logits = small.SEQ * 2 * (4 + 8) + 2 * small.SEQ * 64 * 4  # of two tokens; the final norm and its output
    layer = activations(one, Layout(), 0, 2) - logits
    assert activations(recipe, parsed, 0, 2) == pytest.approx(m * layer * expected)
    few = small.recipe(
        {"num_layers": p * m, "hidden_size": 64},
        training={"global_batch_size": p, "micro_batch_size": p},
        parallel=parsed.parallel(),
    )
    assert activations(few, parsed, 0, 2) == pytest.approx(p * m * layer), "one micro-batch, of p sequences"


def test_recompute_keeps_each_layers_input() -> None:
    sizes = {"num_layers": 3, "hidden_size": 64}
    training = {"micro_batch_size": 2, "precision": "bf16"}
    whole, one = (
        activations(small.recipe({**sizes, "num_layers": n}, training=training), Layout(), 0, 2) for n in (3, 1)
    )
    again = activations(small.recipe(sizes, training={**training, "recompute": "full"}), Layout(), 0, 2)
    layer = (whole - one) // 2
    assert again == whole - 2 * layer + 3 * 2 * small.SEQ * 64 * 2
