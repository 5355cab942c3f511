"""block_mass in Triton against naive, in Triton's interpreter. test_triton.py has what the kernel compiles to."""

from __future__ import annotations

import itertools
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
from torch import Tensor

from megasparse.ops.block_sparse import BlockMask, block_mass, block_sparse_attention
from tests.helpers import assert_close
from tests.ops.block_sparse.test_triton import BF16, F16, F32, TOLERANCE, Case, inputs


def shares(case: Case, backend: str, all_blocks: bool = True) -> tuple[Tensor, BlockMask]:
    """block_mass of the case's lists, by the log-sum-exp over all blocks or over the lists' own; naive in float64."""
    (q, k, v, *_), mask, documents = inputs(case)
    options = {"causal": case.causal, "document_ids": documents}
    every = BlockMask.from_dense(torch.ones_like(mask.to_dense()), case.key_block, case.query_block)
    summed = every if all_blocks else mask
    exact = [x.double() for x in (q, k, v)]
    _, lse = block_sparse_attention(*exact, summed, backend="naive", return_lse=True, **options)  # type: ignore[arg-type]
    assert all_blocks or (lse == -torch.inf).any()
    q, k = (q, k) if backend == "triton" else exact[:2]
    return block_mass(q, k, lse, mask, backend=backend, **options), mask  # type: ignore[arg-type]


def check(interpreter: ProcessPoolExecutor, case: Case, all_blocks: bool = True) -> None:
    """To the bounds of float32: only logits are products of rounded numbers, and those are exact."""
    exact, mask = shares(case, "naive", all_blocks)
    found, _ = interpreter.submit(shares, case, "triton", all_blocks).result()
    assert found.dtype == torch.float32
    assert (found[~mask.listed()] == 0).all()
    assert exact.max() > 0.1
    assert_close(found, exact, TOLERANCE[F32])


@pytest.mark.parametrize("query_block", [1, 32])
@pytest.mark.parametrize(("length", "head_dim", "block"), [(63, 64, 32), (111, 128, 16), (200, 64, 128)])
@pytest.mark.parametrize(("dtype", "group"), [*itertools.product((F32, BF16), (1, 4, 8)), (F16, 4)], ids=str)
def test_grouped_heads_and_ragged_lengths(
    interpreter: ProcessPoolExecutor,
    dtype: torch.dtype,
    group: int,
    length: int,
    head_dim: int,
    block: int,
    query_block: int,
) -> None:
    check(interpreter, Case(dtype, group, head_dim, length, length, query_block, block, kv_heads=1))


@pytest.mark.parametrize(
    "case",
    [
        Case(BF16, 8, 128, 200, 200, 128, 128),
        Case(F32, 3, 80, 63, 63, 24, 40, batch=2),
        Case(F32, 24, 32, 20, 63, 1, 48),
        Case(BF16, 4, 64, 50, 111, 16, 32, batch=2, causal=False, documents=False),
        Case(F32, 4, 64, 40, 200, 1, 64, documents=False),
        Case(F32, 4, 64, 40, 40, 1, 16, causal=False),
    ],
    ids=str,
)
def test_odd_sizes(interpreter: ProcessPoolExecutor, case: Case) -> None:
    """Of groups, tiles and heads; fewer queries than keys, two batches, without causality or documents."""
    check(interpreter, case)


@pytest.mark.parametrize(
    "case", [Case(BF16, 16, 64, 63, 63, 1, 16), Case(BF16, 4, 64, 63, 63, 16, 8, density=0.3)], ids=str
)
def test_where_queries_see_no_key(interpreter: ProcessPoolExecutor, case: Case) -> None:
    """Their lists name only what is hidden, and their log-sum-exp is -inf; in all rows of a tile, as the maximum of
    not-a-number and a number is the number."""
    check(interpreter, case, all_blocks=False)


@pytest.mark.parametrize("query_block", [1, 16])
def test_empty_lists(interpreter: ProcessPoolExecutor, query_block: int) -> None:
    case = Case(BF16, 4, 64, 40, 40, query_block, 16, density=0.0)
    assert (interpreter.submit(shares, case, "triton").result()[0] == 0).all()


def test_refuses_the_cpu_outside_of_the_interpreter(compiler: ProcessPoolExecutor) -> None:
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        compiler.submit(shares, Case(F32, 1, 64, 16, 16, 16, 16), "triton").result()
