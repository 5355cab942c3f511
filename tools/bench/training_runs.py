"""Training runs as processes of their own, for benches that compare what runs end with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml


def metrics_of(folder: Path, recipe: dict[str, Any], threads: int) -> list[dict[str, Any]]:
    """The metrics of each step of the recipe's run in ``folder``, on ``threads`` CPUs; made where it is not there."""
    if not (folder / "done").exists():
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "variant.yaml"
        path.write_text(yaml.safe_dump(recipe))
        command = [sys.executable, "-m", "megasparse", "train", str(path), "--run-dir", str(folder)]
        with (folder / "log.txt").open("w") as log:
            environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
            subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT, env=environment)
        (folder / "done").touch()
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
