"""Find the decay of masked weights (sparsity.weights.decay) for a recipe, as 2by4 does (arXiv 2404.01847).

    python tools/find_decay.py examples/pretrain.yaml 'sparsity.weights={method: sr_ste, decay: 0}' parallel.ep=1
    python tools/find_decay.py RECIPE --decays 1e-5 1e-4 1e-3 --steps 500 --processes 2 --output runs/decays

Short runs of the recipe's first steps, one of them dense, whose masks are made but not applied: each run's flip rate is
the share of places that its masks change between two refreshes, over the second half of the run. Too little decay
leaves masks that jump about, too much freezes them; 2by4 keeps the decays whose flip rate is 0.60 to 0.95 of the dense
run's. Warm-up, learning rate and the rest are the recipe's: its schedule is not shortened with the steps.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from megasparse.config import Recipe, load_recipe, parse_recipe
from megasparse.processes import Workers
from megasparse.train import train

DECAYS = [1e-6, 1e-5, 1e-4, 1e-3, 1e-2]
HEALTHY = (0.60, 0.95)  # flip rate over that of the dense run
MASKS = 10  # made in a run, at least


def run_of(recipe: Recipe, steps: int, decay: float | None) -> dict[str, Any]:
    """The recipe for ``steps`` steps with another decay; None: with dense weights."""
    weights = recipe.sparsity.weights
    if weights is None or weights.decay is None:
        raise ValueError(f"{recipe.name} has no sparsity.weights.decay: set sparsity.weights.method to sr_ste or ast")
    raw = recipe.model_dump(mode="json")
    interval = min(weights.interval, max(1, steps // MASKS))
    masks = {
        "mask": "transposable" if weights.transposable else "row",
        "score": weights.score,
        "search": weights.search,
    }
    changed = {"method": weights.method, "decay": decay} if decay is not None else {"method": "dense"}
    raw["sparsity"]["weights"] = {"targets": weights.targets, "refresh_interval": interval, **masks, **changed}
    warmup = recipe.schedule.warmup_tokens
    raw["schedule"] = {"type": "constant", "warmup_tokens": min(warmup, steps * recipe.tokens_per_step)}
    raw["training"].update(steps=steps, eval_interval=0, eval_stride=recipe.data.seq_length, save_interval=0)
    raw["logging"].update(wandb="disabled", tensorboard=False, log_interval=steps)
    return raw


def launch(raw: dict[str, Any], folder: Path) -> None:
    train(parse_recipe(raw), folder)


def flip_rates(folder: Path) -> list[tuple[int, float]]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(record["step"], record["flip_rate"]) for record in records if "flip_rate" in record]


def plot(rates: dict[str, list[tuple[int, float]]], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for name, points in rates.items():
        axis.plot(*zip(*points, strict=True), label=name, color="black" if name == "dense" else None)
    axis.set(xlabel="step", ylabel="masks flipped")
    axis.legend(frameon=False)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*", help="such as model.num_layers=2")
    parser.add_argument("--decays", type=float, nargs="+", default=DECAYS)
    parser.add_argument("--steps", type=int, default=200, help="of each run")
    parser.add_argument(
        "--processes", type=int, default=1, help="that a run is split over, as the recipe's layout says"
    )
    parser.add_argument("--output", type=Path, default=Path("runs/find_decay"), help="a new folder for the runs")
    arguments = parser.parse_args()
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    runs = {"dense": run_of(recipe, arguments.steps, None)}
    runs |= {f"{decay:g}": run_of(recipe, arguments.steps, decay) for decay in sorted(arguments.decays)}
    console = Console(width=100)
    rates = {}
    with Workers() as workers:
        for name, raw in track(runs.items(), description="runs", console=Console(stderr=True)):
            folder = arguments.output / name
            workers.run(launch, arguments.processes, raw, folder, timeout=24 * 3600)
            rates[name] = flip_rates(folder)
    half = {name: statistics.mean(rate for _, rate in points[len(points) // 2 :]) for name, points in rates.items()}
    table = Table(title=f"{recipe.name}: masks flipped in {arguments.steps} steps, their second half")
    for column in ("decay", "flip rate", "of the dense run's", ""):
        table.add_column(column, justify="right")
    for name, rate in half.items():
        ratio = rate / half["dense"]
        verdict = "" if name == "dense" else "take it" if HEALTHY[0] <= ratio <= HEALTHY[1] else "-"
        table.add_row(name, f"{100 * rate:.2f} %", f"{ratio:.2f}", verdict)
    console.print(table)
    plot(rates, arguments.output / "flip_rates.png")
    console.print(f"curves: {arguments.output / 'flip_rates.png'}")


if __name__ == "__main__":
    main()
