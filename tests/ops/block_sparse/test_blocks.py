"""The lists against the dense masks that they stand for."""

from __future__ import annotations

import pytest
import torch

from megasparse.ops.block_sparse import BlockMask


def dense_mask(*shape: int, density: float = 0.4) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) < density


SHAPES = [(2, 3, 7, 7, 16, 16), (1, 2, 40, 3, 16, 1), (2, 1, 3, 9, 16, 64), (1, 1, 1, 1, 8, 8)]


@pytest.mark.parametrize("density", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dense_to_lists_and_back(shape: tuple[int, ...], density: float) -> None:
    *dims, block_size, query_block_size = shape
    dense = dense_mask(*dims, density=density)
    mask = BlockMask.from_dense(dense, block_size, query_block_size)
    assert torch.equal(mask.to_dense(), dense)
    assert mask.density() == pytest.approx(dense.float().mean().item())
    for i, row in enumerate(dense.flatten(0, 2)):
        count = int(mask.count.flatten()[i])
        assert mask.index.flatten(0, 2)[i, :count].tolist() == row.nonzero().flatten().tolist()
    inverse = mask.transpose()
    assert torch.equal(inverse.to_dense(), dense.transpose(2, 3))
    assert (inverse.block_size, inverse.query_block_size) == (query_block_size, block_size)
    assert torch.equal(inverse.transpose().to_dense(), dense)
    for i, row in enumerate(dense.transpose(2, 3).flatten(0, 2)):
        count = int(inverse.count.flatten()[i])
        assert inverse.index.flatten(0, 2)[i, :count].tolist() == row.nonzero().flatten().tolist()


def test_query_blocks_are_as_large_as_key_blocks_unless_said() -> None:
    mask = BlockMask.from_dense(dense_mask(1, 1, 4, 4), 32)
    assert mask.query_block_size == 32
    again = BlockMask(mask.count, mask.index, 32, 32)
    assert again.num_key_blocks == 4
    assert torch.equal(again.to_dense(), mask.to_dense())


def test_entries_of_any_order_are_packed() -> None:
    index = torch.tensor([[[[3, 1, 2], [0, 0, 1]]]])
    keep = torch.tensor([[[[True, False, True], [False, False, False]]]])
    mask = BlockMask.from_index(index, keep, 4, 8)
    assert mask.count.tolist() == [[[2, 0]]]
    assert mask.index.tolist() == [[[[3, 2], [0, 0]]]]
    assert mask.to_dense().long().tolist() == [[[[0, 0, 1, 1], [0, 0, 0, 0]]]]


@pytest.mark.parametrize(
    ("q_blocks", "k_blocks", "size", "query_size"), [(6, 6, 16, 16), (40, 3, 16, 1), (3, 9, 8, 24)]
)
def test_causal_density(q_blocks: int, k_blocks: int, size: int, query_size: int) -> None:
    """A full causal mask is 1; half of its entries 0.5."""
    last = (torch.arange(q_blocks) + 1) * query_size - 1
    causal = (torch.arange(k_blocks) * size <= last.unsqueeze(1)).expand(2, 2, -1, -1).clone()
    assert BlockMask.from_dense(causal, size, query_size).density(causal=True) == 1.0
    causal[:, 1] = False
    assert BlockMask.from_dense(causal, size, query_size).density(causal=True) == 0.5


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"block_size": 0}, "block_size=0"),
        ({"count": torch.zeros(1, 1, 2, dtype=torch.int32)}, "q_blocks"),
        ({"index": torch.zeros(1, 1, 3, 4)}, r"both must be torch\.int32"),
    ],
)
def test_what_is_no_mask(change: dict, error: str) -> None:
    fields = {
        "count": torch.zeros(1, 1, 3, dtype=torch.int32),
        "index": torch.zeros(1, 1, 3, 4, dtype=torch.int32),
        "block_size": 8,
        "query_block_size": 8,
    }
    BlockMask(**fields)
    with pytest.raises(ValueError, match=error):
        BlockMask(**{**fields, **change})
    with pytest.raises(ValueError, match="query_block_size=0"):
        BlockMask.from_dense(torch.ones(1, 1, 2, 2, dtype=torch.bool), 8, 0)
    with pytest.raises(ValueError, match="must be bool"):
        BlockMask.from_dense(torch.ones(2, 2), 8)
