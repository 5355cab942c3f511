"""How a run goes: metrics.jsonl, TensorBoard, wandb, screen, a plot, and what it ran with."""

from __future__ import annotations

import json
import logging
import math
import os
import platform as host
import secrets
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.columns import Columns
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar

from megasparse import platform
from megasparse.config import Recipe, dump_recipe
from megasparse.files import write_atomic, written_aside
from megasparse.launch import launch
from megasparse.layout import Layout

logger = logging.getLogger("megasparse")


class MetricsLogger:
    """Rank 0's record of a run; on other ranks every method does nothing.

    ``metrics.jsonl`` has one JSON object a step: ``step``, the metrics, and under ``timing`` everything that depends on
    the clock, so that the rest is the same to the bit in a run that was killed and resumed. A value that is not
    finite is null there. The console shows a progress bar, or a plain line every ``log_interval`` steps where the
    output is not a terminal. Names it knows: ``loss``, ``learning_rate``, ``grad_norm``, ``expert_load``,
    ``dropped_fraction``, ``block_density``, ``attention_recall``; timing's ``tokens_per_second`` and ``mfu``. All are
    optional.
    """

    def __init__(self, run_dir: Path, recipe: Recipe, first_step: int = 1, rank: int = 0) -> None:
        """``first_step`` is the number of the next step (from 1): what a killed run had recorded from there on is
        removed, for it is about to be done again."""
        self.active = rank == 0
        if not self.active:
            return
        self.run_dir, self.recipe = run_dir, recipe
        run_dir.mkdir(parents=True, exist_ok=True)
        self._open(first_step)
        self._wandb = _Wandb(run_dir, recipe)
        self._console = _Console(recipe.training.steps, first_step, recipe.logging.log_interval)

    def _open(self, first_step: int) -> None:
        path = self.run_dir / "metrics.jsonl"
        kept = [record for record in read_metrics(self.run_dir) if record["step"] < first_step]
        write_atomic(path, "".join(json.dumps(record) + "\n" for record in kept))
        self._file = path.open("a")
        self._tensorboard = _tensorboard(self.run_dir, first_step) if self.recipe.logging.tensorboard else None

    def rewind(self, first_step: int) -> None:
        """Go back: ``first_step`` is next, and what was recorded from there on is removed."""
        if self.active:
            self._close_files()
            self._open(first_step)

    def _close_files(self) -> None:
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()

    def log(self, step: int, metrics: Mapping[str, Any], timing: Mapping[str, float]) -> None:
        """Record step number ``step``. Values are numbers, or (lists of) numbers for metrics.jsonl alone."""
        if not self.active:
            return
        record = {"step": step, **metrics, "timing": dict(timing)}
        self._file.write(json.dumps(_finite(record), allow_nan=False) + "\n")
        self._file.flush()
        scalars = {key: value for key, value in {**metrics, **timing}.items() if isinstance(value, int | float)}
        if self._tensorboard is not None:
            for key, value in scalars.items():
                self._tensorboard.add_scalar(key, value, step)
            self._tensorboard.flush()
        self._wandb.log({"step": step, **scalars})
        self._console.update(step, scalars)

    def say(self, message: str) -> None:
        """Print a line above the progress bar."""
        if self.active:
            self._console.say(message)

    def close(self) -> None:
        """Write out what is buffered; wandb gets at most a minute."""
        if not self.active:
            return
        self._console.close()
        self._close_files()
        self._wandb.close()


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The records of metrics.jsonl in order; a last line cut short by a kill is left out. Empty if there is none."""
    path = run_dir / "metrics.jsonl"
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]  # what follows the last newline was cut short
    return [json.loads(line) for line in lines]


def _finite(value: Any) -> Any:
    """JSON has no nan or infinity: null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return value


def _tensorboard(run_dir: Path, first_step: int) -> Any:
    from torch.utils.tensorboard.writer import SummaryWriter

    return SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step)


