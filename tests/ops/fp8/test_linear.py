"""The layer: y, dx and dW against float64 products of explicitly rounded operands, for each recipe."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from megasparse.ops.fp8 import E4M3, E5M2, Scaling, fp8_linear, update_history
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
