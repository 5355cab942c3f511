"""``optimizer`` and ``schedule``: AdamW and its learning rate."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat

from megasparse.config.section import Fraction, NonNegative, Section


class Optimizer(Section):
    """AdamW with decoupled weight decay; one-dimensional weights (norms, biases) are not decayed."""

    lr: PositiveFloat = 3e-4
    beta1: Fraction = 0.9
    beta2: Fraction = 0.95
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegative = 0.1
    clip_grad: NonNegative = 1.0  # largest global gradient norm; 0: no clipping


class Schedule(Section):
    """Learning rate as a function of tokens seen: linear warm-up, then one of four shapes."""

    type: Literal["cosine", "wsd", "linear", "constant"] = "cosine"
    warmup_tokens: int = Field(default=0, ge=0)
    decay_tokens: int = Field(default=0, ge=0)  # wsd: length of the final linear decay
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 0.1  # lr at the end / optimizer.lr
