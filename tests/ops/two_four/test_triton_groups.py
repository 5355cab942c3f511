"""Groups along every dimension, in every type, are those that naive sees."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor

import pytest
import torch

from megasparse.ops import two_four
from tests.ops.two_four.cases import BF16, CASES, F16, F32, check, values


@pytest.mark.parametrize("kind", ["gaussian", "tied", "special"])
@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
def test_groups_along_every_dimension(interpreter: ProcessPoolExecutor, dtype: torch.dtype, kind: str) -> None:
    for shape, dim in CASES:
        w = values(kind, shape, dtype)
        check(interpreter, "prune_24", w, dim)
        check(interpreter, "soft_threshold_24", w, dim)


def test_what_is_not_contiguous(interpreter: ProcessPoolExecutor) -> None:
    w = values("tied", (20, 24), F32).mT
    check(interpreter, "prune_24", w)
    check(interpreter, "transposable_mask", w)
    check(interpreter, "pack_24", two_four.prune_24(w)[0].mT.contiguous().mT)
