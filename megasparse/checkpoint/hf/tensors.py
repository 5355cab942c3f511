"""How a tensor of ours is made of tensors of theirs: as views, which serve both directions.

A family's table has, for the name of each tensor of ours, an entry of one of the kinds below. An entry says in which
rectangles the tensor is read and written (``Piece``), and which tensor of theirs each view into one is (``Part``).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megasparse.config import Model

Shape = tuple[int, ...]
TOGETHER = 2**21  # elements of experts


@dataclass(frozen=True)
class Part:
    """A tensor of theirs: ``view`` of a piece of ours has its elements in its order."""

    name: str
    shape: Shape
    view: Callable[[Tensor], Tensor] = lambda piece: piece

    def copy(self, theirs: Tensor, piece: Tensor) -> None:
        """Into its places in a piece of ours."""
        view = self.view(piece)
        view.copy_(theirs.reshape(view.shape))

    def take(self, piece: Tensor) -> Tensor:
        """Out of a piece of ours, contiguous."""
        return self.view(piece).reshape(self.shape).contiguous()


@dataclass(frozen=True)
class Piece:
    """A rectangle of a tensor of ours, and what of theirs it holds: every element once."""

    offsets: Shape
    shape: Shape
    parts: tuple[Part, ...]

    @property
    def is_theirs(self) -> bool:
        """Is it one tensor of theirs, element by element? Else it is put together in memory."""
        (first, *others) = self.parts
        return not others and first.view(torch.empty(self.shape, device="meta")).is_contiguous()

    @property
    def keeps_rows(self) -> bool:
        """Are rows of theirs rows of ours? Those of a transposed matrix, also a square one, are columns."""
        views = [part.view(torch.empty(self.shape, device="meta")) for part in self.parts]
        return all(view.shape[-1] == self.shape[-1] and view.stride(-1) == 1 for view in views)


class Entry(Protocol):
    """How one tensor of ours is made of theirs; what ``prefix`` begins are theirs of the same layer."""

    def pieces(self, prefix: str, shape: Shape, model: Model) -> list[Piece]: ...


@dataclass(frozen=True)
class Same:
    """The same tensor by another name."""

    name: str

    def pieces(self, prefix: str, shape: Shape, model: Model) -> list[Piece]:
        return [Piece((0,) * len(shape), shape, (Part(prefix + self.name, shape),))]


@dataclass(frozen=True)
class Transposed:
    """GPT-2's Conv1D: [in, out]."""

    name: str

    def pieces(self, prefix: str, shape: Shape, model: Model) -> list[Piece]:
        return [Piece((0, 0), shape, (Part(prefix + self.name, shape[::-1], torch.t),))]


@dataclass(frozen=True)
class Halves:
    """Two tensors one above the other: a SwiGLU's gate and up projections. A GELU has the second alone."""

    first: str
    second: str

    def pieces(self, prefix: str, shape: Shape, model: Model) -> list[Piece]:
        if model.activation != "swiglu":
            return Same(self.second).pieces(prefix, shape, model)
        half, zeros = (shape[0] // 2, *shape[1:]), (0,) * (len(shape) - 1)
        starts = {self.first: 0, self.second: half[0]}
        return [Piece((start, *zeros), half, (Part(prefix + name, half),)) for name, start in starts.items()]


@dataclass(frozen=True)
class Experts:
    """A tensor for each expert, stacked in ours; the name has ``{}`` for the expert. Small ones are read and written
    some at a time."""

    name: str

    def pieces(self, prefix: str, shape: Shape, model: Model) -> list[Piece]:
        experts, *matrix = shape
        names = [prefix + self.name.format(expert) for expert in range(experts)]
        together = max(1, TOGETHER // math.prod(matrix))
        return [
            Piece(
                (first, 0, 0),
                (len(some), *matrix),
                tuple(Part(name, tuple(matrix), operator.itemgetter(i)) for i, name in enumerate(some)),
            )
            for first, some in ((first, names[first : first + together]) for first in range(0, experts, together))
        ]


@dataclass(frozen=True)
class Qkv:
    """Query, key and value projections, weights or biases; the name has ``{}`` for q, k or v. Megatron interleaves
    their rows: for each K/V head its query heads, then its key, then its value."""

    name: str

    def pieces(self, prefix: str, shape: Shape, model: Model) -> list[Piece]:
        def grouped(x: Tensor) -> Tensor:  # [K/V heads, query heads of each + 2, head_dim, ...]
            return x.unflatten(0, (model.kv_heads, -1, model.head_size))

        key_value = (model.kv_heads * model.head_size, *shape[1:])
        parts = (
            self._part(prefix, "q", (shape[0] - 2 * key_value[0], *shape[1:]), lambda x: grouped(x)[:, :-2]),
            self._part(prefix, "k", key_value, lambda x: grouped(x)[:, -2]),
            self._part(prefix, "v", key_value, lambda x: grouped(x)[:, -1]),
        )
        return [Piece((0,) * len(shape), shape, parts)]

    def _part(self, prefix: str, letter: str, shape: Shape, view: Callable[[Tensor], Tensor]) -> Part:
        return Part(prefix + self.name.format(letter), shape, view)


@dataclass(frozen=True)
class FusedQkv:
    """GPT-2's c_attn, which has no grouped K/V heads: all queries, then all keys, then all values; its weight is a
    Conv1D, [in, out]."""

    name: str

    def pieces(self, prefix: str, shape: Shape, model: Model) -> list[Piece]:
        def view(x: Tensor) -> Tensor:  # [3, heads, head_dim], of the weight [in, 3, heads, head_dim]
            thirds = x.unflatten(0, (model.kv_heads, 3, model.head_size)).transpose(0, 1)
            return thirds if x.dim() == 1 else thirds.movedim(-1, 0)

        return [Piece((0,) * len(shape), shape, (Part(prefix + self.name, shape[::-1], view),))]
