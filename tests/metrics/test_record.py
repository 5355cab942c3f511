"""Lines of metrics.jsonl."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import pytest
import torch

from megasparse.metrics.log import MetricsLogger
from megasparse.metrics.record import read_metrics
from tests.metrics.runs import recipe


def test_what_is_not_finite_is_null_in_json(tmp_path: Path):
    log = MetricsLogger(tmp_path, recipe())
    log.log(1, {"loss": math.nan, "expert_loads": [1.0, math.inf]}, {})
    record = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail)
    assert abs(record.pop("timing")["time"] - time.time()) < 60
    assert record == {"step": 1, "loss": None, "expert_loads": [1.0, None]}


def test_values_come_back_to_the_bit(tmp_path: Path):
    log = MetricsLogger(tmp_path, recipe())
    value = torch.tensor(0.1).item()
    log.log(1, {"loss": value, "grad_norm": 1e-300}, {})
    entry = read_metrics(tmp_path)[0]
    assert (entry["loss"], entry["grad_norm"]) == (value, 1e-300)
