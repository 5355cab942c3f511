"""What layers add up in a step."""

from __future__ import annotations

import pytest
import torch

from megasparse.layers.step import StepState, auxiliary_losses
from tests import small


@pytest.mark.parametrize("recompute", [False, True])
def test_each_micro_batch_counts_once(recompute: bool) -> None:
    """Losses are means over micro-batches, blocks are sums; a recomputed layer runs first without gradients."""
    state = StepState(recompute=recompute)
    for step in range(2):
        state.begin(step, 4, 2)
        assert (state.step, state.progress) == (step, (step + 1) / 4)
        assert not state.means
        for value in (1.0, 3.0):
            for grad in (False, True) if recompute else (True,):
                with torch.set_grad_enabled(grad):
                    state.record("loss", torch.tensor(value))
                    state.count_blocks(torch.tensor(value), torch.tensor(10))
        assert state.means == {"loss": 2.0}
        assert state.blocks == {"listed": 4.0, "all": 20}


def test_the_losses_of_a_model() -> None:
    gate = {"sparse_attention": {"selector": "gate", "blocks": 8}}
    assert auxiliary_losses(small.recipe().model) == []
    assert auxiliary_losses(small.recipe(gate).model) == ["gate_loss"]
    assert auxiliary_losses(small.recipe(gate, {"z_loss_coefficient": 0.1}).model) == [
        "load_balance_loss",
        "z_loss",
        "gate_loss",
    ]
    assert auxiliary_losses(small.recipe(moe={"aux_loss_coefficient": 0.0}).model) == []
