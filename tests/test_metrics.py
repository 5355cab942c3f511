"""The record of a run through kill and resume, the plot."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megasparse.config import (
    Data,
    DataSet,
    Logging,
    Model,
    Recipe,
    Training,
    load_recipe,
)
from megasparse.metrics import (
    MetricsLogger,
    _clock,
    _smooth,
    plot_loss,
    read_metrics,
    write_environment,
)


def recipe(**logging: Any) -> Recipe:
    return Recipe(
        name="tiny",
        data=Data(sets=[DataSet(path=Path("data/none"))]),
        model=Model(num_layers=3, hidden_size=32, num_attention_heads=4),
        training=Training(steps=20),
        logging=Logging(**{"tensorboard": False, "wandb": "disabled", **logging}),
    )


def figures(step: int) -> dict[str, Any]:
    values = {"loss": 5 / step + 0.1, "learning_rate": 1e-3 / step, "grad_norm": math.sqrt(step), "expert_load": 1.5}
    return {**values, "validation_loss": 5 / step} if step % 5 == 0 else values


def record(run_dir: Path, first: int, last: int, **logging: Any) -> None:
    log = MetricsLogger(run_dir, recipe(**logging), first_step=first)
    for step in range(first, last + 1):
        log.log(step, figures(step), {"tokens_per_second": time.perf_counter()})
    log.close()


def without_timing(run_dir: Path) -> list[str]:
    return [json.dumps({**entry, "timing": None}) for entry in read_metrics(run_dir)]


def test_resumed_record_equals_the_uninterrupted_one(tmp_path: Path):
    record(tmp_path / "whole", 1, 20)
    record(tmp_path / "cut", 1, 13)
    with (tmp_path / "cut" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 14, "lo')  # killed while writing
    record(tmp_path / "cut", 11, 20)  # the newest checkpoint was step 10's
    assert without_timing(tmp_path / "cut") == without_timing(tmp_path / "whole")
    assert [entry["step"] for entry in read_metrics(tmp_path / "cut")] == list(range(1, 21))


def test_each_line_is_there_before_the_next_step(tmp_path: Path):
    log = MetricsLogger(tmp_path, recipe())
    log.log(1, figures(1), {})
    assert len(read_metrics(tmp_path)) == 1


def test_what_is_not_finite_is_null_in_json(tmp_path: Path):
    log = MetricsLogger(tmp_path, recipe())
    log.log(1, {"loss": math.nan, "expert_loads": [1.0, math.inf]}, {})
    line = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(line, parse_constant=pytest.fail) == {
        "step": 1,
        "loss": None,
        "expert_loads": [1.0, None],
        "timing": {},
    }


def test_values_come_back_to_the_bit(tmp_path: Path):
    log = MetricsLogger(tmp_path, recipe())
    value = torch.tensor(0.1).item()
    log.log(1, {"loss": value, "grad_norm": 1e-300}, {})
    entry = read_metrics(tmp_path)[0]
    assert (entry["loss"], entry["grad_norm"]) == (value, 1e-300)


def test_other_ranks_write_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    log = MetricsLogger(tmp_path / "run", recipe(), rank=1)
    log.log(1, figures(1), {})
    log.say("hello")
    log.close()
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr().out == ""


def test_plain_console_prints_every_log_interval(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    record(tmp_path, 1, 20, log_interval=8)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in lines] == ["step 1/20", "step 8/20", "step 16/20", "step 20/20"]
    assert lines[1].startswith("step 8/20 | loss 0.7250 | lr 1.25e-04 | norm 2.83 | load 1.50 | tok/s ")
    assert " | eta 0:0" in lines[1]


def test_tensorboard_holds_each_step_once_after_a_resume(tmp_path: Path):
    record(tmp_path, 1, 13, tensorboard=True)
    time.sleep(1.1)  # event files are ordered by the second
    record(tmp_path, 11, 20, tensorboard=True)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == list(range(1, 21))
    assert events.Scalars("loss")[9].value == pytest.approx(5 / 10 + 0.1)


SCRIPT = """
import sys
from pathlib import Path
from tests.test_metrics import record
if __name__ == "__main__":
    record(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), wandb=sys.argv[4])
"""


def record_with_wandb(run_dir: Path, first: int, last: int, mode: str) -> str:
    """In a process of its own, whose end waits for wandb; there is no network. Returns what it wrote to stderr."""
    environment = {**os.environ, "WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0" * 40}
    del environment["WANDB_MODE"]
    command = [sys.executable, "-c", SCRIPT, str(run_dir), str(first), str(last), mode]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.slow
def test_wandb_offline_keeps_its_id_over_a_resume(tmp_path: Path):
    assert "wandb" not in record_with_wandb(tmp_path, 1, 5, "offline")
    record_with_wandb(tmp_path, 6, 8, "offline")
    run_id = (tmp_path / "wandb_id").read_text()
    folders = [folder.name for folder in (tmp_path / "wandb").glob("offline-run-*")]
    assert len(folders) == 2
    assert all(name.endswith(run_id) for name in folders)


@pytest.mark.slow
def test_wandb_online_without_network_goes_on_offline(tmp_path: Path):
    assert "wandb (online) does not start" in record_with_wandb(tmp_path, 1, 3, "online")
    assert len(read_metrics(tmp_path)) == 3
    assert list((tmp_path / "wandb").glob("offline-run-*"))


def test_plot(tmp_path: Path):
    record(tmp_path, 1, 20)
    picture = plot_loss(tmp_path).read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 10_000


def test_plot_without_experts_validation_or_steps(tmp_path: Path):
    with pytest.raises(ValueError, match="no step to plot"):
        plot_loss(tmp_path)
    log = MetricsLogger(tmp_path, recipe())
    log.log(1, {"loss": 2.0}, {})
    assert plot_loss(tmp_path).exists()


def test_smoothing_keeps_a_line_and_the_ends():
    line = [float(i) for i in range(200)]
    assert _smooth(line) == pytest.approx(line)
    assert _smooth([3.0]) == [3.0]


def test_environment_describes_each_launch(tmp_path: Path):
    write_environment(tmp_path, recipe())
    write_environment(tmp_path, recipe(), {"teacher": {"step": 4}})
    assert load_recipe(tmp_path / "recipe.yaml") == recipe()
    launches = json.loads((tmp_path / "environment.json").read_text())
    assert len(launches) == 2
    assert launches[0]["packages"]["torch"] == torch.__version__
    assert launches[0]["command"] == sys.argv
    assert "teacher" not in launches[0]
    assert launches[1]["teacher"] == {"step": 4}


def test_clock():
    assert [_clock(s) for s in (0, 59.6, 61, 3661)] == ["0:00", "1:00", "1:01", "1:01:01"]
