"""Run a function on several gloo ranks; compare tensors; fill a disk."""

from __future__ import annotations

import atexit
import contextlib
import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megasparse.processes import RankError, Workers

__all__ = ["REPOSITORY", "RankError", "assert_close", "files_of_at_most", "relative_error", "run_distributed"]
REPOSITORY = Path(__file__).resolve().parent.parent

os.environ["PYTHONPATH"] = str(REPOSITORY)  # the ranks import tests
os.environ["MEGASPARSE_SUPERVISOR"] = "none"  # commands that run in a test are their own
_workers = Workers()
atexit.register(_workers.close)


def run_distributed(fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120.0) -> list[Any]:
    """``Workers.run`` on ranks that all tests of this process share."""
    return _workers.run(fn, world_size, *args, timeout=timeout)


def relative_error(a: Tensor, b: Tensor) -> float:
    """max|a - b| / max|b|, in float64; 0 if both are all zeros."""
    a, b = a.detach().double(), b.detach().double()
    largest = b.abs().max().item() if b.numel() else 0.0
    difference = (a - b).abs().max().item() if b.numel() else 0.0
    return difference / largest if largest else (0.0 if difference == 0 else float("inf"))


def assert_close(a: Any, b: Any, rtol: float, name: str = "") -> None:
    """Assert max|a - b| / max|b| <= rtol for two tensors, numbers, or lists or dicts of them, each by itself; the
    message names the worst one and its figure. ``b`` is the reference. Not-a-number is never close."""
    worst, place = 0.0, name
    for path, left, right in _pairs(a, b, name):
        assert left.shape == right.shape, f"{path}: shape {tuple(left.shape)} is not {tuple(right.shape)}"
        error = relative_error(left, right)
        if not error <= worst:
            worst, place = error, path
    assert worst <= rtol, f"{place or 'tensors'}: relative error {worst:.2e} is more than {rtol:.0e}"


def _pairs(a: Any, b: Any, name: str) -> list[tuple[str, Tensor, Tensor]]:
    if isinstance(b, dict):
        assert a.keys() == b.keys(), f"{name}: keys differ: {sorted(a.keys() ^ b.keys())}"
        return [pair for key in b for pair in _pairs(a[key], b[key], f"{name}.{key}" if name else str(key))]
    if isinstance(b, list | tuple):
        assert len(a) == len(b), f"{name}: {len(a)} entries, not {len(b)}"
        return [pair for i, (x, y) in enumerate(zip(a, b, strict=True)) for pair in _pairs(x, y, f"{name}[{i}]")]
    return [(name, _tensor(a), _tensor(b))]


def _tensor(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)


@contextlib.contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """A write beyond it fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
