"""What layers add up in a step."""

from __future__ import annotations

import pytest
import torch

from megasparse.layers.step import StepState


@pytest.mark.parametrize("recompute", [False, True])
def test_each_micro_batch_counts_once(recompute: bool) -> None:
    """Losses are means over micro-batches, blocks are sums; a recomputed layer runs first without gradients."""
    state = StepState(recompute=recompute)
    for step in range(2):
        state.begin(step, 4, 2)
        assert (state.step, state.progress) == (step, (step + 1) / 4)
        assert not state.losses
        for value in (1.0, 3.0):
            for grad in (False, True) if recompute else (True,):
                with torch.set_grad_enabled(grad):
                    state.record("loss", torch.tensor(value))
                    state.count_blocks(torch.tensor(value), torch.tensor(10))
        assert state.losses == {"loss": 2.0}
        assert state.blocks == {"listed": 4.0, "all": 20}
