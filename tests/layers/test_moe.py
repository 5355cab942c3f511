"""The mixture of experts against a loop over tokens, and split over ranks against whole."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from torch import Tensor

from megasparse import topology
from megasparse.config import WeightSparsity
from megasparse.layers import moe as module
from megasparse.layers.moe import MoELayer, PostNormMoELayer, local_expert_order
from megasparse.layers.step import StepState
from megasparse.layout import Layout
from megasparse.model import transformer_config
from megasparse.ops import experts as ops
from megasparse.ops.two_four import matmul as two_four_matmul
from megasparse.sparsity import weight
from megasparse.sparsity.weight import SparseWeight
from tests import small
from tests.helpers import assert_close, run_distributed

SEQ, BATCH, HIDDEN, EXPERTS = 6, 2, 32, 8


def make(
    place: topology.Topology, dtype: torch.dtype = torch.float64, kind: type = MoELayer, **options: Any
) -> MoELayer:
    """A layer in training whose weights are the same under every layout."""
    recipe = small.recipe(moe={"aux_loss_coefficient": 0.0, "ffn_hidden_size": 12, **options})
    assert recipe.model.moe is not None
    config = transformer_config(recipe, place)
    config.params_dtype = dtype
    layer = kind(config, recipe.model.moe, place, StepState(seed=1)).to(dtype)
    for name, parameter in layer.named_parameters():
        generator = torch.Generator().manual_seed(len(name))
        shape = list(parameter.shape)
        if name.startswith("experts."):
            generator.manual_seed(int(name[-1]))
            shape[0] *= place.ep
        value = torch.randn(shape, generator=generator, dtype=torch.float64) / math.sqrt(shape[-1])
        if name.startswith("experts."):
            value = value.chunk(place.ep)[place.ep_rank]
        parameter.data.copy_(2 * value if name == "router.weight" else value)
    return layer.train()


def hidden_states(seed: int = 0, dtype: torch.dtype = torch.float64, batch: int = BATCH) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(SEQ, batch, HIDDEN, generator=generator, dtype=torch.float64).to(dtype)


def swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return down @ (F.silu(gate @ x) * (up @ x))


def by_token(layer: MoELayer, hidden: Tensor) -> Tensor:
    """Softmax scores of every token, its best experts one after the other, in float64."""
    moe, experts = layer.moe, layer.experts
    assert moe.capacity_factor is None
    output = torch.zeros(hidden.shape, dtype=torch.float64)
    for s in range(hidden.shape[0]):
        for b in range(hidden.shape[1]):
            x = hidden[s, b].double()
            scores = (layer.router.weight.double() @ x).softmax(0)
            chosen = sorted(range(moe.num_experts), key=lambda e: -scores[e].item())[: moe.top_k]
            total = sum(scores[e] for e in chosen) if moe.normalize_scores else 1.0
            for e in chosen:
                weights = (w[e].double() for w in (experts.w1, experts.w3, experts.w2))
                output[s, b] += scores[e] / total * swiglu(x, *weights)
            if layer.shared_experts is not None:
                gate, up = layer.shared_experts.linear_fc1.weight.double().chunk(2)
                output[s, b] += swiglu(x, gate, up, layer.shared_experts.linear_fc2.weight.double())
    return output


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize(
    "options",
    [{}, {"normalize_scores": False}, {"top_k": 1}, {"top_k": 8}, {"shared_expert_ffn_hidden_size": 20}],
    ids=str,
)
@torch.no_grad()
def test_output_equals_a_loop(
    single: topology.Topology, options: dict[str, Any], dtype: torch.dtype, tolerance: float
) -> None:
    layer = make(single, dtype, **options)
    x = hidden_states(dtype=dtype)
    output, bias = layer(x)
    assert bias is None
    assert output.dtype == dtype
    assert_close(output, by_token(layer, x), tolerance)


@pytest.mark.parametrize("policy", ["probs", "position"])
@torch.no_grad()
def test_dropped_copies_add_nothing(single: topology.Topology, policy: str) -> None:
    """The output is the sum over kept copies; a token with none comes out as zero (and passes by in the residual)."""
    layer = make(single, capacity_factor=0.4, drop_policy=policy)
    batch = 12
    x = hidden_states(batch=batch)
    index = torch.arange(batch * SEQ).view(batch, SEQ)
    routed = layer.router(x.view(-1, HIDDEN), index.t().reshape(-1))
    output, _ = layer(x, padding_mask=index)
    expected = torch.zeros(SEQ * batch, HIDDEN, dtype=torch.float64)
    w1, w2, w3 = layer.experts.w1, layer.experts.w2, layer.experts.w3
    for t in range(SEQ * batch):
        for j in range(2):
            if routed.keep[t, j]:
                e = routed.experts[t, j]
                expected[t] += routed.weights[t, j] * swiglu(x.view(-1, HIDDEN)[t], w1[e], w3[e], w2[e])
    limit = math.ceil(SEQ * batch * 2 / EXPERTS * 0.4)
    assert torch.bincount(routed.experts[routed.keep], minlength=EXPERTS).max() == limit
    assert (~routed.keep).all(1).any(), "some token lost both experts"
    assert_close(output.reshape(-1, HIDDEN), expected, 1e-12)
    assert layer.router.counts[-1] == 2 * (~routed.keep).sum()


@torch.no_grad()
def test_capacity_counts_sample_by_sample(single: topology.Topology) -> None:
    """By position, the tokens kept are those of the first samples: the last sample loses more than the first."""
    layer = make(single, capacity_factor=0.5, drop_policy="position")
    x = hidden_states(batch=4)
    index = torch.arange(4 * SEQ).view(4, SEQ)
    output, _ = layer(x, padding_mask=index)
    alone = make(single)
    assert_close(output[:, 0], alone(x)[0][:, 0], 1e-12)
    assert not torch.allclose(output[:, 3], alone(x)[0][:, 3])


@pytest.mark.parametrize("backend", ["naive", "cpu"])
@pytest.mark.parametrize("options", [{}, {"capacity_factor": 0.6}, {"shared_expert_ffn_hidden_size": 4}], ids=str)
def test_every_gradient_by_finite_differences(
    single: topology.Topology, monkeypatch: pytest.MonkeyPatch, backend: str, options: dict[str, Any]
) -> None:
    """Of the input, the router and every expert weight, in float64."""
    layer = make(single, num_experts=4, ffn_hidden_size=3, **options)
    monkeypatch.setattr(
        MoELayer,
        "_compute",
        lambda self, rows, counts: ops.grouped_swiglu(
            rows, counts, self.experts.w1, self.experts.w2, self.experts.w3, backend=backend
        ),
    )
    names = [name for name, _ in layer.named_parameters()]
    values = [parameter.detach().clone().requires_grad_() for parameter in layer.parameters()]
    x = hidden_states()[:3].clone().requires_grad_()

    def forward(x: Tensor, *weights: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, weights, strict=True)), (x,))[0]

    assert torch.autograd.gradcheck(forward, (x, *values), fast_mode=True)
    forward(x, *values).square().sum().backward()
    for name, value in zip(names, values, strict=True):
        assert value.grad is not None, name
        assert value.grad.abs().max() > 0, name


def test_naive_and_fast_backends_agree(single: topology.Topology, monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for backend in ("naive", "cpu"):
        layer = make(single, torch.float32)
        monkeypatch.setattr(
            MoELayer,
            "_compute",
            lambda self, rows, counts, backend=backend: ops.grouped_swiglu(
                rows, counts, self.experts.w1, self.experts.w2, self.experts.w3, backend=backend
            ),
        )
        x = hidden_states(dtype=torch.float32).requires_grad_()
        output, _ = layer(x)
        output.square().sum().backward()
        results.append([output, x.grad, *(p.grad for p in layer.parameters())])
    assert_close(results[1], results[0], 1e-5)


def test_the_auxiliary_loss_flows_with_the_output(single: topology.Topology, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attached to the output: its gradient comes times the schedule's scale, whatever the output's gradient."""
    layer = make(single, aux_loss_coefficient=0.5)
    x = hidden_states()
    monkeypatch.setattr(MoEAuxLossAutoScaler, "main_loss_backward_scale", torch.tensor(3.0))
    output, _ = layer(x)
    (output * 0.0).sum().backward()
    attached = layer.router.weight.grad.clone()
    layer.router.weight.grad = None
    layer.router(x.view(-1, HIDDEN), torch.arange(SEQ * BATCH)).loss.backward()
    assert attached.abs().max() > 0
    assert_close(attached, 3 * layer.router.weight.grad, 1e-12)


