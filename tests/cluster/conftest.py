"""What the tests on the cluster of two_hosts.sh share: a corpus, a recipe, jobs, and the run to compare with."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from megasparse.data.prepare import PrepareConfig, prepare
from megasparse.metrics.record import read_faults, read_metrics
from tests.helpers import REPOSITORY

PYTHON = sys.executable
BIN = Path(sys.executable).parent
TEXT = "def f{i}(x):\n    return x + {i}\n\n\nclass C{i}:\n    value = {i}\n"
STEPS = 40
os.environ.pop("MEGASPARSE_SUPERVISOR", None)


@pytest.fixture(scope="session")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny mixture of experts with dropout, its experts on two hosts, a checkpoint each 10 of 40 steps."""
    folder = tmp_path_factory.mktemp("recipe")
    (folder / "texts").mkdir()
    for i in range(200):
        (folder / "texts" / f"{i}.py").write_text(TEXT.replace("{i}", str(i)) * 3)
    prepare(PrepareConfig(output=folder / "set", sources=[folder / "texts"], vocab_size=300, workers=1))
    raw = {
        "name": "tiny",
        "data": {"sets": [{"path": str(folder / "set")}], "seq_length": 32},
        "model": {
            "num_layers": 2,
            "hidden_size": 32,
            "num_attention_heads": 4,
            "num_query_groups": 2,
            "hidden_dropout": 0.1,
            "moe": {"num_experts": 4, "ffn_hidden_size": 32, "jitter": 0.05, "bias_update_rate": 0.01},
        },
        "optimizer": {"lr": 3e-3},
        "training": {
            "steps": STEPS,
            "global_batch_size": 8,
            "micro_batch_size": 2,
            "save_interval": 10,
            "eval_stride": 32,
            "eval_interval": 20,
        },
        "parallel": {"ep": 2},
        "logging": {"tensorboard": False, "wandb": "disabled"},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(raw))
    # What deepspeed gives to ranks that it starts through ssh: both hosts share this machine's cores.
    (folder / "environment").write_text("OMP_NUM_THREADS=1\nDS_ACCELERATOR=cpu\n")
    os.environ["DS_ENV_FILE"] = str(folder / "environment")
    return path


def submit(recipe: Path, run_dir: Path, *options: object) -> int:
    """As a user does; returns the job's number. Two hosts with a process each."""
    program = [PYTHON, "tools/slurm/submit.py", recipe, "--nodes", 2, "--gpus-per-node", 0, "--run-dir", run_dir]
    done = subprocess.run(
        list(map(str, [*program, *options])), cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False
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


@pytest.fixture(scope="session")
def undisturbed(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The metrics of the run that nothing happens to, started by srun."""
    run_dir = tmp_path_factory.mktemp("undisturbed")
    job = submit(recipe, run_dir)
    wait_for_job(job, run_dir)
    return metrics(run_dir)


@pytest.fixture(autouse=True)
def _leave_nothing(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    slurm("scancel", "--user=root", "--state=RUNNING")
    slurm("scancel", "--user=root")
    wait_for(lambda: not slurm("squeue", "-h").strip(), 30)
    for host in ("n1", "n2"):
        slurm("ssh", host, "pkill", "-9", "-f", "'megasparse.* train '")
