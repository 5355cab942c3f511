"""Centroids: their loss one token at a time, that they find clusters, and what a layer chooses by them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

from megasparse.layers.clusters import Centroids
from megasparse.layers.step import StepState
from tests.helpers import assert_close
from tests.layers.test_block_sparse import modules
from tests.layers.test_gate import recall, topics

HEADS, KV_HEADS, DIM, CLUSTERS = 4, 2, 8, 5


def centroids() -> Centroids:
    made = Centroids(SimpleNamespace(kv_channels=DIM, params_dtype=torch.float32), KV_HEADS, CLUSTERS)
    torch.manual_seed(0)
    torch.nn.init.normal_(made.weight)
    return made


def test_loss_and_gradient_one_token_at_a_time() -> None:
    made = centroids()
    random = torch.Generator().manual_seed(1)
    q, k = (torch.randn(2, 11, heads, DIM, generator=random, requires_grad=True) for heads in (HEADS, KV_HEADS))
    loss = made.loss(q, k)
    expected = torch.zeros(())
    for b in range(2):
        for t in range(11):
            for h in range(KV_HEADS):
                for x in (q[b, t, 2 * h] + q[b, t, 2 * h + 1], k[b, t, h]):
                    cosines = [F.cosine_similarity(x.detach(), made.weight[h, c], dim=0) for c in range(CLUSTERS)]
                    expected = expected + 1 - max(cosines, key=lambda c: c.item())
    assert_close(loss, expected, 1e-6)
    assert_close(torch.autograd.grad(loss, made.weight), torch.autograd.grad(expected, made.weight), 1e-5)
    assert not torch.autograd.grad(made.loss(q, k), [q, k], allow_unused=True)[0]


def test_a_layer_finds_clusters_and_chooses_by_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks are of one of eight topics: with a cluster each, a query finds the blocks of its own."""
    monkeypatch.setattr(MoEAuxLossAutoScaler, "main_loss_backward_scale", None)
    torch.manual_seed(0)
    state = StepState()
    _, sparse = modules(state, selector="clusters", clusters=12, blocks=4, dense_start=0.5, local_blocks=1)
    assert sparse.centroids is not None
    torch.nn.init.normal_(sparse.centroids.weight)
    q, k, v = (x.transpose(0, 1) for x in topics(1000))
    before = recall(sparse, q, k, v)
    optimizer = torch.optim.Adam(sparse.centroids.parameters(), lr=5e-2)
    losses = []
    for step in range(100):
        state.begin(step, 110, 1)  # first with dense attention, then by its own choice
        optimizer.zero_grad()
        sparse(*topics(step), None).sum().backward()
        optimizer.step()
        losses.append(float(state.means["cluster_loss"]))
    assert losses[-1] < 0.6 * losses[0]
    assert recall(sparse, q, k, v) > max(0.8, before + 0.1)
