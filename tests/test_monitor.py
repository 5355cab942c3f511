"""What the monitor shows of runs that wait, go on, are resumed, stall and end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from megasparse.metrics.environment import write_environment
from megasparse.monitor import PLAIN_WIDTH, Progress, frame, monitor
from tests.metrics.runs import recipe, record

NOW = 1_800_000_000.0


def write(run_dir: Path, steps: range, seconds: float = 2.0, **figures: Any) -> None:
    """Append records of steps that took ``seconds`` each, the last of which ended at NOW."""
    run_dir.mkdir(exist_ok=True)
    if not (run_dir / "recipe.yaml").exists():
        write_environment(run_dir, recipe(), 96)
        (run_dir / "environment.json").write_text('[{"time": "2020-01-01T00:00:00+0000"}]')
    with (run_dir / "metrics.jsonl").open("a") as file:
        for step in steps:
            timing = {"seconds": seconds, "tokens_per_second": 1000.0, "mfu": 0.5}
            moment = NOW - seconds * (steps[-1] - step)
            line = {
                "step": step,
                "loss": 10.0 - step,
                "grad_norm": 1.0,
                **figures,
                "timing": {**timing, "time": moment},
            }
            file.write(json.dumps(line) + "\n")


def shown(*run_dirs: Path, now: float = NOW) -> str:
    runs = [Progress(run_dir) for run_dir in run_dirs]
    for run in runs:
        run.refresh()
    return text(runs, now)


def text(runs: list[Progress], now: float = NOW, width: int = PLAIN_WIDTH) -> str:
    console = Console(width=width, highlight=False)
    with console.capture() as capture:
        console.print(frame(runs, now, console))
    return capture.get()


def test_a_run_that_goes_on(tmp_path: Path):
    write(tmp_path / "run", range(1, 9), validation_loss=3.25, expert_load=1.5, dropped_fraction=0.125)
    page = shown(tmp_path / "run", now=NOW + 3)
    # 12 of 20 steps are left at 2 s; the mean of losses 2, 3, 4, 5 less that of 6, 7, 8, 9 is -4
    for figure in ["8/20", "eta 0:24", "2.0000", "-4.0000", "3.2500", "1,000", "mfu 50.0%", "1.50", "dropped 12.5%"]:
        assert figure in page
    assert "0:03 ago" in page
    assert "blocks" not in page  # no record has any
    assert "skipped" not in page


def test_the_pace_counts_evaluations_and_not_the_time_between_launches(tmp_path: Path):
    write(tmp_path, range(1, 4))
    path = tmp_path / "metrics.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for entry, moment in zip(records, [NOW - 5000, NOW - 30, NOW], strict=True):  # steps of 2 s, 28 s beside them
        entry["timing"]["time"] = moment
    path.write_text("".join(json.dumps(entry) + "\n" for entry in records))
    launched = time.strftime("%Y-%m-%dT%H:%M:%S+0000", time.gmtime(NOW - 60))
    (tmp_path / "environment.json").write_text(json.dumps([{"time": launched}]))
    run = Progress(tmp_path)
    run.refresh()
    assert run.pace() == pytest.approx(30)


def test_what_is_not_finite_or_skipped(tmp_path: Path):
    write(tmp_path / "run", range(1, 4))
    write(tmp_path / "run", range(4, 6), loss=None, skipped=1)
    lines = shown(tmp_path / "run").splitlines()
    assert lines[0].split()[-3:] == ["skipped", "last", "record"]
    assert " 2 " in lines[1]


@pytest.mark.parametrize(
    ("age", "step", "state"),
    [
        (59, 8, "0:59 ago"),
        (61, 8, "STALLED 1:01"),
        (61, 20, "done 1:01 ago"),
        (7200, 8, "STALLED 2:00:00"),
        (3e5, 20, "done 3 days ago"),
    ],
)
def test_a_run_stalls_only_before_its_end(tmp_path: Path, age: float, step: int, state: str):
    write(tmp_path / "run", range(1, step + 1))
    assert state in shown(tmp_path / "run", now=NOW + age)


@pytest.mark.parametrize(("kind", "state"), [("signal", "saved, ended 1:40 ago"), ("killed", "killed, ended 1:40 ago")])
def test_a_run_that_was_ended_is_not_stalled(tmp_path: Path, kind: str, state: str):
    """... but for what a run before it ended with."""
    write(tmp_path / "run", range(1, 4))
    event = {"time": datetime.fromtimestamp(NOW).isoformat(), "step": 3, "kind": kind, "rank": None, "host": None}
    (tmp_path / "run" / "faults.jsonl").write_text(json.dumps({**event, "message": "x"}) + "\n")
    assert state in shown(tmp_path / "run", now=NOW + 100)
    event["time"] = datetime.fromtimestamp(NOW - 1000).isoformat()
    (tmp_path / "run" / "faults.jsonl").write_text(json.dumps({**event, "message": "x"}) + "\n")
    assert "STALLED 1:40" in shown(tmp_path / "run", now=NOW + 100)


def test_slow_steps_are_no_stall(tmp_path: Path):
    write(tmp_path / "run", range(1, 4), seconds=30)
    assert "STALLED" not in shown(tmp_path / "run", now=NOW + 290)
    assert "STALLED 5:10" in shown(tmp_path / "run", now=NOW + 310)


def test_runs_that_have_not_started(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    write(tmp_path / "run", range(1, 3))
    lines = shown(tmp_path / "empty", tmp_path / "none", tmp_path / "run").splitlines()
    assert lines[1].split() == ["empty", "no", "step", "yet"]
    assert lines[2].split() == ["none", "no", "such", "folder", "yet"]
    assert lines[3].startswith("run ")


def test_a_resumed_run_is_followed(tmp_path: Path):
    """Its record is rewritten by a real logger, from step 6 on, while the monitor looks."""
    run_dir = tmp_path / "run"
    write_environment(run_dir, recipe(), 96)
    run = Progress(run_dir)
    run.refresh()
    assert "no step yet" in text([run])
    record(run_dir, 1, 13)
    run.refresh()
    assert "13/20" in text([run])
    record(run_dir, 6, 7)
    run.refresh()
    assert "7/20" in text([run])
    assert [entry["step"] for entry in run.records] == list(range(1, 8))
    assert run.validation == 1.0  # of step 5; that of step 10 is gone
    record(run_dir, 3, 4)
    run.refresh()
    assert run.validation is None


@pytest.mark.parametrize("width", [60, 80])
def test_a_narrow_terminal_cuts_no_figure(tmp_path: Path, width: int):
    figures = {"validation_loss": 3.25, "expert_load": 1.5, "dropped_fraction": 0.125, "block_density": 0.5}
    runs = [Progress(tmp_path / name) for name in ("first", "second", "third", "fourth")]
    for run in runs:
        write(run.run_dir, range(1, 9), **figures)
        run.refresh()
    page = text(runs, width=width)
    assert "…" not in page
    for figure in [
        "8/20",
        "eta 0:24",
        " 2.0000",
        "-4.0000",
        "3.2500",
        "1,000",
        "mfu 50.0%",
        "dropped 12.5%",
        "0:00 ago",
    ]:
        assert page.count(figure) == 4, figure
    assert max(map(len, page.splitlines())) <= width


def fault(**changes: Any) -> dict[str, Any]:
    basis = {"time": "2027-01-15T08:00:00+00:00", "step": 7, "kind": "hang", "rank": 3, "host": "node1", "message": "m"}
    return {**basis, **changes}


def test_faults_are_listed_as_they_are_written(tmp_path: Path):
    for name in ("a", "b"):
        write(tmp_path / name, range(1, 9))
    first = fault(message="[bold]no markup[/bold] here", time="2027-01-15T09:00:00+00:00")
    second = fault(
        kind="lost", step=None, rank=None, host=None, message="nobody answers", time="2027-01-15T08:00:00+0000"
    )
    for name, entry in (("a", first), ("b", second)):
        (tmp_path / name / "faults.jsonl").write_text(json.dumps(entry) + "\n" + '{"time": "2027')
    below = shown(tmp_path / "a", tmp_path / "b").split("faults ")[1].splitlines()[1:]
    assert below[1].split()[2:] == ["b", "lost", "nobody", "answers"]
    assert below[2].split()[2:] == ["a", "7", "hang", "rank", "3", "node1", "[bold]no", "markup[/bold]", "here"]


def test_only_the_last_faults_are_listed(tmp_path: Path):
    write(tmp_path, range(1, 9))
    lines = [json.dumps(fault(message=f"number {n}")) + "\n" for n in range(30)]
    (tmp_path / "faults.jsonl").write_text("".join(lines))
    page = shown(tmp_path)
    assert "faults, the last 8 of 30" in page
    assert "number 22" in page
    assert "number 21" not in page


def test_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write(tmp_path / "run", range(1, 9))
    monitor([tmp_path / "run"], once=True)
    assert "8/20" in capsys.readouterr().out


def test_on_a_terminal_until_ctrl_c(tmp_path: Path):
    """A run that starts while the monitor looks, in a pseudo-terminal."""
    main, side = os.openpty()
    command = [sys.executable, "-m", "megasparse", "monitor", str(tmp_path / "run"), "--interval", "0.1"]
    process = subprocess.Popen(
        command,
        stdout=side,
        stderr=side,
        env={**os.environ, "COLUMNS": "120", "TERM": "xterm"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which background jobs ignore
    )
    os.close(side)
    try:
        read_until(main, "no such folder yet")
        write(tmp_path / "run", range(1, 6))
        read_until(main, "5/20")
        write(tmp_path / "run", range(6, 8))
        read_until(main, "7/20")
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=10) == 0
    finally:
        process.kill()


def read_until(terminal: int, wanted: str) -> None:
    os.set_blocking(terminal, False)
    seen, deadline = "", time.monotonic() + 20
    while wanted not in seen:
        assert time.monotonic() < deadline, seen
        try:
            seen += os.read(terminal, 65536).decode()
        except BlockingIOError:
            time.sleep(0.02)
