"""``faults``: what a run does about steps, ranks and hosts that go wrong."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from megasparse.config.section import NonNegative, Section


class Faults(Section):
    """A bad step is one whose loss or gradient norm is not finite, or a spike."""

    spike_deviations: NonNegative = 0.0
    """A loss or gradient norm of more than so many standard deviations above its mean over ``spike_window`` steps is a
    spike (OLMo 2 skips at 6); 0: none is. Not in fp16, whose loss scale is found by overflows."""
    spike_window: Annotated[int, Field(ge=8)] = 128  # good steps looked back on, from half as many on
    retry: bool = True
    """A bad step is first done again, on the same samples and with the same random numbers: what a device did wrong
    once leaves no trace. Not in fp16."""
    max_skipped_steps: PositiveInt = 10  # bad steps in a row, each skipped, before the run goes back or ends
    max_rollbacks: NonNegativeInt = 0
    """How many times it goes back to the last checkpoint before those, and on with the same samples, until it ends."""
    check_replicas_interval: NonNegativeInt = 0
    """Steps between comparisons of all copies of each weight, to the bit, which find silent corruption; also before
    each checkpoint. 0: none."""
    hang_minutes: PositiveFloat = 10.0
    """Without a step, a batch of an evaluation or a save done, until every rank's stack is written down and the job
    ended."""
    straggler_interval: PositiveInt = 100  # steps over which ranks' times are compared
    straggler_factor: Annotated[PositiveFloat, Field(gt=1)] = 1.5  # of the median: a rank that slow is reported
