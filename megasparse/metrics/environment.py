"""What a run ran with: recipe.yaml and environment.json."""

from __future__ import annotations

import json
import os
import platform as host
import subprocess
import sys
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from megasparse import platform
from megasparse.config import Recipe, dump_recipe
from megasparse.files import write_atomic
from megasparse.launch import launch
from megasparse.layout import Layout


def write_environment(run_dir: Path, recipe: Recipe, vocab_size: int, sources: Mapping[str, Any] | None = None) -> None:
    """Make the run folder describe itself: ``recipe.yaml``, fully resolved, and ``environment.json``, a list with the
    command, layout, vocabulary, versions, git commit and machine of each launch, the first run's and every
    resumption's; and with ``sources``, what identifies other runs whose weights it used."""
    run_dir.mkdir(parents=True, exist_ok=True)
    write_atomic(run_dir / "recipe.yaml", dump_recipe(recipe))
    path = run_dir / "environment.json"
    launches = json.loads(path.read_text()) if path.exists() else []
    launch = {**_environment(), "layout": str(layout_of(recipe)), "vocab_size": vocab_size, **(sources or {})}
    write_atomic(path, json.dumps([*launches, launch], indent=1) + "\n")


def layout_of(recipe: Recipe) -> Layout:
    """Of this launch."""
    return Layout.of(recipe.parallel, launch().world_size)


def _environment() -> dict[str, Any]:
    packages = ["megasparse", "torch", "megatron-core", "deepspeed", "transformers", "tokenizers", "sentencepiece"]
    device = platform.device()
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        "world_size": launch().world_size,
        "launcher": launch().launcher,
        "commit": _git_commit(),
        "python": host.python_version(),
        "packages": {name: _package_version(name) for name in [*packages, "numpy", "triton", "transformer-engine"]},
        "system": host.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else host.processor() or host.machine(),
        "cpus": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
    }


def _package_version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """The checkout's commit, with ``-dirty`` if tracked files differ from it; None outside a checkout."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10)
        status = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, timeout=10)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    if commit.returncode:
        return None
    return commit.stdout.strip() + ("-dirty" if status.stdout.strip() else "")
