"""The CPU path against the definition; precision, empty lists, threads, memory, errors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from megasparse.ops.block_sparse import BlockMask, block_mass, block_sparse_attention
from tests.helpers import assert_close
from tests.ops.block_sparse.cases import random_mask, results, tensors

CASES: list[tuple[int, int, int, int, int, int, int]] = [
    # batch, queries, keys, heads, kv_heads, block, query_block
    (2, 63, 63, 4, 4, 16, 16),
    (1, 64, 64, 4, 2, 16, 16),
    (2, 111, 111, 4, 2, 32, 16),
    (2, 200, 200, 8, 1, 64, 64),
    (2, 200, 200, 4, 2, 16, 64),
    (2, 111, 111, 8, 1, 16, 1),
    (2, 63, 63, 2, 2, 32, 1),
    (2, 50, 200, 4, 2, 64, 16),
    (2, 1, 77, 4, 2, 16, 1),
    (1, 300, 300, 8, 1, 16, 128),
    (1, 300, 300, 2, 2, 16, 1),
]


@pytest.mark.parametrize("biased", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("documents", [False, True], ids=["", "documents"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "all"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_cpu_is_the_definition(case: tuple[int, ...], causal: bool, documents: bool, biased: bool) -> None:
    """Ragged lengths, grouped heads, single queries, queries after a cache; rows that see nothing."""
    batch, queries, keys, heads, kv_heads, block, query_block = case
    q, k, v = tensors(batch, queries, keys, heads, kv_heads, 8)
    mask = random_mask(q, k, block, query_block)
    ids = torch.randint(0, 3, (batch, keys), generator=torch.Generator().manual_seed(4)).sort(1).values
    options = {
        "causal": causal,
        "document_ids": ids if documents else None,
        "block_bias": torch.randn(*mask.count.shape, mask.num_key_blocks, dtype=torch.float64) if biased else None,
    }
    ours, exact = (results(backend, q, k, v, mask, **options) for backend in ("cpu", "naive"))
    assert torch.equal(ours.pop("empty"), exact.pop("empty"))
    assert_close(ours, exact, 1e-11)


@pytest.mark.parametrize("documents", [False, True], ids=["", "documents"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "all"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_block_mass(case: tuple[int, ...], causal: bool, documents: bool) -> None:
    """Of some of the blocks, by the log-sum-exp of all: against the definition, and that with every block listed a
    single head's shares are one in sum."""
    batch, queries, keys, heads, kv_heads, block, query_block = case
    q, k, v = tensors(batch, queries, keys, heads, kv_heads, 8)
    ids = torch.randint(0, 3, (batch, keys), generator=torch.Generator().manual_seed(4)).sort(1).values
    options: dict[str, Any] = {"causal": causal, "document_ids": ids if documents else None}
    full, some = (random_mask(q, k, block, query_block, density) for density in (1.0, 0.4))
    _, lse = block_sparse_attention(q, k, v, full, return_lse=True, **options)
    for mask in (full, some):
        ours, exact = (block_mass(q, k, lse, mask, backend=backend, **options) for backend in ("cpu", "naive"))
        assert ours.shape == mask.index.shape
        assert_close(ours, exact, 1e-11)
        assert (ours[~mask.listed()] == 0).all()
    if heads == kv_heads and query_block == 1:
        assert_close(block_mass(q, k, lse, full, **options).sum(-1), torch.ones(mask.count.shape), 1e-11)


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 2e-6), (torch.bfloat16, 2.0**-8), (torch.float16, 2.0**-11)], ids=str
)
@pytest.mark.parametrize(("block", "query_block"), [(32, 32), (32, 1)])
def test_precision(dtype: torch.dtype, bound: float, block: int, query_block: int) -> None:
    """Arithmetic is float32, whatever the inputs are: only results are rounded to their type, the log-sum-exp not even
    that. Gradients see it twice: what flows in is rounded, and so is the output that the backward reads."""
    q, k, v = tensors(1, 200, 200, 8, 2, 64, dtype)
    mask = random_mask(q, k, block, query_block)
    bias = torch.randn(*mask.count.shape, mask.num_key_blocks, dtype=torch.float64).to(dtype)
    ours = results("cpu", q, k, v, mask, block_bias=bias)
    exact = results("naive", q.double(), k.double(), v.double(), mask, block_bias=bias.double())
    assert ours["output"].dtype == ours["dq"].dtype == ours["dblock_bias"].dtype == dtype
    assert ours["lse"].dtype == torch.float32
    for name in exact:
        allowed = 2e-6 if name == "lse" else bound * (2 if name.startswith("d") else 1)
        assert_close(ours[name].double(), exact[name].double(), allowed, name)


