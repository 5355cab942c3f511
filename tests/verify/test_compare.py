"""Comparisons of made-up runs: what is close, what is noise, what is named."""

from __future__ import annotations

import copy

import pytest
import torch

from megasparse.verify.compare import Whole, assemble, compare, compare_rounded, group_of
from megasparse.verify.observe import Seen

NAMES = {
    "embedding.word_embeddings.weight": (10, 4),
    "decoder.layers.0.input_layernorm.weight": (4,),
    "decoder.layers.0.self_attention.linear_qkv.weight": (8, 4),
    "decoder.layers.0.self_attention.linear_qkv.bias": (8,),
    "decoder.layers.0.mlp.router.weight": (4, 4),
    "decoder.layers.0.mlp.experts.w1": (4, 6, 4),
    "decoder.layers.1.mlp.linear_fc1.weight": (6, 4),
    "output_layer.weight": (10, 4),
}
GROUPS = ["embedding", "norms", "attention", "attention", "router", "experts", "mlp", "output"]


def run() -> Whole:
    """Two steps; the bias's gradient is rounding."""
    generator = torch.Generator().manual_seed(0)
    gradients = [{name: torch.randn(shape, generator=generator) for name, shape in NAMES.items()} for _ in range(2)]
    for step in gradients:
        step["decoder.layers.0.self_attention.linear_qkv.bias"] *= 1e-9
    norms = [torch.cat([g.flatten() for g in step.values()]).norm().item() for step in gradients]
    scalars = [{"loss": 5.0 - i, "load_balance_loss": 1.0, "grad_norm": norm} for i, norm in enumerate(norms)]
    weights = {name: torch.randn(shape, generator=generator) for name, shape in NAMES.items()}
    return Whole(scalars, gradients, weights, {(0, 0, 0): (1, 2), (0, 0, 1): (0, 3)}, 0.01)


def test_groups() -> None:
    assert [group_of(name) for name in NAMES] == GROUPS


def test_equal_runs_are_equal() -> None:
    result = compare("tp2", 2, run(), run())
    assert result.passed
    assert result.worst == 0
    assert list(result.noise) == ["decoder.layers.0.self_attention.linear_qkv.bias"]
    assert "decoder.layers.0.self_attention.linear_qkv.bias" not in result.tensors


@pytest.mark.parametrize(("size", "passed"), [(5e-6, True), (2e-5, False), (float("nan"), False)])
@pytest.mark.parametrize("what", ["loss", "grad_norm", "gradient", "weight"])
def test_tolerance(what: str, size: float, passed: bool) -> None:
    """A single element, in the last step, decides; not-a-number is never equal."""
    ours, name = run(), "decoder.layers.1.mlp.linear_fc1.weight"
    if what in ours.scalars[1]:
        ours.scalars[1][what] *= 1 + size
    else:
        tensor = (ours.gradients[1] if what == "gradient" else ours.weights)[name]
        tensor[2, 3] += size * tensor.abs().max()
    result = compare("tp2", 2, ours, run())
    assert result.passed is passed
    if not passed and what in ("gradient", "weight"):
        assert name in result.first
        assert "step 2" in result.first or what == "weight"


def test_noise_is_not_judged_but_a_large_gradient_is() -> None:
    ours, name = run(), "decoder.layers.0.self_attention.linear_qkv.bias"
    ours.gradients[0][name] *= -3
    result = compare("tp2", 2, ours, run())
    assert result.passed
    assert result.noise[name] == pytest.approx(4.0)
    ours.gradients[1][name] += 1e-2
    result = compare("tp2", 2, ours, run())
    assert not result.passed
    assert result.first.startswith(f"gradient of {name} in step 2")


def test_where_gradients_are_noise_weights_stay_where_rounding_can_move_them() -> None:
    name = "decoder.layers.0.self_attention.linear_qkv.bias"
    for apart, passed in ((1e-7, True), (1e-3, False), (float("nan"), False)):
        ours = run()
        ours.weights[name] = ours.weights[name] + apart
        assert compare("tp2", 2, ours, run(), lr=1e-3, eps=1e-3).passed is passed


