"""Memory is used again when no tensor has it, and not before."""

from __future__ import annotations

import random
from typing import Any

import numpy
import pytest
import torch

from megasparse.checkpoint.memory import LARGEST, SMALLEST, Memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.int64])
@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (7,), (3, 1000, 250)])
def test_shape_and_type(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = Memory().empty(shape, dtype)
    assert (tensor.shape, tensor.dtype, tensor.is_contiguous()) == (shape, dtype, True)


def test_used_again_when_the_last_view_is_gone() -> None:
    memory = Memory()
    tensor = memory.empty((SMALLEST,), torch.uint8)
    place, row = tensor.data_ptr(), tensor.view(2, -1)[1]
    del tensor
    other = memory.empty((SMALLEST,), torch.uint8)
    assert other.data_ptr() != place, "a view of it is still there"
    del row
    assert memory.empty((SMALLEST // 2,), torch.bfloat16).data_ptr() == place


def test_never_shared() -> None:
    """Whatever is taken and let go, each tensor keeps what it was filled with."""
    rng, memory, held = random.Random(0), Memory(), {}
    for number in range(400):
        size = rng.choice([100, SMALLEST, SMALLEST + 1, 3 * SMALLEST, LARGEST, LARGEST + 1])
        held[number % 251] = memory.empty((size,), torch.uint8).fill_(number % 251)
        for key in rng.sample(sorted(held), len(held) // 2) if len(held) > 5 else []:
            assert (held[key] == key).all()
            del held[key]
    assert sum(free.size for free in memory._free) < 10 * LARGEST


def test_no_more_is_made_than_is_used_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """And of a larger one's memory smaller ones are."""
    memory, made = Memory(), []

    def counted(size: int, dtype: Any) -> numpy.ndarray:
        made.append(size)
        return numpy.zeros(size, dtype)

    monkeypatch.setattr(numpy, "empty", counted)
    for size in [LARGEST, SMALLEST, LARGEST // 2] * 5:
        first, second = memory.empty((size,), torch.uint8), memory.empty((size,), torch.uint8)
        assert first.data_ptr() != second.data_ptr()
        del first, second
    assert made == [LARGEST, LARGEST]
