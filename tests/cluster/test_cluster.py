"""On a cluster of two hosts with Slurm: every launcher, and what happens when ranks, hosts and networks fail."""

from __future__ import annotations

import re
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from megasparse.metrics.record import read_faults, read_metrics
from tests.cluster.conftest import STEPS
from tests.cluster.jobs import (
    job_field,
    kinds,
    metrics,
    output,
    ranks_on,
    slurm,
    submit,
    wait_for,
    wait_for_job,
    wait_for_step,
)


def test_a_job_on_two_hosts_learns(undisturbed: list[dict[str, Any]]) -> None:
    losses = [record["loss"] for record in undisturbed]
    assert len(losses) == STEPS
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


@pytest.mark.parametrize("launcher", ["hostfile", "no-ssh", "torchrun"])
def test_every_launcher_starts_the_same_run(
    launcher: str, recipe: Path, undisturbed: list[dict[str, Any]], tmp_path: Path
) -> None:
    """deepspeed through pdsh and ssh, deepspeed on each host by srun, torchrun: the same losses, to the bit."""
    job = submit(recipe, tmp_path, "--launcher", launcher)
    wait_for_job(job, tmp_path)
    assert metrics(tmp_path) == undisturbed


def test_an_array_is_a_run_a_line(recipe: Path, tmp_path: Path) -> None:
    """In a folder whose name has a space."""
    runs = tmp_path / "two seeds.txt"
    runs.write_text(f"{recipe} training.seed=1\n{recipe} training.seed=2\n")
    run_dir = tmp_path / "the runs"
    job = submit(runs, run_dir, "--nodes", 1, "training.steps=4", "parallel.ep=1")
    wait_for(lambda: not slurm("squeue", "-h", "-j", job).strip(), 90, lambda: output(run_dir))
    losses = [[record["loss"] for record in metrics(run_dir / str(index))] for index in range(2)]
    assert [len(of_run) for of_run in losses] == [4, 4], output(run_dir)
    assert losses[0] != losses[1]


@pytest.mark.parametrize("launcher", ["srun", "hostfile", "no-ssh", "torchrun"])
def test_usr1_saves_requeues_and_goes_on(
    launcher: str, recipe: Path, undisturbed: list[dict[str, Any]], tmp_path: Path
) -> None:
    job = submit(recipe, tmp_path, "--launcher", launcher)
    wait_for_step(tmp_path, 13)
    before = len(read_metrics(tmp_path))
    slurm("scancel", "--signal=USR1", *([] if launcher == "srun" else ["--batch"]), job)
    wait_for(lambda: "signal" in kinds(tmp_path), 30, lambda: output(tmp_path))
    (stopped,) = read_faults(tmp_path)
    assert before <= stopped["step"] <= before + 2, "within a step, and the one that was recorded meanwhile"
    assert (tmp_path / "checkpoints" / f"step_{stopped['step']}").is_dir()
    wait_for_job(job, tmp_path)
    assert job_field(job, "Restarts") == "1"
    assert metrics(tmp_path) == undisturbed


def test_before_its_time_limit_a_job_saves_and_goes_on(recipe: Path, tmp_path: Path) -> None:
    """Slurm looks every 30 s whether the signal would be late by the next time: it comes after half a minute or one."""
    endless = ["training.steps=100000", "training.save_interval=0", "training.eval_interval=0"]
    job = submit(recipe, tmp_path, "--time", "00:02:00", "--save-seconds", 60, *endless)
    wait_for(lambda: "signal" in kinds(tmp_path), 90, lambda: output(tmp_path))
    (stopped,) = read_faults(tmp_path)
    assert stopped["message"].startswith("SIGUSR1")
    wait_for_step(tmp_path, stopped["step"] + 5)
    assert job_field(job, "Restarts") == "1"
    assert f"resumed from {tmp_path}/checkpoints/step_{stopped['step']}" in output(tmp_path)
    steps = [record["step"] for record in read_metrics(tmp_path)]
    assert steps == list(range(1, len(steps) + 1))


def test_a_job_that_is_preempted_goes_on(recipe: Path, undisturbed: list[dict[str, Any]], tmp_path: Path) -> None:
    job = submit(recipe, tmp_path)
    wait_for_step(tmp_path, 13)
    slurm("sbatch", "--partition=high", "--nodes=2", "--ntasks-per-node=2", "--output=/dev/null", "--wrap", "sleep 3")
    wait_for(lambda: "signal" in kinds(tmp_path), 30, lambda: output(tmp_path))
    wait_for_job(job, tmp_path)
    assert job_field(job, "Restarts") == "1"
    assert metrics(tmp_path) == undisturbed


