"""Linear layers in the model: which are sparse, and that they multiply by the sparse weight, in FP8 where asked."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megasparse import topology
from megasparse.layers.linear import ColumnParallelLinear, RowParallelLinear
from megasparse.model import build_model
from megasparse.ops.fp8 import fp8_linear
from megasparse.placement import local_weights
from megasparse.sparsity.weight import sparse_weights
from tests import small
from tests.helpers import assert_close

SHARED = {"layers": [0, 1], "shared_expert_ffn_hidden_size": 16}


@pytest.mark.parametrize("targets", [["."], [r"layers\.1.*(qkv|shared|w2)"], ["linear"]], ids=str)
@pytest.mark.parametrize("norm_placement", ["pre", "post"])
def test_the_weights_that_the_recipe_names_are_sparse(
    single: topology.Topology, targets: list[str], norm_placement: str
) -> None:
    model, weights = {"norm_placement": norm_placement}, {"method": "ste", "targets": targets}
    recipe = small.recipe(model, SHARED, sparsity={"weights": weights})
    chunks, _ = build_model(recipe, single, small.VOCAB)
    names = {weight.tensor: weight.name for weight in local_weights(chunks, single)}
    found = {names[sparse.weight[0]]: sparse for sparse in sparse_weights(chunks)}
    assert found.keys() == set(recipe.sparse_weights)
    assert set(recipe.model.linear_weights) <= set(names.values())
    for name, sparse in found.items():
        assert sparse.name in name


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", ["column", "row"])
def test_y_is_x_times_the_sparse_weight(single: topology.Topology, kind: str, bias: bool) -> None:
    recipe = small.recipe(
        {"bias": "all" if bias else "none", "activation": "gelu"}, sparsity={"weights": {"method": "ste"}}
    )
    chunks, _ = build_model(recipe, single, small.VOCAB)
    chunk: Any = chunks[0]
    mlp = chunk.decoder.layers[0].mlp
    layer = mlp.linear_fc1 if kind == "column" else mlp.linear_fc2
    assert type(layer) is (ColumnParallelLinear if kind == "column" else RowParallelLinear)
    layer.sparsity.begin_step(0, 10)
    assert (layer.sparsity.mask.sum() * 2) == layer.weight.numel()
    x = torch.randn(6, 2, layer.weight.shape[1], requires_grad=True)
    y, returned_bias = layer(x)
    assert (returned_bias is not None) == bias
    dy = torch.randn_like(y)
    y.backward(dy)
    w = (layer.weight * layer.sparsity.mask).double()
    assert_close(y, x.double() @ w.t(), 1e-6)
    assert_close(x.grad, dy.double() @ w, 1e-6)
    assert_close(layer.weight.grad, dy.double().flatten(0, 1).t() @ x.double().flatten(0, 1), 1e-6)


@pytest.mark.parametrize("sparsity", [None, {"method": "s_ste"}, {"method": "s_ste", "mvue": "exact"}], ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", ["column", "row"])
def test_in_fp8_y_and_gradients_are_of_what_is_multiplied(
    single: topology.Topology, kind: str, bias: bool, sparsity: dict[str, Any] | None
) -> None:
    """The 2:4 weight, and for dW the estimate; to the bit those of ops.fp8, here with scales of each tensor itself."""
    recipe = small.recipe(
        {"bias": "all" if bias else "none", "activation": "gelu"},
        training={"fp8": {"recipe": "current"}},
        sparsity={"weights": sparsity},
    )
    chunks, state = build_model(recipe, single, small.VOCAB)
    chunk: Any = chunks[0]
    mlp = chunk.decoder.layers[0].mlp
    layer = mlp.linear_fc1 if kind == "column" else mlp.linear_fc2
    assert type(layer) is (ColumnParallelLinear if kind == "column" else RowParallelLinear)
    state.token_index = torch.arange(2 * small.SEQ).view(2, small.SEQ)
    x = torch.randn(small.SEQ, 2, layer.weight.shape[1], requires_grad=True)
    weight = layer.weight.detach()
    if layer.sparsity is not None:
        layer.sparsity.begin_step(0, 10)
        weight = layer.sparsity(layer.weight).detach()
        assert (weight == 0).float().mean() == 0.5
    weight.requires_grad_()
    y, returned_bias = layer(x)
    assert (returned_bias is not None) == bias
    dy = torch.randn_like(y)
    dx, dw = torch.autograd.grad(y, (x, layer.weight), dy)
    seen = []

    def estimate(rows: torch.Tensor) -> torch.Tensor:
        seen.append(layer.estimate.of_these_tokens()(rows.view_as(dy)).flatten(0, 1))
        return seen[0]

    expected = fp8_linear(x, weight, layer.fp8_scales.scaling(), estimate if layer.estimate is not None else None)
    own = torch.autograd.grad(expected, (x, weight), dy)
    assert torch.equal(y, expected)
    assert torch.equal(dx, own[0])
    assert torch.equal(dw, own[1])
    plain = (x.double() @ weight.double().t()).detach()
    error = ((y - plain).abs().max() / plain.abs().max()).item()
    assert 1e-3 < error < 0.1, "it is in FP8"
    assert [(rows == 0).float().mean().item() >= 0.5 for rows in seen] == [True] * (layer.estimate is not None)
