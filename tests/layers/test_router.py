"""The router against loops in float64: what each option does to the choice and what is dropped."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megasparse import topology
from megasparse.config import MoE
from megasparse.layers.router import Router
from megasparse.layers.step import StepState
from megasparse.layout import Layout
from tests.helpers import assert_close, run_distributed

EXPERTS, HIDDEN, TOKENS = 12, 16, 40

pytestmark = pytest.mark.usefixtures("single")


def make(state: StepState | None = None, dtype: torch.dtype = torch.float64, **options: Any) -> Router:
    """A router in training with weights of some size."""
    moe = MoE(**{"num_experts": EXPERTS, "top_k": 3, "ffn_hidden_size": 8, "aux_loss_coefficient": 0.0, **options})
    config = SimpleNamespace(hidden_size=HIDDEN, params_dtype=dtype, tensor_model_parallel_size=1)
    router = Router(config, moe, state or StepState(), dist.group.WORLD)
    generator = torch.Generator().manual_seed(3)
    router.weight.data.copy_(torch.randn(moe.num_experts, HIDDEN, generator=generator, dtype=torch.float64) / 2)
    return router.train()


def tokens(count: int = TOKENS, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, HIDDEN, generator=generator, dtype=torch.float64), torch.arange(count)


def by_hand(router: Router, x: Tensor) -> tuple[list[list[float]], list[list[int]]]:
    """Weights and experts of each token, from the definitions in config.MoE."""
    moe = router.moe
    all_weights, all_experts = [], []
    for row in (x @ router.weight.detach().T).tolist():
        if moe.score_function == "softmax":
            scores = [math.exp(v) / sum(math.exp(u) for u in row) for v in row]
        else:
            scores = [1 / (1 + math.exp(-v)) for v in row]
        bias = router.bias.tolist() if moe.bias_update_rate > 0 else [0.0] * moe.num_experts
        chosen_by = [s + b for s, b in zip(scores, bias, strict=True)]
        allowed = list(range(moe.num_experts))
        if moe.num_groups is not None:
            size = moe.num_experts // moe.num_groups
            best_two = [sum(sorted(chosen_by[g * size : (g + 1) * size])[-2:]) for g in range(moe.num_groups)]
            groups = sorted(range(moe.num_groups), key=lambda g: -best_two[g])[: moe.top_k_groups]
            allowed = [e for e in allowed if e // size in groups]
        experts = sorted(allowed, key=lambda e: -chosen_by[e])[: moe.top_k]
        weights = [scores[e] for e in experts]
        if moe.normalize_scores:
            weights = [w / sum(weights) for w in weights]
        all_weights.append([w * moe.score_scale for w in weights])
        all_experts.append(experts)
    return all_weights, all_experts


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"normalize_scores": False},
        {"score_function": "sigmoid"},
        {"score_function": "sigmoid", "normalize_scores": False, "score_scale": 2.5},
        {"num_groups": 4, "top_k_groups": 2},
        {"bias_update_rate": 0.001},
        {"score_function": "sigmoid", "num_groups": 3, "top_k_groups": 1, "bias_update_rate": 0.1},
        {"top_k": 1},
        {"top_k": EXPERTS},
    ],
    ids=str,
)
def test_the_choice_is_by_definition(options: dict[str, Any]) -> None:
    router = make(**options)
    router.bias.copy_(torch.linspace(0.4, -0.4, EXPERTS)[torch.randperm(EXPERTS)])
    x, index = tokens()
    routed = router(x, index)
    weights, experts = by_hand(router, x)
    assert routed.experts.tolist() == experts
    assert_close(routed.weights, torch.tensor(weights, dtype=torch.float64), 1e-12)
    assert routed.keep is None
    assert routed.loss is None


def test_the_bias_moves_the_choice_and_not_the_weights() -> None:
    plain, biased = make(normalize_scores=False), make(normalize_scores=False, bias_update_rate=0.001)
    biased.bias[5] = 10.0
    x, index = tokens()
    before, after = plain(x, index), biased(x, index)
    assert (after.experts[:, 0] == 5).all()
    scores = (x @ plain.weight.T).softmax(-1)
    assert_close(after.weights, scores.gather(1, after.experts), 1e-12)
    assert not torch.equal(before.experts, after.experts)
    after.weights.sum().backward()
    assert biased.bias.grad is None


def test_low_precision_is_routed_in_float32() -> None:
    router = make(dtype=torch.bfloat16)
    x, index = tokens()
    routed = router(x.bfloat16(), index)
    expected = make(dtype=torch.float32)
    expected.weight.data.copy_(router.weight)
    reference = expected(x.bfloat16().float(), index)
    assert routed.weights.dtype == torch.float32
    assert torch.equal(routed.experts, reference.experts)
    assert torch.equal(routed.weights, reference.weights)


# Jitter


def test_jitter_belongs_to_step_and_token() -> None:
    """The same token gets the same noise in any order, company and run; another one at the next step or layer."""
    state = StepState(seed=7)
    router = make(state, jitter=0.2, normalize_scores=False)
    x, index = tokens()
    index = index + 1000
    state.begin(4, 10, 1)
    once = router(x, index)
    again = router(x, index)
    assert torch.equal(once.weights, again.weights), "a recomputed layer sees the same noise"
    shuffle = torch.randperm(TOKENS)
    shuffled = router(x[shuffle], index[shuffle])
    assert torch.equal(shuffled.experts, once.experts[shuffle])
    assert_close(shuffled.weights, once.weights[shuffle], 1e-12)
    alone = router(x[7:9], index[7:9])
    assert_close(alone.weights, once.weights[7:9], 1e-12)
    other = {}
    state.begin(5, 10, 1)
    other["step"] = router(x, index).weights
    state.begin(4, 10, 1)
    router.layer_number = 2
    other["layer"] = router(x, index).weights
    router.layer_number = 1
    other["token"] = router(x, index + TOKENS).weights
    state.seed = 8
    other["seed"] = router(x, index).weights
    for name, weights in other.items():
        assert (weights != once.weights).all(), name
    noise = once.weights / router.eval()(x, index).weights - 1
    assert noise.abs().max() > 0


def test_jitter_multiplies_the_input_of_the_router() -> None:
    """With a router that reads one channel, the logit is the channel times a factor within 1 - jitter .. 1 + jitter."""
    router = make(jitter=0.25, top_k=1, normalize_scores=False, score_function="sigmoid", num_experts=1)
    router.weight.data.zero_()
    router.weight.data[0, 3] = 1.0
    x, index = tokens(4000)
    x = x.abs() + 0.1
    factor = torch.logit(router(x, index).weights[:, 0]) / x[:, 3]
    assert factor.min() >= 0.75 - 1e-6
    assert factor.max() <= 1.25 + 1e-6
    assert factor.mean().item() == pytest.approx(1.0, abs=6 * 0.5 / math.sqrt(12 * 4000))
    assert factor.std().item() == pytest.approx(0.5 / math.sqrt(12), rel=0.05)


def test_evaluation_has_neither_noise_nor_counters_nor_losses() -> None:
    router = make(jitter=0.2, aux_loss_coefficient=0.1, z_loss_coefficient=0.1).eval()
    x, index = tokens()
    routed = router(x, index)
    _, experts = by_hand(router, x)
    assert routed.experts.tolist() == experts
    assert routed.loss is None
    assert router.counts.sum() == 0
    assert router.state.means == {}


# Capacity


def kept_by_hand(experts: Tensor, weights: Tensor, order: list[int], limit: int, policy: str) -> list[list[bool]]:
    """Serve copies one by one: the best first, or in token order; an expert takes ``limit``."""
    copies = [(t, j) for t in order for j in range(experts.shape[1])]
    if policy == "probs":
        copies.sort(key=lambda copy: -weights[copy].item())
    taken: dict[int, int] = {}
    keep = [[False] * experts.shape[1] for _ in range(len(experts))]
    for t, j in copies:
        expert = int(experts[t, j])
        if taken.get(expert, 0) < limit:
            taken[expert] = taken.get(expert, 0) + 1
            keep[t][j] = True
    return keep


@pytest.mark.parametrize("policy", ["probs", "position"])
@pytest.mark.parametrize("factor", [0.25, 0.8, 1.0, 1.3, 100.0])
def test_capacity_over_the_micro_batch(policy: str, factor: float) -> None:
    """The router sees [seq * batch] rows, batch inner; drops are counted off batch-major, sample after sample."""
    seq, batch = 10, 4
    router = make(capacity_factor=factor, drop_policy=policy)
    x, _ = tokens(seq * batch)
    index = torch.tensor([1000 + b * seq + s for s in range(seq) for b in range(batch)])
    routed = router(x, index)
    limit = math.ceil(seq * batch * 3 / EXPERTS * factor)
    order = sorted(range(seq * batch), key=lambda t: index[t].item())
    assert routed.keep.tolist() == kept_by_hand(routed.experts, routed.weights, order, limit, policy)
    assert routed.keep.all() == (factor == 100.0)
    if policy == "position" and factor < 1:
        wrong = kept_by_hand(routed.experts, routed.weights, list(range(seq * batch)), limit, policy)
        assert routed.keep.tolist() != wrong, "the order matters, or this test shows nothing"


def test_evaluation_drops_nothing() -> None:
    """Else a token's score would depend on the tokens after it, and on its micro-batch."""
    router = make(capacity_factor=0.1).eval()
    assert router(*tokens()).keep is None


