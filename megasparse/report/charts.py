"""Charts of a run as inline SVG, whose colours are the page's CSS variables: it is light or dark, and so are they.

matplotlib draws with one hex colour for each variable, which ``_svg`` replaces.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from megasparse.metrics.plot import smooth

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

POINTS = 1200  # of a line at most: more than a page has pixels
HEAT_COLUMNS = 400
NUMBERED = 30  # numbers of more faults would overlap
INK, GRID, SERIES, FAINT, VALIDATION, FAULT, NONE = (f"#0101{n:02x}" for n in range(1, 8))
VARIABLES = {
    INK: "var(--ink)",
    GRID: "var(--grid)",
    SERIES: "var(--series)",
    FAINT: "var(--faint)",
    VALIDATION: "var(--validation)",
    FAULT: "var(--fault)",
    NONE: "none",
}
STYLE = {
    "svg.fonttype": "none",  # text stays text, in the page's font
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.facecolor": NONE,
    "axes.labelcolor": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.formatter.limits": (-3, 5),
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": GRID,
    "xtick.labelcolor": INK,
    "ytick.color": GRID,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
}

Points = tuple[Sequence[int], Sequence[float]]  # steps, and a value at each


@dataclass(frozen=True)
class Marks:
    """Steps at which something happened, as lines down the chart of the loss."""

    faults: Sequence[tuple[int, int]] = ()  # step, and the number in the table of faults
    skipped: Sequence[int] = ()
    launches: Sequence[int] = ()  # first steps of all but the first


def loss_chart(training: Points, validation: Points, marks: Marks, span: tuple[int, int]) -> str:
    """Training loss, smoothed and as it was, validation loss, and the marks, from the first step of ``span`` to the
    last."""
    with _drawing(9.6, 3.9, span) as (figure, axes):
        _line(axes, training, "training")
        if validation[0]:
            axes.plot(*validation, "o-", color=VALIDATION, markersize=4.5, linewidth=1.3, label="validation")
        for i, first in enumerate(marks.launches):
            label = None if i else "resumed"
            axes.axvline(first - 0.5, color=INK, linewidth=0.9, linestyle=":", label=label)
        edge = axes.get_xaxis_transform()  # heights from 0, the lower edge, to 1
        if marks.skipped:
            on_edge = [0.0] * len(marks.skipped)
            axes.plot(marks.skipped, on_edge, "|", color=FAULT, markersize=10, transform=edge, label="skipped")
        for i, (step, numbers) in enumerate(_numbers_by_step(marks.faults).items()):
            label = None if i else "fault"
            axes.axvline(step, color=FAULT, linewidth=0.9, linestyle="--", label=label)
            if len(marks.faults) <= NUMBERED:
                axes.text(step, 1.01, numbers, color=FAULT, transform=edge, ha="center", va="bottom", fontsize=9)
        axes.set_ylabel("nats / token")
        axes.set_xlabel("step")
        axes.legend(loc="upper right", ncols=2)
        return _svg(figure, "Loss by step")


def line_chart(
    title: str,
    points: Points,
    span: tuple[int, int],
    *,
    percent: bool = False,
    log: bool = False,
    bottom: float | None = None,
) -> str:
    """One quantity by step; the thick line is its mean over a 25th of the run. ``bottom``: where its axis begins."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, PercentFormatter

    least, greatest = min(points[1]), max(points[1])
    with _drawing(4.7, 2.1, span) as (figure, axes):
        _line(axes, points)
        if log and least > 0:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if greatest < 100 * least else (1.0,)))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
        elif bottom is not None:
            axes.set_ylim(bottom, bottom + (1.06 * (greatest - bottom) if greatest > bottom else 1.0))
        if percent:
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        return _svg(figure, f"{title} by step")