class _Wandb:
    """Weights & Biases, which may slow down or stop a run for nothing: its failures are a warning.

    WANDB_MODE (online, offline, disabled) goes before the recipe. A resumed run continues under the same id.
    """

    def __init__(self, run_dir: Path, recipe: Recipe) -> None:
        self.run: Any = None
        mode = os.environ.get("WANDB_MODE", recipe.logging.wandb)
        if mode == "disabled":
            return
        id_file = run_dir / "wandb_id"
        if not id_file.exists():
            write_atomic(id_file, secrets.token_hex(4))
        for attempt in dict.fromkeys([mode, "offline"]):
            try:
                self.run = self._init(run_dir, recipe, attempt, id_file.read_text())
                return
            except Exception as error:  # noqa: BLE001  # whatever it is, the run goes on
                logger.warning("wandb (%s) does not start: %s", attempt, str(error).partition("\n")[0])

    @staticmethod
    def _init(run_dir: Path, recipe: Recipe, mode: Any, run_id: str) -> Any:
        import wandb

        settings = wandb.Settings(
            console="off",
            silent=True,
            init_timeout=20,
            login_timeout=1,
            finish_timeout=60,
            finish_timeout_raises=False,
            disable_git=True,
            disable_code=True,
            x_disable_stats=True,
            x_disable_meta=True,
        )
        run = wandb.init(
            project=recipe.logging.wandb_project,
            name=f"{recipe.name}-{layout_of(recipe)}",
            id=run_id,
            resume="allow" if mode == "online" else None,
            mode=mode,
            dir=run_dir,
            config=recipe.model_dump(mode="json"),
            settings=settings,
        )
        run.define_metric("*", step_metric="step")
        return run

    def log(self, values: dict[str, Any]) -> None:
        self._try(lambda: self.run.log(values))

    def close(self) -> None:
        self._try(lambda: self.run.finish())

    def _try(self, call: Any) -> None:
        if self.run is None:
            return
        try:
            call()
        except Exception as error:  # noqa: BLE001  # whatever it is, the run goes on
            logger.warning("wandb stops: %s", str(error).partition("\n")[0])
            self.run = None


@dataclass
class _Shown:
    """How the console writes one metric."""

    key: str
    label: str
    format: str
    scale: float = 1.0

    def write(self, values: Mapping[str, float]) -> str:
        return f"{self.label} {self.format.format(self.scale * values[self.key])}"


QUALITY = [
    _Shown("loss", "loss", "{:.4f}"),
    _Shown("learning_rate", "lr", "{:.2e}"),
    _Shown("grad_norm", "norm", "{:.2f}"),
    _Shown("expert_load", "load", "{:.2f}"),
    _Shown("dropped_fraction", "dropped", "{:.1f}%", 100),
    _Shown("block_density", "blocks", "{:.1f}%", 100),
    _Shown("attention_recall", "recall", "{:.1f}%", 100),
    _Shown("flip_rate", "flips", "{:.2f}%", 100),
    _Shown("mass_kept", "mass", "{:.1f}%", 100),
    _Shown("distillation_loss", "KL", "{:.4f}"),
]
PANELS = {  # under the loss in the picture: label, colour, least value of the axis
    "learning_rate": ("learning rate", "#08519c", 0),
    "expert_load": ("expert load\nmax / mean", "#31a354", 1),
    "block_density": ("attention\nblocks seen", "#756bb1", 0),
    "attention_recall": ("attention\nrecalled", "#dd1c77", 0),
    "flip_rate": ("2:4 masks\nflipped", "#636363", 0),
    "mass_kept": ("weight mass\nkept", "#8c6d31", 0),
    "distillation_loss": ("KL from teacher\n(nats/token)", "#e7969c", 0),
}
SPEED = [_Shown("tokens_per_second", "tok/s", "{:,.0f}"), _Shown("mfu", "mfu", "{:.1f}%", 100)]


class _Console:
    """A progress bar with the last step's figures on a terminal; elsewhere a line every ``log_interval`` steps."""

    def __init__(self, steps: int, first_step: int, log_interval: int) -> None:
        self.steps, self.first_step, self.log_interval = steps, first_step, log_interval
        self.started = time.monotonic()
        self.console = Console(highlight=False)
        self.bar = ProgressBar(total=steps, completed=first_step - 1, width=20)
        self.live = Live(console=self.console, auto_refresh=False)
        if self.console.is_terminal:
            self.live.start()

    def update(self, step: int, values: Mapping[str, float]) -> None:
        done = step - self.first_step + 1
        eta = (time.monotonic() - self.started) / done * (self.steps - step)
        place = f"step {step}/{self.steps}"
        quality = [item.write(values) for item in QUALITY if item.key in values]
        speed = [*(item.write(values) for item in SPEED if item.key in values), f"eta {_clock(eta)}"]
        if self.console.is_terminal:
            self.bar.update(completed=step)
            first = Columns([place, self.bar, "  ".join(speed)], padding=(0, 2))
            self.live.update(Group(first, "  ".join(quality)), refresh=True)
        elif step % self.log_interval == 0 or step in (self.first_step, self.steps):
            print(" | ".join([place, *quality, *speed]), flush=True)

    def say(self, message: str) -> None:
        self.console.print(message, markup=False, soft_wrap=True)

    def close(self) -> None:
        self.live.stop()