def tensor_parallel_keep(policy: str, tp: int) -> dict[int, list[bool]]:
    """Token -> which of its copies are kept, with positions split over ``tp`` ranks as the MoE layer splits them."""
    place = topology.initialize(Layout(tp=tp))
    seq, batch = 10, 4
    moe = MoE(num_experts=EXPERTS, top_k=3, ffn_hidden_size=8, capacity_factor=0.6, drop_policy=policy)  # type: ignore[arg-type]
    config = SimpleNamespace(hidden_size=HIDDEN, params_dtype=torch.float64, tensor_model_parallel_size=tp)
    router = Router(config, moe, StepState(), place.tp_cp_group).train()
    router.weight.data.copy_(torch.randn(EXPERTS, HIDDEN, generator=torch.Generator().manual_seed(0)))
    x, _ = tokens(seq * batch)
    index = torch.arange(seq * batch).view(batch, seq).t().reshape(-1)  # row s * batch + b is token b * seq + s
    part = len(x) // tp
    mine = slice(place.tp_rank * part, (place.tp_rank + 1) * part)
    routed = router(x[mine], index[mine])
    return dict(zip(index[mine].tolist(), routed.keep.tolist(), strict=True))


@pytest.mark.parametrize("policy", ["probs", "position"])
def test_capacity_does_not_see_the_split(policy: str) -> None:
    whole = run_distributed(tensor_parallel_keep, 1, policy, 1)[0]
    parts = run_distributed(tensor_parallel_keep, 2, policy, 2)
    assert {**parts[0], **parts[1]} == whole
    assert not all(all(keep) for keep in whole.values())
