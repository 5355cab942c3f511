"""``megasparse report``: report.html, one file that needs no network and no scripts."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from megasparse.config import Recipe, load_recipe
from megasparse.files import write_atomic
from megasparse.metrics.console import clock
from megasparse.metrics.record import moment, read_faults, read_metrics
from megasparse.parameters import parameter_count
from megasparse.report import charts

FAULTS_MARKED = 300  # more would paint the chart over: the last ones are marked


@dataclass(frozen=True)
class Panel:
    """A chart of one metric, by its name in metrics.jsonl or under ``timing`` there."""

    key: str
    title: str
    percent: bool = False
    log: bool = False
    bottom: float | None = 0.0


PANELS = {
    "Speed": [
        Panel("tokens_per_second", "tokens per second"),
        Panel("mfu", "model FLOPs utilisation", percent=True),
        Panel("rank_spread", "slowest rank's own seconds / median", bottom=1.0),
    ],
    "Optimizer": [
        Panel("learning_rate", "learning rate"),
        Panel("grad_norm", "gradient norm, before clipping", log=True),
        Panel("loss_scale", "fp16 loss scale", log=True),
    ],
    "Experts": [
        Panel("expert_load", "largest load / mean, worst layer", bottom=1.0),
        Panel("dropped_fraction", "routed copies dropped", percent=True),
        Panel("load_balance_loss", "load-balance loss", bottom=None),
        Panel("z_loss", "z-loss", log=True),
    ],
    "Block-sparse attention": [
        Panel("block_density", "causal key blocks seen", percent=True),
        Panel("attention_recall", "dense attention that falls into them", percent=True),
        Panel("selector_entropy", "entropy of the selector's scores (nats)", bottom=None),
        Panel("gate_loss", "gate loss", bottom=None),
        Panel("cluster_loss", "cluster loss", bottom=None),
    ],
    "2:4 weights": [
        Panel("flip_rate", "mask entries flipped at a refresh", percent=True),
        Panel("mass_kept", "weight mass kept", percent=True, bottom=None),
    ],
    "Distillation": [Panel("distillation_loss", "KL from the teacher (nats / token)")],
}


def report(run_dir: Path) -> Path:
    """Write ``report.html`` into the run folder, whole or not at all; returns its path.

    Raises ValueError if the folder holds no run.
    """
    for name in ("recipe.yaml", "environment.json"):
        if not (run_dir / name).exists():
            raise ValueError(f"{run_dir} is no run folder, it has no {name}: name one that megasparse train wrote")
    path = run_dir / "report.html"
    write_atomic(path, render(run_dir))
    return path


def render(run_dir: Path) -> str:
    """The page's HTML, from metrics.jsonl, faults.jsonl, environment.json and recipe.yaml."""
    records, faults = read_metrics(run_dir), read_faults(run_dir)
    launches = json.loads((run_dir / "environment.json").read_text())
    text = (run_dir / "recipe.yaml").read_text()
    recipe, resolved = yaml.safe_load(text), _resolved(run_dir)
    templates = Environment(loader=PackageLoader("megasparse", "report"), autoescape=True, undefined=StrictUndefined)
    return templates.get_template("page.html").render(
        name=recipe["name"],
        folder=str(run_dir),
        headline=headline(records, recipe),
        facts=facts(recipe, resolved, launches[-1]),
        loss=_loss(records, faults, launches),
        heat_map=_heat_map(records, resolved),
        sections=sections(records),
        faults=[{**fault, "time": _time(fault["time"])} for fault in faults],
        launches=launch_rows(launches, records),
        packages=launches[-1]["packages"],
        recipe=text,
    )


def series(records: Sequence[dict[str, Any]], key: str) -> charts.Points:
    """Steps and finite values of a metric or of a timing's figure."""
    points = [(record["step"], record.get(key, record["timing"].get(key))) for record in records]
    points = [(step, value) for step, value in points if value is not None]
    return [step for step, _ in points], [value for _, value in points]


