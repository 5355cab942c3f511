"""2:4 sparsity on CPU, in C++ (cpu.cpp). See naive.py, whose functions these are, for shapes."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megasparse.ops import extension
from megasparse.ops.two_four.naive import pack, unpack

__all__ = ["mvue", "pack", "prune_mask", "soft_threshold", "transposable_mask", "unpack"]


def prune_mask(score: Tensor) -> Tensor:
    return _operators().prune_mask(score)


def transposable_mask(w: Tensor, method: str) -> Tensor:
    return _operators().transposable_mask(w.contiguous(), method == "exact")


def soft_threshold(w: Tensor) -> Tensor:
    return _operators().soft_threshold(w)


def mvue(g: Tensor, method: str, seed: int, start: tuple[int, int]) -> Tensor:
    signed = seed - 2**64 if seed >= 2**63 else seed
    return _operators().mvue(g, method == "exact", signed, *start)


@functools.cache
def _operators() -> Any:
    extension.load(Path(__file__).with_name("cpu.cpp"))
    return torch.ops.megasparse_two_four
