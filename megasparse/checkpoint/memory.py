"""Memory for tensors of some megabytes, used again when they are gone: the system hands out new memory page by page,
which takes longer than reading a file into it."""

from __future__ import annotations

import math
import weakref

import numpy
import torch
from torch import Tensor

SMALLEST, LARGEST = 2**19, 2**24  # bytes; others do not matter, or are too many to keep


class Memory:
    """Keeps what one reader's tensors had, as much as they had at once."""

    def __init__(self) -> None:
        self._free: list[numpy.ndarray] = []

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """As torch.empty, on the CPU."""
        size = math.prod(shape) * dtype.itemsize
        if not SMALLEST <= size <= LARGEST:
            return torch.empty(shape, dtype=dtype)
        fitting = [memory for memory in self._free if memory.size >= size]
        if fitting:
            memory = min(fitting, key=lambda memory: memory.size)
            self._free[:] = [other for other in self._free if other is not memory]
        else:
            self._free.clear()  # smaller ones
            memory = numpy.empty(size, dtype=numpy.uint8)
        view = memory[:size]
        weakref.finalize(view, self._free.append, memory).atexit = False  # the tensor has the view
        return torch.from_numpy(view).view(dtype).view(shape)
