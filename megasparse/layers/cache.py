"""Keys and values of the tokens that generation has behind it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Position:
    """Where the tokens of the next forward pass begin; what caches hold from there on is written anew."""

    start: int = 0


class KeyValueCache:
    """Of one attention layer. Tensors are [batch, heads, tokens, head_dim]."""

    def __init__(self, position: Position, query_block_size: int) -> None:
        self.position, self.query_block_size = position, query_block_size
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.queries: Tensor | None = None  # of tokens from ``first_query`` on
        self.first_query = 0

    def extend(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
        """The new tokens' tensors -> queries of positions ``start`` and on, all keys, all values, ``start``.

        Queries that share lists of blocks begin with a block of queries, and those of the block before, which chooses,
        are among them: only the last ones returned are new.
        """
        start = self.position.start
        self.keys, self.values = _put(self.keys, key, start), _put(self.values, value, start)
        size = self.query_block_size
        if size == 1:
            return query, self.keys, self.values, start
        first = max(0, (start // size - 1) * size)
        if start == 0:  # anew, whatever is held
            self.first_query = 0
        queries = _put(self.queries, query, start - self.first_query)
        self.queries, self.first_query = queries[:, :, first - self.first_query :], first
        return self.queries, self.keys, self.values, first


def _put(held: Tensor | None, new: Tensor, start: int) -> Tensor:
    """``new`` after the first ``start`` tokens of what is held."""
    return new if held is None or start == 0 else torch.cat([held[:, :, :start], new], 2)
