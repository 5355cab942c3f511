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
        f"#SBATCH --output='{tmp_path}/my run/slurm.out'",
        f"run=({RECIPE} 'data.sets.0.path=my data')",
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
    """Each with a recipe of its own; what is given on the command line goes for all and comes last."""
    runs = tmp_path / "two rates.txt"
    other = RECIPE.with_name("depth_1b.yaml")
    runs.write_text(f"# two rates\n{RECIPE} optimizer.lr=1e-4\n\n{other} optimizer.lr=2e-4 'name=two' # the usual\n")
    done = submit(runs, "--nodes", 1, "--run-dir", tmp_path / "runs", "--write-only", "training.seed=3")
    assert done.returncode == 0, done.stderr
    script = tmp_path / "runs" / "job.sbatch"
    assert done.stdout == f"two rates: ep8dp8, dp8 on 1 x 8 processes by srun; {script}\n"
    subprocess.run(["bash", "-n", script], check=True)
    for line in (
        "#SBATCH --job-name='two rates'",
        "#SBATCH --array=0-1",
        f"#SBATCH --output={tmp_path}/runs/%a/slurm.out",
        f"  0) run=({RECIPE} optimizer.lr=1e-4 training.seed=3) ;;",
        f"  1) run=({other} optimizer.lr=2e-4 name=two training.seed=3) ;;",
    ):
        assert line in script.read_text().splitlines()
    assert (tmp_path / "runs" / "1").is_dir(), "for its output"


def test_the_ablation_can_be_submitted(tmp_path: Path) -> None:
    ablation = RECIPE.with_name("ablation.txt")
    done = submit(ablation, "--nodes", 1, "--run-dir", tmp_path, "--write-only")
    assert done.returncode == 0, done.stderr
    number = len(ablation.read_text().splitlines())
    assert f"#SBATCH --array=0-{number - 1}\n" in (tmp_path / "job.sbatch").read_text()


def test_what_is_wrong_is_said_before_anything_is_written(tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text("# nothing\n")
    wrong = tmp_path / "wrong.txt"
    wrong.write_text(f"{RECIPE} optimizer.lr=1e-4\n{RECIPE} parallel.tp=3\n")
    bare = tmp_path / "bare.txt"
    bare.write_text("optimizer.lr=1e-4\n")
    for arguments, message in (
        ([RECIPE, "--nodes", 1, "parallel.tp=3"], "error: layout "),
        ([wrong, "--nodes", 8], f"error: {wrong}, line 2: layout "),
        ([empty, "--nodes", 8], f"error: {empty}: it has no line with a recipe"),
        ([bare, "--nodes", 8], f"error: {bare}, line 1: no recipe at optimizer.lr=1e-4"),
        ([tmp_path / "none.txt", "--nodes", 8], f"error: {tmp_path / 'none.txt'}: there is no such file"),
        ([RECIPE, "--processes-per-node", 4], "error: --processes-per-node 4 with --gpus-per-node 8"),
        ([RECIPE, "model.num_layer=3"], f"error: {RECIPE}: model.num_layer: unknown key"),
    ):
        done = submit(*arguments, "--run-dir", tmp_path / "run")
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