def _clock(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def plot_loss(run_dir: Path) -> Path:
    """Draw the run from metrics.jsonl into ``loss.png``: loss with validation, learning rate, expert load.

    Raises ValueError if no step is recorded.
    """
    records = read_metrics(run_dir)
    if not records:
        raise ValueError(f"{run_dir / 'metrics.jsonl'} has no step to plot")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    def series(key: str) -> tuple[list[int], list[float]]:
        points = [(record["step"], record[key]) for record in records if record.get(key) is not None]
        return [step for step, _ in points], [value for _, value in points]

    panels = [key for key in PANELS if series(key)[0]]
    figure = Figure(figsize=(9, 4 + 1.4 * len(panels)), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    axes = figure.subplots(1 + len(panels), sharex=True, height_ratios=[4] + [1.2] * len(panels), squeeze=False)[:, 0]
    steps, loss = series("loss")
    axes[0].plot(steps, loss, color="#9ecae1", linewidth=0.8, label="training")
    axes[0].plot(steps, _smooth(loss), color="#08519c", linewidth=1.8, label="training, smoothed")
    steps, loss = series("validation_loss")
    if loss:
        label = f"validation, last {loss[-1]:.4f}"
        axes[0].plot(steps, loss, "o-", color="#d95f0e", markersize=5, linewidth=1.2, label=label)
    axes[0].set_ylabel("loss (nats/token)")
    axes[0].legend(frameon=False)
    axes[0].set_title(run_dir.name, loc="left")
    for axis, key in zip(axes[1:], panels, strict=True):
        steps, values = series(key)
        label, color, bottom = PANELS[key]
        axis.plot(steps, values, color=color, linewidth=1.2)
        axis.set_ylabel(label)
        axis.set_ylim(bottom=bottom)
        axis.ticklabel_format(axis="y", scilimits=(-3, 3))
    for axis in axes:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(x=0.01)
    axes[-1].set_xlabel("step")
    with written_aside(run_dir / "loss.png") as aside:
        figure.savefig(aside, format="png")
    return run_dir / "loss.png"


def _smooth(values: list[float]) -> list[float]:
    """Mean over a 25th of the values around each; narrower near the ends, so that it lags nowhere."""
    reach = len(values) // 50
    smoothed = []
    for i in range(len(values)):
        near = min(reach, i, len(values) - 1 - i)
        window = values[i - near : i + near + 1]
        smoothed.append(sum(window) / len(window))
    return smoothed


def write_environment(run_dir: Path, recipe: Recipe, sources: Mapping[str, Any] | None = None) -> None:
    """Make the run folder describe itself: ``recipe.yaml``, fully resolved, and ``environment.json``, a list with the
    command, layout, versions, git commit and machine of each launch, the first run's and every resumption's; and
    with ``sources``, what identifies other runs whose weights it used."""
    run_dir.mkdir(parents=True, exist_ok=True)
    write_atomic(run_dir / "recipe.yaml", dump_recipe(recipe))
    path = run_dir / "environment.json"
    launches = json.loads(path.read_text()) if path.exists() else []
    launch = {**_environment(), "layout": str(layout_of(recipe)), **(sources or {})}
    write_atomic(path, json.dumps([*launches, launch], indent=1) + "\n")


def layout_of(recipe: Recipe) -> Layout:
    """Of this launch."""
    return Layout.of(recipe.parallel, launch().world_size)


def _environment() -> dict[str, Any]:
    packages = ["megasparse", "torch", "megatron-core", "deepspeed", "transformers", "tokenizers", "sentencepiece"]
    device = platform.device()
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        "world_size": launch().world_size,
        "launcher": launch().launcher,
        "commit": _git_commit(),
        "python": host.python_version(),
        "packages": {name: _package_version(name) for name in [*packages, "numpy", "triton", "transformer-engine"]},
        "system": host.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else host.processor() or host.machine(),
        "cpus": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
    }


def _package_version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """The checkout's commit, with ``-dirty`` if tracked files differ from it; None outside a checkout."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10)
        status = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, timeout=10)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    if commit.returncode:
        return None
    return commit.stdout.strip() + ("-dirty" if status.stdout.strip() else "")
