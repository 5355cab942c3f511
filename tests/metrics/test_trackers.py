"""wandb through a resume and without a network."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megasparse.metrics.record import read_metrics

SCRIPT = """
import sys
from pathlib import Path
from tests.metrics.runs import record
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
