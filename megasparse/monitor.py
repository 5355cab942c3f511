"""``megasparse monitor``: where runs are, from what they write into their folders."""

from __future__ import annotations

import json
import statistics
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from megasparse.metrics.console import clock
from megasparse.metrics.record import Follower, moment, read_faults

WINDOW = 50  # steps over which the change of the loss, the rates and the pace are taken
STALLED = (10, 60)  # no record for so many times the median step, and so many seconds: evaluations may take a while
ENDS = {  # of the kinds of faults that end a run, what is said
    "signal": "saved, ended",
    **{kind: f"{kind}, ended" for kind in ("killed", "raised", "exited", "hang", "lost", "replicas_differ")},
}
FAULTS = 8  # of the last ones, how many are listed
PLAIN_WIDTH = 160  # columns where the output is no terminal
LABEL, COLUMN = 14, 20  # columns that a name and a run take where runs have columns


@dataclass
class Progress:
    """What is known of one run: the last records, and what is counted over all of them."""

    run_dir: Path
    steps: int | None = None  # of the recipe; None where there is none yet
    launched: float = 0.0  # when the last launch began, in seconds since 1970
    records: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=WINDOW + 1))
    validation: float | None = None  # the last one
    skipped: int = 0
    faults: list[dict[str, Any]] = field(default_factory=list)
    written: float = 0.0  # when the last record was, in seconds since 1970

    def __post_init__(self) -> None:
        self._follower = Follower(self.run_dir)

    def refresh(self) -> None:
        """Read what is new in the run folder, which need not exist yet."""
        new = self._follower.read()
        if self._follower.restarted:
            self.records.clear()
            self.validation, self.skipped = None, 0
        for record in new:
            self.records.append(record)
            self.validation = record.get("validation_loss", self.validation)
            self.skipped += record.get("skipped", 0)
        if new:
            self.written = new[-1]["timing"].get("time") or self._follower.path.stat().st_mtime
        if new or not self.records:
            self.steps, self.launched = _steps(self.run_dir), _launched(self.run_dir)
        self.faults = read_faults(self.run_dir)

    @property
    def last(self) -> dict[str, Any]:
        return self.records[-1]

    def rate(self, name: str) -> float | None:
        """Mean of a timing's figure over the window."""
        values = [record["timing"][name] for record in self.records if record["timing"].get(name) is not None]
        return statistics.fmean(values) if values else None

    def median_seconds(self) -> float:
        return statistics.median(record["timing"].get("seconds", 0.0) for record in self.records)

    def change(self) -> float | None:
        """Of the loss over the window: the mean of its later half less that of its earlier half."""
        losses = [record["loss"] for record in self.records if record.get("loss") is not None]
        half = len(losses) // 2
        return statistics.fmean(losses[-half:]) - statistics.fmean(losses[:half]) if half else None

    def pace(self) -> float | None:
        """Seconds a step, with evaluations and checkpoints where records of this launch say when they were made."""
        times = [record["timing"]["time"] for record in self.records if "time" in record["timing"]]
        times = [moment for moment in times if moment >= self.launched]
        return (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else self.rate("seconds")

    def state(self, now: float) -> Text:
        """Done, ended by a fault or a signal, running with the time since the last record, or stalled."""
        if not self.records:
            return Text("no step yet" if self.run_dir.exists() else "no such folder yet", "dim")
        age = max(0.0, now - self.written)
        if self.steps is not None and self.last["step"] >= self.steps:
            return Text(f"done {_age(age)} ago", "green")
        ended = self.faults[-1] if self.faults and self.faults[-1]["kind"] in ENDS else None
        if ended is not None and (at := moment(ended["time"]).timestamp()) >= max(self.launched, self.written - 1):
            style = "yellow" if ended["kind"] == "signal" else "bold red"
            return Text(f"{ENDS[ended['kind']]} {_age(max(0.0, now - at))} ago", style)
        times, seconds = STALLED
        if age > max(times * self.median_seconds(), seconds):
            return Text(f"STALLED {_age(age)}", "bold red")
        return Text(f"{_age(age)} ago")


def _steps(run_dir: Path) -> int | None:
    path = run_dir / "recipe.yaml"
    return yaml.safe_load(path.read_text())["training"]["steps"] if path.exists() else None


def _launched(run_dir: Path) -> float:
    path = run_dir / "environment.json"
    if not path.exists():
        return 0.0
    return moment(json.loads(path.read_text())[-1]["time"]).timestamp()


# What is shown --------------------------------------------------------------------------------------------------------


def frame(runs: Sequence[Progress], now: float, console: Console) -> RenderableType:
    """A table with a row for each run, without columns that no run has, and the last faults below it. Where that is
    wider than the console, each run has a column instead."""
    rows = [_row(run, now) for run in runs]
    headings = [heading for heading in rows[0] if any(row[heading].plain for row in rows)]
    cells = [[row[heading] for heading in headings] for row in rows]
    tables = [_table(headings, cells)]
    unbounded = console.options.update(max_width=10 * PLAIN_WIDTH)
    if console.measure(tables[0], options=unbounded).maximum > console.width:
        count = max(1, (console.width - LABEL) // COLUMN)
        tables = [_turned(headings, cells[start : start + count]) for start in range(0, len(cells), count)]
    faults = [(run, fault) for run in runs for fault in run.faults]
    if not faults:
        return Group(*tables)
    faults.sort(key=lambda entry: moment(entry[1]["time"]))
    return Group(*tables, Text(), _faults(faults[-FAULTS:], len(faults), several=len(runs) > 1))


def _table(headings: Sequence[str | Text], rows: Sequence[Sequence[Text]]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for heading in headings:
        table.add_column(heading, justify="right" if table.columns else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def _turned(headings: Sequence[str], rows: Sequence[Sequence[Text]]) -> Table:
    """The same with a column for each of ``rows``, whose names are their first cells."""
    names = [row[0] for row in rows]
    lines = [[Text(heading), *(row[i] for row in rows)] for i, heading in enumerate(headings)][1:]
    return _table(["", *names], lines)


def _row(run: Progress, now: float) -> dict[str, Text]:
    """Heading -> cell. A cell of two lines has the figure, and what belongs to it below, dim."""
    last = run.last if run.records else {}
    step = last.get("step", 0)
    pace = run.pace() if run.records else None
    eta = pace * (run.steps - step) if pace and run.steps and step < run.steps else None
    change = run.change()
    return {
        "run": Text(run.run_dir.name or str(run.run_dir)),
        "step": _cell(f"{step}/{run.steps or '?'}" if run.records else "", eta and f"eta {clock(eta)}"),
        "loss": _cell(_number(last.get("loss"), "{:.4f}"), _number(change, "{:+.4f}")),
        "validation": _cell(_number(run.validation, "{:.4f}")),
        "norm": _cell(_number(last.get("grad_norm"), "{:.2f}")),
        "tok/s": _cell(_number(run.rate("tokens_per_second"), "{:,.0f}"), _number(run.rate("mfu"), "mfu {:.1f}%", 100)),
        "load": _cell(
            _number(last.get("expert_load"), "{:.2f}"),
            _number(last.get("dropped_fraction") or None, "dropped {:.1f}%", 100),
        ),
        "blocks": _cell(_number(last.get("block_density"), "{:.1f}%", 100)),
        "skipped": Text(str(run.skipped), "red") if run.skipped else Text(),
        "last record": run.state(now),
    }


def _cell(figure: str, below: str | None = None) -> Text:
    return Text.assemble(figure, ("\n" + below, "dim")) if below else Text(figure)


def _age(seconds: float) -> str:
    return f"{seconds / 86400:.0f} days" if seconds >= 2 * 86400 else clock(seconds)


def _number(value: float | None, form: str, scale: float = 1.0) -> str:
    return "" if value is None else form.format(scale * value)


def _faults(faults: list[tuple[Progress, dict[str, Any]]], count: int, several: bool) -> Table:
    title = f"faults, the last {len(faults)} of {count}" if count > len(faults) else "faults"
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold", title=title, title_justify="left")
    for heading in ["time", *(["run"] if several else []), "step", "kind", "where", "message"]:
        table.add_column(heading, justify="right" if heading == "step" else "left", no_wrap=heading != "message")
    for run, fault in faults:
        where = [f"rank {fault['rank']}" if fault["rank"] is not None else "", fault["host"] or ""]
        cells = [
            moment(fault["time"]).strftime("%m-%d %H:%M:%S"),
            *([run.run_dir.name] if several else []),
            "" if fault["step"] is None else str(fault["step"]),
            fault["kind"],
            " ".join(part for part in where if part),
            fault["message"],
        ]
        table.add_row(*map(Text, cells))
    return table


def monitor(run_dirs: Sequence[Path], once: bool = False, interval: float = 1.0) -> None:
    """Show the runs until Ctrl-C, anew every ``interval`` seconds; with ``once`` a single time."""
    console = Console()
    if not console.is_terminal:
        console.width = PLAIN_WIDTH
    runs = [Progress(run_dir) for run_dir in run_dirs]

    def look() -> RenderableType:
        for run in runs:
            run.refresh()
        return frame(runs, time.time(), console)

    if once:
        console.print(look())
        return
    try:
        with Live(look(), console=console, auto_refresh=False) as live:
            while True:
                time.sleep(interval)
                live.update(look(), refresh=True)
    except KeyboardInterrupt:
        return
