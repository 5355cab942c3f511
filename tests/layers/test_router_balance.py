"""What balances the load of experts, against loops in float64: the router's losses, counters and bias."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megasparse import topology
from megasparse.config import MoE
from megasparse.layers.router import Router, load_by_layer
from megasparse.layers.step import StepState
from megasparse.layout import Layout
from tests import small
from tests.helpers import assert_close, run_distributed
from tests.layers.test_router import EXPERTS, HIDDEN, TOKENS, by_hand, make, tokens
from tests.test_engine import engine_of

pytestmark = pytest.mark.usefixtures("single")

# Losses


def switch_loss(probs: list[list[float]], fraction: list[float]) -> float:
    """E * sum_e f_e * P_e (arXiv:2101.03961)."""
    mean = [sum(row[e] for row in probs) / len(probs) for e in range(len(fraction))]
    return len(fraction) * sum(f * p for f, p in zip(fraction, mean, strict=True))


def probabilities(router: Router, x: Tensor) -> list[list[float]]:
    logits = x @ router.weight.detach().T
    scores = logits.softmax(-1) if router.moe.score_function == "softmax" else logits.sigmoid()
    return (scores / scores.sum(-1, keepdim=True)).tolist()


def fraction_of(experts: list[list[int]], num_experts: int) -> list[float]:
    flat = [e for row in experts for e in row]
    return [flat.count(e) / len(flat) for e in range(num_experts)]


@pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])
def test_micro_batch_loss(score_function: str) -> None:
    """Two micro-batches, each with its own statistics; the objective is their mean, the record the mean over layers."""
    state = StepState()
    state.begin(0, 10, 2)
    router = make(state, aux_loss_coefficient=0.03, z_loss_coefficient=0.002, score_function=score_function)
    router.num_moe_layers = 5
    aux, z = [], []
    for seed in (0, 1):
        x, index = tokens(seed=seed)
        loss = router(x, index).loss
        _, experts = by_hand(router, x)
        aux.append(switch_loss(probabilities(router, x), fraction_of(experts, EXPERTS)))
        logits = (x @ router.weight.detach().T).tolist()
        z.append(sum(math.log(sum(math.exp(v) for v in row)) ** 2 for row in logits) / TOKENS)
        assert loss.item() == pytest.approx((0.03 * aux[-1] + 0.002 * z[-1]) / 2, rel=1e-12)
    assert state.means["load_balance_loss"].item() == pytest.approx(sum(aux) / 2 / 5, rel=1e-12)
    assert state.means["z_loss"].item() == pytest.approx(sum(z) / 2 / 5, rel=1e-12)


def test_global_batch_loss_uses_the_previous_step() -> None:
    """f is the last step's load, whatever this micro-batch's: the loss is then a plain mean over tokens."""
    state = StepState()
    router = make(state, aux_loss_coefficient=0.03, aux_loss_scope="global_batch")
    state.begin(0, 10, 1)
    x, index = tokens()
    assert router(x, index).loss.item() == pytest.approx(0.03, rel=1e-6), "uniform load at first: 1, whatever P"
    counts = torch.arange(EXPERTS) ** 2
    router.end_step(counts)
    fraction = [c / sum(i * i for i in range(EXPERTS)) for c in (i * i for i in range(EXPERTS))]
    state.begin(1, 10, 1)
    whole = router(x, index).loss
    assert whole.item() == pytest.approx(0.03 * switch_loss(probabilities(router, x), fraction), rel=1e-6)
    parts = [router(x[rows], index[rows]).loss.item() for rows in (slice(0, 20), slice(20, 40))]
    assert sum(parts) / 2 == pytest.approx(whole.item(), rel=1e-12), "the same under any split of the batch"


def test_all_layers_loss_equals_transformers() -> None:
    from transformers.models.olmoe.modeling_olmoe import load_balancing_loss_func

    state = StepState()
    state.begin(0, 10, 1)
    routers = [make(state, aux_loss_coefficient=0.03, aux_loss_scope="all_layers") for _ in range(3)]
    routers[-1].is_last_moe_layer = True
    logits, losses = [], []
    for layer, router in enumerate(routers):
        router.num_moe_layers = 3
        router.weight.data *= layer + 0.5
        x, index = tokens(seed=layer)
        losses.append(router(x, index).loss)
        logits.append(x @ router.weight.detach().T)
    expected = load_balancing_loss_func(tuple(logits), EXPERTS, 3)
    assert sum(0.0 if loss is None else loss.item() for loss in losses) == pytest.approx(0.03 * expected.item())
    assert state.means["load_balance_loss"].item() == pytest.approx(expected.item())
    assert state.pooled == [], "the next micro-batch starts anew"


@pytest.mark.parametrize("scope", ["micro_batch", "global_batch", "all_layers"])
@pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])
def test_gradients_of_the_losses(scope: str, score_function: str) -> None:
    """Finite differences in float64, with respect to tokens and router weights, through two layers."""
    state = StepState()
    routers = [
        make(
            state,
            aux_loss_coefficient=0.3,
            z_loss_coefficient=0.1,
            aux_loss_scope=scope,
            score_function=score_function,
            top_k=2,
            num_experts=5,
        )
        for _ in range(2)
    ]
    routers[1].is_last_moe_layer = True
    for router in routers:
        router.load.copy_(torch.tensor([0.5, 0.2, 0.1, 0.2, 0.0]))
    index = torch.arange(6)

    def total(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
        state.begin(0, 10, 1)
        loss = x.new_zeros(())
        for router, weight in zip(routers, (first, second), strict=True):
            part = torch.func.functional_call(router, {"weight": weight}, (x, index)).loss
            loss = loss if part is None else loss + part
        return loss

    x = torch.randn(6, HIDDEN, dtype=torch.float64, requires_grad=True)
    weights = [torch.randn(5, HIDDEN, dtype=torch.float64, requires_grad=True) for _ in routers]
    assert torch.autograd.gradcheck(total, (x, *weights), eps=1e-7, atol=1e-7)


def tensor_parallel_losses(scope: str, tp: int) -> dict[str, Any]:
    """The losses of two layers, and the gradients of their weights, with the tokens split over ``tp`` ranks."""
    place = topology.initialize(Layout(tp=tp))
    state = StepState()
    state.begin(0, 10, 1)
    moe = MoE(
        num_experts=EXPERTS,
        top_k=3,
        ffn_hidden_size=8,
        aux_loss_coefficient=0.3,
        z_loss_coefficient=0.1,
        aux_loss_scope=scope,  # type: ignore[arg-type]
    )
    config = SimpleNamespace(hidden_size=HIDDEN, params_dtype=torch.float64, tensor_model_parallel_size=tp)
    total, weights = torch.zeros((), dtype=torch.float64), []
    for layer in range(2):
        router = Router(config, moe, state, place.tp_cp_group).train()
        router.num_moe_layers, router.is_last_moe_layer = 2, layer == 1
        router.weight.data.copy_(torch.randn(EXPERTS, HIDDEN, generator=torch.Generator().manual_seed(layer)))
        x, index = tokens(seed=layer)
        mine = slice(place.tp_rank * TOKENS // tp, (place.tp_rank + 1) * TOKENS // tp)
        loss = router(x[mine], index[mine]).loss
        total = total if loss is None else total + loss
        weights.append(router.weight)
    total.backward()
    recorded = {name: value.item() for name, value in state.means.items()}
    return {"grads": [w.grad for w in weights], "recorded": recorded, "loss": total.item()}


@pytest.mark.parametrize("scope", ["micro_batch", "global_batch", "all_layers"])
def test_tensor_parallel_parts_sum_to_the_whole(scope: str) -> None:
    whole = run_distributed(tensor_parallel_losses, 1, scope, 1)[0]
    parts = run_distributed(tensor_parallel_losses, 2, scope, 2)
    assert sum(part["loss"] for part in parts) == pytest.approx(whole["loss"], rel=1e-9)
    for name, value in whole["recorded"].items():
        assert sum(part["recorded"][name] for part in parts) == pytest.approx(value, rel=1e-9), name
    for layer in range(2):
        assert_close(sum(part["grads"][layer] for part in parts), whole["grads"][layer], 1e-9)


# Counters, load, bias


def test_counters_advance_once_under_recompute() -> None:
    """mcore's checkpoint runs a layer twice, the first time without gradients."""
    state = StepState(recompute=True)
    state.begin(0, 10, 1)
    router = make(state, aux_loss_coefficient=0.1, capacity_factor=0.5)
    x, index = tokens()
    with torch.no_grad():
        first = router(x, index)
    counts, recorded = router.counts.clone(), state.means["load_balance_loss"].clone()
    assert first.loss is None
    second = router(x, index)
    assert second.loss is not None
    assert torch.equal(router.counts, counts)
    assert torch.equal(state.means["load_balance_loss"], recorded)
    assert torch.equal(first.keep, second.keep)