def heat_map(
    title: str, steps: Sequence[int], values: Sequence[Sequence[float]], rows: Sequence[int], span: tuple[int, int]
) -> str:
    """``values[i][j]`` of step ``steps[i]`` and layer ``rows[j]``; steps that share a column show their largest."""
    grid = np.array(values, dtype=float).T
    grid = np.maximum.reduceat(grid, _bins(grid.shape[1], HEAT_COLUMNS), axis=1)
    with _drawing(9.6, min(5.0, 1.2 + 0.22 * len(rows)), span) as (figure, axes):
        axes.grid(False)
        image = axes.imshow(
            grid,
            aspect="auto",
            interpolation="none",
            cmap="viridis",
            vmin=1.0,
            vmax=max(1.5, float(np.quantile(grid, 0.99))),
            extent=(steps[0] - 0.5, steps[-1] + 0.5, len(rows) - 0.5, -0.5),
        )
        shown = range(0, len(rows), -(-len(rows) // 16))
        axes.set_yticks(list(shown), [str(rows[i]) for i in shown])
        axes.set_ylabel("layer")
        axes.set_xlabel("step")
        axes.set_xlim(span[0] - 0.5, span[1] + 0.5)
        bar = figure.colorbar(image, ax=axes, pad=0.01, aspect=12, extend="max")
        bar.outline.set_visible(False)  # type: ignore[operator]
        return _svg(figure, title)


def thin(points: Points, count: int = POINTS) -> Points:
    """At most ``count`` of the points: of each stretch of steps its least and its greatest value, in order."""
    steps, values = points
    if len(steps) <= count:
        return points
    kept = []
    starts = [*_bins(len(steps), count // 2), len(steps)]
    for i in range(len(starts) - 1):
        stretch = range(starts[i], starts[i + 1])
        kept += sorted({min(stretch, key=values.__getitem__), max(stretch, key=values.__getitem__)})
    return [steps[i] for i in kept], [values[i] for i in kept]


def _numbers_by_step(faults: Sequence[tuple[int, int]]) -> dict[int, str]:
    numbers: dict[int, list[str]] = {}
    for step, number in faults:
        numbers.setdefault(step, []).append(str(number))
    return {step: ", ".join(some) for step, some in numbers.items()}


def _bins(length: int, count: int) -> list[int]:
    """Where ``count`` stretches of equal length begin, or one of each if there are fewer."""
    count = min(length, count)
    return [length * i // count for i in range(count)]


def _line(axes: Axes, points: Points, label: str | None = None) -> None:
    steps, values = points
    if len(steps) == 1:
        axes.plot(steps, values, "o", color=SERIES, label=label)
        return
    axes.plot(*thin(points), color=FAINT, linewidth=0.8)
    axes.plot(*thin((steps, smooth(values))), color=SERIES, linewidth=1.7, label=label)


@contextmanager
def _drawing(width: float, height: float, span: tuple[int, int]) -> Iterator[tuple[Figure, Axes]]:
    """A figure of so many inches (of 72 pixels), in the style of the page, and its axes over the steps of ``span``."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):  # type: ignore[arg-type]
        figure = Figure(figsize=(width, height), layout="constrained", facecolor=NONE)
        axes = figure.subplots()
        margin = max(0.5, 0.01 * (span[1] - span[0]))
        axes.set_xlim(span[0] - margin, span[1] + margin)
        yield figure, axes


def _svg(figure: Figure, title: str) -> str:
    """The figure as an ``<svg>`` element that a page can hold beside others."""
    file = io.StringIO()
    metadata: Any = {"Creator": None, "Date": None, "Format": None, "Type": None}
    figure.savefig(file, format="svg", metadata=metadata)
    text = file.getvalue()
    text = text[text.index("<svg") :]
    for color, variable in VARIABLES.items():
        text = text.replace(color, variable)
    opening = re.compile(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', re.DOTALL)
    text = opening.sub(rf'<svg viewBox="\1" role="img" aria-label="{title}">', text, count=1)
    return re.sub(r' id="(?:figure|axes|patch|line2d|text|matplotlib\.axis|[xy]tick|legend)_\d+"', "", text)
