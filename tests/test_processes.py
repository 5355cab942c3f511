"""Worker processes: results by rank, failures told, hangs ended, and kept for the next layout."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megasparse.engine import Engine
from megasparse.layout import Layout
from megasparse.model import build_model
from megasparse.processes import RankError, Workers
from tests import small
from tests.helpers import REPOSITORY, run_distributed


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


def train_in(layout: str) -> int:
    """A step of training; the process that did it."""
    recipe = small.recipe(moe={}, training={"micro_batch_size": 1}, parallel=Layout.parse(layout).parallel())
    place = small.start(recipe)
    engine = Engine(recipe, place, *build_model(recipe, place, small.VOCAB))
    engine.train_step(small.batches(recipe, 0, place.dp_rank, place.dp), 0, 1e-3)
    return os.getpid()


def threads() -> int:
    return len(os.listdir("/proc/self/task"))


def test_ranks_are_kept_and_groups_are_not() -> None:
    """The same processes train in one layout after the other; their threads do not grow from round to round."""
    with Workers() as workers:
        first = workers.run(train_in, 4, "tp2pp2")
        idle = []
        for _ in range(2):
            for layout in ("ep4", "tp2cp2", "dp2"):
                ranks = workers.run(train_in, Layout.parse(layout).world_size, layout)
                assert ranks == first[: len(ranks)]
            idle.append(workers.run(threads, 4))
        assert idle[0] == idle[1], "threads left behind"


def test_a_failure_ends_all_ranks_and_the_next_run_has_new_ones() -> None:
    with Workers() as workers:
        before = workers.run(os.getpid, 2)
        with pytest.raises(RankError, match="the reason"):
            workers.run(fails_on_rank_1, 2)
        for process in before:
            assert not Path(f"/proc/{process}").exists()
        after = workers.run(os.getpid, 2)
        assert not set(before) & set(after)


def leaves_a_trace() -> tuple[bool, float]:
    enabled = torch.is_grad_enabled()
    torch.set_grad_enabled(False)
    return enabled, torch.rand(1).item()


def test_a_run_starts_like_the_first() -> None:
    with Workers() as workers:
        assert workers.run(leaves_a_trace, 1) == workers.run(leaves_a_trace, 1)


ORPHANS = """
import os, sys, time
from megasparse.processes import Workers
from tests.test_processes import prints_and_waits
if __name__ == "__main__":
    Workers().run(prints_and_waits, 2, sys.argv[1])
"""


def prints_and_waits(folder: str) -> None:
    (Path(folder) / f"{os.getpid()}").touch()
    time.sleep(60)


def test_ranks_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    program, found = tmp_path / "program.py", tmp_path / "found"
    program.write_text(ORPHANS)
    found.mkdir()
    parent = subprocess.Popen([sys.executable, str(program), str(found)], cwd=REPOSITORY)
    until(lambda: len(list(found.iterdir())) == 2)
    ranks = [int(path.name) for path in found.iterdir()]
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    until(lambda: not any(Path(f"/proc/{rank}").exists() for rank in ranks))


def until(condition: object, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end
        time.sleep(0.05)


def dies_while_the_other_waits() -> None:
    dist.init_process_group("gloo")
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def test_a_death_that_made_another_rank_fail_is_named() -> None:
    """The one that is left sees a closed connection and may say so first."""
    for _ in range(3):
        with pytest.raises(RankError, match="rank 1 died with exit code -9"):
            run_distributed(dies_while_the_other_waits, 2)
