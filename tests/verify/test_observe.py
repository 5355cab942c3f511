"""What is observed is what happened: routes, margins, gradients, and samples that do not depend on who reads them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megasparse import topology
from megasparse.verify.observe import _batches, observe
from tests import small
from tests.helpers import relative_error, run_distributed

RECIPE = small.recipe(
    {"vocab_size": 95}, {"bias_update_rate": 0.01}, optimizer={"clip_grad": 0.0}, data={"document_mask": True}
)

NSA = {"compression_size": 2, "compression_stride": 2, "window_blocks": 2}


def test_samples_are_those_of_their_numbers() -> None:
    """Two data-parallel ranks read what one reads, with documents that end at other places in every sample."""

    def batches(rank: int, size: int) -> list:
        place = topology.Topology.__new__(topology.Topology)
        object.__setattr__(place, "dp", size)
        object.__setattr__(place, "dp_rank", rank)
        return _batches(RECIPE, 3, place)

    whole, halves = batches(0, 1), [*batches(0, 2), *batches(1, 2)]
    assert len(whole) == len(halves) == 4
    for a, b in zip(whole, halves, strict=True):
        assert torch.equal(a.tokens, b.tokens)
        assert torch.equal(a.token_index, b.token_index)
        assert torch.equal(a.labels[:, :-1], a.tokens[:, 1:])
    scored = torch.stack([b.loss_mask.sum() for b in whole])
    assert len(set(scored.tolist())) > 1, "uneven masks"


def test_what_is_seen() -> None:
    seen = run_distributed(observe, 1, RECIPE.model_dump(mode="json"), 2)[0]
    tokens = 8 * small.SEQ
    assert len(seen.routes) == 2 * 2 * tokens  # steps, layers
    assert {len(set(route)) for route in seen.routes.values()} == {2}
    assert {token for _, _, token in seen.routes} == set(range(2 * tokens))
    assert 0 < seen.margin < 0.1
    for step, scalars in enumerate(seen.scalars):
        norm = torch.cat([part.flatten().double() for *_, part in seen.gradients[step]]).norm()
        assert relative_error(norm, torch.tensor(scalars["grad_norm"])) < 1e-6, "the gradients are those of the norm"
    weights = {name for name, *_ in seen.gradients[0]}
    buffers = {f"decoder.layers.{i}.mlp.router.{name}" for i in range(2) for name in ("bias", "load")}
    assert {name for name, *_ in seen.weights} == weights | buffers
    assert {name for name, *_ in seen.moved} == weights
    start = run_distributed(observe, 1, RECIPE.model_dump(mode="json"), 0)[0]
    before, after = ({name: part for name, *_, part in one.weights} for one in (start, seen))
    for name, _, _, moved in seen.moved:
        assert relative_error(before[name] + moved, after[name]) < 1e-6
        assert moved.abs().max() > 0


@pytest.mark.parametrize("options", [{"query_block_size": 4}, {"selector": "nsa", **NSA}], ids=str)
def test_lists_of_key_blocks_are_seen(options: dict[str, Any]) -> None:
    """Each sparse layer's lists, once under recompute, by the number of their first token and the K/V head."""
    sparse = {"selector": "pooled", "block_size": 4, "blocks": 4, "layers": [0, 1], **options}
    recipe = small.recipe({"vocab_size": 95, "sparse_attention": sparse}, training={"recompute": "full"})
    (seen,) = run_distributed(observe, 1, recipe.model_dump(mode="json"), 2)
    size = options.get("query_block_size", 1)
    tokens = range(0, 2 * 8 * small.SEQ, size)
    assert set(seen.routes) == {(t // (8 * small.SEQ), 1, t, head) for t in tokens for head in range(2)}
    for (_, _, token, _), listed in seen.routes.items():
        own = token % small.SEQ // 4
        assert {0, own} <= set(listed) <= set(range(own + 1))
        assert len(listed) == min(own + 1, 4)
