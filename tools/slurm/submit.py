"""Submit a recipe to Slurm: checks the layout against nodes x GPUs, writes the job, submits it, says what it did.

    python tools/slurm/submit.py examples/hopper/mixtral_8x7b.yaml --nodes 16 --gpus-per-node 8 --time 24:00:00
    python tools/slurm/submit.py examples/hopper/ablation.txt            an array of jobs, a run a line

The job saves before its time limit and when it is preempted, goes back into the queue and on from there. What a site
needs (partition, account, network) is given by --option and by the environment: Slurm passes it on.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from megasparse.config import load_recipe
from megasparse.files import write_atomic
from megasparse.layout import check_layout


class Launcher(str, Enum):
    """What starts the ranks of each node."""

    srun = "srun"  # Slurm itself: a task is a rank
    hostfile = "hostfile"  # deepspeed through pdsh and ssh
    no_ssh = "no-ssh"  # deepspeed on each node, started by srun
    torchrun = "torchrun"  # torchrun on each node, started by srun


def submit(
    recipe: Annotated[
        Path,
        typer.Argument(
            help="YAML file; or a .txt file with a recipe and values to change a line: an array of jobs, "
            "in RUN_DIR/0, 1, ...",
            show_default=False,
        ),
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Values to change, such as model.num_layers=4.", show_default=False)
    ] = None,
    nodes: Annotated[int, typer.Option(min=1)] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=0, help="0: a cluster of CPUs.")] = 8,
    processes_per_node: Annotated[
        int | None, typer.Option(min=1, help="Default: one for each GPU; without GPUs one.")
    ] = None,
    launcher: Launcher = Launcher.srun,
    time: Annotated[str | None, typer.Option(help="Limit, such as 24:00:00. Default: the partition's.")] = None,
    save_seconds: Annotated[
        int, typer.Option(min=1, help="How long before the limit the run is told to save: a step, a save and some.")
    ] = 300,
    restarts: Annotated[int, typer.Option(min=0, help="How often a job that failed goes back into the queue.")] = 3,
    run_dir: Annotated[Path | None, typer.Option(help="Default: runs/ and the recipe's name.")] = None,
    option: Annotated[
        list[str] | None, typer.Option(help="More for sbatch, such as --partition=gpu. Can be given several times.")
    ] = None,
    write_only: Annotated[bool, typer.Option("--write-only", help="Write the job, do not submit it.")] = False,
) -> None:
    """Submit a recipe to Slurm."""
    per_node = processes_per_node or gpus_per_node or 1
    if gpus_per_node and per_node != gpus_per_node:
        raise ValueError(f"--processes-per-node {per_node} with --gpus-per-node {gpus_per_node}: a process has one GPU")
    array = recipe.suffix == ".txt"
    runs = read_array(recipe) if array else {"": [str(recipe)]}
    recipes = []
    for where, run in runs.items():
        run += overrides or []
        try:
            recipes.append(load_recipe(Path(run[0]), run[1:]))
            check_layout(recipes[-1], nodes * per_node)
        except ValueError as error:
            raise ValueError(f"{where}{error}") from error
    layouts = dict.fromkeys(str(check_layout(resolved, nodes * per_node)) for resolved in recipes)
    name = recipe.stem if array else recipes[0].name
    folder = (run_dir or Path("runs") / name).resolve()
    script = folder / "job.sbatch"
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(len(runs) if array else 0):  # Slurm does not make a folder for its output
        (folder / str(index)).mkdir(exist_ok=True)
    content = template().render(
        name=name,
        nodes=nodes,
        per_node=per_node,
        gpus=gpus_per_node > 0,
        launcher=launcher.value,
        time=time,
        save_seconds=save_seconds,
        restarts=restarts,
        run_dir=str(folder),
        runs=[[str(Path(path).resolve()), *changes] for path, *changes in runs.values()],
        array=array,
        options=option or [],
        python=sys.executable,
        bin=os.path.dirname(sys.executable),
    )
    write_atomic(script, content)
    print(f"{name}: {', '.join(layouts)} on {nodes} x {per_node} processes by {launcher.value}; {script}")
    if write_only:
        return
    if shutil.which("sbatch") is None:
        raise ValueError(f"there is no sbatch here: submit {script} where there is Slurm")
    done = subprocess.run(["sbatch", "--parsable", str(script)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"sbatch refused {script}: {done.stderr.strip()}")
    job = done.stdout.strip().partition(";")[0]
    each = f", {len(runs)} runs" if array else ""
    print(f"submitted as job {job}{each}; output: {folder / ('N/' if array else '')}/slurm.out".replace("//", "/"))
    print(
        f"save and go back into the queue: scancel --signal=USR1 {'' if launcher is Launcher.srun else '--batch '}{job}"
    )


def read_array(path: Path) -> dict[str, list[str]]:
    """The recipe and the overrides of each run, by where it is said: a line each, but for empty ones and comments."""
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file")
    lines = [shlex.split(line, comments=True) for line in path.read_text().splitlines()]
    found = {f"{path}, line {number}: ": line for number, line in enumerate(lines, 1) if line}
    if not found:
        raise ValueError(f"{path}: it has no line with a recipe")
    return found


def template():
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["quote"] = shlex.quote
    return environment.get_template("job.sbatch.j2")


def main() -> None:
    try:
        typer.run(submit)
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
