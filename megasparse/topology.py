"""Process groups: the only place that creates or looks them up.

megatron-core's parallel_state owns tensor, pipeline, context and data parallelism. DeepSpeed owns expert parallelism,
folded over the tensor x context x data ranks of one pipeline stage.
"""

from __future__ import annotations

import contextlib
import gc
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from megasparse import platform
from megasparse.launch import launch
from megasparse.layout import Layout

Group = dist.ProcessGroup
COLLECTIVE_TIMEOUT = timedelta(minutes=10)  # at least: a supervisor notices earlier


@dataclass(frozen=True, kw_only=True)
class Topology(Layout):
    """A layout and where this process stands in it: ranks along each dimension, the groups collectives run in."""

    rank: int
    tp_rank: int
    tp_group: Group
    pp_rank: int
    cp_rank: int
    cp_group: Group
    tp_cp_group: Group  # the ranks that share the tokens of a micro-batch
    dp_rank: int
    replica_group: Group  # data x context parallel: the ranks over which a dense weight's gradients are averaged
    ep_rank: int
    ep_group: Group
    expert_dp: int  # ranks that hold the same experts
    expert_dp_group: Group
    stage_group: Group  # the ranks of this pipeline stage

    __str__ = Layout.__str__

    @property
    def is_first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pp - 1


class MegatronMPU:
    """parallel_state as DeepSpeed's ``mpu``: with the two older Megatron names it still calls, and data parallelism
    over context-parallel ranks too, as they hold the same weights and see other tokens."""

    def __getattr__(self, name: str) -> Any:
        from megatron.core import parallel_state

        return getattr(parallel_state, name)

    def get_model_parallel_world_size(self) -> int:
        return dist.get_world_size(self.get_model_parallel_group())

    def get_model_parallel_rank(self) -> int:
        return dist.get_rank(self.get_model_parallel_group())

    def get_data_parallel_group(self) -> Group:
        from megatron.core import parallel_state

        return parallel_state.get_data_parallel_group(with_context_parallel=True)

    def get_data_parallel_world_size(self) -> int:
        return dist.get_world_size(self.get_data_parallel_group())

    def get_data_parallel_rank(self) -> int:
        return dist.get_rank(self.get_data_parallel_group())


def initialize(layout: Layout | None = None, seed: int = 1234, timeout: timedelta = COLLECTIVE_TIMEOUT) -> Topology:
    """Join the process group (one process where no launcher says otherwise) and create every group of the layout
    (None: one process).

    Seeds what dropout draws from. It differs between data- and context-parallel ranks and between stages. The
    tensor-parallel ranks of a stage draw alike for activations they all hold, and differently in megatron-core's
    tensor-parallel regions.
    """
    layout = layout or Layout()
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
        launch().export()  # a process alone has port 0: one probed beforehand may be taken in the meantime
    if not deepspeed.comm.is_initialized():  # of torch's world, where there is one
        deepspeed.init_distributed(platform.backend(), verbose=False, timeout=max(timeout, COLLECTIVE_TIMEOUT))
    assert layout.world_size == dist.get_world_size(), f"{layout} is not a layout of {dist.get_world_size()} processes"
    parallel_state.initialize_model_parallel(
        layout.tp,
        layout.pp,
        layout.vp if layout.vp > 1 else None,
        context_parallel_size=layout.cp,
        create_gloo_process_groups=False,
    )
    groups.mpu = MegatronMPU()
    groups._create_expert_and_data_parallel(layout.ep)
    pp_rank = parallel_state.get_pipeline_model_parallel_rank()
    replica = parallel_state.get_data_parallel_rank(with_context_parallel=True)
    seed += layout.tp * (pp_rank * layout.replicas + replica)  # megatron-core adds the tp rank
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)

    expert = f"ep_size_{layout.ep}"
    return Topology(
        **vars(layout),
        rank=dist.get_rank(),
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        pp_rank=pp_rank,
        cp_rank=parallel_state.get_context_parallel_rank(),
        cp_group=parallel_state.get_context_parallel_group(),
        tp_cp_group=parallel_state.get_tensor_and_context_parallel_group(),
        dp_rank=parallel_state.get_data_parallel_rank(),
        replica_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
        ep_rank=groups._get_expert_parallel_rank(expert),
        ep_group=groups._get_expert_parallel_group(expert),
        expert_dp=groups._get_expert_data_parallel_world_size(expert),
        expert_dp_group=groups._get_expert_data_parallel_group(expert),
        stage_group=parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True),
    )


@contextlib.contextmanager
def pretended(layout: Layout, rank: int) -> Iterator[Topology]:
    """Within it this process is ``rank`` of a layout whose other processes do not exist: every group has its members,
    and collectives move nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    assert not dist.is_initialized(), "this process is in a world already: leave it first"
    dist.init_process_group("fake", rank=rank, world_size=layout.world_size, store=FakeStore())
    try:
        yield initialize(layout)
    finally:
        leave()


def background_group(timeout: timedelta) -> Group:
    """A group of all ranks on gloo, for a thread beside training: no other may use it. Every rank calls this."""
    group: Any = dist.new_group(backend="gloo", timeout=timeout)
    return group


def shutdown() -> None:
    """Forget every group but the world, so that :func:`initialize` can build another layout in this process.

    megatron-core and DeepSpeed forget theirs without destroying them; each gloo group left over keeps its threads.
    """
    import deepspeed
    from deepspeed.utils import groups
    from megatron.core import parallel_state
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    parallel_state.destroy_model_parallel()
    for name in vars(parallel_state):  # these it leaves: a rank of the next layout took itself for one with embeddings
        if name.startswith("_") and name.endswith("_GLOBAL_RANKS"):
            setattr(parallel_state, name, None)
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)
    groups._WORLD_GROUP = None
    for engine in [thing for thing in gc.get_objects() if issubclass(type(thing), deepspeed.DeepSpeedEngine)]:
        engine.destroy()  # its gradient hooks are cycles through C++, with models and groups on them for ever
    RotaryEmbedding.forward.cache_clear()  # it keeps the modules it was called on
    gc.collect()
    for name in vars(groups):
        if name.startswith("_EXPERT_") and isinstance(vars(groups)[name], dict):
            vars(groups)[name].clear()
    groups.mpu = None


def leave() -> None:
    """Forget every group and the world, so that this process can join another."""
    if not dist.is_initialized():
        return
    import deepspeed.comm.comm as deepspeed_comm

    shutdown()
    dist.destroy_process_group()
    deepspeed_comm.cdb = None  # it takes the old world for the new one
