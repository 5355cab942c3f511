"""What the tests on the cluster of two_hosts.sh share: a corpus, a recipe, and the run to compare with."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from megasparse.data.prepare import PrepareConfig, prepare
from tests.cluster.jobs import metrics, slurm, submit, wait_for, wait_for_job

TEXT = "def f{i}(x):\n    return x + {i}\n\n\nclass C{i}:\n    value = {i}\n"
STEPS = 40
os.environ.pop("MEGASPARSE_SUPERVISOR", None)


@pytest.fixture(scope="session")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny mixture of experts with dropout, its experts on two hosts, a checkpoint each 10 of 40 steps."""
    folder = tmp_path_factory.mktemp("recipe")
    (folder / "texts").mkdir()
    for i in range(200):
        (folder / "texts" / f"{i}.py").write_text(TEXT.replace("{i}", str(i)) * 3)
    prepare(PrepareConfig(output=folder / "set", sources=[folder / "texts"], vocab_size=300, workers=1))
    raw = {
        "name": "tiny",
        "data": {"sets": [{"path": str(folder / "set")}], "seq_length": 32},
        "model": {
            "num_layers": 2,
            "hidden_size": 32,
            "num_attention_heads": 4,
            "num_query_groups": 2,
            "hidden_dropout": 0.1,
            "moe": {"num_experts": 4, "ffn_hidden_size": 32, "jitter": 0.05, "bias_update_rate": 0.01},
        },
        "optimizer": {"lr": 3e-3},
        "training": {
            "steps": STEPS,
            "global_batch_size": 8,
            "micro_batch_size": 2,
            "save_interval": 10,
            "eval_stride": 32,
            "eval_interval": 20,
        },
        "parallel": {"ep": 2},
        "logging": {"tensorboard": False, "wandb": "disabled"},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(raw))
    # What deepspeed gives to ranks that it starts through ssh: both hosts share this machine's cores.
    (folder / "environment").write_text("OMP_NUM_THREADS=1\nDS_ACCELERATOR=cpu\n")
    os.environ["DS_ENV_FILE"] = str(folder / "environment")
    return path


@pytest.fixture(scope="session")
def undisturbed(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The metrics of the run that nothing happens to, started by srun."""
    run_dir = tmp_path_factory.mktemp("undisturbed")
    job = submit(recipe, run_dir)
    wait_for_job(job, run_dir)
    return metrics(run_dir)


@pytest.fixture(autouse=True)
def _leave_nothing(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    slurm("scancel", "--user=root", "--state=RUNNING")
    slurm("scancel", "--user=root")
    wait_for(lambda: not slurm("squeue", "-h").strip(), 30)
    for host in ("n1", "n2"):
        slurm("ssh", host, "pkill", "-9", "-f", "'megasparse.* train '")
