"""Tiny runs that the checkpoint tests share: a model with everything that has state, and what its steps returned."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from megasparse.config import Recipe
from megasparse.engine import Engine
from megasparse.layout import Layout
from megasparse.model import build_model
from megasparse.topology import Topology
from tests import small

FINGERPRINT = "abc"
MOE = {"bias_update_rate": 0.01, "jitter": 0.05, "aux_loss_scope": "global_batch", "layers": [0, 1, 0, 1]}
MODEL = {"num_layers": 4, "bias": "qkv", "tie_embeddings": True}
# Masks from the second step on, made anew every other step.
SPARSITY = {"method": "sr_ste", "decay": 0.01, "dense_start": 0.05, "refresh_interval": 2, "targets": ["."]}
DROPOUT = {"hidden_dropout": 0.1, "attention_dropout": 0.1}


def recipe_of(layout: str = "single", precision: str = "fp32", dropout: bool = True, **training: Any) -> Recipe:
    """Routers with bias, load and jitter, tied embeddings, a vocabulary that tp pads, 2:4 weights; dropout, which no
    two layouts draw alike. fp16: the scale doubles after every fourth good step, so its counter is state too."""
    return small.recipe(
        {**MODEL, **(DROPOUT if dropout else {})},
        MOE,
        {"precision": precision, "loss_scale": 256.0, "loss_scale_window": 4, "micro_batch_size": 1, **training},
        sparsity={"weights": SPARSITY},
        parallel=Layout.parse(layout).parallel(),
    )


def engine_of(recipe: Recipe, place: Topology) -> Engine:
    return Engine(recipe, place, *build_model(recipe, place, small.VOCAB - 1))


def run(engine: Engine, first: int, last: int) -> list[tuple[Any, ...]]:
    """What the steps returned, all of it."""
    place, results = engine.topology, []
    for step in range(first, last):
        batches = small.batches(engine.recipe, step, place.dp_rank, place.dp)
        r = engine.train_step(batches, step, 3e-3 / (step + 1))
        results.append(
            (r.loss, r.grad_norm, r.aux_losses, r.loss_scale, r.skipped, r.expert_tokens.tolist(), r.sparsity)
        )
    return results


def state_of(engine: Engine) -> dict[str, torch.Tensor]:
    """Weights and buffers, copied."""
    named = {**dict(engine.chunks.named_parameters()), **dict(engine.chunks.named_buffers())}
    return {name: tensor.detach().clone() for name, tensor in named.items()}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def disturb(engine: Engine) -> None:
    """Leave nothing as a fresh process would happen to have it: what load does not restore, shows."""
    with torch.no_grad():
        for tensor in engine.chunks.state_dict().values():
            if tensor is not None:  # mcore's empty _extra_state
                tensor.copy_(~tensor if tensor.dtype == torch.bool else tensor + 1)
    torch.manual_seed(99)
    model_parallel_cuda_manual_seed(99, force_reset_rng=True)
