"""Rotary frequencies and their long-context scalings, as transformers' ``modeling_rope_utils`` defines them."""

from __future__ import annotations

import math
from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding as MegatronRotaryEmbedding
from torch import Tensor

from megasparse.config import Rope
from megasparse.layers.cache import Position


class RotaryEmbedding(MegatronRotaryEmbedding):
    """megatron-core's, with the recipe's frequencies, of positions from ``position.start`` on."""

    def __init__(self, rope: Rope, rotary_dim: int, device: torch.device, cp_group: Any) -> None:
        super().__init__(rotary_dim, rotary_percent=1.0, use_cpu_initialization=True, cp_group=cp_group)
        self.inv_freq = inverse_frequencies(rope, rotary_dim).to(device)
        self.position = Position()

    def forward(self, max_seq_len: int, offset: int = 0, **options: Any) -> Tensor:
        """[seq, 1, 1, rotary_dim]"""
        return super().forward(max_seq_len, offset + self.position.start, **options)


def inverse_frequencies(rope: Rope, rotary_dim: int) -> Tensor:
    """Angle per position of each rotated pair: float32 [rotary_dim / 2]."""
    powers = torch.arange(0, rotary_dim, 2, dtype=torch.int64).float() / rotary_dim
    base = 1.0 / (rope.theta**powers)
    match rope.scaling:
        case "none":
            return base
        case "linear":
            return base / rope.factor
        case "llama3":
            return _llama3(base, rope)
        case "yarn":
            return _yarn(base, rope, rotary_dim)


def attention_factor(rope: Rope) -> float:
    """What cos and sin are multiplied by (YaRN's temperature; 1 for the others)."""
    if rope.scaling != "yarn":
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor
    return 0.1 * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0


def _llama3(base: Tensor, rope: Rope) -> Tensor:
    """Low frequencies are divided by the factor, high ones kept, those between interpolated."""
    assert rope.original_max_position_embeddings is not None
    original = rope.original_max_position_embeddings
    wavelength = 2 * math.pi / base
    smooth = (original / wavelength - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    smooth = smooth.clamp(0, 1)
    return (1 - smooth) * base / rope.factor + smooth * base


def _yarn(base: Tensor, rope: Rope, rotary_dim: int) -> Tensor:
    """YaRN (Peng et al. 2023): a linear ramp from kept to divided between beta_fast and beta_slow rotations."""
    assert rope.original_max_position_embeddings is not None

    def dimension(rotations: float) -> float:
        length = rope.original_max_position_embeddings
        assert length is not None
        return rotary_dim * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low = max(math.floor(dimension(rope.beta_fast)), 0)
    high = min(math.ceil(dimension(rope.beta_slow)), rotary_dim - 1)
    high = high + 0.001 if low == high else high
    ramp = ((torch.arange(rotary_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    kept = 1 - ramp
    return base / rope.factor * (1 - kept) + base * kept
