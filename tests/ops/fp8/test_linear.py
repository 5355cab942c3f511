"""The layer: y, dx and dW against float64 products of explicitly rounded operands, for each recipe."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from megasparse.ops.fp8 import E4M3, E5M2, Scaling, amax, fp8_grouped_swiglu, fp8_linear, quantize, update_history
from megasparse.ops.fp8.linear import DY, DY_OF_DW, WEIGHT, X
from tests.ops.fp8.explicit import rounded, scaled_and_rounded

RECIPES = pytest.mark.parametrize("recipe", ["delayed", "current", "block"])
TYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
SHAPES = pytest.mark.parametrize("shape", [(1, 1, 1), (5, 7, 3), (128, 256, 128), (200, 130, 300)], ids=str)
SCALES = torch.tensor([90.0, 1000.0, 3e4, 2e4])  # of the delayed recipe: some of x and dy saturates
ROW, COLUMN, SQUARE = (1, 128), (128, 1), (128, 128)


def scaling(recipe, **kwargs) -> Scaling:
    state = dict(scale=SCALES, amax=torch.zeros(4)) if recipe == "delayed" else {}
    return Scaling(recipe, **{**state, **kwargs})


def explicit(recipe: str, x: Tensor, operand: int, tile: tuple[int, int], grad_dtype=E5M2) -> np.ndarray:
    dtype = grad_dtype if operand in (DY, DY_OF_DW) else E4M3
    if recipe == "delayed":
        return scaled_and_rounded(x.detach().double().numpy(), dtype, SCALES[operand].item())
    return rounded(x, dtype, tile if recipe == "block" else None)


def operands(shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x [tokens, in], weight [out, in] and dy [tokens, out], whose rows and columns are of many sizes: powers of two
    round all the same but what they make subnormal."""
    tokens, width, out = shape

    def draw(rows: int, columns: int, size: float) -> Tensor:
        sizes = torch.randn(rows, 1).mul(5).exp() * torch.randn(columns).mul(5).exp()
        return (size * torch.randn(rows, columns) * sizes).to(dtype)

    return draw(tokens, width, 1.0).requires_grad_(), draw(out, width, 0.05).requires_grad_(), draw(tokens, out, 1.0)


def assert_product(actual: Tensor, a: np.ndarray, b: np.ndarray) -> None:
    """Within float32's rounding of the sum, and the result's own."""
    exact, size = a @ b, np.abs(a) @ np.abs(b)
    bound = (a.shape[1] + 4) * 2.0**-24 * size + (2.0**-8 * np.abs(exact) if actual.dtype == torch.bfloat16 else 0)
    np.testing.assert_array_less(np.abs(actual.detach().double().numpy() - exact), bound + 1e-300)


