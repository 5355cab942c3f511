"""``parallel``: how the run is split."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, PositiveInt

from megasparse.config.deepspeed import DeepSpeed
from megasparse.config.section import NonNegative, Section


class Parallel(Section):
    """How the run is split. Data parallelism is what is left of the world: world / (tp * pp * cp). What goes together
    is check_layout's to say."""

    tp: PositiveInt = 1  # tensor parallel
    sequence_parallel: bool = False  # with tp: norms and residuals are split along the sequence
    pp: PositiveInt = 1  # pipeline parallel
    vp: PositiveInt = 1  # virtual pipeline: model chunks a stage holds, interleaved (Narayanan et al. 2021)
    layers_per_stage: list[PositiveInt] | None = None
    """Layers of each of the pp * vp stages, in the order of the model. None: even, with these weights:"""
    embedding_weight: NonNegative = 0.0  # the embedding's share of the first stage, in layers
    loss_weight: NonNegative = 0.0  # the output layer and loss's share of the last stage, in layers
    cp: PositiveInt = 1  # context parallel: the sequence is split, keys and values are gathered
    ep: PositiveInt = 1  # expert parallel, folded over tp x cp x dp
    world_size: PositiveInt | None = None
    """Processes the recipe is written for: what a dry run is of, and train notes that it has others. None: as many as
    are started; of a dry run the fewest that the sizes above need."""
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 1
    offload_optimizer: bool = False  # ZeRO's master weights and moments, and the step, on the CPU
    deepspeed: DeepSpeed = DeepSpeed()
