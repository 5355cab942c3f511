"""Scales at ordinary amaxes and at every corner; the history of delayed scaling, by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from megasparse.ops.fp8 import E4M3, E5M2, amax, scale_from_amax, update_history
from tests.ops.fp8.explicit import LARGEST, scale_of, tiles

FLOAT32_MAX = torch.finfo(torch.float32).max


@pytest.mark.parametrize("tile", [(1, 128), (128, 1), (128, 128)], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (5, 200), (200, 5), (256, 129), (0, 7)], ids=str)
def test_amax_of_tiles(tile: tuple[int, int], shape: tuple[int, int]) -> None:
    x = -torch.rand(shape) - 0.1
    result = amax(x, tile)
    assert result.shape == (-(-shape[0] // tile[0]), -(-shape[1] // tile[1]))
    assert result.flatten().tolist() == [x[place].abs().max().item() for place in tiles(shape, tile)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_amax_of_what_is_not_finite(dtype: torch.dtype) -> None:
    x = torch.tensor([[1.0, math.nan, -3.0], [0.0, 2.0, -math.inf]], dtype=dtype)
    assert amax(x).item() == math.inf
    assert amax(x, (1, 128)).tolist() == [[3.0], [math.inf]]
    assert amax(x[:1]).item() == 3.0
    assert amax(x[:0]).item() == 0.0
    assert amax(x.requires_grad_()).requires_grad is False


@pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=str)
@pytest.mark.parametrize("power_of_two", [False, True])
def test_scale_of_ordinary_amaxes(dtype: torch.dtype, power_of_two: bool) -> None:
    """With powers of two, neighbours of the places where the power changes as well."""
    steps = LARGEST[dtype] / 2.0 ** np.arange(-20, 20)
    edges = [np.float32(steps), np.nextafter(np.float32(steps), np.float32(0)), np.nextafter(np.float32(steps), np.inf)]
    values = np.concatenate([*edges, np.random.default_rng(0).lognormal(0, 8, 500)]).astype(np.float32)
    expected = [scale_of(float(value), dtype, power_of_two) for value in values]
    assert scale_from_amax(torch.from_numpy(values), dtype, power_of_two).tolist() == expected


@pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=str)
def test_scale_at_the_corners(dtype: torch.dtype) -> None:
    corners = torch.tensor([0.0, math.inf, math.nan, 1e-45, 1e-38, FLOAT32_MAX])
    scale = scale_from_amax(corners, dtype).tolist()
    assert scale[:5] == [1.0, 1.0, 1.0, FLOAT32_MAX, FLOAT32_MAX]
    assert scale[5] == float(np.float32(LARGEST[dtype]) / np.float32(FLOAT32_MAX)) > 0
    scale = scale_from_amax(corners, dtype, power_of_two=True).tolist()
    assert scale[:5] == [1.0, 1.0, 1.0, 2.0**127, 2.0**127]
    assert math.frexp(scale[5])[0] == 0.5


def steps(amaxes: list[float], length: int, **kwargs) -> list[tuple[list[float], float]]:
    """History and scale after each step of one tensor in e4m3."""
    history, scale, after = torch.zeros(length, 1), torch.ones(1), []
    for value in amaxes:
        history, scale = update_history(history, scale, torch.tensor([value]), E4M3, **kwargs)
        after.append((history[:, 0].tolist(), scale.item()))
    return after


def test_history_by_hand_max() -> None:
    """Three rows: two remembered steps and the one under way, whose row is zero between steps."""
    assert steps([2.0, 8.0, 4.0, 1.0, 0.5], 3) == [
        ([0.0, 0.0, 2.0], 224.0),
        ([0.0, 2.0, 8.0], 56.0),
        ([0.0, 8.0, 4.0], 56.0),
        ([0.0, 4.0, 1.0], 56.0),  # the 8 of two steps ago is still looked at
        ([0.0, 1.0, 0.5], 112.0),
    ]


def test_history_by_hand_most_recent() -> None:
    after = steps([2.0, 8.0, 4.0], 3, algo="most_recent")
    assert after == [([0.0, 0.0, 2.0], 224.0), ([0.0, 2.0, 8.0], 56.0), ([0.0, 8.0, 4.0], 112.0)]


@pytest.mark.parametrize("algo", ["max", "most_recent"])
def test_history_of_length_one(algo) -> None:
    assert steps([2.0, 1.0], 1, algo=algo) == [([0.0], 224.0), ([0.0], 448.0)]


def test_history_of_an_unseen_tensor_stays() -> None:
    """kernel_bulk rolls only where the amax is not zero."""
    after = steps([2.0, 0.0, 0.0, 1.0], 3)
    assert after[1] == after[2] == after[0] == ([0.0, 0.0, 2.0], 224.0)
    assert after[3] == ([0.0, 2.0, 1.0], 224.0)


def test_history_with_infinity() -> None:
    """The scale waits until the infinity has left the window, and takes the finite amaxes after it then."""
    after = steps([2.0, math.inf, 4.0, 16.0, 16.0], 3)
    assert [scale for _, scale in after] == [224.0, 224.0, 224.0, 224.0, 28.0]
    assert after[1][0] == [0.0, 2.0, math.inf]
    assert [s for _, s in steps([2.0, math.inf, 4.0], 3, algo="most_recent")] == [224.0, 224.0, 112.0]
    assert steps([math.inf], 2) == [([0.0, math.inf], 1.0)]


def test_margin_and_overflow_of_the_scale() -> None:
    assert [scale for _, scale in steps([2.0, 8.0], 2, margin=3)] == [28.0, 7.0]
    assert steps([1e-40], 2)[0][1] == FLOAT32_MAX


def test_tensors_do_not_mix_and_nothing_is_written_in_place() -> None:
    history, scale = torch.tensor([[0.0, 0.0], [1.0, 7.0], [3.0, 0.5]]), torch.tensor([5.0, 6.0])
    before = history.clone(), scale.clone()
    seen: Tensor = torch.tensor([2.0, 0.0])
    new, new_scale = update_history(history, scale, seen, E5M2)
    assert new.tolist() == [[0.0, 0.0], [3.0, 7.0], [2.0, 0.5]]
    assert new_scale.tolist() == [float(np.float32(57344) / np.float32(3)), 6.0]
    assert torch.equal(history, before[0])
    assert torch.equal(scale, before[1])


def test_unknown_algo() -> None:
    with pytest.raises(ValueError, match="algo='median'"):
        steps([1.0], 2, algo="median")
