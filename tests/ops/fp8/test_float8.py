"""Casts against the formats' definition; the product against float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from megasparse.ops.fp8 import E4M3, E5M2, Float8, amax, dequantize, fp8_matmul, quantize, scale_from_amax
from tests.ops.fp8.explicit import LARGEST, decode, round_to, rounded

DTYPES = pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=str)
ONE = torch.tensor(1.0)


@DTYPES
def test_every_code_is_what_the_definition_says(dtype: torch.dtype) -> None:
    """Which is also the test of the tests' own decoder."""
    codes = torch.arange(256, dtype=torch.uint8).view(dtype)
    expected = torch.tensor([decode(code, dtype) for code in range(256)])
    torch.testing.assert_close(dequantize(Float8(codes, ONE)), expected, rtol=0, atol=0, equal_nan=True)


@DTYPES
@pytest.mark.parametrize("scale", [1.0, 3.7, 2.0**-6, 1e4])
def test_every_bfloat16_is_rounded_to_the_nearest(dtype: torch.dtype, scale: float) -> None:
    x = torch.arange(65536).to(torch.int16).view(torch.bfloat16)
    x = x[x.isfinite()]
    with np.errstate(over="ignore"):  # beyond float32 is beyond float8 too
        products = (x.double().numpy().astype(np.float32) * np.float32(scale)).astype(np.float64)
    expected = round_to(products, dtype)
    actual = quantize(x, dtype, torch.tensor(scale)).data.double().numpy()
    np.testing.assert_array_equal(actual, expected)
    np.testing.assert_array_equal(np.signbit(actual), np.signbit(expected))
    assert np.abs(actual).max() == LARGEST[dtype]


@DTYPES
def test_ties_go_to_the_even_code(dtype: torch.dtype) -> None:
    """Float32 at, just below and just above the middle of every two neighbours, subnormal ones too."""
    numbers = np.array([decode(code, dtype) for code in range(128)])
    numbers = numbers[np.isfinite(numbers)]
    middles = ((numbers[1:] + numbers[:-1]) / 2).astype(np.float32)
    even = numbers[np.arange(len(middles)) + np.arange(len(middles)) % 2]
    for x, expected in [
        (middles, even),
        (np.nextafter(middles, np.float32(0)), numbers[:-1]),
        (np.nextafter(middles, np.float32(np.inf)), numbers[1:]),
    ]:
        for sign in (1, -1):
            actual = quantize(torch.from_numpy(sign * x), dtype, ONE).data.double().numpy()
            np.testing.assert_array_equal(actual, sign * expected)


@DTYPES
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tile", [None, (1, 128), (128, 1), (128, 128)], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 130), (130, 3), (257, 128), (129, 300)], ids=str)
def test_scaled_and_rounded_explicitly(dtype, x_dtype, tile, shape) -> None:
    x = (torch.randn(shape) * torch.randn(shape[0], 1).exp() * torch.randn(shape[1]).exp()).to(x_dtype)
    x[0] = 0  # rows of tiles without anything
    scale = scale_from_amax(amax(x, tile), dtype, power_of_two=tile is not None)
    if x.any():
        expected = rounded(x, dtype, tile).astype(np.float32)
        np.testing.assert_array_equal(dequantize(quantize(x, dtype, scale)).numpy(), expected)
    else:
        assert not dequantize(quantize(x, dtype, scale)).any()


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_not_finite_stays_visible(x_dtype: torch.dtype) -> None:
    x = torch.tensor([[math.inf, -math.inf, math.nan, 1e38, -1e38, 1.0]], dtype=x_dtype)
    for scale in (torch.tensor(1e30), torch.tensor([[1e30]])):  # 1e38 * 1e30 is beyond float32
        e5m2 = dequantize(quantize(x, E5M2, scale))[0] * 1e30
        e4m3 = dequantize(quantize(x, E4M3, scale))[0] * 1e30
        assert e5m2[0] == math.inf
        assert e5m2[1] == -math.inf
        assert e5m2[2].isnan()
        assert e4m3[:3].isnan().all()
        for values, largest in ((e5m2, 57344.0), (e4m3, 448.0)):
            torch.testing.assert_close(values[3:], torch.tensor([largest, -largest, largest]))


def test_tiles_of_another_shape_are_refused() -> None:
    with pytest.raises(AssertionError):
        quantize(torch.ones(130, 130), E4M3, torch.ones(130, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tiles", [None, ((1, 128), (128, 128)), ((1, 128), (128, 1))], ids=str)
def test_product(dtype: torch.dtype, tiles) -> None:
    """Within float32's rounding of the sum of the exact product of the rounded operands."""
    a, b = torch.randn(37, 300), torch.randn(300, 150) * torch.randn(150).exp()
    (ta, tb), tiled = tiles or (None, None), tiles is not None
    qa = quantize(a, E5M2, scale_from_amax(amax(a, ta), E5M2, tiled))
    qb = quantize(b, E4M3, scale_from_amax(amax(b, tb), E4M3, tiled))
    ra, rb = rounded(a, E5M2, ta), rounded(b, E4M3, tb)
    y = fp8_matmul(qa, qb, dtype)
    assert y.dtype == dtype
    exact = ra @ rb
    bound = (300 + 4) * 2.0**-24 * (np.abs(ra) @ np.abs(rb)) + (np.abs(exact) * 2.0**-8 if dtype.itemsize == 2 else 0)
    assert (np.abs(y.double().numpy() - exact) <= bound).all()
    assert np.abs(y.double().numpy() - a.double().numpy() @ b.double().numpy()).max() > bound.max()  # it did round


def test_product_of_whole_tensors_is_exact_where_the_sum_is() -> None:
    """Scales that are no powers of two touch the sum, not its terms."""
    a, b = torch.randint(1, 4, (20, 64)).float(), torch.randint(1, 4, (64, 20)).float()
    qa, qb = (quantize(t, E4M3, scale_from_amax(amax(t), E4M3)) for t in (a, b))
    products = (qa.data.double() @ qb.data.double()).float()  # multiples of 256 below 2^24
    assert torch.equal(fp8_matmul(qa, qb), products * (1 / qa.scale) * (1 / qb.scale))


def test_scales_at_the_ends_of_float32() -> None:
    """A product of two inverse scales would overflow, and zero times it would be NaN."""
    big, zero = torch.tensor([[3e38, 0.0]]), torch.tensor([[0.0], [3e38]])
    qa, qb = (quantize(t, E4M3, scale_from_amax(amax(t), E4M3)) for t in (big, zero))
    assert fp8_matmul(qa, qb).item() == 0.0
    tiny = torch.tensor([[2.0**-140, 0.0]])
    q = quantize(tiny, E4M3, scale_from_amax(amax(tiny), E4M3))
    assert q.scale.item() == torch.finfo(torch.float32).max
    assert dequantize(q).isfinite().all()
