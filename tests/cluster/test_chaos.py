"""The campaign of faults, short: one of each kind, on two hosts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.helpers import REPOSITORY

KINDS = ["kill", "supervisor", "term", "usr1", "nan", "hang", "disk"]  # a cut network takes longer: test_cluster.py


def test_a_run_survives_every_kind_of_fault(tmp_path: Path) -> None:
    arguments = ["--faults", str(len(KINDS)), "--steps", "40", "--only", ",".join(KINDS), "--json", tmp_path / "found"]
    done = subprocess.run(
        [sys.executable, REPOSITORY / "tools" / "chaos.py", *arguments], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(KINDS)} of {len(KINDS)} faults survived" in done.stdout
    found = json.loads((tmp_path / "found").read_text())
    assert found["faults"] == dict.fromkeys(KINDS, 1)
    assert found["equal"]
    assert found["starts"] == len(KINDS), "all but the NaN ended the job"