def test_post_norm(single: topology.Topology) -> None:
    layer = make(single, kind=PostNormMoELayer)
    layer.post_layernorm.to(torch.float64)
    x = hidden_states()
    expected = by_token(layer, x)
    expected = expected / (expected.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.post_layernorm.weight
    assert_close(layer(x)[0], expected, 1e-12)


@pytest.mark.parametrize(
    "counts",
    [
        [[2, 0, 3], [1, 1, 0]],
        [[0, 0], [0, 0]],
        [[5]],
        [[0, 4], [0, 0], [3, 1]],
        [[1, 2, 3, 4], [4, 3, 2, 1], [0, 0, 0, 1], [2, 2, 2, 2]],
    ],
    ids=str,
)
def test_local_expert_order(counts: list[list[int]]) -> None:
    """Rows labelled by source, expert and number: after the first permutation by expert then source, and back."""
    rows = [(e, s, n) for s, row in enumerate(counts) for e, count in enumerate(row) for n in range(count)]
    forward, backward = local_expert_order(torch.tensor(counts))
    assert [rows[i] for i in forward] == sorted(rows)
    assert [sorted(rows)[i] for i in backward] == rows


# Expert parallelism


def one_micro_batch(place: topology.Topology, seed: int, forced: list[int] | None, **options: Any) -> dict[str, Any]:
    """Forward and backward of the micro-batch ``seed``; ``forced``: only these experts are chosen."""
    layer = make(place, bias_update_rate=0.001, **options)
    if forced is not None:
        layer.router.bias.fill_(-100.0)
        layer.router.bias[forced] = 100.0
    x = hidden_states(seed).requires_grad_()
    output, _ = layer(x)
    output.backward(hidden_states(seed + 100))
    grads = {name: p.grad for name, p in layer.named_parameters()}
    assert all(grad is not None for grad in grads.values()), [name for name in grads if grads[name] is None]
    return {"output": output.detach(), "dx": x.grad, "grads": grads, "counts": layer.router.counts.clone()}


def expert_parallel(cases: list[tuple[list[int] | None, dict[str, Any]]], ep: int) -> list[dict[str, Any]]:
    place = topology.initialize(Layout(ep=ep, dp=ep))
    return [one_micro_batch(place, place.rank, forced, **options) for forced, options in cases]


CASES: list[tuple[list[int] | None, dict[str, Any]]] = [
    (None, {}),
    (None, {"shared_expert_ffn_hidden_size": 20}),
    (None, {"capacity_factor": 0.5, "drop_policy": "position"}),
    ([0, 1], {}),  # rank 1 has no token to compute
    ([4, 5], {}),  # rank 0 has none
    ([1, 6], {"top_k": 2}),  # most experts have none
    ([3, 5, 7], {"top_k": 3}),
]


def test_two_ranks_equal_one(single: topology.Topology) -> None:
    """Output, gradient of the input, and expert gradients summed over both ranks' tokens; also for idle ranks."""
    ranks = run_distributed(expert_parallel, 2, CASES, 2)
    for number, (forced, options) in enumerate(CASES):
        whole = [one_micro_batch(single, rank, forced, **options) for rank in range(2)]
        parts = [rank[number] for rank in ranks]
        for ours, reference in zip(parts, whole, strict=True):
            for key in ("output", "dx", "counts"):
                assert_close(ours[key], reference[key], 1e-12, f"{forced} {options} {key}")
        for name in whole[0]["grads"]:
            reference = whole[0]["grads"][name] + whole[1]["grads"][name]
            if name.startswith("experts."):
                ours = torch.cat([part["grads"][name] for part in parts])
            else:
                ours = parts[0]["grads"][name] + parts[1]["grads"][name]
            assert_close(ours, reference, 1e-12, f"{forced} {options} {name}")
            if forced is not None and name.startswith("experts."):
                idle = [e for e in range(EXPERTS) if e not in forced]
                assert (ours[idle] == 0).all()
                assert (ours[forced].flatten(1).abs().amax(1) > 0).all()


def tensor_parallel(sequence_parallel: bool, ep: int, options: dict[str, Any]) -> dict[str, Any]:
    """The layer under tp=2: the whole sequence on each rank, or its half with sequence parallelism."""
    place = topology.initialize(Layout(tp=2, ep=ep, sequence_parallel=sequence_parallel))
    layer = make(place, **options)
    index = torch.arange(BATCH * SEQ).view(BATCH, SEQ)
    x, dy = hidden_states(), hidden_states(100)
    if sequence_parallel:
        x, dy = (t.chunk(2)[place.tp_rank].clone() for t in (x, dy))
    x.requires_grad_()
    output, _ = layer(x, padding_mask=index)
    output.backward(dy)
    return {"output": output.detach(), "dx": x.grad, "grads": {n: p.grad for n, p in layer.named_parameters()}}


@pytest.mark.parametrize(("sequence_parallel", "ep"), [(False, 1), (False, 2), (True, 2)])
def test_tensor_parallel_equals_one(single: topology.Topology, sequence_parallel: bool, ep: int) -> None:
    """Router gradients sum over the ranks; so do the experts' that both hold."""
    options = {"capacity_factor": 0.7, "drop_policy": "position"}
    ranks = run_distributed(tensor_parallel, 2, sequence_parallel, ep, options)
    layer = make(single, **options)
    x = hidden_states().requires_grad_()
    output, _ = layer(x, padding_mask=torch.arange(BATCH * SEQ).view(BATCH, SEQ))
    output.backward(hidden_states(100))
    for key, reference in (("output", output.detach()), ("dx", x.grad)):
        if sequence_parallel:
            assert_close(torch.cat([rank[key] for rank in ranks]), reference, 1e-12, key)
        else:
            assert_close([rank[key] for rank in ranks], [reference] * 2, 1e-12, key)
    for name, parameter in layer.named_parameters():
        parts = [rank["grads"][name] for rank in ranks]
        ours = torch.cat(parts) if name.startswith("experts.") and ep == 2 else parts[0] + parts[1]
        assert_close(ours, parameter.grad, 1e-12, name)


@pytest.mark.parametrize("at_least", [0, 4, 99])
def test_experts_by_themselves_and_together(
    monkeypatch: pytest.MonkeyPatch, single: topology.Topology, at_least: int
) -> None:
    """Those with many rows each by its own 2:4 products (here the masked door's), w3 is dense: outputs and gradients
    are those of all together."""
    how = WeightSparsity(method="s_ste")
    recipe = small.recipe(moe={"aux_loss_coefficient": 0.0})
    assert recipe.model.moe is not None
    state = StepState(seed=1)
    config = transformer_config(recipe, single)
    layer = MoELayer(config, recipe.model.moe, single, state, {"w1": how, "w2": how}).train()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    for sparse in layer.experts.sparsity.values():
        sparse.begin_step(0, 4)
    rows, counts = torch.randn(17, HIDDEN, requires_grad=True), torch.tensor([3, 0, 8, 6] + [0] * 4)
    wanted = [rows, *layer.experts.parameters()]
    expected = layer._compute(rows, counts)
    expected_gradients = torch.autograd.grad(expected.square().sum(), wanted)

    called = []
    monkeypatch.setattr(module, "expert_door", lambda n, _: called.append(n) or ("x" if n >= at_least else "masked"))
    monkeypatch.setattr(SparseWeight, "door_now", property(lambda self: "semi_structured"))
    prepared = []

    def prepare(w: Tensor, door: str, transposable: bool) -> Any:
        prepared.append(w.data_ptr())
        return two_four_matmul.prepare(w, "masked", transposable)

    monkeypatch.setattr(weight, "prepare", prepare)
    for _ in range(2):  # operands are made once a step
        output = layer._compute(rows, counts)
    assert called == 2 * counts.tolist()
    assert len(prepared) == 2 * sum(n >= at_least for n in counts.tolist())
    assert_close(output, expected, 1e-6)
    for gradient, other in zip(torch.autograd.grad(output.square().sum(), wanted), expected_gradients, strict=True):
        assert_close(gradient, other, 1e-6)
