"""tools/slurm/submit.py without Slurm: what it writes and what it refuses. tests/cluster submits."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import REPOSITORY

RECIPE = REPOSITORY / "examples" / "hopper" / "olmoe_1b_7b.yaml"
PROGRAM = [sys.executable, str(REPOSITORY / "tools" / "slurm" / "submit.py")]


def submit(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*PROGRAM, *map(str, arguments)], capture_output=True, text=True, timeout=60, cwd=REPOSITORY)


def written(tmp_path: Path, *arguments: object) -> str:
    done = submit(RECIPE, "--run-dir", tmp_path / "my run", "--write-only", *arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("olmoe_1b_7b: ")
    script = tmp_path / "my run" / "job.sbatch"
    subprocess.run(["bash", "-n", script], check=True)
    return script.read_text()


def test_a_job_by_srun(tmp_path: Path) -> None:
    more = ["--time", "12:00:00", "--option=--partition=gpu", "--option=--account=me", "data.sets.0.path=my data"]
    script = written(tmp_path, "--nodes", 8, *more)
    for line in (
        "#SBATCH --nodes=8",
        "#SBATCH --ntasks-per-node=8",
        "#SBATCH --gpus-per-node=8",
        "#SBATCH --time=12:00:00",
        "#SBATCH --signal=USR1@300",
        "#SBATCH --requeue",
        "#SBATCH --open-mode=append",
        "#SBATCH --partition=gpu",
        "#SBATCH --account=me",
        f"run_dir='{tmp_path}/my run'",
        "overrides=('data.sets.0.path=my data')",
    ):
        assert line in script.splitlines()
    assert f'srun --kill-on-bad-exit=1 {sys.executable} -u -m "${{train[@]}}"' in script


@pytest.mark.parametrize(
    ("launcher", "starts"),
    [
        ("hostfile", "deepspeed --hostfile"),
        ("no-ssh", "deepspeed --no_ssh --hostfile"),
        ("torchrun", "torchrun --nnodes=4 --nproc_per_node=8"),
    ],
)
def test_jobs_of_launchers(launcher: str, starts: str, tmp_path: Path) -> None:
    """A task a node; the signal goes to the script, which passes it to rank 0's supervisor."""
    script = written(tmp_path, "--nodes", 4, "--launcher", launcher)
    assert "#SBATCH --ntasks-per-node=1\n" in script
    assert "#SBATCH --signal=B:USR1@300\n" in script
    assert starts in script
    assert 'kill -USR1 "$pid"' in script


def test_an_array_has_a_run_a_line(tmp_path: Path) -> None:
    lines = tmp_path / "lines.txt"
    lines.write_text("# two rates\noptimizer.lr=1e-4\n\noptimizer.lr=2e-4 'name=two' # the usual\n")
    script = written(tmp_path, "--nodes", 8, "--array", lines)
    assert "#SBATCH --array=0-1\n" in script
    assert "  0) overrides+=(optimizer.lr=1e-4) ;;\n" in script
    assert "  1) overrides+=(optimizer.lr=2e-4 name=two) ;;\n" in script
    assert (tmp_path / "my run" / "1").is_dir(), "for its output"


def test_what_is_wrong_is_said_before_anything_is_written(tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text("# nothing\n")
    wrong = tmp_path / "wrong.txt"
    wrong.write_text("optimizer.lr=1e-4\nparallel.tp=3\n")
    for arguments, message in (
        (["--nodes", 1, "parallel.tp=3"], "error: layout "),
        (["--nodes", 8, "--array", wrong], "error: layout "),
        (["--nodes", 8, "--array", empty], f"error: --array {empty}: it has no line with overrides"),
        (["--nodes", 8, "--array", tmp_path / "none"], f"error: --array {tmp_path / 'none'}: there is no such file"),
        (["--processes-per-node", 4], "error: --processes-per-node 4 with --gpus-per-node 8"),
        (["model.num_layer=3"], f"error: {RECIPE}: model.num_layer: unknown key"),
    ):
        done = submit(RECIPE, "--run-dir", tmp_path / "run", *arguments)
        assert done.returncode == 1
        assert done.stderr.startswith(message), done.stderr
        assert done.stderr.count("\n") == 1
        assert not (tmp_path / "run").exists()


def test_without_slurm_it_says_so(tmp_path: Path) -> None:
    """... and leaves the job, which can be submitted elsewhere."""
    done = subprocess.run(
        [*PROGRAM, RECIPE, "--nodes", "8", "--run-dir", tmp_path / "run"],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env={"PATH": "/nowhere"},
    )
    assert done.returncode == 1
    assert "error: there is no sbatch here" in done.stderr
    assert (tmp_path / "run" / "job.sbatch").exists()
