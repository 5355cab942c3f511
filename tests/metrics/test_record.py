"""Lines of metrics.jsonl."""

from __future__ import annotations

import json
import math
import random
import time
from pathlib import Path

import pytest
import torch

from megasparse.metrics.log import MetricsLogger
from megasparse.metrics.record import Follower, moment, read_faults, read_metrics
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


def test_a_follower_sees_what_the_file_has(tmp_path: Path):
    """Whatever is appended, cut short or rewritten between two looks."""
    draw = random.Random(0)
    follower, seen, path = Follower(tmp_path), [], tmp_path / "metrics.jsonl"
    restarts = 0
    for look in range(300):
        match draw.choice(["append", "append", "half", "rewrite", "nothing"]):
            case "append":
                with path.open("a") as file:
                    file.writelines(json.dumps({"step": look, "n": n}) + "\n" for n in range(draw.randint(1, 4)))
            case "half":
                with path.open("a") as file:
                    file.write('{"half": ')
                follower_saw = follower.read()
                seen = follower_saw if follower.restarted else seen + follower_saw
                with path.open("a") as file:
                    file.write("1}\n")
            case "rewrite":
                kept = read_metrics(tmp_path)[: draw.randint(0, 5)]
                path.write_text("".join(json.dumps({**record, "look": look}) + "\n" for record in kept))
            case _:
                pass
        new = follower.read()
        restarts += follower.restarted
        seen = new if follower.restarted else seen + new
        assert seen == read_metrics(tmp_path)
    assert restarts > 20


def test_a_follower_waits_for_the_file_and_survives_its_end(tmp_path: Path):
    follower = Follower(tmp_path / "run")
    assert follower.read() == []
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1}\n')
    assert follower.read() == [{"step": 1}]
    (tmp_path / "run" / "metrics.jsonl").unlink()
    assert follower.read() == []
    assert follower.restarted


def test_faults(tmp_path: Path):
    assert read_faults(tmp_path) == []
    (tmp_path / "faults.jsonl").write_text('{"kind": "hang"}\n{"kind": "kil')
    assert read_faults(tmp_path) == [{"kind": "hang"}]


@pytest.mark.parametrize("zone", ["+0200", "+02:00"])
def test_moment(zone: str):
    assert moment(f"1970-01-01T02:00:01{zone}").timestamp() == 1.0
    assert moment("1970-01-01T00:00:01.500Z").timestamp() == 1.5
    with pytest.raises(ValueError, match="yesterday"):
        moment("yesterday")
