"""What tools/bench/recall.py asks: its sequences, its density, and that no local window reaches an answer."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

PATH = Path(__file__).parent.parent / "tools" / "bench" / "recall.py"
SPEC = importlib.util.spec_from_file_location("recall", PATH)
assert SPEC is not None
assert SPEC.loader is not None
recall = importlib.util.module_from_spec(SPEC)
sys.modules["recall"] = recall  # its dataclasses look it up
SPEC.loader.exec_module(recall)


CURRICULA = [recall.CURRICULUM, *recall.OWN_CURRICULUM.values()]


@pytest.mark.parametrize(
    ("curriculum", "seq"), [(curriculum, length) for curriculum in CURRICULA for length, _ in curriculum.lengths]
)
def test_answers_are_the_values_that_the_sequence_binds_to_the_keys(curriculum: Any, seq: int) -> None:
    batch = recall.draw(torch.Generator().manual_seed(7), 3, seq, curriculum)
    first_value, last = 1 + recall.KEYS, recall.LAST * seq // recall.SEQ
    queries = recall.QUERIES if seq == recall.SEQ else curriculum.queries * seq // recall.SEQ
    for tokens, labels, scored in zip(batch.tokens, batch.labels, batch.loss_mask, strict=True):
        places = ((tokens > 0) & (tokens < first_value)).nonzero().flatten()
        places = places[places < queries]
        bound = dict(zip(tokens[places].tolist(), tokens[places + 1].tolist(), strict=True))
        assert len(bound) == len(places) == min(recall.KEYS, seq // curriculum.tokens_per_pair), (
            "each key has one value"
        )
        assert all(first_value <= value < recall.VOCAB for value in bound.values())
        assert places.min() >= recall.FIRST * seq // recall.SEQ
        assert places.max() < last - 1
        assert scored.nonzero().flatten().equal(torch.arange(queries, seq))
        asked = zip(tokens[queries:].tolist(), labels[queries:].tolist(), strict=True)
        assert all(label == bound[token] for token, label in asked)


def test_sequences_depend_on_the_seed_alone() -> None:
    first, again, other = (next(recall.sequences(seed, 2, 100)).tokens for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_sequences_become_longer_and_batches_stay_as_large() -> None:
    shapes = [tuple(batch.tokens.shape) for batch in recall.sequences(1, 1, 20)]
    assert shapes == [(32, 36)] * 4 + [(8, 144)] * 3 + [(1, 1152)] * 13


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
