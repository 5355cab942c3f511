"""The test helpers themselves: results by rank, failures told, hangs ended."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.helpers import RankError, assert_close, run_distributed


def summed(value: int) -> tuple[int, torch.Tensor]:
    dist.init_process_group("gloo")
    total = torch.tensor([float(value + dist.get_rank())])
    dist.all_reduce(total)
    return dist.get_rank(), total


def fails_on_rank_1() -> None:
    dist.init_process_group("gloo")
    if dist.get_rank() == 1:
        raise KeyError("the reason")
    dist.barrier()


def dies_on_rank_1() -> None:
    if os.environ["RANK"] == "1":
        os._exit(7)
    time.sleep(60)


def waits_for_nobody() -> None:
    dist.init_process_group("gloo")
    if dist.get_rank() == 0:
        dist.barrier()


def rank_and_threads() -> tuple[str, int]:
    return os.environ["LOCAL_RANK"], torch.get_num_threads()


def test_results_by_rank():
    assert run_distributed(summed, 2, 10) == [(0, torch.tensor([21.0])), (1, torch.tensor([21.0]))]


def test_environment():
    assert run_distributed(rank_and_threads, 3) == [("0", 1), ("1", 1), ("2", 1)]


def test_failing_rank_is_told_with_its_traceback():
    with pytest.raises(RankError, match=r"(?s)rank 1 of 2 failed.*fails_on_rank_1.*the reason"):
        run_distributed(fails_on_rank_1, 2)


def test_dead_rank_is_told():
    with pytest.raises(RankError, match="rank 1 died with exit code 7"):
        run_distributed(dies_on_rank_1, 2)


def test_hang_ends_with_the_stack():
    with pytest.raises(RankError, match=r"(?s)not done after 3 s.*rank 0 is here.*waits_for_nobody"):
        run_distributed(waits_for_nobody, 2, timeout=3)


def test_assert_close():
    a = {"x": [torch.tensor([1.0, 2.0])], "y": 3.0}
    assert_close(a, {"x": [torch.tensor([1.0, 2.0])], "y": 3.0 + 3e-7}, 1e-6)
    with pytest.raises(AssertionError, match=r"x\[0\]: relative error 5.00e-01"):
        assert_close(a, {"x": [torch.tensor([1.0, 4.0])], "y": 3.0}, 1e-6)
    with pytest.raises(AssertionError, match="relative error nan"):
        assert_close(torch.tensor(float("nan")), torch.tensor(1.0), 1e-6)
    with pytest.raises(AssertionError, match="shape"):
        assert_close(torch.zeros(2), torch.zeros(3), 1e-6)
    assert_close(torch.zeros(2), torch.zeros(2), 0)