@SHAPES
@TYPES
@RECIPES
def test_products(recipe: str, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    x, weight, dy = operands(shape, dtype)
    y = fp8_linear(x, weight, scaling(recipe))
    dx, dw = torch.autograd.grad(y, (x, weight), dy)
    assert (y.dtype, dx.dtype, dw.dtype) == (dtype,) * 3
    qw = explicit(recipe, weight, WEIGHT, SQUARE)
    assert_product(y, explicit(recipe, x, X, ROW), qw.T)
    assert_product(dx, explicit(recipe, dy, DY, ROW), qw)
    assert_product(dw, explicit(recipe, dy, DY, COLUMN).T, explicit(recipe, x, X, COLUMN))


def test_tiles_of_the_two_directions_differ() -> None:
    """Else test_products could not tell whether dW is made of x and dy quantised along tokens."""
    x, _, dy = operands((200, 130, 300), torch.float32)
    for tensor, dtype in ((x, E4M3), (dy, E5M2)):
        differ = rounded(tensor, dtype, ROW) != rounded(tensor, dtype, COLUMN)
        assert differ.mean() > 0.05


@RECIPES
def test_gradients_in_e4m3(recipe: str) -> None:
    x, weight, dy = operands((9, 40, 20), torch.float32)
    y = fp8_linear(x, weight, scaling(recipe, grad_dtype=E4M3))
    (dx,) = torch.autograd.grad(y, x, dy)
    assert_product(dx, explicit(recipe, dy, DY, ROW, E4M3), explicit(recipe, weight, WEIGHT, SQUARE))


@RECIPES
@pytest.mark.parametrize("other", [torch.float32, torch.bfloat16], ids=str)
def test_another_dy_for_the_weight_alone(recipe: str, other: torch.dtype) -> None:
    """dW is of the pruned dy, quantised by itself; dx is to the bit what it is without."""
    x, weight, dy = operands((200, 40, 300), torch.bfloat16)
    seen = []

    def pruned(gradient: Tensor) -> Tensor:
        seen.append(gradient)
        return torch.where(torch.arange(300) % 2 == 0, 2 * gradient, 0).to(other)

    shaped = x.view(2, 100, 40)
    dx, dw = torch.autograd.grad(fp8_linear(shaped, weight, scaling(recipe), pruned), (x, weight), dy.view(2, 100, 300))
    (plain,) = torch.autograd.grad(fp8_linear(x, weight, scaling(recipe)), x, dy)
    assert torch.equal(dx, plain)
    assert torch.equal(seen[0], dy)
    assert_product(dw, explicit(recipe, pruned(dy), DY_OF_DW, COLUMN).T, explicit(recipe, x, X, COLUMN))


@RECIPES
def test_the_weight_may_be_a_function_of_the_parameter(recipe: str) -> None:
    """A masked, scaled weight: its gradient is that of the product, taken on by autograd."""
    x, parameter, dy = operands((30, 16, 8), torch.float32)
    mask = (torch.arange(16) % 4 < 2).float()
    weight = 1.5 * mask * parameter
    y = fp8_linear(x, weight, scaling(recipe))
    dx, dw = torch.autograd.grad(y, (x, parameter), dy)
    assert (dw[:, mask == 0] == 0).all()
    assert_product(dx, explicit(recipe, dy, DY, ROW), explicit(recipe, weight, WEIGHT, SQUARE))
    assert (dx[:, mask == 0] == 0).all()


@RECIPES
def test_only_what_is_asked_and_shapes(recipe: str) -> None:
    x, weight, dy = operands((12, 16, 8), torch.float32)
    expected = torch.autograd.grad(fp8_linear(x, weight, scaling(recipe)), (x, weight), dy)
    shaped, gradient = x.view(3, 4, 16), dy.view(3, 4, 8)
    y = fp8_linear(shaped, weight.detach(), scaling(recipe))
    assert y.shape == (3, 4, 8)
    assert torch.equal(torch.autograd.grad(y, x, gradient)[0], expected[0])
    y = fp8_linear(shaped.detach(), weight, scaling(recipe))
    assert torch.equal(torch.autograd.grad(y, weight, gradient)[0], expected[1])
    none = x.detach()[:0].requires_grad_()
    y = fp8_linear(none, weight, scaling(recipe))
    dx, dw = torch.autograd.grad(y, (none, weight), dy[:0])
    assert (y.shape, dx.shape) == ((0, 8), (0, 16))
    assert (dw == 0).all()


@RECIPES
def test_zeros(recipe: str) -> None:
    x, weight, dy = (torch.zeros_like(t).requires_grad_() for t in operands((5, 6, 7), torch.bfloat16))
    y = fp8_linear(x, weight, scaling(recipe))
    for result in (y, *torch.autograd.grad(y, (x, weight), dy)):
        assert (result == 0).all()


@RECIPES
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_reaches_the_results(recipe: str, bad: float) -> None:
    """So that the step is skipped: in forward as a loss that is not finite, in backward as a gradient."""
    x, weight, dy = operands((130, 140, 8), torch.bfloat16)
    spoilt = dy.clone()
    spoilt[3, 5] = bad
    y = fp8_linear(x, weight, scaling(recipe))
    dx, dw = torch.autograd.grad(y, (x, weight), spoilt)
    assert not dx[3].isfinite().any()
    assert not dw[5].isfinite().any()
    with torch.no_grad():
        x[7, 2] = bad
    assert not fp8_linear(x, weight, scaling(recipe))[7].isfinite().any()


def test_amaxes_are_noted_and_scales_are_those_of_before() -> None:
    """Two microbatches raise the amaxes; a history of three steps rescales the operands."""
    state, history, past = torch.ones(4), torch.zeros(3, 4), []
    for _ in range(5):
        seen = torch.zeros(4)
        expected = torch.zeros(4)
        for microbatch in range(2):
            x, weight, dy = operands((20, 16, 8), torch.float32)
            other = 2 * dy if microbatch else None
            delayed = Scaling("delayed", scale=state, amax=seen)
            y = fp8_linear(x, weight, delayed, (lambda _, other=other: other) if other is not None else None)
            (dx,) = torch.autograd.grad(y, x, dy, retain_graph=True)
            qw = scaled_and_rounded(weight.detach().double().numpy(), E4M3, state[WEIGHT].item())
            qdy = scaled_and_rounded(dy.double().numpy(), E5M2, state[DY].item())
            assert_product(dx, qdy, qw)
            torch.autograd.grad(y, (x, weight), dy)
            values = [x, weight, dy, torch.zeros(1) if other is None else other]
            expected = torch.maximum(expected, torch.stack([t.detach().abs().max() for t in values]))
        assert torch.equal(seen, expected)
        forward = update_history(history[:, :2], state[:2], seen[:2], E4M3)
        backward = update_history(history[:, 2:], state[2:], seen[2:], E5M2)
        history, state = (torch.cat(pair, -1) for pair in zip(forward, backward, strict=True))
        past.append(seen)
        largest = torch.stack(past[-3:]).amax(0)
        torch.testing.assert_close(state * largest, torch.tensor([448.0, 448.0, 57344.0, 57344.0]))


def test_scale_that_changes_before_backward_is_not_seen() -> None:
    """The next step's scales may be written over these while a microbatch's backward is still to come."""
    x, weight, dy = operands((20, 16, 8), torch.float32)
    state = SCALES.clone()
    y = fp8_linear(x, weight, Scaling("delayed", scale=state, amax=torch.zeros(4)))
    state[:2] = 1.0
    (dw,) = torch.autograd.grad(y, weight, dy)
    assert_product(dw, explicit("delayed", dy, DY, COLUMN).T, explicit("delayed", x, X, COLUMN))


def test_amax_over_ranks() -> None:
    """Half of the rows with the amax of all are the half of all rows; with their own, they are not."""
    x, weight, dy = operands((20, 16, 8), torch.float32)
    y = fp8_linear(x, weight, Scaling("current"))
    (dx,) = torch.autograd.grad(y, x, dy)
    small = [x.detach().abs().amax(1).argmin().item()]
    largest = iter([x.detach().abs().max(), weight.detach().abs().max(), dy.abs().max()])
    part = Scaling("current", reduce_amax=lambda _: next(largest))
    y_part = fp8_linear(x[small], weight, part)
    dx_part, _ = torch.autograd.grad(y_part, (x, weight), dy[small])
    torch.testing.assert_close(y_part, y[small])
    torch.testing.assert_close(dx_part[small], dx[small])
    assert not torch.allclose(fp8_linear(x[small], weight, Scaling("current")), y[small])


def test_unknown_recipe_and_missing_state() -> None:
    with pytest.raises(ValueError, match="recipe='mxfp8'"):
        Scaling("mxfp8")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs scale and amax"):
        Scaling("delayed", scale=SCALES)


# What layouts ask for ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("recipe", "tile"), [("current", (1, 10_000)), ("block", ROW)])
def test_by_row(recipe: str, tile: tuple[int, int]) -> None:
    """A row of x and dy has scales of its own in all three products, so it does not matter what is beside it."""
    x, weight, dy = operands((200, 130, 300), torch.float32)
    state = scaling(recipe, by_row=True)
    y = fp8_linear(x, weight, state)
    dx, dw = torch.autograd.grad(y, (x, weight), dy)

    def of_rows(tensor: Tensor, dtype: torch.dtype) -> np.ndarray:
        if recipe == "block":
            return rounded(tensor, dtype, ROW)
        return np.concatenate([rounded(row, dtype) for row in tensor.split(1)])

    qw = rounded(weight, E4M3, SQUARE if recipe == "block" else None)
    assert_product(y, of_rows(x, E4M3), qw.T)
    assert_product(dx, of_rows(dy, E5M2), qw)
    assert_product(dw, of_rows(dy, E5M2).T, of_rows(x, E4M3))
    some = torch.arange(200).flip(0)[::3]
    torch.testing.assert_close(fp8_linear(x[some], weight, state), y[some])
    assert not torch.allclose(
        fp8_linear(x[some], weight, scaling("current")), fp8_linear(x, weight, scaling("current"))[some]
    )


@RECIPES
@pytest.mark.parametrize("unit", [4.0, 3.0])
def test_what_gradients_are_multiplied_by_is_not_in_scales(recipe: str, unit: float) -> None:
    """A sum over three replicas: each of them sees three times the gradient, and its casts are the same."""
    x, weight, dy = operands((20, 140, 300), torch.float32)
    results, seen = [], []
    for factor in (1.0, unit):
        state = scaling(recipe, gradient_unit=factor)
        results.append(torch.autograd.grad(fp8_linear(x, weight, state), (x, weight), factor * dy))
        seen.append(state.amax)
    for plain, scaled in zip(*results, strict=True):
        torch.testing.assert_close(scaled / unit, plain, rtol=1e-5, atol=1e-5 * plain.abs().max().item())
    if recipe == "delayed":
        torch.testing.assert_close(seen[1], seen[0])


@pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=str)
def test_smooth_is_as_rough_and_continuous(dtype: torch.dtype) -> None:
    """Off by at most half of the last bit of a cast, and by nearly that somewhere; another scale is another result; a
    small difference stays one, where a cast makes some large."""
    x = torch.logspace(-4, 2, 20_000).repeat(2) * torch.tensor([1.0, -1.0]).repeat_interleave(20_000)
    scale = torch.tensor(1.7)
    largest, half = torch.finfo(dtype).max, torch.finfo(dtype).eps / 2

    def smooth(tensor: Tensor, scale: Tensor) -> Tensor:
        q = quantize(tensor, dtype, scale, smooth=True)
        assert q.data.dtype == torch.float32
        return q.data / q.scale

    away = (smooth(x, scale) / x - 1).abs()
    assert 0.99 * half < away.max() <= half * 1.001
    assert ((smooth(x, 2 * scale) - smooth(x, scale)) / x).abs().mean() > half / 4
    near = x * (1 + 1e-3)
    assert ((smooth(near, scale) - smooth(x, scale)) / x).abs().max() < 3e-3
    cast = [quantize(tensor, dtype, scale).data.float() for tensor in (x, near)]
    assert ((cast[1] - cast[0]) / cast[0]).nan_to_num().abs().max() > half
    assert smooth(torch.tensor([1e9, -1e9, 0.0]), scale).abs().max() <= largest / scale * (1 + half)
    assert smooth(torch.zeros(3), scale).eq(0).all()
    assert not smooth(torch.tensor([math.inf, math.nan]), scale).isfinite().any()


