"""Supervisors of small programs: every end of a rank, as the user and the other ranks see it."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megasparse.metrics.record import read_faults
from megasparse.supervisor import RESUME
from tests.helpers import REPOSITORY

# A rank: it is under a supervisor once ``supervise`` returns.
RANK = """
import os, signal, sys, time
from pathlib import Path
from megasparse import supervisor
from megasparse.launch import launch

place = launch()
supervisor.supervise(place)
folder = Path(sys.argv[1])
supervisor.tell(say="run_dir", path=str(folder))
(folder / f"rank_{place.rank}").write_text(str(os.getpid()))
while len(list(folder.glob("rank_*"))) < place.world_size:
    time.sleep(0.01)
"""


class Job:
    def __init__(self, folder: Path, ranks: list[str], port: int | None = None, local: str = "LOCAL_SIZE") -> None:
        """``ranks``: what each does, in Python. ``local``: torchrun's name for it is LOCAL_WORLD_SIZE."""
        port = port or 20_000 + os.getpid() % 5000
        ours = ("MEGASPARSE_SUPERVISOR", "LOCAL_SIZE")  # of a test that was a rank itself
        environment = {name: value for name, value in os.environ.items() if name not in ours}
        self.folder = folder
        self.ranks = [
            subprocess.Popen(
                [sys.executable, "-c", RANK + program, str(folder)],
                cwd=REPOSITORY,
                env={
                    **environment,
                    "RANK": str(rank),
                    "WORLD_SIZE": str(len(ranks)),
                    "LOCAL_RANK": str(rank),
                    local: str(len(ranks)),
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(port),
                },
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank, program in enumerate(ranks)
        ]

    def wait(self) -> tuple[list[int], list[str]]:
        """Exit statuses, and what each wrote to stderr."""
        try:
            errors = [rank.communicate(timeout=60)[1] for rank in self.ranks]
        finally:
            for rank in self.ranks:
                rank.kill()
        return [rank.returncode for rank in self.ranks], errors

    def pid(self, rank: int) -> int:
        """Of the rank itself, not of its supervisor; once all run."""
        end = time.monotonic() + 30
        while len(list(self.folder.glob("rank_*"))) < len(self.ranks):
            assert time.monotonic() < end
            time.sleep(0.02)
        time.sleep(0.2)
        return int((self.folder / f"rank_{rank}").read_text())


WAIT = "time.sleep(60)"


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_all_end_well(tmp_path: Path) -> None:
    """... at the same time: a launcher ends the others when one ends otherwise."""
    job = Job(tmp_path, ["", "time.sleep(1)"])
    statuses, errors = job.wait()
    assert (statuses, errors) == ([0, 0], ["", ""])
    assert not read_faults(tmp_path)
    assert (tmp_path / "status").read_text() == "0\n"
    assert not (tmp_path / "pid").exists()


def test_they_end_to_be_resumed(tmp_path: Path) -> None:
    job = Job(tmp_path, [f"sys.exit({RESUME})"] * 2)
    assert job.wait() == ([RESUME, RESUME], ["", ""])
    assert (tmp_path / "status").read_text() == f"{RESUME}\n"


def test_they_end_to_be_resumed_but_not_by_torchrun(tmp_path: Path) -> None:
    """It would start them again at once."""
    job = Job(tmp_path, [f"sys.exit({RESUME})"] * 2, local="LOCAL_WORLD_SIZE")
    assert job.wait() == ([0, 0], ["", ""])
    assert (tmp_path / "status").read_text() == f"{RESUME}\n", "for who started torchrun"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT])
