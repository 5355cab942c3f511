"""What is saved: every element of every weight once, under the name and at the place it has in the whole model."""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

from megasparse.checkpoint.state import Sharded, random_state, seed_anew, set_random_state, tensors
from megasparse.layout import Layout
from megasparse.placement import local_weights
from megasparse.topology import Topology
from tests import small
from tests.checkpoint.runs import engine_of, recipe_of, run
from tests.helpers import run_distributed

Rectangles = dict[str, tuple[tuple[int, ...], list[tuple[tuple[int, ...], torch.Tensor]]]]


def rectangles(layout: str) -> Rectangles:
    """This rank's, before any step: the weights as they were drawn, the same in every layout."""
    recipe = recipe_of(layout)
    engine = engine_of(recipe, small.start(recipe))
    return {
        name: (tuple(sharded.shape), [(tuple(o), view.clone()) for o, view in sharded.views.items()])
        for name, sharded in tensors(engine, copies=False).items()
    }


def test_ranges_of_all_ranks_make_the_whole_model() -> None:
    """Against the plain parameters of one process without ZeRO."""
    recipe = recipe_of("single+zero0")
    weights = run_distributed(plain_weights, 1)[0]
    for layout in ("tp2pp2ep2+sp", "cp2ep2+zero2", "pp2vp2"):
        found: dict[str, torch.Tensor] = {}
        for rank in run_distributed(rectangles, Layout.parse(layout).world_size, layout):
            for name, (shape, views) in rank.items():
                whole = found.setdefault(name, torch.full(shape, torch.nan))
                for offsets, view in views:
                    whole[tuple(slice(o, o + n) for o, n in zip(offsets, view.shape, strict=True))] = view
        for name, weight in weights.items():
            assert torch.equal(found.pop(f"model.{name}"), weight), f"{layout}: {name}"
            for moment in ("exp_avg", "exp_avg_sq"):
                assert not found.pop(f"optimizer.{moment}.{name}").count_nonzero(), f"{layout}: {name}"
        buffers = {f"model.decoder.layers.{i}.mlp.router.{b}" for i in (1, 3) for b in ("bias", "load")}
        linears = [
            name.replace(".weight", ".sparsity").replace(".experts", ".experts.sparsity")
            for name in recipe.sparse_weights
        ]
        masks = {f"model.{linear}.mask" for linear in linears}
        assert found.keys() == buffers | masks, layout
    assert len(weights) > 4 * recipe.model.num_layers


def plain_weights() -> dict[str, torch.Tensor]:
    recipe = recipe_of("single+zero0")
    place = small.start(recipe)
    engine = engine_of(recipe, place)
    return {weight.name: weight.tensor.detach().clone() for weight in local_weights(engine.chunks, place)}


def test_moments_are_adams(single: Topology) -> None:
    """After a step from zero, exp_avg is (1 - beta1) of the gradient and exp_avg_sq (1 - beta2) of its square."""
    recipe = recipe_of("single+zero0", dropout=False)
    engine = engine_of(recipe, single)
    run(engine, 0, 1)
    found = tensors(engine, copies=False)
    optimizer = recipe.optimizer
    norm = 0.0
    for weight in local_weights(engine.chunks, single):
        averages = found[f"optimizer.exp_avg.{weight.name}"].views
        squares = found[f"optimizer.exp_avg_sq.{weight.name}"].views
        assert averages.keys() == squares.keys()
        for offsets, average in averages.items():
            gradient = average / (1 - optimizer.beta1)
            expected = gradient**2 * (1 - optimizer.beta2)
            torch.testing.assert_close(squares[offsets], expected, rtol=1e-4, atol=1e-12)
            norm += gradient.square().sum().item()
    assert norm**0.5 <= optimizer.clip_grad * (1 + 1e-4)
    assert norm > 0


def test_views_are_the_optimizers_own(single: Topology) -> None:
    engine = engine_of(recipe_of("single"), single)
    name = "model.decoder.layers.0.self_attention.linear_qkv.weight"
    for view in tensors(engine, copies=False)[name].views.values():
        view.fill_(7.0)
    engine.optimizer.update_lp_params()
    weight = next(w for w in local_weights(engine.chunks, single) if f"model.{w.name}" == name)
    assert (weight.tensor == 7.0).all()


def test_a_copy_is_its_own() -> None:
    tensor = torch.arange(6.0).view(2, 3)
    sharded = Sharded.whole(tensor)
    copy = sharded.copied()
    tensor.zero_()
    assert copy.views[torch.Size([0, 0])].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert (copy.shape, copy.dtype, copy.bytes) == (tensor.shape, tensor.dtype, 24)


def draw() -> tuple[torch.Tensor, torch.Tensor]:
    ordinary = torch.rand(4)
    with get_cuda_rng_tracker().fork():
        return ordinary, torch.rand(4)


def same(a: tuple[torch.Tensor, torch.Tensor], b: tuple[torch.Tensor, torch.Tensor]) -> list[bool]:
    return [torch.equal(x, y) for x, y in zip(a, b, strict=True)]


def test_random_state_round_trip(single: Topology) -> None:
    draw()
    state = random_state(0)
    first = draw()
    set_random_state(state)
    second = draw()
    assert same(first, second) == [True, True]
    assert not torch.equal(first[0], first[1])


def test_seeded_anew_differs_by_step_and_not_by_what_was_drawn(single: Topology) -> None:
    torch.manual_seed(1234)
    drawn = {}
    for step in (3, 4):
        torch.manual_seed(1234)
        seed_anew(step)
        drawn[step] = draw()
    assert same(drawn[3], drawn[4]) == [False, False]
    torch.manual_seed(1234)
    draw()
    seed_anew(3)
    assert same(drawn[3], draw()) == [True, True]
