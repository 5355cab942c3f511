"""Which of the kernels that want an NVIDIA GPU, and a package beside torch, run here: for the log."""

from __future__ import annotations

from megasparse.config import Recipe
from megasparse.layers import apex, te
from megasparse.optimizer import bf16_optimizer, fused_adam_missing


def notes(recipe: Recipe) -> list[str]:
    """What is used, and what is not with its reason: a line each, of all that share it."""
    gradients = apex.gradients_missing()
    if gradients is None and not bf16_optimizer(recipe):
        gradients = "they are summed in float32 with training.precision=bf16 and parallel.zero_stage=1 alone"
    doors = {
        "Transformer Engine's fused attention": te.attention_missing(recipe),
        "apex's fused norms": apex.norms_missing(),
        "apex's weight gradients": gradients,
        "DeepSpeed's FusedAdam": fused_adam_missing(recipe),
    }
    reasons = dict.fromkeys(doors.values())
    return [
        f"{', '.join(name for name, why in doors.items() if why == reason)}: " + (reason or "used")
        for reason in reasons
    ]
