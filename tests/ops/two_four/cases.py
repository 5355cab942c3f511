"""Made-up values for the Triton backend, and the comparison with naive, to the bit."""

from __future__ import annotations

import math
import warnings
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
from torch import Tensor

from megasparse.ops import two_four

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}

# Shape and dimension: one group; rows that are cut into several programs, and programs that are not full, along each
# dimension; a width at which loads are vectors, and none.
CASES = [
    ((4,), 0),
    ((5, 12), 1),
    ((2, 1060), -1),
    ((12, 5), 0),
    ((3, 8, 48), 1),
    ((2, 4, 1100), -2),
    ((4, 3, 2, 2), 0),
    ((3, 0), 1),
]


def values(kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Gaussian, or tied: small integers, many of them 0, so that sums are exact. "special" puts zeros of both signs,
    infinities, NaN, the smallest and the largest number between tied ones."""
    generator = torch.Generator().manual_seed(math.prod(shape))
    if kind == "gaussian":
        return torch.randn(shape, generator=generator).to(dtype)
    tied = torch.randint(-2, 3, shape, generator=generator).to(dtype)
    if kind == "tied":
        return tied
    info = torch.finfo(dtype)
    rare = [0.0, -0.0, torch.inf, -torch.inf, torch.nan, info.smallest_normal / 4, -info.smallest_normal, info.max]
    which = torch.randint(0, 24, shape, generator=generator)
    return torch.where(which < len(rare), torch.tensor(rare, dtype=dtype)[which % len(rare)], tied)


def assert_same_bits(ours: Any, reference: Any) -> None:
    """But for those of a NaN, of which there is one."""
    if isinstance(reference, tuple | list):
        for pair in zip(ours, reference, strict=True):
            assert_same_bits(*pair)
        return
    assert (ours.dtype, ours.shape) == (reference.dtype, reference.shape)
    if reference.is_floating_point():
        nan = ours.float().isnan()
        assert torch.equal(nan, reference.float().isnan())
        ours, reference = (x.view(INTEGERS[x.element_size()]).masked_fill(nan, 0) for x in (ours, reference))
    assert torch.equal(ours, reference)


def run(function: str, *inputs: Tensor, **settings: Any) -> Any:
    warnings.simplefilter("ignore", RuntimeWarning)  # numpy's, of infinities and NaN in the interpreter
    return getattr(two_four, function)(*inputs, **settings)


def check(
    interpreter: ProcessPoolExecutor, function: str, *inputs: Tensor, reference: str = "naive", **settings: Any
) -> None:
    ours = interpreter.submit(run, function, *inputs, backend="triton", **settings).result()
    assert_same_bits(ours, run(function, *inputs, backend=reference, **settings))
