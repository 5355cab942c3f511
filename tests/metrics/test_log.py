"""The record of a run through kill and resume, TensorBoard's."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megasparse.metrics.log import MetricsLogger
from megasparse.metrics.record import read_metrics
from tests.metrics.runs import figures, recipe, record


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


def test_a_record_that_goes_back_equals_the_uninterrupted_one(tmp_path: Path):
    record(tmp_path / "whole", 1, 20)
    log = MetricsLogger(tmp_path / "back", recipe())
    for step in [*range(1, 14), 11, *range(12, 21)]:
        if step == 11 and len(read_metrics(tmp_path / "back")) == 13:
            log.rewind(11)
        log.log(step, figures(step), {})
    log.close()
    assert without_timing(tmp_path / "back") == without_timing(tmp_path / "whole")


def test_each_line_is_there_before_the_next_step(tmp_path: Path):
    log = MetricsLogger(tmp_path, recipe())
    log.log(1, figures(1), {})
    assert len(read_metrics(tmp_path)) == 1


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
