"""The C++ path gives naive's bits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megasparse.ops.two_four import mvue_24, prune_24, soft_threshold_24, transposable_mask

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(4, 4), (8, 12), (68, 132), (3, 20, 64), (2, 4, 8, 4)]


def weights(shape: tuple[int, ...], dtype: torch.dtype, tied: bool) -> Tensor:
    """Gaussian; or multiples of 1/2 with many zeros and ties, whose sums are exact."""
    w = torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)), dtype=torch.float64)
    return ((w * 2).round() / 2 if tied else w).to(dtype)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_masks_and_thresholds(shape: tuple[int, ...], dtype: torch.dtype, tied: bool) -> None:
    w = weights(shape, dtype, tied)
    for method in ("exact", "greedy"):
        ours, reference = (transposable_mask(w, method, backend) for backend in ("cpu", "naive"))  # type: ignore[arg-type]
        assert torch.equal(ours, reference)
    for dim in (d for d in range(w.dim()) if shape[d] % 4 == 0):
        for function in (prune_24, soft_threshold_24):
            ours, reference = (function(w, dim, backend=backend) for backend in ("cpu", "naive"))
            assert torch.equal(
                ours[1] if function is prune_24 else ours, reference[1] if function is prune_24 else reference
            )


@pytest.mark.parametrize("method", ["exact", "approx"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_estimates(shape: tuple[int, ...], dtype: torch.dtype, method: str) -> None:
    for tied in (True, False):
        g = weights(shape, dtype, tied)
        for dim in (d for d in range(g.dim()) if shape[d] % 4 == 0):
            settings = {"dim": dim, "method": method, "seed": 2**63 + 5}
            ours, reference = (mvue_24(g, **settings, backend=backend) for backend in ("cpu", "naive"))  # type: ignore[arg-type]
            assert torch.equal(ours, reference)


def test_what_is_not_finite() -> None:
    w = weights((16, 16), torch.float32, False)
    w[0, 1], w[5, 5], w[5, 6], w[9, 12:] = torch.nan, torch.inf, -torch.inf, torch.nan
    for function in (
        transposable_mask,
        lambda w, **k: transposable_mask(w, "greedy", **k),
        lambda w, **k: prune_24(w, **k)[1],
    ):
        assert torch.equal(function(w, backend="cpu"), function(w, backend="naive"))
    for function in (soft_threshold_24, lambda w, **k: mvue_24(w, seed=1, **k)):
        torch.testing.assert_close(
            function(w, backend="cpu"), function(w, backend="naive"), rtol=0, atol=0, equal_nan=True
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_thresholds_of_every_group_of_special_values(dtype: torch.dtype) -> None:
    special = torch.tensor([0.0, -0.0, 1.0, -2.0, 3.0, torch.inf, -torch.inf, torch.nan], dtype=dtype)
    w = torch.cartesian_prod(*[special] * 4)
    ours, reference = (soft_threshold_24(w, backend=backend) for backend in ("cpu", "naive"))
    torch.testing.assert_close(ours, reference, rtol=0, atol=0, equal_nan=True)


def test_any_number_of_threads_gives_the_same() -> None:
    w = weights((256, 512), torch.float32, False)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append([transposable_mask(w), soft_threshold_24(w, 0), mvue_24(w, 0, seed=1)])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