def test_a_buffer_is_compared_though_it_has_no_gradient() -> None:
    ours, reference, name = run(), run(), "decoder.layers.0.mlp.router.bias"
    for whole in (ours, reference):
        whole.weights[name] = torch.ones(4)
    assert compare("tp2", 2, ours, reference).passed
    ours.weights[name] = ours.weights[name] * 1.1
    result = compare("tp2", 2, ours, reference)
    assert not result.passed
    assert name in result.first


def without(kind: str) -> Whole:
    ours = run()
    match kind:
        case "gradients":
            del ours.gradients[1]["output_layer.weight"]
        case "weights":
            ours.weights["output_layer.weight"] = torch.zeros(3, 3)
        case "steps":
            ours = Whole(ours.scalars[:1], ours.gradients[:1], ours.weights, ours.routes, 0.01)
        case "updates":
            ours.moved = {"output_layer.weight": torch.zeros(10, 4)}
        case "losses":
            ours.scalars[0]["another"] = 1e9
    return ours


@pytest.mark.parametrize("kind", ["gradients", "weights", "updates", "steps", "losses"])
def test_what_cannot_be_compared_is_an_error_of_the_layout(kind: str) -> None:
    for result in (compare("tp2", 2, without(kind), run()), compare_rounded("tp2", "bf16", without(kind), run())):
        assert kind in result.error
        assert not result.passed


def test_rounded_runs_are_compared_in_size_in_every_step_and_in_their_updates() -> None:
    def rounded() -> Whole:
        whole = run()
        whole.moved = {name: weight * 1e-3 for name, weight in whole.weights.items()}
        for step, gradients in zip(whole.scalars, whole.gradients, strict=True):
            step["grad_norm"] = torch.cat([g.flatten() for g in gradients.values()]).norm().item()
        return whole

    assert compare_rounded("dp2", "bf16", rounded(), rounded()).off == []
    name = "decoder.layers.0.input_layernorm.weight"
    ours = rounded()
    ours.moved = {name: torch.zeros_like(moved) for name, moved in ours.moved.items()}  # a step that is lost
    assert compare_rounded("dp2", "bf16", ours, rounded()).off == ["updates"]
    ours = rounded()
    b = ours.gradients[1][name]
    ours.gradients[1][name] = b + 10 * torch.stack([b[1], -b[0], b[3], -b[2]])  # at right angles
    assert "sizes" in compare_rounded("dp2", "bf16", ours, rounded()).off
    ours = rounded()
    ours.moved[name] = ours.moved[name] * float("nan")
    assert compare_rounded("dp2", "bf16", ours, rounded()).off == ["updates"]
    assert compare_rounded("dp2", "bf16", zeros(rounded()), rounded()).off


def zeros(whole: Whole) -> Whole:
    whole.gradients = [{name: torch.zeros_like(g) for name, g in step.items()} for step in whole.gradients]
    return whole


def test_ranks_that_route_a_token_must_agree() -> None:
    def rank(route: tuple[int, ...]) -> Seen:
        part = [("w", (2,), (0,), torch.ones(2))]
        return Seen([{"loss": 1.0, "grad_norm": 1.0}], [part], part, routes={(0, 0, 0): route}, margin=0.1)

    assert assemble([rank((1,)), rank((1,))]).contradictions == []
    for routes in (((1,), (2,)), ((2,), (1,))):
        found = assemble([rank(route) for route in routes]).contradictions
        assert found == ["ranks take different routes in step 0, layer 0, token 0"]


def test_a_flipped_route_fails() -> None:
    ours = run()
    ours.routes[0, 0, 1] = (0, 2)
    ours.routes[0, 0, 2] = (0, 1)
    result = compare("tp2", 2, ours, run())
    assert not result.passed
    assert result.flipped == ["step 0, layer 0, token 1", "step 0, layer 0, token 2"]
    assert "2 tokens took another route" in result.diagnosis


def scaled(kinds: set[str], factor: float) -> Whole:
    ours = run()
    for step in ours.gradients:
        for name, gradient in step.items():
            gradient *= factor if group_of(name) in kinds else 1.0
    return ours


