"""What a cache hands to attention: all keys and values, and the queries that choose for the new ones."""

from __future__ import annotations

import pytest
import torch

from megasparse.layers.cache import KeyValueCache, Position

TOKENS = 50


@pytest.mark.parametrize("size", [1, 3, 16, 64])
def test_what_is_held_and_what_is_new_make_the_sequence(size: int) -> None:
    """In passes of several sizes, the second written twice, as copies of a micro-batch do; then anew; then on."""
    query, key, value = (torch.randn(2, heads, TOKENS, 8) for heads in (4, 2, 2))
    position = Position()
    cache = KeyValueCache(position, size)
    passes = [(0, 17), (17, 18), (17, 18), (18, 40), (40, 41), (41, TOKENS), (0, TOKENS), (0, 20), (20, 21)]
    for start, end in passes:
        position.start = start
        queries, keys, values, first = cache.extend(*(x[:, :, start:end] for x in (query, key, value)))
        assert torch.equal(keys, key[:, :, :end])
        assert torch.equal(values, value[:, :, :end])
        assert torch.equal(queries, query[:, :, first:end])
        block = start // size
        assert first == (start if size == 1 else max(0, (block - 1) * size))


def test_what_follows_the_position_is_forgotten() -> None:
    """Tokens that only filled up a pass."""
    position, x = Position(), torch.randn(1, 2, 12, 8)
    cache = KeyValueCache(position, 4)
    cache.extend(*[torch.cat([x[:, :, :6], torch.zeros(1, 2, 2, 8)], 2)] * 3)
    position.start = 6
    for held in cache.extend(*[x[:, :, 6:]] * 3)[:3]:
        assert torch.equal(held, x)
