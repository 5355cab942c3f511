"""A campaign of faults: a run is killed, cut off, filled up, stopped and fed with NaNs, and ends as if nothing were.

    python tools/chaos.py --faults 30
    tests/cluster/two_hosts.sh python tools/chaos.py --faults 30      on two hosts, with the network cut, too

Two processes train a tiny mixture of experts, first undisturbed. Then it is done again with a fault every few steps,
each of a kind drawn at random; a run that ended is started again with --auto-resume. The metrics of all steps must
equal the undisturbed run's to the bit.

kill         kill -9 of a rank                              nan        a NaN in a gradient, once
supervisor   kill -9 of a rank's supervisor                 hang       a rank that is stopped and does nothing
term, usr1   SIGTERM or SIGUSR1: save and end               disk       a full disk (where it may mount one: as root)
network      the link of a host down (on two hosts)
"""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

PROCESSES = 2
STEP_SECONDS = 0.15  # a step is made that long, so that faults hit different ones
DISK_BYTES = 4 << 20  # of the disk that is filled up: room for four checkpoints
KINDS = ("kill", "supervisor", "term", "usr1", "nan", "hang", "disk", "network")
ENDS = {"nan": False}  # does the fault end the job? the others do


def recipe(folder: Path, steps: int) -> Path:
    """A tiny mixture of experts with everything random on, on a corpus of its own; saved every third step."""
    from megasparse.data.prepare import PrepareConfig, prepare

    texts = folder / "texts"
    texts.mkdir()
    for i in range(200):
        (texts / f"{i}.py").write_text(f"def f{i}(x):\n    return x + {i}\n\n\nclass C{i}:\n    value = {i}\n" * 3)
    prepare(PrepareConfig(output=folder / "set", sources=[texts], vocab_size=300, workers=1))
    moe = {"num_experts": 4, "ffn_hidden_size": 32, "jitter": 0.05, "bias_update_rate": 0.01}
    shape = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "num_query_groups": 2}
    training = {"steps": steps, "global_batch_size": 8, "micro_batch_size": 2, "save_interval": 3, "eval_stride": 32}
    raw = {
        "name": "chaos",
        "data": {"sets": [{"path": str(folder / "set")}], "seq_length": 32},
        "model": {**shape, "hidden_dropout": 0.1, "moe": moe},
        "training": {**training, "eval_interval": 10},
        "parallel": {"ep": 2},
        "faults": {"hang_minutes": 0.1, "check_replicas_interval": 10},
        "logging": {"tensorboard": False, "wandb": "disabled"},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


# The ranks ------------------------------------------------------------------------------------------------------------


def rank(folder: Path, arguments: list[str]) -> None:
    """A rank: megasparse, with slower steps, and a NaN where ``folder / "nan"`` is."""
    from megasparse import cli, supervisor
    from megasparse.launch import launch

    place = launch()
    supervisor.supervise(place)
    from megasparse import platform

    platform.activate()
    from megasparse.engine import Engine

    (folder / f"rank_{place.rank}").write_text(f"{os.getpid()} {os.getppid()} {os.uname().nodename}")
    whole_step, finalize = Engine.train_step, Engine._finalize_gradients

    def slow_step(engine: Engine, *args: Any, **options: Any) -> Any:
        time.sleep(STEP_SECONDS)
        return whole_step(engine, *args, **options)

    def finalize_with_nan(engine: Engine, *args: Any, **options: Any) -> None:
        order = folder / "nan"
        if place.rank == 0 and order.exists():
            order.unlink()
            gradient = next(p.grad for p in engine.chunks.parameters() if p.grad is not None)
            gradient.view(-1)[3] = float("nan")
        finalize(engine, *args, **options)

    Engine.train_step, Engine._finalize_gradients = slow_step, finalize_with_nan  # type: ignore[method-assign]
    sys.argv = ["megasparse", *arguments]
    cli.main()


# The job --------------------------------------------------------------------------------------------------------------


class Job:
    """The run, started again and again."""

    def __init__(self, path: Path, run_dir: Path, folder: Path) -> None:
        self.path, self.run_dir, self.folder = path, run_dir, folder
        self.log = folder / f"{run_dir.name}.log"
        self.on_hosts = "SLURM_CONF" in os.environ
        self.starts = 0

    def start(self) -> None:
        self.starts += 1
        for file in self.folder.glob("rank_*"):
            file.unlink()
        program = [sys.executable, "-u", str(Path(__file__).resolve()), "rank", str(self.folder)]
        program += ["train", str(self.path), "--run-dir", str(self.run_dir), "--auto-resume"]
        port = random.Random().randrange(20_000, 29_000, 2)
        self.processes = []
        for number in range(PROCESSES):
            there = {"WORLD_SIZE": PROCESSES, "LOCAL_SIZE": PROCESSES, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            there |= {"RANK": number, "LOCAL_RANK": number, "OMP_NUM_THREADS": 1}
            prefix: list[str] = []
            if self.on_hosts:
                there |= {"LOCAL_SIZE": 1, "LOCAL_RANK": 0, "MASTER_ADDR": "n1"}
                prefix = ["ssh", f"n{number + 1}"]
            variables = [f"{name}={value}" for name, value in there.items()]
            with self.log.open("a") as log:
                self.processes.append(subprocess.Popen([*prefix, "env", *variables, *program], stdout=log, stderr=log))

    def ended(self) -> bool:
        return all(process.poll() is not None for process in self.processes)

    def wait(self, seconds: float = 120) -> None:
        for process in self.processes:
            process.wait(seconds)

    def wait_for_ranks(self, seconds: float = 120) -> None:
        """Until every rank and its supervisor has ended."""
        end = time.monotonic() + seconds
        pids = [pid for number in range(PROCESSES) for pid in self.pids(number)]
        while any(is_alive(pid) for pid in pids):
            assert time.monotonic() < end, f"ranks are still there: see {self.log}"
            time.sleep(0.05)
        for process in self.processes:
            process.kill()  # ssh, that waits for word from a host that was cut off
        self.wait()

    def pids(self, number: int) -> tuple[int, int]:
        """Of rank ``number`` and of its supervisor."""
        found = (self.folder / f"rank_{number}").read_text().split()
        return int(found[0]), int(found[1])

    def records(self) -> list[dict[str, Any]]:
        """What metrics.jsonl has, without what depends on the clock."""
        from megasparse.metrics.record import read_metrics

        return [{k: v for k, v in record.items() if k != "timing"} for record in read_metrics(self.run_dir)]

    def finished(self, steps: int) -> bool:
        records = self.records()
        return len(records) == steps and "validation_bits_per_byte" in records[-1] and self.ended()


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


# Faults ---------------------------------------------------------------------------------------------------------------


def inject(kind: str, job: Job, draw: random.Random) -> Callable[[], None]:
    """Do it; returns what mends it once the job has ended."""
    number = draw.randrange(PROCESSES)
    pid, supervisor = job.pids(number)
    ballast = job.run_dir / "checkpoints" / "ballast"
    match kind:
        case "kill":
            os.kill(pid, signal.SIGKILL)
        case "supervisor":
            os.kill(supervisor, signal.SIGKILL)
        case "term":
            os.kill(supervisor, signal.SIGTERM)
        case "usr1":
            os.kill(pid, signal.SIGUSR1)
        case "nan":
            (job.folder / "nan").touch()
        case "hang":
            os.kill(pid, signal.SIGSTOP)
        case "disk":
            with ballast.open("wb") as file:
                try:
                    while True:
                        file.write(bytes(1 << 16))
                        file.flush()
                except OSError as error:
                    if error.errno != errno.ENOSPC:  # full, as it should be
                        raise
            return ballast.unlink
        case "network":
            link = f"v{number + 1}"
            subprocess.run(["ip", "link", "set", link, "down"], check=True)
            return lambda: subprocess.run(["ip", "link", "set", link, "up"], check=True) and None
    return lambda: None


def kinds_possible(run_dir: Path) -> list[str]:
    """A disk of its own is mounted at the run's checkpoints where that is allowed."""
    (run_dir / "checkpoints").mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "checkpoints", str(run_dir / "checkpoints")]
    may_mount = "SLURM_CONF" in os.environ and subprocess.run(mount, capture_output=True).returncode == 0
    left_out = {"disk": not may_mount, "network": "SLURM_CONF" not in os.environ}
    return [kind for kind in KINDS if not left_out.get(kind)]


def campaign(
    faults: Annotated[int, typer.Option(min=1)] = 30,
    steps: Annotated[int, typer.Option(min=1)] = 100,
    seed: Annotated[int, typer.Option(help="Of the kinds of faults and whom they hit.")] = 0,
    only: Annotated[str | None, typer.Option(help=f"Some of {','.join(KINDS)}.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="File for what happened.")] = None,
) -> None:
    """Run it; exit status 1 if a run does not come to its end, or to another one."""
    console = Console()
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    path = recipe(folder, steps)
    calm = Job(path, folder / "undisturbed", folder)
    calm.start()
    calm.wait(600)
    assert calm.finished(steps), calm.log.read_text()

    job = Job(path, folder / "disturbed", folder)
    possible = kinds_possible(job.run_dir)
    chosen = [kind for kind in (only.split(",") if only else possible) if kind in possible]
    console.print(f"{faults} faults in {steps} steps, of {', '.join(chosen)}; files in {folder}")
    draw = random.Random(seed)
    plan = (chosen * faults)[:faults]  # as many of each
    draw.shuffle(plan)
    seconds: dict[str, list[float]] = defaultdict(list)
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("faults", total=faults)
        job.start()
        for index, kind in enumerate(plan):
            wait_for_step(job, max(1, (index + 1) * steps // (faults + 2)))
            started = time.monotonic()
            mend = inject(kind, job, draw)
            if ENDS.get(kind, True):
                job.wait_for_ranks()
                seconds[kind].append(time.monotonic() - started)
                mend()
                job.start()
            progress.advance(task)
        while not job.ended():
            time.sleep(0.1)
    survived = job.finished(steps)
    equal = job.records() == calm.records()
    table = Table(title=f"{faults} faults, {job.starts} starts, {steps} steps")
    for name in ("fault", "times", "seconds until the job had ended"):
        table.add_column(name, justify="left" if name == "fault" else "right")
    for kind, times in Counter(plan).items():
        took = f"{min(seconds[kind]):.1f} to {max(seconds[kind]):.1f}" if seconds[kind] else "went on"
        table.add_row(kind, str(times), took)
    console.print(table)
    if json_path is not None:
        found = {"faults": Counter(plan), "starts": job.starts, "seconds": seconds, "equal": equal}
        json_path.write_text(json.dumps(found, indent=1))
    if job.on_hosts:
        subprocess.run(["umount", str(job.run_dir / "checkpoints")], capture_output=True)
    if not survived or not equal:
        console.print(f"error: the run {'ended otherwise' if survived else 'did not end'}: see {job.log}")
        raise typer.Exit(1)
    console.print(f"{faults} of {faults} faults survived: the metrics of all {steps} steps equal the undisturbed run's")
    shutil.rmtree(folder)


def wait_for_step(job: Job, step: int) -> None:
    end = time.monotonic() + 180
    while len(job.records()) < step or len(list(job.folder.glob("rank_*"))) < PROCESSES:
        if time.monotonic() > end or job.ended():
            raise typer.Exit(print(f"error: step {step} was not reached: see {job.log}") or 1)
        time.sleep(0.05)


if __name__ == "__main__":
    if sys.argv[1:2] == ["rank"]:
        rank(Path(sys.argv[2]), sys.argv[3:])
    else:
        typer.run(campaign)