def test_a_killed_rank_is_named(tmp_path: Path, number: signal.Signals) -> None:
    job = Job(tmp_path, [WAIT, WAIT, WAIT])
    started = time.monotonic()
    os.kill(job.pid(1), number)
    statuses, errors = job.wait()
    assert time.monotonic() - started < 15
    assert statuses == [128 + number] * 3
    assert int((tmp_path / "status").read_text()) == 128 + number
    assert f"error: rank 1 on {os.uname().nodename} was killed by {number.name}" in errors[0]
    assert errors[2] == ""
    (fault,) = read_faults(tmp_path)
    assert (fault["kind"], fault["rank"], fault["host"]) == ("killed", 1, os.uname().nodename)
    assert not any(alive(job.pid(rank)) for rank in range(3))
    if number == signal.SIGSEGV:  # its own traceback, too
        assert "Fatal Python error: Segmentation fault" in errors[1]


def killed_supervisor(number: int, folder: Path) -> tuple[list[int], list[str]]:
    """Of rank ``number`` of two that sleep: both ranks end with it, and soon."""
    job = Job(folder, [WAIT, WAIT])
    ranks = [job.pid(0), job.pid(1)]
    started = time.monotonic()
    job.ranks[number].kill()
    found = job.wait()
    assert time.monotonic() - started < 15, "a rank slept on"
    assert not any(alive(rank) for rank in ranks)
    return found


def test_a_killed_supervisor_takes_its_rank_along(tmp_path: Path) -> None:
    statuses, errors = killed_supervisor(1, tmp_path)
    assert statuses == [1, -9]
    assert "error: rank 1 on " in errors[0]
    assert "is gone" in errors[0]


def test_rank_0s_supervisor_killed_ends_all(tmp_path: Path) -> None:
    statuses, errors = killed_supervisor(0, tmp_path)
    assert statuses == [-9, 1]
    assert re.search(r"error: rank 0 \(MASTER_ADDR=127.0.0.1, .*\) is gone.*; rank 1 on \S+ ends", errors[1])


RAISES = """
def broken():
    raise KeyError("weights")
try:
    broken()
except KeyError as error:
    import traceback
    assert supervisor.report("raised", f"raised KeyError: {error}", traceback.format_exc())
    sys.exit(1)
"""
FOLLOWS = """
while Path(f"/proc/{(folder / 'rank_2').read_text()}").exists():
    time.sleep(0.01)
supervisor.report("raised", "raised RuntimeError: Connection closed by peer", "Traceback of what follows")
sys.exit(1)
"""


def test_the_first_traceback_is_shown_and_none_of_those_that_follow(tmp_path: Path) -> None:
    job = Job(tmp_path, [FOLLOWS, FOLLOWS, RAISES])
    statuses, errors = job.wait()
    assert statuses == [1, 1, 1]
    shown = errors[0].strip().splitlines()
    assert shown[0] == "Traceback (most recent call last):"
    assert "in broken" in errors[0]
    assert shown[-2] == f"error: rank 2 on {os.uname().nodename} raised KeyError: 'weights'"
    assert shown[-1] == "after it, ranks 0-1 failed"
    assert "Traceback of what follows" not in "".join(errors)
    assert errors[1:] == ["", ""]


def test_what_the_user_can_mend_is_one_line(tmp_path: Path) -> None:
    job = Job(tmp_path, ["supervisor.report('refused', 'model.x: unknown key'); sys.exit(2)"] * 2)
    assert job.wait() == ([2, 2], ["\nerror: model.x: unknown key\n", ""])
    assert not read_faults(tmp_path)


def test_an_exit_without_a_word(tmp_path: Path) -> None:
    statuses, errors = Job(tmp_path, [WAIT, "os._exit(7)"]).wait()
    assert statuses == [7, 7]
    assert "error: rank 1 on " in errors[0]
    assert "ended with exit status 7" in errors[0]


HANGS = """
def stuck():
    time.sleep(60)
beats = supervisor.Beats(0.5 / 60)
beats.beat(3)
stuck()
"""
WORKS = """
beats = supervisor.Beats(0.5 / 60)
for step in range(600):
    beats.beat(3 + step)
    time.sleep(0.1)
"""


