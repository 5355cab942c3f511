"""Process groups: the only place that creates or looks them up.

megatron-core's parallel_state owns tensor, pipeline and data parallelism. DeepSpeed owns expert parallelism, folded
over the tensor x data ranks of one pipeline stage.
"""

from __future__ import annotations

import gc
import logging
import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from megasparse import platform

Group = dist.ProcessGroup
COLLECTIVE_TIMEOUT = timedelta(minutes=10)


@dataclass(frozen=True)
class Topology:
    """Where this process stands. Sizes and ranks along each dimension, and the groups collectives run in."""

    rank: int
    world_size: int
    tp: int
    tp_rank: int
    tp_group: Group
    pp: int
    pp_rank: int
    dp: int
    dp_rank: int
    dp_group: Group
    ep: int
    ep_rank: int
    ep_group: Group
    expert_dp: int  # ranks that hold the same experts
    sequence_parallel: bool

    @property
    def is_first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pp - 1

    @property
    def layout(self) -> str:
        """The notation used in logs and run names, such as ``tp2pp2ep2``; ``single`` for one process."""
        sizes = {"tp": self.tp, "pp": self.pp, "ep": self.ep, "dp": self.dp}
        return "".join(f"{name}{size}" for name, size in sizes.items() if size > 1) or "single"


class MegatronMPU:
    """parallel_state as DeepSpeed's ``mpu``: with the two older Megatron names it still calls."""

    def __getattr__(self, name: str) -> Any:
        from megatron.core import parallel_state

        return getattr(parallel_state, name)

    def get_model_parallel_world_size(self) -> int:
        return dist.get_world_size(self.get_model_parallel_group())

    def get_model_parallel_rank(self) -> int:
        return dist.get_rank(self.get_model_parallel_group())


def initialize(tp: int = 1, pp: int = 1, ep: int = 1, sequence_parallel: bool = False, seed: int = 1234) -> Topology:
    """Join the process group (one process where no launcher set WORLD_SIZE) and create every group of the layout.

    Seeds what dropout draws from. It differs between data-parallel ranks and between stages. The tensor-parallel ranks
    of a stage draw alike for activations they all hold, and differently in megatron-core's tensor-parallel regions.
    """
    platform.activate()
    import deepspeed
    from deepspeed.utils import groups
    from deepspeed.utils import logger as deepspeed_logger
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    deepspeed_logger.setLevel(logging.ERROR)
    # An all-reduce for CPU inference, compiled at the first use (half a minute); training does not call it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not dist.is_initialized():
        _default_environment()
        deepspeed.init_distributed(platform.backend(), verbose=False, timeout=COLLECTIVE_TIMEOUT)
    parallel_state.initialize_model_parallel(tp, pp, create_gloo_process_groups=False)
    groups.mpu = MegatronMPU()
    groups._create_expert_and_data_parallel(ep)
    dp, dp_rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    pp_rank = parallel_state.get_pipeline_model_parallel_rank()
    seed += tp * (pp_rank * dp + dp_rank)  # megatron-core adds the tp rank
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)

    expert = f"ep_size_{ep}"
    return Topology(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        tp=tp,
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        pp=pp,
        pp_rank=pp_rank,
        dp=dp,
        dp_rank=dp_rank,
        dp_group=parallel_state.get_data_parallel_group(),
        ep=ep,
        ep_rank=groups._get_expert_parallel_rank(expert),
        ep_group=groups._get_expert_parallel_group(expert),
        expert_dp=groups._get_expert_data_parallel_world_size(expert),
        sequence_parallel=sequence_parallel,
    )


def shutdown() -> None:
    """Forget every group but the world, so that :func:`initialize` can build another layout in this process.

    megatron-core and DeepSpeed forget theirs without destroying them; each gloo group left over keeps its threads.
    """
    from deepspeed.utils import groups
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)
    groups._WORLD_GROUP = None
    gc.collect()  # engines that hold groups are cycles
    for name in vars(groups):
        if name.startswith("_EXPERT_") and isinstance(vars(groups)[name], dict):
            vars(groups)[name].clear()
    groups.mpu = None


def _default_environment() -> None:
    """One process, where no launcher said otherwise."""
    if "WORLD_SIZE" in os.environ:
        return
    # Port 0: the rendezvous listens wherever there is room; a port probed beforehand may be taken in the meantime.
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
