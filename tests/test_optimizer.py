"""AdamW's parameter groups, and DeepSpeed's FusedAdam, which has a kernel for this CPU too, beside torch's AdamW."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn as nn
from deepspeed.ops.op_builder import FusedAdamBuilder

from megasparse import optimizer, topology
from megasparse.model import build_model
from megasparse.optimizer import FusedAdam, adamw, fused_adam_missing, parameter_groups
from tests import small
from tests.helpers import assert_close


def test_matrices_decay_and_experts_are_apart(single: topology.Topology) -> None:
    chunks, _ = build_model(small.recipe({"bias": "qkv"}, {}), single, small.VOCAB)
    groups = parameter_groups(chunks, 0.3)
    assert sum(len(group["params"]) for group in groups) == len(list(chunks.parameters()))
    for group in groups:
        assert {parameter.dim() > 1 for parameter in group["params"]} == {group["weight_decay"] == 0.3}
        assert {getattr(parameter, "allreduce", True) for parameter in group["params"]} == {"moe" not in group}


@pytest.mark.slow  # DeepSpeed compiles its kernel
def test_fused_adam_is_adamw_and_counts_every_parameters_steps() -> None:
    """Two groups, a parameter that has no gradient at first; then torch's AdamW goes on from its state, and back."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))
    models = [model, copy.deepcopy(model)]
    arguments = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-6}
    groups = [parameter_groups(model, 0.1) for model in models]
    optimizers = [FusedAdam(groups[0], **arguments), torch.optim.AdamW(groups[1], **arguments, fused=True)]
    for step in range(9):
        if step == 6:  # they swap their states
            states = [copy.deepcopy(optimizer.state_dict()["state"]) for optimizer in optimizers]
            for made, state in zip(optimizers, reversed(states), strict=True):
                made.load_state_dict({**made.state_dict(), "state": state})
        for parameters in zip(*(model.parameters() for model in models), strict=True):
            gradient = torch.randn(parameters[0].shape)
            for parameter in parameters:
                parameter.grad = gradient.clone()
        for made in optimizers:
            made.step()
    for ours, theirs in zip(*(model.parameters() for model in models), strict=True):
        assert_close(ours, theirs, 1e-6)
        state, other = optimizers[0].state[ours], optimizers[1].state[theirs]
        assert state["step"].item() == other["step"].item() == 9
        assert_close(state["exp_avg_sq"], other["exp_avg_sq"], 1e-6)


def test_whose_adamw_steps(monkeypatch: pytest.MonkeyPatch, single: topology.Topology) -> None:
    recipe = small.recipe()
    chunks, _ = build_model(recipe, single, small.VOCAB)
    assert fused_adam_missing(recipe) == "there is no CUDA device"
    assert type(adamw(recipe, chunks)) is torch.optim.AdamW
    monkeypatch.setattr(optimizer.platform, "has_cuda", lambda: True)
    assert type(adamw(recipe, chunks)) is FusedAdam
    offload = small.recipe(parallel={"zero_stage": 1, "offload_optimizer": True})
    assert fused_adam_missing(offload) == "parallel.offload_optimizer=true steps on the CPU"

    def no_compiler(*_: object, **__: object) -> None:
        raise RuntimeError("no\ncompiler")

    monkeypatch.setattr(FusedAdamBuilder, "load", no_compiler)
    assert fused_adam_missing(recipe) == "DeepSpeed cannot compile FusedAdam (no compiler)"
