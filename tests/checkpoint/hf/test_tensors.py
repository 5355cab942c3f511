"""Every kind of entry against loops written from Megatron's order of rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megasparse.checkpoint.hf import tensors as module
from megasparse.checkpoint.hf.tensors import Entry, Experts, FusedQkv, Halves, Piece, Qkv, Same, Transposed
from megasparse.config import Model

HIDDEN, HEAD = 5, 3
GROUPS = [(4, 2), (4, 4), (6, 1), (6, 3)]  # heads, K/V heads


def model_of(heads: int = 4, kv_heads: int = 2, **changes: Any) -> Model:
    fields = {"num_attention_heads": heads, "num_query_groups": kv_heads, "head_dim": HEAD, "hidden_size": HIDDEN}
    return Model.model_validate({"num_layers": 1, **fields, "position_embedding": "learned", **changes})


def unique(*shape: int) -> Tensor:
    """No two elements alike."""
    return 1 + torch.arange(torch.Size(shape).numel(), dtype=torch.int64).view(shape)


def rectangle(piece: Piece) -> tuple[slice, ...]:
    return tuple(slice(start, start + size) for start, size in zip(piece.offsets, piece.shape, strict=True))


def there_and_back(entry: Entry, ours: Tensor, model: Model) -> dict[str, Tensor]:
    """Theirs; every element of ours is in one place of one of them, and all come back."""
    theirs: dict[str, Tensor] = {}
    again, covered = torch.zeros_like(ours), torch.zeros_like(ours)
    for piece in entry.pieces("layer.", tuple(ours.shape), model):
        covered[rectangle(piece)] += 1
        block = torch.zeros(piece.shape, dtype=ours.dtype)
        for part in piece.parts:
            assert part.name not in theirs
            taken = theirs[part.name] = part.take(ours[rectangle(piece)])
            assert taken.shape == part.shape
            assert taken.is_contiguous()
            before = block.count_nonzero()
            part.copy(taken, block)
            assert block.count_nonzero() - before == taken.numel(), "parts overlap"
        again[rectangle(piece)] = block
        if piece.is_theirs:
            assert torch.equal(theirs[piece.parts[0].name].reshape(piece.shape), ours[rectangle(piece)])
    assert (covered == 1).all()
    assert torch.equal(again, ours)
    elements = torch.cat([tensor.flatten() for tensor in theirs.values()])
    assert torch.equal(elements.sort().values, ours.flatten())
    return theirs


def is_theirs(entry: Entry, shape: tuple[int, ...], model: Model) -> set[bool]:
    return {piece.is_theirs for piece in entry.pieces("", shape, model)}


@pytest.mark.parametrize(("heads", "kv_heads"), GROUPS)
@pytest.mark.parametrize("columns", [(HIDDEN,), ()], ids=["weight", "bias"])
def test_qkv(heads: int, kv_heads: int, columns: tuple[int, ...]) -> None:
    """For each K/V head its query heads, its key, its value."""
    ours = unique((heads + 2 * kv_heads) * HEAD, *columns)
    expected: dict[str, list[Tensor]] = {"q": [], "k": [], "v": []}
    row = 0
    for _ in range(kv_heads):
        for letter in [*["q"] * (heads // kv_heads), "k", "v"]:
            for _ in range(HEAD):
                expected[letter].append(ours[row])
                row += 1
    assert row == len(ours)
    theirs = there_and_back(Qkv("{}_proj"), ours, model_of(heads, kv_heads))
    assert {name: tensor.shape for name, tensor in theirs.items()} == {
        "layer.q_proj": (heads * HEAD, *columns),
        "layer.k_proj": (kv_heads * HEAD, *columns),
        "layer.v_proj": (kv_heads * HEAD, *columns),
    }
    for letter, rows in expected.items():
        assert torch.equal(theirs[f"layer.{letter}_proj"], torch.stack(rows))
    assert is_theirs(Qkv("{}"), tuple(ours.shape), model_of(heads, kv_heads)) == {False}


@pytest.mark.parametrize("columns", [(HIDDEN,), ()], ids=["weight", "bias"])
def test_fused_qkv(columns: tuple[int, ...]) -> None:
    """Ours: for each head its query, key and value; theirs: all queries, all keys, all values, [in, out]."""
    heads = 4
    ours = unique(3 * heads * HEAD, *columns)
    rows = {"q": [], "k": [], "v": []}
    row = 0
    for _ in range(heads):
        for letter in "qkv":
            rows[letter] += range(row, row + HEAD)
            row += HEAD
    theirs = there_and_back(FusedQkv("c_attn"), ours, model_of(heads, heads))["layer.c_attn"]
    assert theirs.shape == (*columns, 3 * heads * HEAD)
    for place, row in enumerate([*rows["q"], *rows["k"], *rows["v"]]):
        assert torch.equal(theirs[..., place], ours[row])
    assert is_theirs(FusedQkv(""), tuple(ours.shape), model_of(heads, heads)) == {False}


@pytest.mark.parametrize("columns", [(HIDDEN,), ()], ids=["weight", "bias"])
def test_halves(columns: tuple[int, ...]) -> None:
    ours = unique(8, *columns)
    theirs = there_and_back(Halves("gate", "up"), ours, model_of())
    assert list(theirs) == ["layer.gate", "layer.up"]
    for row in range(4):
        assert torch.equal(theirs["layer.gate"][row], ours[row])
        assert torch.equal(theirs["layer.up"][row], ours[4 + row])
    assert is_theirs(Halves("gate", "up"), tuple(ours.shape), model_of()) == {True}


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
@pytest.mark.parametrize("columns", [(HIDDEN,), ()], ids=["weight", "bias"])
def test_halves_of_a_gelu_are_one(columns: tuple[int, ...], activation: str) -> None:
    ours = unique(7, *columns)
    theirs = there_and_back(Halves("gate", "up"), ours, model_of(activation=activation))
    assert list(theirs) == ["layer.up"]
    assert torch.equal(theirs["layer.up"], ours)


def test_experts() -> None:
    ours = unique(3, 4, 5)
    theirs = there_and_back(Experts("experts.{}.w1"), ours, model_of())
    assert list(theirs) == [f"layer.experts.{expert}.w1" for expert in range(3)]
    for expert, matrix in enumerate(theirs.values()):
        assert torch.equal(matrix, ours[expert])
    assert is_theirs(Experts("{}"), (3, 4, 5), model_of()) == {False}


@pytest.mark.parametrize(("elements", "together"), [(1, 1), (39, 1), (40, 2), (60, 3), (1000, 3)])
def test_small_experts_together(monkeypatch: pytest.MonkeyPatch, elements: int, together: int) -> None:
    monkeypatch.setattr(module, "TOGETHER", elements)
    pieces = Experts("{}").pieces("", (3, 4, 5), model_of())
    places = [((first, 0, 0), (min(together, 3 - first), 4, 5)) for first in range(0, 3, together)]
    assert [(piece.offsets, piece.shape) for piece in pieces] == places
    assert [part.name for piece in pieces for part in piece.parts] == ["0", "1", "2"]
    ours = unique(3, 4, 5)
    theirs = there_and_back(Experts("{}"), ours, model_of())
    assert all(torch.equal(theirs[f"layer.{expert}"], ours[expert]) for expert in range(3))
    if together == 1:
        assert is_theirs(Experts("{}"), (3, 4, 5), model_of()) == {True}


def test_transposed() -> None:
    ours = unique(4, 6)
    theirs = there_and_back(Transposed("c_fc"), ours, model_of())["layer.c_fc"]
    assert theirs.shape == (6, 4)
    for row in range(4):
        for column in range(6):
            assert theirs[column, row] == ours[row, column]
    assert is_theirs(Transposed(""), (4, 6), model_of()) == {False}


@pytest.mark.parametrize("shape", [(7,), (4, 6), (2, 3, 4)])
def test_same(shape: tuple[int, ...]) -> None:
    ours = unique(*shape)
    assert torch.equal(there_and_back(Same("norm"), ours, model_of())["layer.norm"], ours)
    assert is_theirs(Same(""), shape, model_of()) == {True}


def test_types_are_converted() -> None:
    """A float32 piece takes bfloat16 parts, as where a folder has both."""
    (piece,) = Qkv("{}").pieces("", (24, HIDDEN), model_of())
    block = torch.empty(piece.shape)
    parts = {part.name: torch.randn(part.shape).bfloat16() for part in piece.parts}
    for part in piece.parts:
        part.copy(parts[part.name], block)
        assert torch.equal(part.take(block), parts[part.name].float())


def test_whose_rows_are_ours() -> None:
    """A square matrix too is transposed or not."""
    square = (3 * 4 * HEAD, 3 * 4 * HEAD)
    entries: list[tuple[Entry, bool]] = [(Same(""), True), (Halves("", "x"), True), (Qkv("{}"), True)]
    entries += [(Transposed(""), False), (FusedQkv(""), False)]
    for entry, keeps in entries:
        assert {piece.keeps_rows for piece in entry.pieces("", square, model_of(4, 4))} == {keeps}, entry
    assert {piece.keeps_rows for piece in Experts("{}").pieces("", (2, 4, 4), model_of())} == {True}
