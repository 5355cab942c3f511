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
from megasparse.layout import Layout, check_layout
from megasparse.verify.compare import (
    CAPACITY,
    NOISE,
    ROUNDED,
    TOLERANCE,
    Comparison,
    Rounded,
    Whole,
    assemble,
    compare,
    compare_rounded,
    worst_of,
)
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
    rounded: list[Rounded]  # in the recipe's own precision, if that is not fp32

    @property
    def passed(self) -> bool:
        return bool(self.comparisons) and all(found.passed for found in [*self.comparisons, *self.rounded])

    def to_json(self) -> str:
        found = [{**asdict(c), "passed": c.passed, "worst": c.worst} for c in self.comparisons]
        rounded = [{**asdict(r), "passed": r.passed, "allowed": ROUNDED} for r in self.rounded]
        verdict = {"passed": self.passed, "tolerance": TOLERANCE, "comparisons": found, "rounded": rounded}
        whole = {**asdict(self), **verdict}
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
    for layout in layouts:
        _check(recipe, small, layout)
    precision = recipe.training.precision
    partitioned = [layout for layout in layouts if layout.zero_stage > 0 and precision != "fp32"]
    with Progress(transient=True) as progress:
        task = progress.add_task("", total=len(layouts) + len(partitioned) + 2)

        def train(layout: Layout, precision: str) -> Whole:
            progress.update(task, advance=1, description=f"{layout}, {precision}")
            raw = _in_layout(small, layout, precision).model_dump(mode="json")
            return assemble(run(observe, layout.world_size, raw, steps, timeout=TIMEOUT))

        def attempt(layout: Layout, precision: str) -> Whole | str:
            try:
                return train(layout, precision)
            except AssertionError as error:  # a rank failed
                return str(error)

        single = train(Layout(zero_stage=0), "fp32")
        adam = small.optimizer.lr, small.optimizer.eps
        comparisons = [compare(str(o), o.world_size, attempt(o, "fp32"), single, *adam) for o in layouts]
        rounded = []
        if partitioned:
            single = train(Layout(), precision)
            rounded = [compare_rounded(str(o), precision, attempt(o, precision), single) for o in partitioned]
    return Report(recipe.name, steps, changes, left_out, comparisons, rounded)


def possible_layouts(recipe: Recipe) -> tuple[list[Layout], list[str]]:
    """The default layouts that this recipe allows; and those it does not, with the reason."""
    found: list[Layout] = []
    left_out = []
    for layout in default_layouts(recipe):
        try:
            _check(recipe, shrink(recipe, [*found, layout])[0], layout)
        except ValueError as error:
            left_out.append(str(error))
        else:
            found.append(layout)
    return found, left_out


def _check(recipe: Recipe, small: Recipe, layout: Layout) -> None:
    """ValueError if the layout is impossible for the small recipe, or for the model and sequence that it was made
    from: what is proved must be what can be run. Batches are verify's own."""
    raw = recipe.model_dump(mode="json")
    raw["training"] = small.training.model_dump(mode="json")
    raw["schedule"] = small.schedule.model_dump(mode="json")
    raw["parallel"]["layers_per_stage"] = None
    for one in (parse_recipe(raw), small):
        check_layout(_in_layout(one, layout, "fp32"), layout.world_size)


def _in_layout(recipe: Recipe, layout: Layout, precision: str) -> Recipe:
    raw = recipe.model_dump(mode="json")
    raw["parallel"].update(layout.parallel())
    raw["training"]["precision"] = precision
    return parse_recipe(raw)


def show(report: Report, console: Console) -> None:
    """The report as tables: scalars and verdicts by layout, then gradients and weights by group."""

    def say(text: str, style: str | None = None) -> None:
        console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

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
    if report.rounded:
        console.print(_rounded(report.rounded))
    for c in report.comparisons:
        if not c.passed:
            say(f"{c.layout}: {c.error or c.diagnosis}", "red")
        if c.first:
            say(f"  the first to differ: {c.first}")
        for contradiction in c.contradictions[:CAPACITY]:
            say(f"  {contradiction}")
        for route in c.flipped[:CAPACITY]:
            say(f"  another route: {route}")
    for r in report.rounded:
        if not r.passed:
            wrong = ", ".join([*r.off, *r.contradictions[:CAPACITY]])
            hint = f"further off than rounding: {wrong}; where fp32 is equal, look at what only {r.precision} does"
            say(f"{r.layout} in {r.precision}: {r.error or hint}", "red")


def _scalars(report: Report) -> Table:
    title = f"{report.recipe}: {report.steps} steps, the largest relative difference to one process"
    table = _table(title, "layout", "loss", "auxiliary", "norm", "flips", "margin", "")
    for c in report.comparisons:
        if c.error:
            table.add_row(c.layout, *["-"] * 5, _verdict(c))
            continue
        auxiliary = [value for name, value in c.scalars.items() if name not in ("loss", "grad_norm")]
        figures = [c.scalars["loss"], worst_of([0.0, *auxiliary]), c.scalars["grad_norm"]]
        rest = [str(len(c.flipped)), f"{c.margin:.1e}"]
        table.add_row(c.layout, *map(_figure, figures), *rest, _verdict(c))
    return table


def _rounded(found: list[Rounded]) -> Table:
    table = _table(
        f"the same in {found[0].precision}, with the most that its rounding explains", "layout", *ROUNDED, ""
    )
    table.add_row("", *[f"{most:.0e}" for most in ROUNDED.values()], end_section=True)
    for r in found:
        cells = (
            [_figure(r.figures[name], most) for name, most in ROUNDED.items()] if r.figures else ["-"] * len(ROUNDED)
        )
        table.add_row(r.layout, *cells, _verdict(r))
    return table


def _verdict(c: Comparison | Rounded) -> str:
    return "[red]failed[/]" if c.error else "[green]equal[/]" if c.passed else "[red]differs[/]"


def _tensors(comparisons: list[Comparison]) -> Table:
    table = _table("every gradient, and below it every updated weight", "layout", *comparisons[0].groups)
    for c in comparisons:
        table.add_row(c.layout, *[f"{_figure(g.gradient)}\n{_figure(g.weight)}" for g in c.groups.values()])
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", collapse_padding=True, pad_edge=False)
    for column in columns:
        table.add_column(column, no_wrap=True)
    return table


def _figure(value: float, tolerance: float = TOLERANCE) -> str:
    return f"{value:.1e}" if value <= tolerance else f"[red]{value:.1e}[/]"


def _finite(value: Any) -> Any:
    """JSON has no infinity."""
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