@RECIPES
def test_experts_are_linear_layers_of_their_rows(recipe: str) -> None:
    """The second of three has no rows."""
    counts = torch.tensor([40, 0, 5])
    x = torch.randn(45, 24).requires_grad_()
    w1, w2, w3 = (torch.randn(3, *shape).mul(0.2).requires_grad_() for shape in ((16, 24), (24, 16), (16, 24)))
    dy = torch.randn(45, 24)
    states = [tuple(scaling(recipe, by_row=True) for _ in range(3)) for _ in range(3)]
    for expert in states:
        for state in expert:
            if recipe == "delayed":
                object.__setattr__(state, "amax", torch.zeros(4))
    y = fp8_grouped_swiglu(x, counts, w1, w2, w3, states)  # type: ignore[arg-type]
    gradients = torch.autograd.grad(y, (x, w1, w2, w3), dy)
    dx = []
    for e, rows in enumerate(x.detach().split(counts.tolist())):
        one = [rows.clone().requires_grad_(), *(w[e].detach().clone().requires_grad_() for w in (w1, w2, w3))]
        gate, up = (fp8_linear(one[0], w, scaling(recipe, by_row=True)) for w in (one[1], one[3]))
        out = fp8_linear(torch.nn.functional.silu(gate) * up, one[2], scaling(recipe, by_row=True))
        assert torch.equal(out, y.split(counts.tolist())[e])
        own = torch.autograd.grad(out, one, dy.split(counts.tolist())[e])
        dx.append(own[0])
        for whole, part in zip(gradients[1:], own[1:], strict=True):
            assert torch.equal(whole[e], part)
        if recipe == "delayed":
            assert states[e][0].amax[X] == amax(rows)
    assert torch.equal(torch.cat(dx), gradients[0])
