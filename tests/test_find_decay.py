"""What tools/find_decay.py runs, and how it reads the runs."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from megasparse.config import parse_recipe
from tests import small

PATH = Path(__file__).parent.parent / "tools" / "find_decay.py"
SPEC = importlib.util.spec_from_file_location("find_decay", PATH)
assert SPEC is not None
assert SPEC.loader is not None
find_decay = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(find_decay)

WEIGHTS = {"method": "sr_ste", "decay": 1e-4, "targets": ["mlp"], "dense_end": 0.2, "dense_start": 0.1}


def test_runs_differ_in_the_decay_alone_and_are_sparse_throughout() -> None:
    recipe = small.recipe(training={"steps": 5000}, sparsity={"weights": WEIGHTS})
    dense, sparse = (parse_recipe(find_decay.run_of(recipe, 200, decay)) for decay in (None, 0.5))
    for run, method, decay in ((dense, "dense", None), (sparse, "sr_ste", 0.5)):
        weights = run.sparsity.weights
        assert weights is not None
        assert (weights.method, weights.decay, weights.transposable) == (method, decay, True)
        assert (weights.refresh_interval, weights.dense_start, weights.dense_end) == (20, 0.0, 0.0)
        assert run.training.steps == 200
    without = [run.model_dump(exclude={"sparsity"}) for run in (dense, sparse)]
    assert without[0] == without[1]


def test_a_recipe_without_a_decay_is_refused() -> None:
    for weights in (None, {"method": "s_ste"}):
        with pytest.raises(
            ValueError, match=r"small has no sparsity\.weights\.decay: set sparsity\.weights\.method to sr_ste"
        ):
            find_decay.run_of(small.recipe(sparsity={"weights": weights}), 100, 0.1)


def test_flip_rates_are_those_of_the_steps_that_made_masks(tmp_path: Path) -> None:
    records = [
        {"step": 1, "mass_kept": 0.7},
        {"step": 11, "flip_rate": 0.1},
        {"step": 12},
        {"step": 21, "flip_rate": 0.2},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    rates = find_decay.flip_rates(tmp_path)
    assert rates == [(11, 0.1), (21, 0.2)]
    find_decay.plot({"dense": rates, "0.1": rates}, tmp_path / "rates.png")
    assert (tmp_path / "rates.png").stat().st_size > 1000
