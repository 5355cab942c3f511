"""What a checkpoint holds: every tensor of the training state under its name in the whole model, whatever the layout.

``model.NAME`` is a float32 master weight or a persistent buffer (router biases and loads, sparsity masks),
``optimizer.exp_avg.NAME`` and ``optimizer.exp_avg_sq.NAME`` are AdamW's moments, ``random.RANK.GENERATOR`` a generator
of one rank. Each process holds rectangles of them: views into the optimizer's own buffers, written and read in place.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn as nn
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker, model_parallel_cuda_manual_seed
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from megasparse import platform
from megasparse.engine import Engine
from megasparse.placement import Weight, blocks, local_buffers, local_weights
from megasparse.topology import Topology

MOMENTS = ("exp_avg", "exp_avg_sq")
LOSS_SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")  # DeepSpeed's: the rest is the recipe's
SEED_OF_A_STEP = 1_000_003


class Sharded:
    """The rectangles of a whole tensor that this process holds, by their offsets in it. The double-underscored methods
    are what torch's distributed checkpoints ask of a state that is no tensor."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.shape, self.dtype = torch.Size(shape), dtype
        self.views: dict[torch.Size, Tensor] = {}

    @staticmethod
    def whole(tensor: Tensor) -> Sharded:
        sharded = Sharded(tensor.shape, tensor.dtype)
        sharded.views[torch.Size([0] * tensor.dim())] = tensor
        return sharded

    def copied(self) -> Sharded:
        """The same in CPU memory of its own."""
        copy = Sharded(self.shape, self.dtype)
        copy.views = {offsets: view.detach().to("cpu", copy=True) for offsets, view in self.views.items()}
        return copy

    @property
    def bytes(self) -> int:
        """Of the whole tensor."""
        return self.shape.numel() * self.dtype.itemsize

    def size(self) -> torch.Size:
        return self.shape

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(offsets, view.shape) for offsets, view in self.views.items()]

    def __create_write_items__(self, name: str, _: Any) -> list[WriteItem]:
        properties = TensorProperties(self.dtype)
        return [
            WriteItem(
                MetadataIndex(name, chunk.offsets),
                WriteItemType.SHARD,
                None,
                TensorWriteData(chunk, properties, self.shape),
            )
            for chunk in self.__create_chunk_list__()
        ]


class SavePlanner(DefaultSavePlanner):
    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def lookup_object(self, index: MetadataIndex) -> Any:
        return self.state_dict[index.fqn].views[index.offset]


class LoadPlanner(DefaultLoadPlanner):
    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def set_up_planner(self, state_dict: dict[str, Any], metadata: Any = None, is_coordinator: bool = False) -> None:
        self.state_dict, self.metadata, self.is_coordinator = state_dict, metadata, is_coordinator  # as they are

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self.state_dict[index.fqn].views[index.offset]


# Weights, moments, buffers --------------------------------------------------------------------------------------------


def tensors(engine: Engine, copies: bool) -> dict[str, Sharded]:
    """What this rank holds of the weights, AdamW's moments and the persistent buffers. ``copies``: with the last
    stage's copy of a tied embedding, which is loaded but not saved."""
    found: dict[str, Sharded] = {}
    _anticipate_first_step(engine)
    for fragment in engine.fragments:
        weight = fragment.weight
        if weight.copy and not copies:
            continue
        parts = {"model": fragment.master, **{f"optimizer.{key}": fragment.state[key] for key in MOMENTS}}
        for kind, flat in parts.items():
            sharded = found[f"{kind}.{weight.name}"] = Sharded(weight.shape, flat.dtype)
            sharded.views = {torch.Size(offsets): view for offsets, view in blocks(weight, fragment.start, flat)}
    for buffer in local_buffers(engine.chunks, engine.topology):
        found[f"model.{buffer.name}"] = _sharded(buffer)
    return found


def weights(chunks: nn.ModuleList, topology: Topology) -> dict[str, Sharded]:
    """What this rank holds of a model without an optimizer: weights, in the model's precision, and buffers."""
    held = (*local_weights(chunks, topology), *local_buffers(chunks, topology))
    return {f"model.{weight.name}": _sharded(weight) for weight in held}


def _sharded(weight: Weight) -> Sharded:
    sharded = Sharded(weight.shape, weight.tensor.dtype)
    parts = blocks(weight, 0, weight.tensor.detach().view(-1))
    sharded.views = {torch.Size(offsets): view for offsets, view in parts}
    return sharded


def _parameters(engine: Engine) -> Iterator[Tensor]:
    for group in engine.adam.param_groups:
        yield from group["params"]


def _anticipate_first_step(engine: Engine) -> None:
    """Make what AdamW makes in its first step, as it would."""
    adam = engine.adam
    for parameter in _parameters(engine):
        if not adam.state[parameter]:
            adam.state[parameter]["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            for key in MOMENTS:
                adam.state[parameter][key] = torch.zeros_like(parameter, requires_grad=False)


# Numbers --------------------------------------------------------------------------------------------------------------


def numbers(engine: Engine) -> dict[str, Any]:
    """What is not a tensor, the same on every rank: AdamW's count of steps, DeepSpeed's dynamic loss scale."""
    _anticipate_first_step(engine)
    (adam_steps,) = {int(engine.adam.state[parameter]["step"]) for parameter in _parameters(engine)}
    fp16 = engine.recipe.training.precision == "fp16"
    scaler = {name: getattr(engine.optimizer.loss_scaler, name) for name in LOSS_SCALER} if fp16 else None
    return {"adam_steps": adam_steps, "loss_scaler": scaler}


def finish_loading(engine: Engine, loaded: dict[str, Any]) -> None:
    """Set ``numbers``, and the weights that the model computes with from the master weights that were loaded."""
    for parameter in _parameters(engine):
        engine.adam.state[parameter]["step"].fill_(loaded["adam_steps"])
    for name, value in (loaded["loss_scaler"] or {}).items():
        setattr(engine.optimizer.loss_scaler, name, value)
    engine.follow_loaded()


# Random generators ----------------------------------------------------------------------------------------------------


def random_state(rank: int) -> dict[str, Sharded]:
    """Every generator a training step of this rank draws from, copied."""
    states = {"torch": torch.get_rng_state(), **get_cuda_rng_tracker().get_states()}
    if platform.has_cuda():
        states["cuda"] = torch.cuda.get_rng_state()
    return {f"random.{rank}.{name}": Sharded.whole(state.clone()) for name, state in states.items()}


def set_random_state(states: dict[str, Sharded]) -> None:
    """What ``random_state`` returned."""
    generators = {name.split(".", 2)[2]: next(iter(state.views.values())) for name, state in states.items()}
    torch.set_rng_state(generators.pop("torch"))
    if platform.has_cuda():
        torch.cuda.set_rng_state(generators.pop("cuda"))
    get_cuda_rng_tracker().set_states(generators)


def seed_anew(step: int) -> None:
    """Where the generators of another layout are of no use: from this rank's first seed and the step."""
    seed = (torch.initial_seed() + SEED_OF_A_STEP * step) % 2**32
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
