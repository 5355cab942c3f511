"""Matmuls of the CPU paths.

MKL takes its AVX2 path on AMD processors, where oneDNN's AVX-512 kernels reach twice its speed in float32 (400 against
200 GFLOP/s on two Zen 5 cores), at the same precision. torch offers oneDNN for dense float32 only through the operator
that Inductor emits, which cannot write into a given tensor. oneDNN compiles a kernel for every new shape (half a
millisecond): callers whose rows differ at every step round them up.
"""

from __future__ import annotations

import torch
from torch import Tensor

ONEDNN = torch.backends.mkldnn.is_available()  # x86 and Arm Linux builds of torch


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a [m, k] times b [k, n]. Fast where ``a`` is contiguous; a transposed one costs oneDNN three times as much."""
    if ONEDNN and a.dtype == torch.float32:
        return torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], "")
    return torch.mm(a, b)


def round_up(count: int) -> int:
    """The least of 8, 16, 24, ..., 256, 272, 288, ..., 512, 544, ... that is not below ``count``."""
    step = 1 << max(3, (count - 1).bit_length() - 5)
    return -(-count // step) * step
