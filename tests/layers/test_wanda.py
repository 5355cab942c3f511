"""Input norms against those of every layer's inputs, kept whole."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from megasparse import topology
from megasparse.engine import Engine
from megasparse.layers.moe import MoELayer
from megasparse.layers.wanda import measure_inputs
from megasparse.model import build_model
from tests import small
from tests.helpers import assert_close


def engine_of(place: topology.Topology, **moe: Any) -> Engine:
    weights = {"method": "ast", "decay": 1e-3, "score": "wanda", "targets": ["."]}
    recipe = small.recipe({}, {"layers": [0, 1], **moe}, sparsity={"weights": weights})
    return Engine(recipe, place, *build_model(recipe, place, small.VOCAB))


def forward(engine: Engine) -> None:
    engine._forward_backward(small.batches(engine.recipe, 0), 1.0, forward_only=True)


def test_root_mean_square_of_every_feature(single: topology.Topology) -> None:
    engine = engine_of(single)
    chunk: Any = engine.chunks[0]
    layer = chunk.decoder.layers[0]
    linears = [
        layer.self_attention.linear_qkv,
        layer.self_attention.linear_proj,
        layer.mlp.linear_fc1,
        layer.mlp.linear_fc2,
    ]
    seen: dict[Any, list[torch.Tensor]] = {}
    for linear in linears:
        linear.register_forward_hook(lambda module, inputs, _: seen.setdefault(module, []).append(inputs[0].detach()))
    moe: MoELayer = chunk.decoder.layers[1].mlp
    rows: list[tuple[torch.Tensor, torch.Tensor]] = []
    compute = moe._compute
    moe._compute = lambda x, counts: rows.append((x, counts)) or compute(x, counts)  # type: ignore[method-assign, func-returns-value]
    engine.chunks.eval()
    measure_inputs(engine.chunks, single, lambda: forward(engine))

    for linear in linears:
        x = torch.cat([x.flatten(0, 1) for x in seen[linear]]).double()
        assert len(x) == 8 * small.SEQ
        assert_close(linear.sparsity.input_norm, x.square().mean(0).sqrt(), 1e-6)
    w1, w3 = moe.experts.w1.detach(), moe.experts.w3.detach()
    for expert in range(8):
        x = torch.cat([x.split(counts.tolist())[expert] for x, counts in rows])
        hidden = F.silu(x @ w1[expert].t()) * (x @ w3[expert].t())
        for name, inputs in (("w1", x), ("w3", x), ("w2", hidden)):
            expected = inputs.double().square().mean(0).sqrt()
            assert_close(moe.experts.sparsity[name].input_norm[expert], expected, 1e-5)  # type: ignore[index]
    assert moe.observe is None
    count = len(seen[linears[0]])
    forward(engine)
    assert len(seen[linears[0]]) == 2 * count


def test_an_expert_without_tokens_goes_by_magnitude(single: topology.Topology) -> None:
    engine = engine_of(single, top_k=1)
    chunk: Any = engine.chunks[0]
    moe: MoELayer = chunk.decoder.layers[1].mlp
    norms = moe.experts.sparsity["w1"].input_norm  # type: ignore[index]
    compute = moe._compute

    def without_third(x: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        assert moe.observe is not None
        moved = counts.clone()
        moved[4] += moved[3]
        moved[3] = 0
        observe, moe.observe = moe.observe, None
        observe(x, moved)
        output = compute(x, counts)
        moe.observe = observe
        return output

    moe._compute = without_third  # type: ignore[method-assign]
    measure_inputs(engine.chunks, single, lambda: forward(engine))
    assert (norms[3] == 1).all()
    assert (norms[4] != 1).any()


def test_a_step_measures_when_weights_become_sparse(single: topology.Topology) -> None:
    engine = engine_of(single)
    norms = [sparse.input_norm for sparse in engine.sparse_weights.of.values()]
    engine.train_step(small.batches(engine.recipe, 0), 0, 1e-3)
    first = [norm.clone() for norm in norms]
    assert all((norm != 1).any() for norm in first)
    engine.train_step(small.batches(engine.recipe, 1), 1, 1e-3)
    assert all(torch.equal(a, b) for a, b in zip(first, norms, strict=True))
