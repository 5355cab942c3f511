"""What is written a block at a time is read back by Reader, and by torch's distributed checkpoints in any layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from megasparse.checkpoint.folder import write_manifest
from megasparse.checkpoint.reader import Reader
from megasparse.checkpoint.state import LoadPlanner, Sharded
from megasparse.checkpoint.writer import METADATA, write_block, write_metadata

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.bool, torch.uint8, torch.int64]
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # as no_dist wants it
Blocks = list[tuple[tuple[int, ...], Tensor]]


def write(folder: Path, files: dict[str, dict[str, Blocks]], wholes: dict[str, Tensor]) -> Reader:
    """``files``: of each the blocks of each tensor."""
    folder.mkdir()
    written: dict[str, list[list[Any]]] = {}
    for file, tensors in files.items():
        with (folder / file).open("wb") as stream:
            written[file] = [
                write_block(stream, name, offsets, block)
                for name, blocks in tensors.items()
                for offsets, block in blocks
            ]
    write_metadata(folder, {name: (tuple(whole.shape), whole.dtype) for name, whole in wholes.items()}, written)
    write_manifest(folder, {"files": {}})
    return Reader(folder)


def cut(whole: Tensor, rows: list[int], columns: list[int]) -> Blocks:
    """Blocks between these rows and columns."""
    return [
        ((a, c), whole[a:b, c:d].clone())
        for a, b in zip([0, *rows], [*rows, whole.shape[0]], strict=True)
        for c, d in zip([0, *columns], [*columns, whole.shape[1]], strict=True)
    ]


def load(folder: Path, shape: tuple[int, ...], dtype: torch.dtype, places: list[tuple[int, ...]]) -> Sharded:
    """The rectangles [first row, end, first column, end] of the tensor ``x``, by torch."""
    sharded = Sharded(shape, dtype)
    for first, last, left, right in places:
        sharded.views[torch.Size((first, left))] = torch.zeros(last - first, right - left, dtype=dtype)
    dcp.load({"x": sharded}, storage_reader=dcp.FileSystemReader(folder), planner=LoadPlanner(), no_dist=True)
    return sharded


@pytest.mark.parametrize("dtype", DTYPES)
def test_blocks_are_read_in_other_rectangles(tmp_path: Path, dtype: torch.dtype) -> None:
    """By torch, and by Reader; the blocks lie in two files."""
    whole = torch.randint(0, 2 if dtype == torch.bool else 200, (11, 7)).to(dtype)
    blocks = cut(whole, [2, 3, 8], [5])
    reader = write(tmp_path / "x", {"a": {"x": blocks[::2]}, "b": {"x": blocks[1::2]}}, {"x": whole})
    assert torch.equal(reader.read("x"), whole)
    assert reader.tensors["x"].pieces == 8
    assert reader.tensors["x"].elements == 77
    places = [(0, 5, 0, 3), (0, 5, 3, 7), (5, 11, 0, 6), (10, 11, 6, 7), (3, 8, 0, 5)]
    for (row, column), view in load(tmp_path / "x", (11, 7), dtype, places).views.items():
        assert torch.equal(view, whole[row : row + view.shape[0], column : column + view.shape[1]])


def test_several_tensors_in_a_file(tmp_path: Path) -> None:
    wholes = {f"model.{i}": torch.randn(3 + i, 4) for i in range(5)}
    files = {"a": {name: cut(whole, [1], [2]) for name, whole in wholes.items()}}
    reader = write(tmp_path / "x", files, wholes)
    assert list(reader.tensors) == list(wholes)
    assert all(torch.equal(reader.read(name), whole) for name, whole in wholes.items())
    kept = {name: torch.zeros_like(whole) for name, whole in wholes.items()}
    state = {name: Sharded.whole(tensor) for name, tensor in kept.items()}
    dcp.load(state, storage_reader=dcp.FileSystemReader(tmp_path / "x"), planner=LoadPlanner(), no_dist=True)
    assert all(torch.equal(kept[name], whole) for name, whole in wholes.items())


@pytest.mark.parametrize(
    "whole",
    [
        torch.arange(28.0).view(4, 7).t(),
        torch.arange(60.0).view(6, 10)[1:4, 2::3],
        torch.arange(5.0).expand(3, 5),
        torch.arange(24).view(2, 3, 4).movedim(0, -1).bool(),
    ],
    ids=["transposed", "strided", "expanded", "moved"],
)
def test_what_is_not_contiguous(tmp_path: Path, whole: Tensor) -> None:
    zeros = (0,) * whole.dim()
    reader = write(tmp_path / "x", {"a": {"x": [(zeros, whole)]}}, {"x": whole})
    assert torch.equal(reader.read("x"), whole)
    ((offsets, piece),) = reader.pieces("x")
    assert offsets == zeros
    assert torch.equal(piece, whole)
    loaded = torch.zeros(whole.shape, dtype=whole.dtype)
    state = {"x": Sharded.whole(loaded)}
    dcp.load(state, storage_reader=dcp.FileSystemReader(tmp_path / "x"), planner=LoadPlanner(), no_dist=True)
    assert torch.equal(loaded, whole)


@pytest.mark.parametrize("shape", [(), (0,), (0, 4), (3, 0), (1,), (1, 1, 1)])
def test_empty_tensors_and_single_numbers(tmp_path: Path, shape: tuple[int, ...]) -> None:
    wholes = {"before": torch.randn(3), "x": torch.randn(shape), "z": torch.randn(2)}
    files = {"a": {name: [((0,) * whole.dim(), whole)] for name, whole in wholes.items()}}
    reader = write(tmp_path / "x", files, wholes)
    for name, whole in wholes.items():
        assert torch.equal(reader.read(name), whole)
        assert [piece.shape for _, piece in reader.pieces(name)] == [whole.shape]


def test_a_block_takes_the_room_of_its_elements(tmp_path: Path) -> None:
    with (tmp_path / "x").open("wb") as stream:
        first = write_block(stream, "x", (0, 0), torch.zeros(1000, 100))
        second = write_block(stream, "x", (1000, 0), torch.zeros(7, 100))
    assert first[:4] == ["x", [0, 0], [1000, 100], 0]
    assert second[:4] == ["x", [1000, 0], [7, 100], first[4]]
    assert (tmp_path / "x").stat().st_size == first[4] + second[4]
    assert 400_000 <= first[4] < 402_000


def test_it_is_a_checkpoint_of_torch(tmp_path: Path) -> None:
    """Its own reader finds the table, and torch.load a block."""
    whole = torch.randn(4, 6)
    write(tmp_path / "x", {"a": {"x": cut(whole, [2], [])}}, {"x": whole})
    metadata = dcp.FileSystemReader(tmp_path / "x").read_metadata()
    assert (tmp_path / "x" / METADATA).is_file()
    stored: Any = metadata.state_dict_metadata["x"]
    assert (tuple(stored.size), stored.properties.dtype) == ((4, 6), torch.float32)
    assert [(tuple(c.offsets), tuple(c.sizes)) for c in stored.chunks] == [((0, 0), (2, 6)), ((2, 0), (2, 6))]
    assert torch.equal(torch.load(tmp_path / "x" / "a", weights_only=True), whole[:2])
