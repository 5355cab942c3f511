"""Where this process stands among those that were started together: one mapping for every launcher.

deepspeed and torchrun tell each process by RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, and how many
share its host by LOCAL_SIZE or LOCAL_WORLD_SIZE. srun tells by SLURM_* variables of its step. Without either a process
is alone. deepspeed or torchrun under srun set theirs, which go first.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

FIRST_PORT, PORTS = 15_000, 10_000  # of steps of srun that give no MASTER_PORT: below what Linux hands out by itself
ELSEWHERE = {  # launchers that say so by other variables: each process would take itself for the only one
    "OMPI_COMM_WORLD_SIZE": "Open MPI's mpirun",
    "PMI_SIZE": "mpiexec",
}


@dataclass(frozen=True)
class Launch:
    """What a launcher told this process."""

    launcher: str  # "deepspeed", "torchrun", "srun" or "none"
    rank: int
    world_size: int
    local_rank: int  # among the processes of this host
    local_world_size: int
    master_addr: str
    master_port: int  # 0 for a process alone: wherever there is room

    def export(self) -> None:
        """Set what torch.distributed and DeepSpeed read."""
        os.environ.update(
            RANK=str(self.rank),
            WORLD_SIZE=str(self.world_size),
            LOCAL_RANK=str(self.local_rank),
            LOCAL_SIZE=str(self.local_world_size),
            MASTER_ADDR=self.master_addr,
            MASTER_PORT=str(self.master_port),
        )


def launch(environment: Mapping[str, str] | None = None) -> Launch:
    """Read ``environment`` (None: this process's). ValueError naming the variable that is missing or wrong."""
    env = os.environ if environment is None else environment
    if "RANK" in env or "WORLD_SIZE" in env:
        found = _ranks(env)
    elif "SLURM_STEP_ID" in env:
        found = _srun(env)
    else:
        _check_alone(env)
        return Launch("none", 0, 1, 0, 1, "127.0.0.1", 0)
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE")
    if found.launcher == "srun":
        names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE")
    elif found.launcher == "torchrun":
        names = (*names[:3], "LOCAL_WORLD_SIZE")
    for (name, value), (of, size) in (
        ((names[0], found.rank), (names[1], found.world_size)),
        ((names[2], found.local_rank), (names[3], found.local_world_size)),
        ((names[3], found.local_world_size - 1), (names[1], found.world_size)),
    ):
        if value >= size:
            raise ValueError(f"{name}={env[name]} does not go with {of}={env[of]}: check what the launcher sets")
    return found


def _ranks(env: Mapping[str, str]) -> Launch:
    """deepspeed, torchrun, or a script that sets the same."""
    if env.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and env.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0":
        raise ValueError(
            "ranks that torchrun starts again would read the addresses of those before them from its store: set "
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 where torchrun starts, or give it --max_restarts=0"
        )
    local = "LOCAL_WORLD_SIZE" if "LOCAL_WORLD_SIZE" in env and "LOCAL_SIZE" not in env else "LOCAL_SIZE"
    who = "RANK and WORLD_SIZE say that a launcher started this process"
    return Launch(
        "torchrun" if local == "LOCAL_WORLD_SIZE" else "deepspeed",
        _number(env, "RANK", who),
        _number(env, "WORLD_SIZE", who, least=1),
        _number(env, "LOCAL_RANK", who),
        _number(env, local, who, least=1),
        _text(env, "MASTER_ADDR", who),
        _port(env, who),
    )


def _srun(env: Mapping[str, str]) -> Launch:
    """A task of a step of Slurm's srun."""
    who = "SLURM_STEP_ID says that srun started this process"
    step = _number(env, "SLURM_STEP_ID", who)
    job = _number(env, "SLURM_JOB_ID", who)
    tasks = tasks_per_node(_text(env, "SLURM_STEP_TASKS_PER_NODE", who))
    node = _number(env, "SLURM_NODEID", who)
    if node >= len(tasks):
        raise ValueError(
            f"SLURM_NODEID={node} is not one of SLURM_STEP_TASKS_PER_NODE={env['SLURM_STEP_TASKS_PER_NODE']}"
        )
    return Launch(
        "srun",
        _number(env, "SLURM_PROCID", who),
        _number(env, "SLURM_STEP_NUM_TASKS", who, least=1),
        _number(env, "SLURM_LOCALID", who),
        tasks[node],
        env["MASTER_ADDR"] if env.get("MASTER_ADDR") else first_host(_text(env, "SLURM_STEP_NODELIST", who)),
        _port(env, who) if env.get("MASTER_PORT") else FIRST_PORT + 2 * (job + step) % PORTS,
    )


def tasks_per_node(text: str) -> list[int]:
    """Slurm's ``2(x3),1``, tasks on each node, written out: [2, 2, 2, 1]."""
    counts = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise ValueError(f"SLURM_STEP_TASKS_PER_NODE={text}: a list such as 2(x3),1 was expected")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def first_host(nodes: str) -> str:
    """The first of Slurm's list of nodes: ``gpu[007-008,12],login`` -> ``gpu007``."""
    first = re.match(r"(?:[^\[\],]|\[[^\]]*\])+", nodes)
    if first is None:
        raise ValueError(f"SLURM_STEP_NODELIST={nodes}: a list of nodes such as n[1-4] was expected")
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first[0])


def _check_alone(env: Mapping[str, str]) -> None:
    """Was this process meant to be one of several?"""
    tasks = env.get("SLURM_NTASKS", "1")
    if "SLURM_JOB_ID" in env and tasks.isdigit() and int(tasks) > 1:
        raise ValueError(
            f"this job of Slurm has SLURM_NTASKS={tasks}, but SLURM_STEP_ID is not set: it would run alone; "
            "start it with srun (or deepspeed, or torchrun)"
        )
    for name, launcher in ELSEWHERE.items():
        size = env.get(name, "1")
        if size.isdigit() and int(size) > 1:
            raise ValueError(
                f"{name}={size} says that {launcher} started this process, but RANK is not set: use deepspeed, "
                "torchrun or srun"
            )


def _text(env: Mapping[str, str], name: str, who: str) -> str:
    if not env.get(name):
        raise ValueError(f"{name} is not set, but {who}")
    return env[name]


def _number(env: Mapping[str, str], name: str, who: str, least: int = 0) -> int:
    text = _text(env, name, who)
    if not text.isdigit() or int(text) < least:
        raise ValueError(f"{name}={text}: a whole number of {least} or more was expected")
    return int(text)


def _port(env: Mapping[str, str], who: str) -> int:
    port = _number(env, "MASTER_PORT", who)
    if port > 65_534:  # the next one is the supervisors'
        raise ValueError(f"MASTER_PORT={port}: a port of 65534 or less was expected")
    return port
