"""Is every layout equal to one process? The recipe trains from the same weights in both, and everything is compared.

observe.py   some real training steps on a rank, and all that can be seen of them
compare.py   a layout's run against one process's, and what a difference looks like
shrink.py    a large recipe made small enough, with its structure
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from megasparse.config import Recipe, parse_recipe
from megasparse.topology import Layout, check_layout
from megasparse.verify.compare import CAPACITY, NOISE, TOLERANCE, Comparison, assemble, compare
from megasparse.verify.observe import observe
from megasparse.verify.shrink import default_layouts, shrink

TIMEOUT = 600.0  # seconds for the steps of one layout

Run = Callable[..., list[Any]]  # (function, world size, *arguments, timeout=) -> what each rank returned


@dataclass
class Report:
    """What ``verify`` found."""

    recipe: str
    steps: int
    changes: list[str]  # made to the recipe so that it fits
    comparisons: list[Comparison]

    @property
    def passed(self) -> bool:
        return all(comparison.passed for comparison in self.comparisons)

    def to_json(self) -> str:
        found = [{**asdict(c), "passed": c.passed, "worst": c.worst} for c in self.comparisons]
        whole = {**asdict(self), "passed": self.passed, "tolerance": TOLERANCE, "comparisons": found}
        return json.dumps(_finite(whole), indent=1)


def verify(recipe: Recipe, layouts: list[Layout], steps: int, run: Run) -> Report:
    """Train in one process and in every layout, ``run`` being ``Workers.run``, and compare.

    Layouts have the same micro-batches and global batch: what data parallelism shares, one process accumulates.
    Raises ValueError for a layout that is impossible for the shrunk recipe, before anything runs; AssertionError where
    a run is not a number or ranks report different scalars. Of what several ranks hold, the last one's is compared.
    """
    small, changes = shrink(recipe, layouts)
    recipes = [_in_layout(small, layout) for layout in layouts]
    for layout, one in zip(layouts, recipes, strict=True):
        check_layout(one, layout.world_size)
    with Progress(transient=True) as progress:
        task = progress.add_task("one process", total=len(layouts) + 1)
        single = _in_layout(small, Layout(zero_stage=0))
        reference = assemble(run(observe, 1, single.model_dump(mode="json"), steps, timeout=TIMEOUT))
        comparisons = []
        for layout, one in zip(layouts, recipes, strict=True):
            progress.update(task, advance=1, description=str(layout))
            ranks = run(observe, layout.world_size, one.model_dump(mode="json"), steps, timeout=TIMEOUT)
            comparisons.append(compare(str(layout), layout.world_size, assemble(ranks), reference))
    return Report(recipe.name, steps, changes, comparisons)


def possible_layouts(recipe: Recipe) -> list[Layout]:
    """The default layouts that this recipe allows."""
    found = []
    for layout in default_layouts(recipe):
        small, _ = shrink(recipe, [*found, layout])
        try:
            check_layout(_in_layout(small, layout), layout.world_size)
        except ValueError:
            continue
        found.append(layout)
    return found


def _in_layout(recipe: Recipe, layout: Layout) -> Recipe:
    raw = recipe.model_dump(mode="json")
    raw["parallel"].update(layout.parallel())
    return parse_recipe(raw)


def show(report: Report, console: Console) -> None:
    """The report as tables: scalars and verdicts by layout, then gradients and weights by group."""
    for line in report.changes:
        console.print(f"  {line}", highlight=False)
    title = f"{report.recipe}: {report.steps} steps, the largest relative difference to one process"
    columns = ["loss", "auxiliary", "norm", "flips", "margin", ""]
    table = _table(title, "layout", *columns)
    for c in report.comparisons:
        auxiliary = max((v for k, v in c.scalars.items() if k not in ("loss", "grad_norm")), default=0.0)
        scalars = [_figure(v) for v in (c.scalars["loss"], auxiliary, c.scalars["grad_norm"])]
        verdict = "[green]equal[/]" if c.passed else "[red]differs[/]"
        table.add_row(c.layout, *scalars, str(len(c.flipped)), f"{c.margin:.1e}", verdict)
    console.print(table)
    table = _table("every gradient, and below it every updated weight", "layout", *report.comparisons[0].groups)
    for c in report.comparisons:
        cells = [f"{_figure(g.gradient)}\n{_figure(g.weight)}" for g in c.groups.values()]
        table.add_row(c.layout, *cells)
    console.print(table)
    noisy = {name for c in report.comparisons for name in c.noise}
    if noisy:
        listed = ", ".join(sorted(noisy)[:CAPACITY]) + (" ..." if len(noisy) > CAPACITY else "")
        console.print(
            f"not judged, in steps where the largest element is below {NOISE:.0e} of the gradient norm, which is "
            f"rounding: {listed}",
            highlight=False,
        )
    for c in report.comparisons:
        if not c.passed:
            console.print(f"{c.layout}: {c.diagnosis}", style="red", highlight=False)
            if c.first:
                console.print(f"  the first to differ: {c.first}", highlight=False)
            for route in c.flipped[:CAPACITY]:
                console.print(f"  another route: {route}", highlight=False)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, no_wrap=True)
    return table


def _figure(value: float) -> str:
    return f"{value:.1e}" if value <= TOLERANCE else f"[red]{value:.1e}[/]"


def _finite(value: Any) -> Any:
    """JSON has no infinity."""
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