@pytest.mark.parametrize("backend", ["naive", "cpu"])
@pytest.mark.parametrize("query_block", [16, 1])
def test_empty_lists_give_zeros(backend: str, query_block: int) -> None:
    """Of a query, of a key block, of everything; also where a list names only what is hidden."""
    q, k, v = tensors(1, 48, 48, 4, 2, 8)
    dense = torch.zeros(1, 2, 48 // query_block, 3, dtype=torch.bool)
    dense[:, :, :, 2] = True  # the future of the first 32
    dense[:, 1] = False
    for mask in (dense, torch.zeros_like(dense)):
        found = results(backend, q, k, v, BlockMask.from_dense(mask, 16, query_block))
        empty = found.pop("empty")
        assert empty[:, :32].all()
        assert all(torch.isfinite(x).all() for x in found.values())
        assert (found["output"][empty] == 0).all()
        assert (found["dq"][empty] == 0).all()
        assert (found["dk"][:, :32] == 0).all()
        assert (found["dv"][:, :, 1] == 0).all()
        assert empty[:, 32:, :2].any() == (not mask.any())


def test_the_order_of_a_list_changes_only_rounding() -> None:
    q, k, v = tensors(1, 64, 64, 2, 2, 8)
    mask = random_mask(q, k, 16, 16, 1.0)
    turned = BlockMask(mask.count, mask.index.flip(-1), 16, 16)
    assert_close(results("cpu", q, k, v, turned), results("cpu", q, k, v, mask), 1e-12)


@pytest.mark.parametrize("backend", ["naive", "cpu"])
def test_a_mask_made_of_lists_alone_fits_a_ragged_sequence(backend: str) -> None:
    """Two blocks of 32 queries could reach into four blocks of 16 keys; 35 tokens have three."""
    q, k, v = tensors(1, 35, 35, 4, 2, 8)
    mask = random_mask(q, k, 16, 32)
    alone = BlockMask(mask.count, mask.index, 16, 32)
    assert (alone.num_key_blocks, mask.num_key_blocks) == (4, 3)
    assert_close(results(backend, q, k, v, alone), results(backend, q, k, v, mask), 1e-12)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("query_block", [16, 64, 1])
def test_any_number_of_threads_gives_the_same_bits(query_block: int, dtype: torch.dtype) -> None:
    q, k, v = tensors(2, 200, 200, 8, 2, 32, dtype)
    mask = random_mask(q, k, 16, query_block)
    bias = torch.randn(*mask.count.shape, mask.num_key_blocks)
    found = []
    for count in (1, 2, 3, 7):
        torch.set_num_threads(count)
        found.append(results("cpu", q, k, v, mask, block_bias=bias))
    for other in found[1:]:
        assert all(torch.equal(other[name], found[0][name]) for name in other)


@pytest.mark.parametrize("query_block", [16, 1])
def test_finite_differences(query_block: int) -> None:
    q, k, v = tensors(1, 20, 20, 2, 1, 3)
    mask = random_mask(q, k, 8, query_block, 0.7)
    bias = torch.randn(*mask.count.shape, mask.num_key_blocks, dtype=torch.float64)
    inputs = tuple(x.requires_grad_() for x in (q, k, v, bias))

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        output, lse = block_sparse_attention(q, k, v, mask, block_bias=bias, backend="cpu", return_lse=True)
        return output, lse.where(lse > -torch.inf, 0)

    assert torch.autograd.gradcheck(attend, inputs)


def test_memory_is_linear() -> None:
    """Four times the sequence at the same lists' length needs about four times the memory, not sixteen."""
    peaks = []
    for seq in (4096, 16384):
        q, k, v = (x.requires_grad_() for x in tensors(1, seq, seq, 2, 1, 16, torch.float32))
        own = torch.arange(seq // 64).view(1, 1, -1, 1)
        index = torch.cat([own, (own - 1).clamp(min=0)], -1)
        mask = BlockMask.from_index(index, torch.cat([own >= 0, own > 0], -1), seq // 64, 64)
        with torch.profiler.profile(profile_memory=True) as profile:
            block_sparse_attention(q, k, v, mask, backend="cpu").sum().backward()  # type: ignore[union-attr]
        used = highest = 0
        for event in profile.profiler.kineto_results.events():  # type: ignore[union-attr]
            used += event.nbytes() if event.name() == "[memory]" else 0
            highest = max(highest, used)
        peaks.append(highest)
    assert 3.5 < peaks[1] / peaks[0] < 4.5


def changed_list(last: int, more: int) -> BlockMask:
    """All of 2 key blocks for each of 2 query blocks, but for the last list: its last entry and its count."""
    mask = BlockMask.from_dense(torch.ones(1, 2, 2, 2, dtype=torch.bool), 16)
    mask.index[0, 1, 1, 1] = last
    mask.count[0, 1, 1] += more
    return mask


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"q": torch.zeros(1, 32, 3, 8)}, "q has 3 heads, not a multiple of the 2"),
        ({"q": torch.zeros(1, 48, 4, 8)}, "more than the 32 of k and v"),
        ({"v": torch.zeros(1, 32, 2, 4)}, "must be"),
        ({"k": torch.zeros(1, 32, 2, 8, dtype=torch.float64)}, "of one float type"),
        ({"document_ids": torch.zeros(1, 31, dtype=torch.int32)}, r"document_ids is torch.int32 \[1, 31\]: must be"),
        ({"document_ids": torch.zeros(1, 32)}, r"document_ids is torch.float32 \[1, 32\]: must be integers"),
        ({"block_bias": torch.zeros(1, 2, 2, 3)}, r"must be \[1, 2, 2, 2\]"),
        ({"backend": "cuda"}, "backend='cuda'"),
        ({"scale": 0.0}, "scale=0.0: must be > 0"),
        ({"scale": float("nan")}, "scale=nan: must be > 0"),
        ({"mask": BlockMask.from_dense(torch.ones(1, 2, 2, 3, dtype=torch.bool), 16)}, "does not fit"),
        ({"mask": BlockMask.from_dense(torch.ones(1, 1, 2, 2, dtype=torch.bool), 16)}, "does not fit"),
        ({"mask": changed_list(2, 0)}, "batch 0, K/V head 1, query block 1 names key block 2 of 2"),
        ({"mask": changed_list(-1, 0)}, "names key block -1 of 2"),
        ({"mask": changed_list(0, 0)}, "names key block 0 twice"),
        ({"mask": changed_list(1, 3)}, "has count 5 and room for 2"),
        ({"mask": changed_list(1, -3)}, "has count -1 and room for 2"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], error: str) -> None:
    arguments = {
        "q": torch.zeros(1, 32, 4, 8),
        "k": torch.zeros(1, 32, 2, 8),
        "v": torch.zeros(1, 32, 2, 8),
        "mask": BlockMask.from_dense(torch.ones(1, 2, 2, 2, dtype=torch.bool), 16),
    }
    block_sparse_attention(**arguments)
    with pytest.raises(ValueError, match=error):
        block_sparse_attention(**{**arguments, **change})
