"""What a process's parameters and buffers are in the whole model: their names, which no layout changes, and places."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch.nn as nn
from torch import Tensor

from megasparse.layers.fp8 import Fp8State
from megasparse.sparsity.weight import SparseWeight
from megasparse.topology import Topology


@dataclass(frozen=True)
class Slab:
    """Consecutive elements of a local tensor, from ``start`` of its flattened self on: shaped ``shape``, they lie at
    ``offsets`` of the whole tensor."""

    start: int
    shape: tuple[int, ...]
    offsets: tuple[int, ...]


@dataclass(frozen=True)
class Weight:
    """A parameter or buffer that this process holds, and what it is in the whole model."""

    name: str  # the same under every layout
    tensor: Tensor
    shape: tuple[int, ...]  # of the whole
    slabs: tuple[Slab, ...]  # of which this process holds these; rows that pad the vocabulary belong to none
    copy: bool = False  # the last stage's copy of a tied embedding: the first stage's is the one that counts


def is_expert(parameter: Any) -> bool:
    """Is it of experts, split over expert parallelism? DeepSpeed's mark, set by MoELayer; others have none."""
    return not getattr(parameter, "allreduce", True)


def blocks(weight: Weight, start: int, flat: Tensor) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    """A flat range of a local weight, elements ``start`` .. start + len(flat), as rectangles of the whole weight:
    (offsets in the whole, view of ``flat``)."""
    end = start + flat.numel()
    for slab in weight.slabs:
        first, last = max(start, slab.start), min(end, slab.start + math.prod(slab.shape))
        if first < last:
            part = flat[first - start : last - start]
            for local, view in _rectangles(slab.shape, first - slab.start, part):
                yield tuple(a + b for a, b in zip(slab.offsets, local, strict=True)), view


def _rectangles(shape: tuple[int, ...], first: int, flat: Tensor) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    """Elements ``first`` and on of a row-major array of ``shape``: the rest of a row, whole rows, the start of one."""
    if len(shape) == 1:
        yield (first,), flat
        return
    row = math.prod(shape[1:])
    while flat.numel():
        index, within = divmod(first, row)
        rows = flat.numel() // row if within == 0 else 0
        if rows:
            yield (index,) + (0,) * (len(shape) - 1), flat[: rows * row].view(rows, *shape[1:])
            taken = rows * row
        else:
            taken = min(row - within, flat.numel())
            for inner, view in _rectangles(shape[1:], within, flat[:taken]):
                yield (index, *inner), view.unsqueeze(0)
        first, flat = first + taken, flat[taken:]


def local_weights(chunks: nn.ModuleList, topology: Topology) -> Iterator[Weight]:
    """The parameters of this process, under their names in the whole model."""
    chunk: Any
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            tied = name == "output_layer.weight" and chunk.share_embeddings_and_output_weights
            shared = bool(tied and not chunk.pre_process)
            whole = "embedding.word_embeddings.weight" if tied else _global_name(chunk, name)
            rows = chunk.true_vocab_size if whole in VOCABULARY else None
            yield Weight(whole, parameter, *_place(parameter, topology, rows), copy=shared)


def local_buffers(chunks: nn.ModuleList, topology: Topology) -> Iterator[Weight]:
    """The persistent buffers of this process, under their names in the whole model. Those of a sparse weight are split
    as it is; every tensor-, context- and data-parallel rank of the stage holds the same of the others (router biases
    and loads)."""
    for chunk in chunks:
        persistent = chunk.state_dict(keep_vars=True)
        for path, module in chunk.named_modules():
            for name, buffer in module.named_buffers(recurse=False):
                full = f"{path}.{name}"
                if full in persistent:
                    yield Weight(_global_name(chunk, full), buffer, *_place_beside(buffer, module, topology))


NORMS_OF_TE = {"self_attention.linear_qkv": "input_layernorm", "mlp.linear_fc1": "pre_mlp_layernorm"}
VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")  # their rows are padded to a multiple of tp


def _global_name(chunk: Any, name: str) -> str:
    """Layers counted from 0 over all pipeline stages; a norm that is a part of the layer after it has its own name."""
    for of_te, ours in NORMS_OF_TE.items():
        name = name.replace(f"{of_te}.layer_norm_", f"{ours}.")
    parts = name.split(".")
    if parts[:2] == ["decoder", "layers"]:
        parts[2] = str(chunk.decoder.layers[int(parts[2])].layer_number - 1)
    return ".".join(parts)


def _place(parameter: Any, topology: Topology, rows: int | None) -> tuple[tuple[int, ...], tuple[Slab, ...]]:
    """Shape of the whole, and the slabs held here. A SwiGLU's gate and up halves are split each by itself: stride 2."""
    local = tuple(parameter.shape)
    if is_expert(parameter):
        split, rank, size, stride, dim = True, topology.ep_rank, topology.ep, 1, 0
    else:
        split, rank, size = getattr(parameter, "tensor_model_parallel", False), topology.tp_rank, topology.tp
        stride, dim = (parameter.partition_stride, parameter.partition_dim) if split else (1, 0)
    if not split:
        return local, (Slab(0, local, (0,) * len(local)),)
    whole = list(local)
    whole[dim] *= size
    part = local[dim] // stride
    slabs = []
    for i in range(stride):
        offsets, shape = [0] * len(local), list(local)
        offsets[dim] = i * whole[dim] // stride + rank * part
        shape[dim] = part
        if rows is not None:
            shape[0] = min(part, max(0, rows - offsets[0]))
        slabs.append(Slab(i * parameter.numel() // stride, tuple(shape), tuple(offsets)))
    if rows is not None:
        whole[0] = rows
    return tuple(whole), tuple(slab for slab in slabs if math.prod(slab.shape))


def _place_beside(buffer: Tensor, module: nn.Module, topology: Topology) -> tuple[tuple[int, ...], tuple[Slab, ...]]:
    """Of a buffer: that of a sparse weight is split as the weight is in the dimensions that it has of it, for elements,
    experts, or columns of experts or of a matrix; FP8 scales of experts as these are; else all of it is here."""
    if isinstance(module, SparseWeight):
        weight = module.weight[0]
        shape, slabs = _place(weight, topology, None)
        if buffer.shape == weight.shape:
            return shape, slabs
        dims = {
            weight.shape[:-2]: range(weight.dim() - 2),
            weight.shape[:-2] + weight.shape[-1:]: (*range(weight.dim() - 2), -1),
        }
        if dims.get(buffer.shape):
            first = slabs[0]
            part, offsets, whole = (
                tuple(sizes[d] for d in dims[buffer.shape]) for sizes in (first.shape, first.offsets, shape)
            )
            return whole, (Slab(0, part, offsets),)
    if isinstance(module, Fp8State) and module.experts is not None:
        experts, here = module.experts
        leading = buffer.shape[:-2]
        return (*leading, experts, buffer.shape[-1]), (
            Slab(0, tuple(buffer.shape), (*(0 for _ in leading), here.start, 0)),
        )
    return tuple(buffer.shape), (Slab(0, tuple(buffer.shape), (0,) * buffer.dim()),)
