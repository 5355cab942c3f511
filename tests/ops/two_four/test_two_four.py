"""The public functions: shapes, packing, and errors that say what to do."""

from __future__ import annotations

import pytest
import torch

from megasparse.ops.two_four import (
    mvue_24,
    pack_24,
    prune_24,
    prune_nm,
    soft_threshold_24,
    sste_scale,
    transposable_mask,
    unpack_24,
)

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
FLOAT8 = [torch.float8_e4m3fn, torch.float8_e5m2]


def gaussian(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("dtype", FLOATS)
def test_both_a_transposable_mask_and_its_transpose_are_two_four(dtype: torch.dtype) -> None:
    w = gaussian(3, 12, 8, dtype=dtype)
    for method in ("exact", "greedy"):
        mask = transposable_mask(w, method)  # type: ignore[arg-type]
        assert mask.dtype == torch.bool
        assert mask.shape == w.shape
        for of in (mask, mask.mT):
            assert of.unflatten(-1, (-1, 4)).sum(-1).max() == 2
    assert torch.equal(transposable_mask(w)[1], transposable_mask(w[1]))


@pytest.mark.parametrize("dtype", [*FLOATS, *FLOAT8])
@pytest.mark.parametrize("shape", [(4,), (2, 12), (3, 5, 16), (0, 8), (3, 0)])
def test_what_is_packed_is_unpacked_to_the_bit(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    w = prune_24(gaussian(*shape))[0].to(dtype)
    values, metadata = pack_24(w)
    assert values.shape == (*shape[:-1], shape[-1] // 2)
    assert metadata.shape == (*shape[:-1], -(-shape[-1] // 8))
    assert torch.equal(unpack_24(values, metadata).float(), w.float())


@pytest.mark.parametrize(("n", "m"), [(1, 4), (2, 4), (3, 4), (1, 8), (4, 16)])
def test_n_of_every_m(n: int, m: int) -> None:
    w = gaussian(3, 32, 16)
    for dim in (1, 2, -1, -2):
        values, mask = prune_nm(w, n, m, dim)
        groups = w.abs().movedim(dim, -1).unflatten(-1, (-1, m))
        kept = mask.movedim(dim, -1).unflatten(-1, (-1, m))
        assert (kept.sum(-1) == n).all()
        assert (groups.masked_fill(~kept, torch.inf).amin(-1) >= groups.masked_fill(kept, 0).amax(-1)).all()
        assert torch.equal(values, w * mask)
        if (n, m) == (2, 4):
            assert torch.equal(mask, prune_24(w, dim)[1])


def test_metadata_by_hand() -> None:
    w = torch.tensor([[0.0, 5.0, 0.0, 7.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 9.0, 0.0]])
    values, metadata = pack_24(w)
    assert values.tolist() == [[5.0, 7.0, 0.0, 0.0, 0.0, 9.0]]
    assert metadata.tolist() == [[(1 | 3 << 2) | (0 | 1 << 2) << 4, 0 | 2 << 2]]


def test_nan_and_infinity_are_kept() -> None:
    w = torch.tensor([[1.0, torch.nan, 2.0, 3.0], [torch.inf, 1.0, 2.0, 0.0], [1, 2, 3, 4], [4, 3, 2, 1]])
    for mask in (prune_24(w)[1], transposable_mask(w)):
        assert mask[~w.isfinite()].all()
        assert (mask.sum(1) == 2).all()
    assert soft_threshold_24(w).isnan().any()
    values = prune_24(w)[0]
    torch.testing.assert_close(unpack_24(*pack_24(values)), values, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (2, 0, 4)])
def test_nothing_is_nothing(shape: tuple[int, ...]) -> None:
    w = torch.empty(shape)
    assert transposable_mask(w).shape == prune_24(w)[1].shape == soft_threshold_24(w).shape == shape
    assert mvue_24(w, seed=0).shape == shape


def test_nothing_is_differentiated() -> None:
    w = gaussian(4, 4).requires_grad_()
    results = (prune_24(w)[0], soft_threshold_24(w), sste_scale(w), mvue_24(w, seed=0))
    assert not any(result.requires_grad for result in results)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda w: prune_24(w), r"\[4, 6\] has 6 elements along dim=1: must be a multiple of 4"),
        (lambda w: prune_nm(w, 1, 4), r"1 of every 4 along dim=-1 of \[4, 6\]: 0 < n < m and multiples of m"),
        (lambda w: soft_threshold_24(w, 2), r"dim=2 is not a dimension of \[4, 6\]"),
        (lambda w: prune_24(w[:, :4], score=w), r"score \[4, 6\] must have the shape of w \[4, 4\]"),
        (lambda w: transposable_mask(w), r"w \[4, 6\] must be \[..., rows, columns\], both multiples of 4"),
        (lambda w: transposable_mask(w[:, :4], "best"), "method='best': use 'exact' or 'greedy'"),
        (lambda w: transposable_mask(w[:, :4].long()), "torch.int64 is not one of"),
        (lambda w: mvue_24(w, 0, "fast", seed=1), "method='fast': use 'exact' or 'approx'"),
        (lambda w: prune_24(w, 0, backend="gpu"), "backend='gpu': use 'auto', 'naive', 'cpu' or 'triton'"),
        (lambda w: pack_24(w), r"w \[4, 6\] must be \[..., columns\], a multiple of 4"),
        (lambda w: pack_24(w[:, :4]), "4 groups of four have more than two values that are not zero"),
        (lambda w: unpack_24(w, torch.zeros(4, 2)), r"values \[4, 6\] and metadata torch.float32 \[4, 2\] do not fit"),
        (lambda w: unpack_24(w, torch.zeros(4, 1).byte()), r"metadata torch.uint8 \[4, 1\] do not fit"),
    ],
)
def test_bad_input_is_named(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(gaussian(4, 6))
