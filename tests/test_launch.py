"""What each launcher sets, and what is said of a variable that is missing or wrong."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from base64 import b64encode
from pathlib import Path

import pytest

from megasparse.launch import Launch, first_host, launch, tasks_per_node
from tests.helpers import REPOSITORY

DEEPSPEED = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_SIZE": "2",
    "MASTER_ADDR": "n1",
    "MASTER_PORT": "29500",
    "CROSS_RANK": "1",
    "CROSS_SIZE": "2",
}
TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "n1",
    "MASTER_PORT": "29500",
    "GROUP_RANK": "1",
    "TORCHELASTIC_RUN_ID": "x",
    "TORCHELASTIC_RESTART_COUNT": "0",
    "TORCHELASTIC_MAX_RESTARTS": "0",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
}
SRUN = {  # of task 3, srun --nodes 2 --ntasks-per-node 2
    "SLURM_JOB_ID": "71",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_NODEID": "1",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, Launch("none", 0, 1, 0, 1, "127.0.0.1", 0)),
        (DEEPSPEED, Launch("deepspeed", 3, 4, 1, 2, "n1", 29500)),
        (TORCHRUN, Launch("torchrun", 3, 4, 1, 2, "n1", 29500)),
        (SRUN, Launch("srun", 3, 4, 1, 2, "n1", 15_142)),
        ({**SRUN, **DEEPSPEED, "RANK": "2", "LOCAL_RANK": "0"}, Launch("deepspeed", 2, 4, 0, 2, "n1", 29500)),
        # deepspeed --launcher slurm: srun, with the address and the port that deepspeed chose
        ({**SRUN, "MASTER_ADDR": "n2", "MASTER_PORT": "29501"}, Launch("srun", 3, 4, 1, 2, "n2", 29501)),
        ({**SRUN, "SLURM_STEP_ID": "9", "SLURM_JOB_ID": "4999"}, Launch("srun", 3, 4, 1, 2, "n1", 15_016)),
        (
            {**SRUN, "SLURM_STEP_TASKS_PER_NODE": "3,1", "SLURM_LOCALID": "0"},
            Launch("srun", 3, 4, 0, 1, "n1", 15_142),
        ),
        ({"SLURM_JOB_ID": "71", "SLURM_NTASKS": "1"}, Launch("none", 0, 1, 0, 1, "127.0.0.1", 0)),
    ],
    ids=["alone", "deepspeed", "torchrun", "srun", "deepspeed in srun", "by slurm", "port", "uneven", "batch of one"],
)
def test_where_a_process_stands(environment: dict[str, str], expected: Launch) -> None:
    assert launch(environment) == expected


@pytest.mark.parametrize("environment", [DEEPSPEED, TORCHRUN, SRUN], ids=["deepspeed", "torchrun", "srun"])
def test_each_missing_variable_is_named(environment: dict[str, str]) -> None:
    used = [name for name in environment if name.startswith(("RANK", "WORLD", "LOCAL", "MASTER", "SLURM_"))]
    for name in used:
        if name in ("SLURM_NTASKS", "SLURM_STEP_ID"):
            continue
        rest = {key: value for key, value in environment.items() if key != name}
        # Of torchrun's and deepspeed's number of local processes one is enough.
        named = "LOCAL_SIZE" if name == "LOCAL_WORLD_SIZE" else name
        with pytest.raises(ValueError, match=f"^{named} is not set, but "):
            launch(rest)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"RANK": "4"}, r"^RANK=4 does not go with WORLD_SIZE=4"),
        ({"LOCAL_RANK": "2"}, r"^LOCAL_RANK=2 does not go with LOCAL_SIZE=2"),
        ({"LOCAL_SIZE": "5"}, r"^LOCAL_SIZE=5 does not go with WORLD_SIZE=4"),
        ({"WORLD_SIZE": "0"}, r"^WORLD_SIZE=0: a whole number of 1 or more"),
        ({"RANK": "-1"}, r"^RANK=-1: a whole number"),
        ({"MASTER_PORT": "http"}, r"^MASTER_PORT=http: a whole number"),
        ({"LOCAL_SIZE": "two"}, r"^LOCAL_SIZE=two: a whole number of 1 or more"),
        ({"MASTER_ADDR": ""}, r"^MASTER_ADDR is not set, but RANK and WORLD_SIZE say"),
        ({"MASTER_PORT": "65535"}, r"^MASTER_PORT=65535: a port of 65534 or less"),
    ],
)
def test_what_is_wrong_is_named(changes: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        launch({**DEEPSPEED, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"LOCAL_RANK": "2"}, r"^LOCAL_RANK=2 does not go with LOCAL_WORLD_SIZE=2"),
        ({"LOCAL_WORLD_SIZE": "5"}, r"^LOCAL_WORLD_SIZE=5 does not go with WORLD_SIZE=4"),
        ({"LOCAL_WORLD_SIZE": "0"}, r"^LOCAL_WORLD_SIZE=0: a whole number of 1 or more"),
    ],
)
def test_what_is_wrong_of_torchrun_is_named(changes: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        launch({**TORCHRUN, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"SLURM_PROCID": "4"}, r"^SLURM_PROCID=4 does not go with SLURM_STEP_NUM_TASKS=4"),
        ({"SLURM_NODEID": "2"}, r"^SLURM_NODEID=2 is not one of SLURM_STEP_TASKS_PER_NODE=2\(x2\)"),
        ({"SLURM_LOCALID": "2"}, r"^SLURM_LOCALID=2 does not go with SLURM_STEP_TASKS_PER_NODE=2\(x2\)"),
        ({"SLURM_STEP_NUM_TASKS": "0"}, r"^SLURM_STEP_NUM_TASKS=0: a whole number of 1 or more"),
        ({"SLURM_JOB_ID": "71_2"}, r"^SLURM_JOB_ID=71_2: a whole number"),
        ({"MASTER_PORT": "70000"}, r"^MASTER_PORT=70000: a port of 65534 or less"),
        ({"SLURM_STEP_TASKS_PER_NODE": "2(x2"}, r"^SLURM_STEP_TASKS_PER_NODE=2\(x2: a list such as"),
        ({"SLURM_STEP_TASKS_PER_NODE": "many"}, r"^SLURM_STEP_TASKS_PER_NODE=many: a list such as"),
        ({"SLURM_STEP_NODELIST": ","}, r"^SLURM_STEP_NODELIST=,: a list of nodes"),
    ],
)
def test_what_is_wrong_of_slurm_is_named(changes: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        launch({**SRUN, **changes})


def test_processes_that_would_take_themselves_for_the_only_one() -> None:
    with pytest.raises(ValueError, match=r"SLURM_NTASKS=16, but SLURM_STEP_ID is not set.*start it with srun"):
        launch({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "16"})
    with pytest.raises(ValueError, match="OMPI_COMM_WORLD_SIZE=4 says that Open MPI's mpirun started this process"):
        launch({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "2"})
    with pytest.raises(ValueError, match="PMI_SIZE=2 says that mpiexec started this process"):
        launch({"PMI_SIZE": "2", "PMI_RANK": "0"})
    assert launch({"OMPI_COMM_WORLD_SIZE": "1"}).launcher == "none"
    assert launch({**DEEPSPEED, "OMPI_COMM_WORLD_SIZE": "4"}).rank == 3
    assert launch({**SRUN, "PMI_SIZE": "4"}).rank == 3


def test_a_store_that_outlives_ranks_is_refused() -> None:
    """torchrun with restarts keeps the addresses of ranks that are gone."""
    with pytest.raises(ValueError, match="set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        launch({**TORCHRUN, "TORCHELASTIC_MAX_RESTARTS": "3"})
    alone = {**TORCHRUN, "TORCHELASTIC_MAX_RESTARTS": "3", "TORCHELASTIC_USE_AGENT_STORE": "False"}
    assert launch(alone).launcher == "torchrun"


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("gpu[007-010,12]", "gpu007"),
        ("gpu[3,5-6],login", "gpu3"),
        ("rack[2-3]n[10-12]-ib", "rack2n10-ib"),
        ("a-b.example.org,c", "a-b.example.org"),
    ],
)
def test_the_first_host(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_tasks_of_each_node() -> None:
    assert tasks_per_node("2(x3),1") == [2, 2, 2, 1]
    assert tasks_per_node("4") == [4]


def test_steps_of_srun_that_run_at_once_have_their_own_ports() -> None:
    """The one after each is the supervisors'. All are below 25000: Linux hands out ports from 32768 on."""
    ports = [launch({**SRUN, "SLURM_JOB_ID": str(job)}).master_port for job in range(4990, 5010)]
    assert len({port + more for port in ports for more in (0, 1)}) == 40
    assert all(15_000 <= port < 25_000 for port in ports)