def test_a_hang_shows_where_every_rank_is(tmp_path: Path) -> None:
    job = Job(tmp_path, [WORKS, HANGS, WORKS])
    statuses, errors = job.wait()
    assert statuses == [1, 1, 1]
    assert f"error: rank 1 on {os.uname().nodename} made no progress for 0.0 minutes (step 3 was done)" in errors[0]
    assert re.search(r"rank 1: stuck \(<string>:\d+\)", errors[0])
    assert re.search(r"ranks 0, 2: <module> \(<string>:\d+\)", errors[0])
    for rank in range(3):
        assert "most recent call first" in (tmp_path / "stacks" / f"rank_{rank}.txt").read_text()
    (fault,) = read_faults(tmp_path)
    assert (fault["kind"], fault["step"], fault["rank"]) == ("hang", 3, 1)


NOTES = """
noted = []
for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(number, lambda number, frame: noted.append(number))
(folder / "ready").touch()
while len(noted) < 3:
    time.sleep(0.01)
print(*(signal.Signals(number).name for number in noted))
"""


def test_signals_are_passed_on(tmp_path: Path) -> None:
    job = Job(tmp_path, [NOTES])
    while not (tmp_path / "ready").exists():
        time.sleep(0.02)
    supervisor, host = (tmp_path / "pid").read_text().split()
    assert (int(supervisor), host) == (job.ranks[0].pid, os.uname().nodename)
    for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM):
        os.kill(int(supervisor), number)
        time.sleep(0.1)
    assert job.ranks[0].communicate(timeout=30)[0].split() == ["SIGUSR1", "SIGUSR2", "SIGTERM"]
    assert job.ranks[0].returncode == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_asked_to_end_before_the_first_step(tmp_path: Path, number: signal.Signals) -> None:
    """One rank is asked: all end, to be started again. Profiling cannot be asked for yet."""
    job = Job(tmp_path, [WAIT, WAIT])
    rank = job.pid(1)
    os.kill(rank, signal.SIGUSR2)
    time.sleep(0.2)
    assert alive(rank)
    job.ranks[1].send_signal(number)
    statuses, errors = job.wait()
    assert statuses == [RESUME, RESUME]
    assert errors == [f"\nerror: {number.name} before the first step: nothing is lost\n", ""]


def test_a_taken_port_is_said(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        job = Job(tmp_path, ["", ""], port - 1)
        error = job.ranks[0].communicate(timeout=30)[1]
        said = rf"error: rank 0's supervisor cannot listen on port {port} of .* MASTER_PORT={port - 1}: .*: set another"
        assert re.match(said, error)
        assert job.ranks[0].returncode == 2
        job.ranks[1].kill()
        job.ranks[1].communicate()


def test_no_supervisor_on_request() -> None:
    program = "from megasparse import supervisor; from megasparse.launch import launch; supervisor.supervise(launch())"
    program += "; import os; print(os.getppid(), supervisor.tell(say='beat'), supervisor.report('raised', 'x'))"
    environment = {**os.environ, "MEGASPARSE_SUPERVISOR": "none"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [str(os.getpid()), "False", "False"]


def test_two_jobs_with_one_port(tmp_path: Path) -> None:
    """The second cannot start, and the first goes on."""
    (tmp_path / "first").mkdir()
    (tmp_path / "second").mkdir()
    port = 26_000 + os.getpid() % 2000
    first = Job(tmp_path / "first", ["time.sleep(6)"] * 2, port)
    first.pid(0)
    second = Job(tmp_path / "second", [WAIT, WAIT], port)
    statuses, errors = second.wait()
    assert statuses == [2, 2]
    assert "cannot listen on port" in errors[0]
    assert errors[1] == (
        f"error: MASTER_ADDR=127.0.0.1, supervisor's port {port + 1} is another job's: set another MASTER_PORT\n"
    )
    assert first.wait() == ([0, 0], ["", ""])
