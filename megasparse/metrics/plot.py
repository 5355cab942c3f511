"""loss.png: a picture of the run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megasparse.files import written_aside
from megasparse.metrics.record import read_metrics

PANELS = {  # under the loss in the picture: label, colour, least value of the axis
    "learning_rate": ("learning rate", "#08519c", 0),
    "expert_load": ("expert load\nmax / mean", "#31a354", 1),
    "block_density": ("attention\nblocks seen", "#756bb1", 0),
    "attention_recall": ("attention\nrecalled", "#dd1c77", 0),
    "flip_rate": ("2:4 masks\nflipped", "#636363", 0),
    "mass_kept": ("weight mass\nkept", "#8c6d31", 0),
    "distillation_loss": ("KL from teacher\n(nats/token)", "#e7969c", 0),
}


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
    axes[0].plot(steps, smooth(loss), color="#08519c", linewidth=1.8, label="training, smoothed")
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


def smooth(values: Sequence[float]) -> list[float]:
    """Mean over a 25th of the values around each; narrower near the ends, so that it lags nowhere."""
    count = len(values)
    sums = np.concatenate([[0.0], np.cumsum(values, dtype=float)])
    at = np.arange(count)
    near = np.minimum(count // 50, np.minimum(at, count - 1 - at))
    return ((sums[at + near + 1] - sums[at - near]) / (2 * near + 1)).tolist()
