"""What watching a run costs: the ranks' exchange after each step, and the comparison of weights' copies.

    python tools/bench/watching.py dp2 ep2 tp2 pp2

Two processes of this machine, each with a core, train the model of ``examples/pretrain.yaml`` on random tokens. After
each step they exchange signals and times (``pulse.py``) and compare all copies (``replicas.py``); each is timed by
itself, the steps in the same run. Medians, in milliseconds and in shares of a step.
"""

from __future__ import annotations

import argparse
import statistics
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from layouts import batches
from rich.console import Console
from rich.table import Table

from megasparse import topology
from megasparse.config import load_recipe, parse_recipe
from megasparse.layout import Layout, check_layout
from megasparse.processes import Workers

RECIPE = Path(__file__).resolve().parents[2] / "examples" / "pretrain.yaml"
VOCAB = 4096
WARM_UP, STEPS = 3, 10


def measure(raw: dict[str, Any]) -> tuple[list[float], int]:
    """Median seconds of a step, of the exchange and of the comparison; the parameters held here. On each rank."""
    from megasparse.engine import Engine
    from megasparse.model import build_model
    from megasparse.pulse import Pulse
    from megasparse.replicas import check_replicas
    from megasparse.signals import Signals

    torch.set_num_threads(1)
    recipe = parse_recipe(raw)
    layout = check_layout(recipe, 2)
    place = topology.initialize(layout)
    engine = Engine(recipe, place, *build_model(recipe, place, VOCAB))
    pulse = Pulse(layout, recipe.faults.straggler_interval, recipe.faults.straggler_factor)
    seconds: list[list[float]] = []
    with Signals() as signals:
        for step in range(WARM_UP + STEPS):
            micro_batches = list(batches(recipe, step, place))
            dist.barrier()
            times = [time.perf_counter()]
            engine.train_step(micro_batches, step, 1e-3)
            times.append(time.perf_counter())
            pulse.exchange(signals, engine.own_seconds)
            times.append(time.perf_counter())
            assert check_replicas(engine) is None
            times.append(time.perf_counter())
            seconds.append([after - before for before, after in pairwise(times)])
    held = sum(parameter.numel() for parameter in engine.chunks.parameters())
    return [statistics.median(column) for column in zip(*seconds[WARM_UP:], strict=True)], held


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("layouts", nargs="*", default=["dp2", "ep2", "tp2", "pp2"], help="of two processes")
    table = Table("layout", "M parameters a process", "step", "exchange", "comparison")
    with Workers() as workers:
        for text in parser.parse_args().layouts:
            changes = {"parallel": Layout.parse(text).parallel()}
            recipe = parse_recipe({**load_recipe(RECIPE).model_dump(mode="json"), **changes})
            ranks = workers.run(measure, 2, recipe.model_dump(mode="json"))
            step, exchange, comparison = (max(column) for column in zip(*(times for times, _ in ranks), strict=True))
            shares = [f"{1e3 * part:.1f} ({part / step:.1%})" for part in (exchange, comparison)]
            table.add_row(text, f"{max(held for _, held in ranks) / 1e6:.1f}", f"{1e3 * step:,.0f}", *shares)
    Console().print(table)


if __name__ == "__main__":
    main()
