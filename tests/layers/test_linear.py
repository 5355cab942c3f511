"""Sparse linear layers in the model: which they are, and that they multiply by the sparse weight."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megasparse import topology
from megasparse.layers.linear import SparseColumnParallelLinear, SparseRowParallelLinear
from megasparse.model import build_model, local_weights
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
    assert type(layer) is (SparseColumnParallelLinear if kind == "column" else SparseRowParallelLinear)
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