def test_counters_add_up_over_micro_batches() -> None:
    router = make(capacity_factor=0.7)
    expected, dropped = torch.zeros(EXPERTS, dtype=torch.int64), 0
    for seed in range(3):
        x, index = tokens(seed=seed)
        routed = router(x, index)
        expected += torch.bincount(routed.experts.flatten(), minlength=EXPERTS)
        dropped += int((~routed.keep).sum())
    assert dropped > 0
    assert router.counts.tolist() == [*expected.tolist(), dropped]


def test_end_of_step() -> None:
    router = make(bias_update_rate=0.01)
    router.counts.fill_(3)
    counts = torch.tensor([4, 4, 4, 4, 0, 8, 4, 4, 4, 4, 5, 3])
    router.end_step(counts)
    assert_close(router.load, counts / 48, 1e-7)
    expected = [0.0] * 4 + [0.01, -0.01] + [0.0] * 4 + [-0.01, 0.01]
    assert router.bias.tolist() == pytest.approx(expected)
    assert router.counts.sum() == 0
    router.counts.fill_(3)
    load, bias = router.load.clone(), router.bias.clone()
    router.end_step(None)
    assert torch.equal(router.load, load)
    assert torch.equal(router.bias, bias)
    assert router.counts.sum() == 0


def test_the_bias_stays_put_when_it_is_off() -> None:
    router = make()
    router.end_step(torch.arange(EXPERTS))
    assert (router.bias == 0).all()


