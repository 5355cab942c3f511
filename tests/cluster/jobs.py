"""What the tests on the cluster do with jobs: submit them, wait for them, read what they left."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megasparse.metrics.record import read_faults, read_metrics
from tests.helpers import REPOSITORY


def submit(recipe: Path, run_dir: Path, *options: object) -> int:
    """As a user does; returns the job's number. Two hosts with a process each."""
    command = [sys.executable, "tools/slurm/submit.py", recipe, "--run-dir", run_dir]
    command += ["--nodes", 2, "--gpus-per-node", 0, *options]
    done = subprocess.run(
        list(map(str, command)), cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout.partition("submitted as job ")[2].split(";")[0].split(",")[0])


def slurm(*command: object) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=10, check=False)
    return done.stdout + done.stderr


def job_field(job: int, name: str) -> str:
    return slurm("scontrol", "show", "job", job).partition(f" {name}=")[2].split()[0]


def wait_for(what: Callable[[], Any], seconds: float, said: Callable[[], str] = lambda: "") -> Any:
    """Until ``what()`` is true; returns it."""
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end, f"nothing within {seconds} s: {said()}"
        time.sleep(0.2)
    return found


def wait_for_step(run_dir: Path, step: int, seconds: float = 60) -> None:
    wait_for(lambda: len(read_metrics(run_dir)) >= step, seconds, lambda: output(run_dir))


def wait_for_job(job: int, run_dir: Path, state: str = "COMPLETED", seconds: float = 90) -> None:
    ended = ("COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL", "TIMEOUT")
    found = wait_for(
        lambda: s if (s := job_field(job, "JobState")) in ended else None, seconds, lambda: output(run_dir)
    )
    assert found == state, output(run_dir)


def output(run_dir: Path) -> str:
    return "\n".join(file.read_text(errors="replace") for file in sorted(run_dir.rglob("slurm.out")))


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """What the clock has no part in."""
    return [{key: value for key, value in record.items() if key != "timing"} for record in read_metrics(run_dir)]


def kinds(run_dir: Path) -> list[str]:
    return [fault["kind"] for fault in read_faults(run_dir)]


def ranks_on(host: str) -> list[int]:
    """Processes that train there: each is the child of its supervisor, whose command line is the same."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes().split(b"\0")
            network, parent = (
                (process / "ns/net").stat().st_ino,
                (process / "stat").read_text().rpartition(")")[2].split()[1],
            )
        except OSError:  # it has ended
            continue
        if command[1:4] == [b"-u", b"-m", b"megasparse"] and network == Path("/run/netns", host).stat().st_ino:
            found[int(process.name)] = int(parent)
    return sorted(process for process, parent in found.items() if parent in found)
