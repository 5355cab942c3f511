"""What tools/bench/recall.py asks: its sequences, its density, and that no local window reaches an answer."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

PATH = Path(__file__).parent.parent / "tools" / "bench" / "recall.py"
SPEC = importlib.util.spec_from_file_location("recall", PATH)
assert SPEC is not None
assert SPEC.loader is not None
recall = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(recall)


def test_answers_are_the_values_that_the_sequence_binds_to_the_keys() -> None:
    batch = next(recall.sequences(7, 3))
    first_pair = 1 + recall.KEYS + recall.VALUES
    for tokens, labels, scored in zip(batch.tokens, batch.labels, batch.loss_mask, strict=True):
        pairs = (tokens[tokens >= first_pair] - first_pair).unique()
        bound = {int(pair) // recall.VALUES: int(pair) % recall.VALUES for pair in pairs}
        assert len(bound) == len(pairs) == recall.KEYS, "each key has one value"
        places = scored.nonzero().flatten()
        assert places.equal(torch.arange(recall.QUERIES, recall.SEQ))
        for token, label in zip(tokens[places], labels[places], strict=True):
            assert int(label) - 1 - recall.KEYS == bound[int(token) - 1]


def test_sequences_depend_on_the_seed_alone() -> None:
    first, again, other = (next(recall.sequences(seed, 2)).tokens for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_no_local_window_reaches_or_relays_a_pair() -> None:
    """A query sees keys less than local_blocks * block_size before it, in each of the layers."""
    local = recall.recipe("local", 0, 100, 1).model.sparse_attention
    assert recall.LAYERS * local.local_blocks * local.block_size < recall.QUERIES - (recall.LAST - 1)
    assert local.sink_blocks * local.block_size <= recall.FIRST


def test_variants_see_no_more_than_15_percent() -> None:
    """Of the causal blocks: all that a query late in the sequence may see, over half of the sequence's."""
    mean = (recall.SEQ // recall.BLOCK + 1) / 2
    for variant in set(recall.VARIANTS) - {"dense"}:
        sparse = recall.recipe(variant, 0, 100, 1).model.sparse_attention
        seen = sparse.blocks or sparse.local_blocks + sparse.sink_blocks
        share = seen / mean
        if variant == "nsa":
            share = (seen + sparse.window_blocks) / mean + 1 / sparse.compression_stride
        assert 0.13 < share < 0.15
