"""A few real training steps on this rank, and all that can be seen of them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from megasparse import topology
from megasparse.config import Recipe, parse_recipe
from megasparse.data.loader import Batch, make_batch
from megasparse.engine import Engine
from megasparse.launch import launch
from megasparse.layers.block_sparse import BlockSparseAttention
from megasparse.layout import check_layout
from megasparse.model import build_model, moe_layers
from megasparse.ops.block_sparse import BlockMask
from megasparse.placement import blocks, local_buffers, local_weights

Parts = list[tuple[str, tuple[int, ...], tuple[int, ...], Tensor]]  # name, shape of the whole, offsets, a rectangle


@dataclass
class Seen:
    """What one rank saw of a run and holds of its weights."""

    scalars: list[dict[str, float]] = field(default_factory=list)  # of each step: loss, auxiliary losses, grad_norm
    gradients: list[Parts] = field(default_factory=list)  # of each step: reduced, before clipping
    weights: Parts = field(default_factory=list)  # after the last step; and buffers
    moved: Parts = field(default_factory=list)  # how far the optimizer's weights, float32, came in all steps
    routes: dict[tuple[int, ...], tuple[int, ...]] = field(default_factory=dict)
    """(step, layer, token's number) -> its experts, in ascending order; and with the K/V head as a fourth number the
    key blocks that the token sees, or the query block that starts with it."""
    margin: float = math.inf  # the least distance between the scores of a token's last chosen and first left expert


def observe(raw: dict[str, Any], steps: int) -> Seen:
    """Train the recipe for ``steps`` steps on made-up text, from the weights that its seed gives in every layout."""
    recipe = parse_recipe(raw)
    place = topology.initialize(check_layout(recipe, launch().world_size), recipe.training.seed)
    assert recipe.model.vocab_size is not None
    chunks, state = build_model(recipe, place, recipe.model.vocab_size)
    engine = Engine(recipe, place, chunks, state)
    seen = Seen()
    for layer, moe in moe_layers(chunks):
        moe.router.register_forward_hook(_record_routes(seen, state, layer))
    for chunk in chunks:
        _record_lists(seen, state, chunk)

    def before_step() -> None:
        scale = engine.loss_scale()
        seen.gradients.append(
            [
                (f.weight.name, f.weight.shape, offsets, part.float() / scale)
                for f in engine.fragments
                if f.gradient is not None and not f.weight.copy
                for offsets, part in blocks(f.weight, f.start, f.gradient)
            ]
        )

    engine.before_step = before_step
    starts = [fragment.master.float().clone() for fragment in engine.fragments]
    for step in range(steps):
        result = engine.train_step(_batches(recipe, step, place), step, recipe.optimizer.lr)
        seen.scalars.append({"loss": result.loss, **result.aux_losses, "grad_norm": result.grad_norm})
    seen.weights = [
        (weight.name, weight.shape, offsets, part.float().clone())
        for weight in (*local_weights(chunks, place), *local_buffers(chunks, place))
        for offsets, part in blocks(weight, 0, weight.tensor.detach().reshape(-1))
    ]
    seen.moved = [
        (f.weight.name, f.weight.shape, offsets, part)
        for f, start in zip(engine.fragments, starts, strict=True)
        if not f.weight.copy
        for offsets, part in blocks(f.weight, f.start, f.master.float() - start)
    ]
    return seen


def _record_routes(seen: Seen, state: Any, layer: int) -> Any:
    def hook(router: Any, inputs: tuple[Tensor, Tensor], output: Any) -> None:
        token_index = inputs[1]
        for token, experts in zip(token_index.tolist(), output.experts.tolist(), strict=True):
            seen.routes[state.step, layer, token] = tuple(sorted(experts))
        if router.moe.top_k < router.moe.num_experts:
            best = output.selection.topk(router.moe.top_k + 1).values
            seen.margin = min(seen.margin, (best[:, -2] - best[:, -1]).min().item())

    return hook


def _record_lists(seen: Seen, state: Any, chunk: Any) -> None:
    """Record what each block-sparse layer of ``chunk`` selects. A layer is asked once for each part of the sequence
    that this rank has, in their order."""
    tokens: list[Tensor] = []  # numbers [batch, seq] of the micro-batch that is in the model
    start: dict[int, int] = {}  # by layer: how many of them it has been asked for

    def begin(_: Any, __: Any, kwargs: dict[str, Any]) -> None:
        tokens[:] = [kwargs["padding_mask"]]
        start.clear()

    def record(layer: int, attention: BlockSparseAttention) -> Any:
        select = attention.select

        def recorded(q: Tensor, *arguments: Any) -> BlockMask:
            mask = select(q, *arguments)
            if not state.first_pass():
                return mask
            first = start.get(layer, 0)
            start[layer] = first + q.shape[1]
            numbers = tokens[0][:, first : first + q.shape[1] : mask.query_block_size].tolist()
            for (row, head, i), count in np.ndenumerate(mask.count.numpy()):
                listed = mask.index[row, head, i, :count].tolist()
                seen.routes[state.step, layer, numbers[row][i], attention.first_head + head] = tuple(sorted(listed))
            return mask

        return recorded

    chunk.register_forward_pre_hook(begin, with_kwargs=True)
    for layer in chunk.decoder.layers:
        attention = layer.self_attention.core_attention
        if isinstance(attention, BlockSparseAttention):
            attention.select = record(layer.layer_number - 1, attention)  # type: ignore[method-assign]


def _batches(recipe: Recipe, step: int, place: topology.Topology) -> list[Batch]:
    """This rank's micro-batches: sequences that rise by 0, 1 or 2, in documents of uneven length, by sample number."""
    training, vocab = recipe.training, recipe.model.vocab_size
    assert vocab is not None
    count = training.global_batch_size // (training.micro_batch_size * place.dp)
    first = step * training.global_batch_size + place.dp_rank * count * training.micro_batch_size
    made = []
    for number in range(first, first + count * training.micro_batch_size, training.micro_batch_size):
        ids = np.stack([_sample(recipe, n) for n in range(number, number + training.micro_batch_size)])
        scored = ids[:, :-1] != vocab - 1 if recipe.data.document_mask else np.ones_like(ids[:, :-1], dtype=bool)
        made.append(make_batch(ids[:, :-1], ids[:, 1:], scored, number, vocab - 1, recipe.data))
    return made


def _sample(recipe: Recipe, number: int) -> np.ndarray:
    """Sample ``number``: [seq + 1] ids; the last of the vocabulary ends a document."""
    assert recipe.model.vocab_size is not None
    random = np.random.default_rng([recipe.training.seed, number])
    eod = recipe.model.vocab_size - 1
    ids = (random.integers(0, eod) + random.integers(0, 3, recipe.data.seq_length + 1).cumsum()) % eod
    ids[random.random(len(ids)) < 0.15 * random.random()] = eod
    return ids