# In one write: the two share their output.
SHOW = """
import os
from megasparse.launch import launch

os.write(1, (" ".join(map(str, vars(launch()).values())) + "\\n").encode())
"""


@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_the_real_launcher(launcher: str, tmp_path: Path) -> None:
    script = tmp_path / "show.py"
    script.write_text(SHOW)
    port = 27_000 + os.getpid() % 1000
    world = b64encode(b'{"localhost": [0, 1]}').decode()
    start = {
        "deepspeed": ["-m", "deepspeed.launcher.launch", f"--world_info={world}", "--master_addr=127.0.0.1"],
        "torchrun": ["-m", "torch.distributed.run", "--nproc_per_node=2", "--master_addr=127.0.0.1"],
    }[launcher]
    environment = {key: value for key, value in os.environ.items() if key not in {*DEEPSPEED, *TORCHRUN}}
    done = subprocess.run(
        [sys.executable, *start, f"--master_port={port}", script],
        capture_output=True,
        text=True,
        timeout=60,
        env={**environment, "PYTHONPATH": str(REPOSITORY)},
    )
    assert done.returncode == 0, done.stderr
    lines = sorted(re.findall(rf"^{launcher} .*$", done.stdout, re.MULTILINE))
    assert lines == [f"{launcher} {rank} 2 {rank} 2 127.0.0.1 {port}" for rank in range(2)]


def test_what_is_exported_is_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in DEEPSPEED:
        monkeypatch.setenv(name, "")
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    place = launch(SRUN)
    place.export()
    again = launch(os.environ)
    assert vars(again) == {**vars(place), "launcher": "deepspeed"}
