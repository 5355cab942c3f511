"""What a run ran with."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from megasparse.config import load_recipe
from megasparse.metrics.environment import write_environment
from tests.metrics.runs import recipe


def test_environment_describes_each_launch(tmp_path: Path):
    write_environment(tmp_path, recipe(), 96)
    write_environment(tmp_path, recipe(), 96, {"teacher": {"step": 4}})
    assert load_recipe(tmp_path / "recipe.yaml") == recipe()
    launches = json.loads((tmp_path / "environment.json").read_text())
    assert len(launches) == 2
    assert launches[0]["packages"]["torch"] == torch.__version__
    assert launches[0]["command"] == sys.argv
    assert launches[0]["vocab_size"] == 96
    assert "teacher" not in launches[0]
    assert launches[1]["teacher"] == {"step": 4}