def headline(records: Sequence[dict[str, Any]], recipe: dict[str, Any]) -> list[tuple[str, str, str]]:
    """What the run came to: (label, figure, remark)."""
    if not records:
        return [("step", f"0 of {recipe['training']['steps']:,}", "nothing recorded yet")]
    last = records[-1]
    rows = [("step", f"{last['step']:,}", f"of {recipe['training']['steps']:,}")]
    if "tokens" in last:
        rows.append(("tokens", _short(last["tokens"]), f"{last['tokens']:,}"))
    if loss := series(records, "loss")[1]:
        few = loss[-max(1, len(loss) // 25) :]
        rows.append(("training loss", f"{statistics.fmean(few):.4f}", f"mean of the last {len(few):,}"))
    steps, validation = series(records, "validation_loss")
    if validation:
        rows.append(("validation loss", f"{validation[-1]:.4f}", f"at step {steps[-1]:,}"))
    if "validation_bits_per_byte" in last:
        others = f"gzip {last['gzip9_bits_per_byte']:.3f}, xz {last['xz_bits_per_byte']:.3f}"
        rows.append(("bits / byte", f"{last['validation_bits_per_byte']:.3f}", others))
    seconds = series(records, "seconds")[1]
    if seconds:
        rows.append(("time in steps", clock(sum(seconds)), f"median {statistics.median(seconds):.3g} s a step"))
    speed, mfu = (series(records, key)[1] for key in ("tokens_per_second", "mfu"))
    if speed:
        utilisation = f"median; MFU {100 * statistics.median(mfu):.1f} %" if mfu else "median"
        rows.append(("tokens / s", f"{statistics.median(speed):,.0f}", utilisation))
    if skipped := sum(record.get("skipped", 0) for record in records):
        rows.append(("steps skipped", f"{skipped:,}", "loss or gradient norm not finite"))
    return rows


def facts(recipe: dict[str, Any], resolved: Recipe | ValueError, launch: dict[str, Any]) -> list[tuple[str, str]]:
    """What was trained, in which layout and where."""
    training, data = recipe["training"], recipe["data"]
    batch, seq = training["global_batch_size"], data["seq_length"]
    rows = [
        ("layout", f"{launch['layout']}, {_where(launch)}"),
        ("parameters", _parameters(resolved, launch)),
        ("precision", training["precision"]),
        ("a step", f"{batch} sequences of {seq} tokens: {batch * seq:,} tokens"),
        ("data", ", ".join(str(entry["path"]) for entry in data["sets"])),
        ("commit", launch["commit"] or "not from a checkout"),
    ]
    for source in ("initial_checkpoint", "teacher"):
        if source in launch:
            rows.append((source.replace("_", " "), f"{launch[source]['path']}, step {launch[source]['step']}"))
    return rows


def _resolved(run_dir: Path) -> Recipe | ValueError:
    """The recipe, or why this version cannot read it: a page of an older run is there all the same."""
    try:
        return load_recipe(run_dir / "recipe.yaml")
    except ValueError as error:
        return error


def _parameters(resolved: Recipe | ValueError, launch: dict[str, Any]) -> str:
    if isinstance(resolved, ValueError):
        return f"not counted: {resolved}"
    if "vocab_size" not in launch:
        return "not counted: the launch did not record its vocabulary"
    total, active = parameter_count(resolved.model, launch["vocab_size"], resolved.data.seq_length)
    return f"{total:,}" if total == active else f"{total:,}, of which {active:,} take part in a token"


def _loss(
    records: Sequence[dict[str, Any]], faults: Sequence[dict[str, Any]], launches: Sequence[dict[str, Any]]
) -> Markup | None:
    training = series(records, "loss")
    if not training[0]:
        return None
    numbered = [(fault["step"], number) for number, fault in enumerate(faults, 1) if fault["step"] is not None]
    firsts = [_first_step(launch, records) for launch in launches]
    marks = charts.Marks(
        faults=numbered[-FAULTS_MARKED:],
        skipped=[record["step"] for record in records if record.get("skipped")],
        launches=sorted({first for first in firsts if first is not None and first > records[0]["step"]}),
    )
    return Markup(charts.loss_chart(training, series(records, "validation_loss"), marks, _span(records)))


def _heat_map(records: Sequence[dict[str, Any]], resolved: Recipe | ValueError) -> Markup | None:
    rows = [record for record in records if "expert_load_by_layer" in record]
    if not rows:
        return None
    steps, loads = [row["step"] for row in rows], [row["expert_load_by_layer"] for row in rows]
    layers = list(range(len(loads[0])))  # where the recipe does not say which they are, by their order
    if isinstance(resolved, Recipe):
        layers = [index for index, moe in enumerate(resolved.model.moe_layers) if moe]
    return Markup(charts.heat_map("Expert load by layer and step", steps, loads, layers, _span(records)))


def _span(records: Sequence[dict[str, Any]]) -> tuple[int, int]:
    return records[0]["step"], records[-1]["step"]


def sections(records: Sequence[dict[str, Any]]) -> list[tuple[str, list[tuple[str, Markup]]]]:
    """Headings with their charts; what no record has is left out, and so is a drop rate that is always zero."""
    made = []
    for heading, panels in PANELS.items():
        drawn = []
        for panel in panels:
            points = series(records, panel.key)
            if points[0] and (any(points[1]) or panel.key != "dropped_fraction"):
                picture = charts.line_chart(
                    panel.title, points, _span(records), percent=panel.percent, log=panel.log, bottom=panel.bottom
                )
                drawn.append((panel.title, Markup(picture)))
        if drawn:
            made.append((heading, drawn))
    return made


def launch_rows(launches: Sequence[dict[str, Any]], records: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """One for each launch, with what changed among the packages since the one before."""
    rows = []
    for before, launch in zip([launches[0], *launches], launches, strict=False):
        old, new = before["packages"], launch["packages"]
        first = _first_step(launch, records)
        changed = [f"{name} {old.get(name)} → {new[name]}" for name in new if old.get(name) != new[name]]
        rows.append(
            {
                "time": _time(launch["time"]),
                "first": "" if first is None else f"{first:,}",
                "layout": launch["layout"],
                "where": _where(launch),
                "commit": (launch["commit"] or "")[:10] + ("-dirty" if "dirty" in (launch["commit"] or "") else ""),
                "command": " ".join(launch["command"]),
                "changed": ", ".join(changed),
            }
        )
    return rows


def _first_step(launch: dict[str, Any], records: Sequence[dict[str, Any]]) -> int | None:
    """The first recorded step since a launch; None if records do not say when they were made, or there is none."""
    began = moment(launch["time"]).timestamp()
    return next((record["step"] for record in records if record["timing"].get("time", 0.0) >= began), None)


def _where(launch: dict[str, Any]) -> str:
    count = launch["world_size"]
    return f"{count} process{'es' if count > 1 else ''} on {launch['device']}"


def _time(text: str) -> str:
    return moment(text).strftime("%Y-%m-%d %H:%M:%S")


def _short(number: float) -> str:
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.3g}"
