"""What the screen shows of a run: a progress bar on a terminal, else a line every few steps."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

from rich.columns import Columns
from rich.console import Console as Screen
from rich.console import Group
from rich.live import Live
from rich.progress_bar import ProgressBar


@dataclass
class Shown:
    """How the console writes one metric."""

    key: str
    label: str
    format: str
    scale: float = 1.0

    def write(self, values: Mapping[str, float]) -> str:
        return f"{self.label} {self.format.format(self.scale * values[self.key])}"


QUALITY = [
    Shown("loss", "loss", "{:.4f}"),
    Shown("learning_rate", "lr", "{:.2e}"),
    Shown("grad_norm", "norm", "{:.2f}"),
    Shown("expert_load", "load", "{:.2f}"),
    Shown("dropped_fraction", "dropped", "{:.1f}%", 100),
    Shown("block_density", "blocks", "{:.1f}%", 100),
    Shown("attention_recall", "recall", "{:.1f}%", 100),
    Shown("flip_rate", "flips", "{:.2f}%", 100),
    Shown("mass_kept", "mass", "{:.1f}%", 100),
    Shown("distillation_loss", "KL", "{:.4f}"),
]
SPEED = [Shown("tokens_per_second", "tok/s", "{:,.0f}"), Shown("mfu", "mfu", "{:.1f}%", 100)]


class Console:
    """A progress bar with the last step's figures on a terminal; elsewhere a line every ``log_interval`` steps."""

    def __init__(self, steps: int, first_step: int, log_interval: int) -> None:
        self.steps, self.first_step, self.log_interval = steps, first_step, log_interval
        self.started = time.monotonic()
        self.console = Screen(highlight=False)
        self.bar = ProgressBar(total=steps, completed=first_step - 1, width=20)
        self.live = Live(console=self.console, auto_refresh=False)
        if self.console.is_terminal:
            self.live.start()

    def update(self, step: int, values: Mapping[str, float]) -> None:
        done = step - self.first_step + 1
        eta = (time.monotonic() - self.started) / done * (self.steps - step)
        place = f"step {step}/{self.steps}"
        quality = [item.write(values) for item in QUALITY if item.key in values]
        speed = [*(item.write(values) for item in SPEED if item.key in values), f"eta {clock(eta)}"]
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


def clock(seconds: float) -> str:
    """Hours, minutes and seconds, such as 1:01:01 or 0:07."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
