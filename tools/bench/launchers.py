"""How long each launcher takes on a cluster: to the first step, and to end when it is told to save.

    tests/cluster/two_hosts.sh python tools/bench/launchers.py

A job of a process on each of two hosts, submitted by tools/slurm/submit.py, with ``examples/pretrain.yaml`` made
small on data/stdlib (``megasparse prepare --output data/stdlib``). First step: from the job's start on its first host
to the first record of metrics.jsonl, imports included. USR1: from ``scancel --signal=USR1`` to the job's end with
status 75, by which every rank has saved. The hosts share one machine's cores.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

REPOSITORY = Path(__file__).resolve().parents[2]
LAUNCHERS = ("srun", "hostfile", "no-ssh", "torchrun")
SMALL = (
    "model.num_layers=2 model.hidden_size=64 data.seq_length=64 training.global_batch_size=4 "
    "training.micro_batch_size=2 training.steps=100000"
)


def main(repeats: Annotated[int, typer.Option(min=1)] = 3) -> None:
    """Time every launcher, one after the other."""
    seconds: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for launcher in track(LAUNCHERS * repeats, "jobs", transient=True):
        with tempfile.TemporaryDirectory() as folder:
            seconds[launcher].append(time_job(launcher, Path(folder)))
    table = Table(title=f"seconds, medians of {repeats} jobs")
    table.add_column("launcher")
    for name in ("first step", "USR1"):
        table.add_column(name, justify="right")
    for launcher, times in seconds.items():
        columns = (sorted(column) for column in zip(*times, strict=True))
        table.add_row(launcher, *(f"{c[len(c) // 2]:.1f} ({c[0]:.1f} to {c[-1]:.1f})" for c in columns))
    Console().print(table)


def time_job(launcher: str, folder: Path) -> tuple[float, float]:
    """Seconds to the first step, and from USR1 to the job's end."""
    command = [sys.executable, "tools/slurm/submit.py", "examples/pretrain.yaml", *SMALL.split(), "--nodes", "2"]
    command += ["--launcher", launcher, "--gpus-per-node", "0", "--run-dir", str(folder)]
    job = re.findall(r"submitted as job (\d+)", output_of(command))[0]
    out, records = folder / "slurm.out", folder / "metrics.jsonl"
    began = when(lambda: has(out, "on n"), out)
    first = when(lambda: has(records, "\n"), out)
    when(lambda: records.read_text().count("\n") >= 5, out)
    told = time.monotonic()
    output_of(["scancel", "--signal=USR1", *([] if launcher == "srun" else ["--batch"]), job])
    ended = when(lambda: has(out, "ended with status 75"), out)
    while output_of(["squeue", "-h"]).strip():  # it would go on
        output_of(["scancel", job])
        time.sleep(1)
    return first - began, ended - told


def output_of(command: list[str]) -> str:
    return subprocess.run(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True, check=True).stdout


def has(file: Path, text: str) -> bool:
    return file.exists() and text in file.read_text()


def when(what: Callable[[], Any], out: Path, most: float = 120) -> float:
    """The time at which it is true."""
    end = time.monotonic() + most
    while not what():
        if time.monotonic() > end:
            raise typer.Exit(print(f"error: nothing within {most:.0f} s: {out.read_text()}") or 1)
        time.sleep(0.02)
    return time.monotonic()


if __name__ == "__main__":
    typer.run(main)
