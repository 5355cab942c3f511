"""``training``: steps, batches, precision, evaluation, checkpoints; FP8 and a teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from megasparse.config.section import Section


class Teacher(Section):
    """Knowledge distillation: the loss of a token is (1 - weight) times its cross-entropy, plus weight * temperature^2
    times KL(teacher || student), both softened to softmax(logits / temperature) (Hinton et al. 2015)."""

    checkpoint: Path  # a folder step_N of a run, of any model with the same vocabulary
    temperature: PositiveFloat = 2.0  # AST
    weight: Annotated[float, Field(ge=0, le=1)] = 0.67  # AST


class Fp8(Section):
    """FP8 products of attention's and MLPs' linear layers and of experts, by one of Transformer Engine's recipes.

    x and weights are cast to e4m3. Embedding, output layer, routers, norms, and what attention has besides its linear
    layers, stay in training.precision. NVIDIA GPUs run Transformer Engine, a CPU emulates it (ops/fp8).
    """

    recipe: Literal["delayed", "current", "block"]
    """Where scales come from. delayed: the largest values of earlier steps. current: each tensor itself. block: each
    128 of its values, or 128 x 128 of a weight's (DeepSeek-V3). Megatron's fp8_recipe calls the last two tensorwise and
    blockwise."""
    gradients: Literal["e5m2", "e4m3"] = "e5m2"  # of outputs: Megatron's fp8 is hybrid or e4m3
    margin: int = Field(default=0, ge=0)  # delayed: as many powers of two below the largest number of the type
    amax_history_len: PositiveInt = 1024  # delayed: steps looked back on
    amax_compute_algo: Literal["max", "most_recent"] = "max"  # delayed: what of them counts
    num_layers_at_start_in_bf16: int = Field(default=0, ge=0)  # transformer layers that stay in training.precision,
    num_layers_at_end_in_bf16: int = Field(default=0, ge=0)  # at both ends of the model
    experts: bool = True  # routed experts too
    emulate: bool = False  # on a GPU as well: what Transformer Engine cannot do, slower than without FP8
    rounding: Literal["nearest", "smooth"] = "nearest"
    """smooth: emulation with a continuous map in place of the cast, by the same scales: verify's."""

    @model_validator(mode="after")
    def _check(self) -> Fp8:
        for field, unset in (("margin", 0), ("amax_history_len", 1024), ("amax_compute_algo", "max")):
            if getattr(self, field) != unset and self.recipe != "delayed":
                raise ValueError(f"{field}={getattr(self, field)} with recipe={self.recipe}: it has none, unset it")
        return self


class Training(Section):
    """How long, in what portions and in which precision."""

    steps: PositiveInt
    global_batch_size: PositiveInt = 32  # sequences per optimizer step, over all ranks
    micro_batch_size: PositiveInt = 8  # sequences per forward pass of one rank
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    fp8: Fp8 | None = None
    loss_scale: PositiveFloat = 65536.0  # fp16: the first dynamic loss scale
    loss_scale_window: PositiveInt = 1000  # fp16: good steps before the scale doubles
    recompute: Literal["none", "full"] = "none"  # full: each layer's activations are recomputed in backward
    seed: int = Field(default=1234, ge=0)
    eval_interval: int = Field(default=0, ge=0)  # steps; 0: only at the end
    eval_tokens: PositiveInt = 100_000  # validation tokens at each interval (the end uses all)
    eval_stride: PositiveInt | None = None
    """Tokens that a window of the last evaluation scores: each has seq_length - eval_stride of context or more. None:
    a quarter of seq_length, at four times the work of seq_length."""
    save_interval: int = Field(default=0, ge=0)  # steps; 0: only at the end
    keep_checkpoints: PositiveInt = 2  # the newest ones kept
    keep_every: int = Field(default=0, ge=0)  # steps; 0: none: checkpoints kept for good, a multiple of save_interval
    async_save: bool = False  # a checkpoint is copied and written while training goes on
    initial_checkpoint: Path | None = None
    """A folder step_N of another run, whose weights and router biases a new run begins with; None: drawn from seed."""
    teacher: Teacher | None = None

    @model_validator(mode="after")
    def _check(self) -> Training:
        if self.keep_every and (self.save_interval == 0 or self.keep_every % self.save_interval):
            raise ValueError(
                f"keep_every={self.keep_every} is not a multiple of save_interval={self.save_interval}: "
                "no such step is saved"
            )
        return self
