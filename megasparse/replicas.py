"""Copies of weights compared to the bit: what a device computed, stored or sent wrong shows as a difference."""

from __future__ import annotations

import socket
from collections import Counter

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megasparse.engine import Engine
from megasparse.placement import Weight, is_expert, local_weights
from megasparse.topology import Group

CHUNK = 1 << 22  # elements hashed at a time
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}  # by bytes of an element


def check_replicas(engine: Engine) -> str | None:
    """What differs, on the ranks that see it; None where all copies agree. Every rank calls it.

    Ranks that hold the same part of a weight have the same bits of it: dense weights over data and context parallelism,
    experts over the ranks that hold the same, norms and routers over tensor parallelism, too, and a tied embedding over
    the first and the last pipeline stage. The masters and moments that ZeRO splits have no copies."""
    place = engine.topology
    weights = list(local_weights(engine.chunks, place))
    dense = [weight for weight in weights if not is_expert(weight.tensor)]
    whole = [weight for weight in dense if not getattr(weight.tensor, "tensor_model_parallel", False)]
    experts = [weight for weight in weights if is_expert(weight.tensor)]
    sets = [(dense, place.replica_group), (whole, place.tp_group), (experts, place.expert_dp_group)]
    if engine.recipe.model.tie_embeddings and parallel_state.is_rank_in_embedding_group():
        embedding = [weight for weight in dense if weight.name == "embedding.word_embeddings.weight"]
        sets.append((embedding, parallel_state.get_embedding_group()))
    found = [_compare(group_weights, group) for group_weights, group in sets]
    return next(filter(None, found), None)


def _compare(weights: list[Weight], group: Group) -> str | None:
    if dist.get_world_size(group) == 1 or not weights:
        return None
    own = torch.stack([fingerprint(weight.tensor) for weight in weights])
    flat = own.new_empty(dist.get_world_size(group) * len(own))
    dist.all_gather_into_tensor(flat, own, group=group)
    everyone = flat.view(-1, len(own))
    differs = (everyone != everyone[0]).any(0)
    if not differs.any():
        return None
    weight = int(differs.nonzero()[0])
    values = everyone[:, weight].tolist()
    usual, copies = Counter(values).most_common(1)[0]
    ranks = dist.get_process_group_ranks(group)
    odd = [rank for rank, value in zip(ranks, values, strict=True) if value != usual]
    who = f"rank {', '.join(map(str, odd))}" if copies > 1 else f"each of ranks {', '.join(map(str, ranks))}"
    here = f" ({socket.gethostname()})" if dist.get_rank() in odd and copies > 1 else ""
    name, count = weights[weight].name, int(differs.sum())
    return f"{who}{here} holds another {name} than its copies ({count} of {len(weights)} differ)"


@torch.no_grad()
def fingerprint(tensor: Tensor) -> Tensor:
    """int64 []: of the tensor's bits and their order; any single changed element changes it."""
    bits = tensor.detach().contiguous().view(-1).view(INTEGERS[tensor.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, len(bits), CHUNK):
        part = bits[start : start + CHUNK].long()
        places = torch.arange(start, start + len(part), device=tensor.device)
        total += (part * (2 * places + 1)).sum()  # odd factors: none is lost modulo 2^64
    return total
