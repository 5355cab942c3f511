"""What fails on one rank fails on all, with the same words."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from megasparse import topology
from megasparse.checkpoint.ranks import together
from megasparse.layout import Layout
from tests.helpers import RankError, run_distributed


def sums_and_failures() -> tuple[int, list[str]]:
    topology.initialize(Layout(dp=2))
    rank = dist.get_rank()
    total = together(None, lambda: rank + 1, sum)

    def own(failing: tuple[int, ...]) -> int:
        if rank in failing:
            raise OSError(28, f"disk {rank} is full")
        return rank

    def refuse(parts: list[int]) -> None:
        raise ValueError(f"{parts} will not do")

    said = []
    for part, whole in (
        (lambda: own((1,)), sum),
        (lambda: own((0, 1)), sum),
        (lambda: own(()), refuse),
    ):
        try:
            together(None, part, whole)
        except ValueError as error:
            said.append(str(error))
    assert together(None, lambda: rank, max) == 1, "the ranks are still in step"
    return total, said


def test_together() -> None:
    said = [
        "[Errno 28] disk 1 is full",
        "[Errno 28] disk 0 is full; [Errno 28] disk 1 is full",
        "[0, 1] will not do",
    ]
    assert run_distributed(sums_and_failures, 2) == [(3, said)] * 2


def fault_of_ours() -> None:
    topology.initialize(Layout(dp=2))

    def part() -> None:
        raise KeyError("a bug")

    together(None, part, lambda _: None)


def test_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(RankError, match=r"(?s)in part.*KeyError: 'a bug'"):
        run_distributed(fault_of_ours, 2)
