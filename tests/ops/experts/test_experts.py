"""The public op: its backends against naive."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megasparse.ops.experts import grouped_swiglu

RAGGED = [5, 0, 17, 300, 1, 0]
COUNTS = [RAGGED, [0, 0, 40], [64, 0], [33], [0, 0]]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 2e-2}


def arguments(counts: list[int], hidden: int, ffn: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """x, counts, w1, w2, w3."""
    generator = torch.Generator().manual_seed(len(counts))
    shapes = [(sum(counts), hidden), (len(counts), ffn, hidden), (len(counts), hidden, ffn), (len(counts), ffn, hidden)]
    x, w1, w2, w3 = (
        (0.3 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_()
        for shape in shapes
    )
    return x, torch.tensor(counts), w1, w2, w3


def output_and_gradients(backend: str, args: tuple[Tensor, ...]) -> list[Tensor]:
    y = grouped_swiglu(*args, backend=backend)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y.dtype)
    return [y, *torch.autograd.grad(y, [t for t in args if t.requires_grad], dy)]


def assert_near(actual: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for name, a, b in zip(("y", "dx", "dw1", "dw2", "dw3"), actual, expected, strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        scale = b.abs().max().item() if b.numel() else 0.0
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance * scale, msg=lambda m, name=name: f"{name}: {m}")


def check_equals_naive(backend: str, dtype: torch.dtype, counts: list[int]) -> None:
    """Output and every gradient; those of experts without rows are zero."""
    args = arguments(counts, 64, 96, dtype)
    actual = output_and_gradients(backend, args)
    assert_near(actual, output_and_gradients("naive", args), TOLERANCE[dtype])
    idle = torch.tensor(counts) == 0
    for gradient in actual[2:]:
        assert (gradient[idle] == 0).all()


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["cpu", "auto"])
def test_equals_naive(backend: str, dtype: torch.dtype, counts: list[int]) -> None:
    check_equals_naive(backend, dtype, counts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_is_about_as_exact_as_naive(dtype: torch.dtype) -> None:
    args = arguments([130, 70], 256, 512, dtype)
    x, counts, *weights = args
    doubles = [t.detach().double().requires_grad_() for t in (x, *weights)]
    exact = output_and_gradients("naive", (doubles[0], counts, *doubles[1:]))
    for ours, naive, true in zip(
        output_and_gradients("cpu", args), output_and_gradients("naive", args), exact, strict=True
    ):
        assert (ours.double() - true).norm() <= 2 * (naive.double() - true).norm()


def test_repeats_to_the_bit() -> None:
    args = arguments(RAGGED, 64, 96, torch.float32)
    for a, b in zip(output_and_gradients("cpu", args), output_and_gradients("cpu", args), strict=True):
        assert torch.equal(a, b)


def test_only_what_is_asked() -> None:
    x, counts, w1, w2, w3 = arguments(RAGGED, 16, 24, torch.float32)
    expected = output_and_gradients("cpu", (x, counts, w1, w2, w3))
    frozen = [w.detach() for w in (w1, w2, w3)]
    assert torch.equal(output_and_gradients("cpu", (x, counts, *frozen))[1], expected[1])
    y, *gradients = output_and_gradients("cpu", (x.detach(), counts, w1, w2, w3))
    assert torch.equal(y, expected[0])
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected[2:], strict=True))
    with torch.no_grad():
        assert torch.equal(grouped_swiglu(x, counts, w1, w2, w3), expected[0])


def test_unknown_backend() -> None:
    with pytest.raises(ValueError, match="backend='fast'"):
        grouped_swiglu(*arguments([1], 4, 4, torch.float32), backend="fast")  # type: ignore[arg-type]
