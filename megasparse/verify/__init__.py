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
from megasparse.verify.compare import CAPACITY, NOISE, TOLERANCE, Comparison, assemble, compare, worst_of
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
    left_out: list[str]  # default layouts that this recipe does not allow, with the rule they break
    comparisons: list[Comparison]

    @property
    def passed(self) -> bool:
        return all(comparison.passed for comparison in self.comparisons)

    def to_json(self) -> str:
        found = [{**asdict(c), "passed": c.passed, "worst": c.worst} for c in self.comparisons]
        whole = {**asdict(self), "passed": self.passed, "tolerance": TOLERANCE, "comparisons": found}
        return json.dumps(_finite(whole), indent=1)


def verify(recipe: Recipe, layouts: list[Layout] | None, steps: int, run: Run) -> Report:
    """Train in one process and in every layout, ``run`` being ``Workers.run``, and compare. None: the default layouts.

    Layouts have the same micro-batches and global batch: what data parallelism shares, one process accumulates. One
    that fails is reported, and the next ones run. Raises ValueError for a layout that is impossible, before anything
    runs.
    """
    left_out: list[str] = []
    if layouts is None:
        layouts, left_out = possible_layouts(recipe)
    small, changes = shrink(recipe, layouts)
    recipes = [_checked(recipe, small, layout) for layout in layouts]
    comparisons = []
    with Progress(transient=True) as progress:
        task = progress.add_task("one process", total=len(layouts) + 1)
        single = _in_layout(small, Layout(zero_stage=0))
        reference = assemble(run(observe, 1, single.model_dump(mode="json"), steps, timeout=TIMEOUT))
        for layout, one in zip(layouts, recipes, strict=True):
            progress.update(task, advance=1, description=str(layout))
            try:
                ours = assemble(run(observe, layout.world_size, one.model_dump(mode="json"), steps, timeout=TIMEOUT))
            except AssertionError as error:  # a rank failed
                comparisons.append(Comparison(str(layout), layout.world_size, error=str(error)))
            else:
                comparisons.append(compare(str(layout), layout.world_size, ours, reference))
    return Report(recipe.name, steps, changes, left_out, comparisons)


def possible_layouts(recipe: Recipe) -> tuple[list[Layout], list[str]]:
    """The default layouts that this recipe allows; and those it does not, with the reason."""
    found: list[Layout] = []
    left_out = []
    for layout in default_layouts(recipe):
        try:
            _checked(recipe, shrink(recipe, [*found, layout])[0], layout)
        except ValueError as error:
            left_out.append(str(error))
        else:
            found.append(layout)
    return found, left_out


def _checked(recipe: Recipe, small: Recipe, layout: Layout) -> Recipe:
    """The small recipe in this layout. ValueError if the layout is impossible for it, or for the model and sequence
    that it was made from: what is proved must be what can be run. Batches are verify's own."""
    raw = recipe.model_dump(mode="json")
    raw["training"] = small.training.model_dump(mode="json")
    raw["schedule"] = small.schedule.model_dump(mode="json")
    raw["parallel"]["layers_per_stage"] = None
    for one in (parse_recipe(raw), small):
        in_layout = _in_layout(one, layout)
        check_layout(in_layout, layout.world_size)
    return in_layout


def _in_layout(recipe: Recipe, layout: Layout) -> Recipe:
    raw = recipe.model_dump(mode="json")
    raw["parallel"].update(layout.parallel())
    return parse_recipe(raw)


def show(report: Report, console: Console) -> None:
    """The report as tables: scalars and verdicts by layout, then gradients and weights by group."""

    def say(text: str, style: str | None = None) -> None:
        console.print(text, style=style, markup=False, highlight=False)

    for line in report.changes:
        say(f"  {line}")
    for line in report.left_out:
        say(f"  left out: {line}")
    console.print(_scalars(report))
    compared = [c for c in report.comparisons if not c.error]
    if compared:
        console.print(_tensors(compared))
    noisy = sorted({name for c in compared for name in c.noise})
    if noisy:
        listed = ", ".join(noisy[:CAPACITY]) + (" ..." if len(noisy) > CAPACITY else "")
        say(f"not judged, in steps where no element is above {NOISE:.0e} of the gradient norm (rounding): {listed}")
    for c in report.comparisons:
        if not c.passed:
            say(f"{c.layout}: {c.error or c.diagnosis}", "red")
        if c.first:
            say(f"  the first to differ: {c.first}")
        for contradiction in c.contradictions[:CAPACITY]:
            say(f"  {contradiction}")
        for route in c.flipped[:CAPACITY]:
            say(f"  another route: {route}")


def _scalars(report: Report) -> Table:
    title = f"{report.recipe}: {report.steps} steps, the largest relative difference to one process"
    table = _table(title, "layout", "loss", "auxiliary", "norm", "flips", "margin", "")
    for c in report.comparisons:
        if c.error:
            table.add_row(c.layout, *["-"] * 5, "[red]failed[/]")
            continue
        auxiliary = [value for name, value in c.scalars.items() if name not in ("loss", "grad_norm")]
        figures = [_figure(v) for v in (c.scalars["loss"], worst_of([0.0, *auxiliary]), c.scalars["grad_norm"])]
        verdict = "[green]equal[/]" if c.passed else "[red]differs[/]"
        table.add_row(c.layout, *figures, str(len(c.flipped)), f"{c.margin:.1e}", verdict)
    return table


def _tensors(comparisons: list[Comparison]) -> Table:
    table = _table("every gradient, and below it every updated weight", "layout", *comparisons[0].groups)
    for c in comparisons:
        table.add_row(c.layout, *[f"{_figure(g.gradient)}\n{_figure(g.weight)}" for g in c.groups.values()])
    return table


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