def test_a_killed_rank_ends_the_job_and_is_named(recipe: Path, tmp_path: Path) -> None:
    job = submit(recipe, tmp_path, "--restarts", 0)
    wait_for_step(tmp_path, 13)
    (rank,) = ranks_on("n2")
    killed = time.monotonic()
    slurm("ssh", "n2", "kill", "-9", rank)
    wait_for_job(job, tmp_path, "FAILED")
    assert time.monotonic() - killed < 60
    assert "error: rank 1 on n2 was killed by SIGKILL" in output(tmp_path)
    (fault,) = read_faults(tmp_path)
    assert (fault["kind"], fault["rank"], fault["host"]) == ("killed", 1, "n2")


def test_what_came_first_is_said_not_what_followed(recipe: Path, tmp_path: Path) -> None:
    """A rank that is interrupted: the other one's error is about its lost connection."""
    job = submit(recipe, tmp_path, "--restarts", 0, "training.steps=100000")
    wait_for_step(tmp_path, 3)
    (rank,) = ranks_on("n2")
    slurm("ssh", "n2", "kill", "-INT", rank)
    wait_for_job(job, tmp_path, "FAILED")
    assert "error: interrupted" in output(tmp_path)
    assert "Connection closed by peer" not in output(tmp_path)


def test_a_torchrun_that_restarts_goes_on(recipe: Path, undisturbed: list[dict[str, Any]], tmp_path: Path) -> None:
    job = submit(recipe, tmp_path, "--launcher", "torchrun")
    wait_for_step(tmp_path, 13)
    (rank,) = ranks_on("n2")
    slurm("ssh", "n2", "kill", "-9", rank)
    wait_for_job(job, tmp_path)
    assert job_field(job, "Restarts") == "0", "it was torchrun that started the ranks again"
    assert kinds(tmp_path) == ["killed"]
    assert metrics(tmp_path) == undisturbed


def test_a_disk_that_becomes_read_only(recipe: Path, tmp_path: Path) -> None:
    checkpoints = tmp_path / "checkpoints"
    checkpoints.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "checkpoints", checkpoints], check=True)
    try:
        job = submit(recipe, tmp_path, "training.steps=100000", "training.save_interval=20")
        wait_for(lambda: (checkpoints / "latest").exists(), 60, lambda: output(tmp_path))
        subprocess.run(["mount", "-o", "remount,ro", checkpoints], check=True)
        wait_for_job(job, tmp_path, "FAILED")
        assert job_field(job, "Restarts") == "0", "starting it again would not help"
        last = (checkpoints / "latest").read_text().strip()
        assert re.search(
            rf"error: could not save .*Read-only file system.*whole checkpoint is {last}", output(tmp_path)
        )
        assert (checkpoints / last / "manifest.json").exists()
    finally:
        subprocess.run(["umount", checkpoints], check=True)


def test_a_cut_network_ends_the_job(recipe: Path, tmp_path: Path) -> None:
    job = submit(recipe, tmp_path, "--restarts", 0, "training.steps=100000", "training.save_interval=0")
    wait_for_step(tmp_path, 3)
    cut = time.monotonic()
    slurm("ip", "link", "set", "v2", "down")
    try:
        wait_for(lambda: "error: rank 1 on n2 was not heard from for" in output(tmp_path), 60, lambda: output(tmp_path))
        assert time.monotonic() - cut < 60
        assert "the network between it and n1, is down" in output(tmp_path)
    finally:
        slurm("ip", "link", "set", "v2", "up")
    wait_for_job(job, tmp_path, "FAILED", 60)


def test_a_rank_that_hangs_ends_the_job_with_every_stack(recipe: Path, tmp_path: Path) -> None:
    job = submit(recipe, tmp_path, "--restarts", 0, "faults.hang_minutes=0.1", "training.steps=100000")
    wait_for_step(tmp_path, 13)
    (rank,) = ranks_on("n2")
    slurm("ssh", "n2", "kill", "-STOP", rank)
    wait_for_job(job, tmp_path, "FAILED")
    assert "made no progress for 0.1 minutes" in output(tmp_path)
    assert "where they are:" in output(tmp_path)
    assert "/megasparse/train.py" in (tmp_path / "stacks" / "rank_0.txt").read_text()
    assert "rank 0: " in output(tmp_path)