@pytest.mark.parametrize(
    ("ours", "diagnosis"),
    [
        (scaled({"experts"}, 0.5), "expert gradients alone are off, by 0.5: they are averaged over the wrong group"),
        (scaled(set(GROUPS), 0.25), "every gradient is 0.25 times what it should be"),
        (scaled({"router"}, 2.0), "the auxiliary loss is scaled by the layout"),
        (scaled({"mlp", "norms"}, 2.0), "gradients of mlp, norms are off in the first step"),
    ],
    ids=["experts", "all", "router", "others"],
)
def test_diagnosis(ours: Whole, diagnosis: str) -> None:
    assert diagnosis in compare("tp2", 2, ours, run()).diagnosis


def test_diagnosis_of_the_loss_and_of_the_step() -> None:
    ours = run()
    ours.scalars[0]["loss"] += 1
    assert "the forward pass computes something else" in compare("tp2", 2, ours, run()).diagnosis
    ours = run()
    ours.weights["output_layer.weight"][0, 0] += 1
    assert "the optimizer's step" in compare("tp2", 2, ours, run()).diagnosis


@pytest.mark.parametrize(
    ("left_out", "diagnosis"),
    [
        ("experts", "it counts experts not at all"),
        ("norms", "it counts norms not at all"),
        ("half", "first of 2 ranks"),
    ],
)
def test_diagnosis_of_the_norm(left_out: str, diagnosis: str) -> None:
    ours = copy.deepcopy(run())
    gradients = {n: g for n, g in ours.gradients[0].items() if group_of(n) != left_out}
    if left_out == "half":
        gradients["decoder.layers.0.mlp.experts.w1"] = gradients["decoder.layers.0.mlp.experts.w1"][:2]
    ours.scalars[0]["grad_norm"] = torch.cat([g.flatten() for g in gradients.values()]).norm().item()
    assert diagnosis in compare("tp2", 2, ours, run()).diagnosis


def test_parts_become_whole() -> None:
    def rank(rows: slice, loss: float = 1.0) -> Seen:
        whole = torch.arange(8.0).view(4, 2)
        part = [("w", (4, 2), (rows.start, 0), whole[rows])]
        routes = {(0, 0, rows.start): (1,)}
        return Seen([{"loss": loss, "grad_norm": 1.0}], [part], part, routes=routes, margin=float(rows.start))

    whole = assemble([rank(slice(0, 3)), rank(slice(2, 4))])
    assert torch.equal(whole.weights["w"], torch.arange(8.0).view(4, 2))
    assert torch.equal(whole.gradients[0]["w"], whole.weights["w"])
    assert whole.routes == {(0, 0, 0): (1,), (0, 0, 2): (1,)}
    assert whole.margin == 0.0
    assert whole.contradictions == []
    with pytest.raises(AssertionError, match="no rank holds all of"):
        assemble([rank(slice(0, 3))])
    assert assemble([rank(slice(0, 3)), rank(slice(2, 4), loss=2.0)]).contradictions == [
        "ranks report different losses or norms"
    ]


@pytest.mark.parametrize("drift", [1.5, float("nan")])
@pytest.mark.parametrize("wrong", [0, 1], ids=["first", "last"])
def test_ranks_that_hold_the_same_must_agree(wrong: int, drift: float) -> None:
    """Whichever of two replicas has drifted, and though the other equals the reference."""

    def rank(number: int) -> Seen:
        factor = drift if number == wrong else 1.0
        parts = [[(n, tuple(t.shape), (0,) * t.dim(), t) for n, t in step.items()] for step in run().gradients]
        weights = [(n, tuple(w.shape), (0,) * w.dim(), w * factor) for n, w in run().weights.items()]
        return Seen(run().scalars, parts, weights, routes=run().routes, margin=0.01)

    result = compare("dp2", 2, assemble([rank(0), rank(1)]), run())
    assert not result.passed
    assert len(result.contradictions) == len(NAMES)
    assert "ranks that hold the same weight of embedding.word_embeddings.weight differ" in result.contradictions[0]
    assert drift != drift or result.diagnosis == result.contradictions[0]