def test_what_a_checkpoint_holds() -> None:
    assert set(make().state_dict()) == {"weight", "bias", "load"}


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_the_bias_stays_float32_under_deepspeed(single: topology.Topology, precision: str) -> None:
    """A rate of 0.001 is lost in bfloat16 once the bias is 0.5."""
    recipe = small.recipe(moe={"bias_update_rate": 0.001}, training={"precision": precision, "loss_scale": 1024.0})
    engine = engine_of(recipe, single)
    _, moe = engine._moe[0]
    moe.router.bias.fill_(0.5)
    engine.train_step(small.batches(recipe, 0), 0, 1e-3)
    moved = (moe.router.bias - 0.5).abs()
    assert moved.max().item() == pytest.approx(0.001, rel=1e-3)


def test_the_bias_evens_out_a_skewed_router(single: topology.Topology) -> None:
    """The whole engine, no auxiliary loss, one expert that nearly every token prefers at first."""
    loads = {}
    for rate in (0.0, 0.02):
        recipe = small.recipe(
            model={"num_layers": 1},
            moe={"aux_loss_coefficient": 0.0, "bias_update_rate": rate, "score_function": "sigmoid"},
            parallel={"zero_stage": 0},
        )
        engine = engine_of(recipe, single)
        engine.chunks[0].embedding.word_embeddings.weight.data += 0.03
        router = engine._moe[0][1].router
        router.weight.data *= 8
        router.weight.data[0] += 0.1
        results = [engine.train_step(small.batches(recipe, s), s, 1e-5) for s in range(40)]
        loads[rate] = [max(load_by_layer(r.expert_tokens)) for r in results]
    assert loads[0.02][0] == loads[0.0][0] > 3
    assert min(loads[0.0][-5:]) > 3, "left alone it stays skewed"
    assert max(loads[0.02][-5:]) < 1.7


def test_load_by_layer() -> None:
    assert load_by_layer(torch.tensor([[1, 1, 2], [0, 3, 3], [2, 2, 2]])) == pytest.approx([1.5, 1.5, 1.0])
    assert load_by_layer(torch.tensor([[0, 6, 0]])) == pytest.approx([3.0])
