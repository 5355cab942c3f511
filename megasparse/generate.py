"""Text from a model in any layout, and the logits of given text: every rank calls these with the same tokens, so that
expert parallelism has its partners."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megasparse.config import Recipe
from megasparse.data.loader import zigzag
from megasparse.layers.attention import CoreAttention
from megasparse.layers.cache import KeyValueCache, Position
from megasparse.layers.linear import fp8_sparse_products
from megasparse.layers.rope import RotaryEmbedding
from megasparse.model import GPTModel
from megasparse.topology import Topology


@torch.no_grad()
def generate(
    chunks: nn.ModuleList,
    recipe: Recipe,
    topology: Topology,
    prompt: list[int],
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    stop: int | None = None,
    fp8_sparse: bool = False,
    top_p: float = 1.0,
    until: Callable[[list[int]], bool] | None = None,
) -> list[int]:
    """Continue ``prompt``: the new tokens, up to and without ``stop``, and until ``until`` says of them that they are
    enough. Temperature 0 is greedy; else a token is drawn from the fewest that have ``top_p`` of the probability.

    Keys and values of the tokens before are kept; under context parallelism, and where there are more tokens than
    data.seq_length, of which the last are seen, each token costs a forward pass over all of them. Every rank calls it
    and gets the same tokens. ``fp8_sparse``: 2:4 linear layers multiply by torchao's FP8 2:4 kernel, on a Hopper GPU;
    ValueError, with the reason, where it does not run.
    """
    chunks.eval()
    generator = torch.Generator().manual_seed(seed)
    tokens = list(prompt)
    products = fp8_sparse_products(chunks) if fp8_sparse else contextlib.nullcontext()
    with products, key_value_caches(chunks, topology) as position:
        for _ in range(max_new_tokens):
            window = tokens[-recipe.data.seq_length :]
            logits = next_token_logits(chunks, recipe, topology, window, position.start)
            if temperature == 0:
                token = int(logits.argmax())
            else:
                probabilities = likeliest(torch.softmax(logits / temperature, -1), top_p)
                token = int(torch.multinomial(probabilities, 1, generator=generator))
            token = _of_first_rank(token, next(chunks.parameters()).device)
            if token == stop:
                break
            tokens.append(token)
            if until is not None and until(tokens[len(prompt) :]):
                break
            position.start = len(window) if topology.cp == 1 and len(tokens) <= recipe.data.seq_length else 0
    return tokens[len(prompt) :]


@contextlib.contextmanager
def key_value_caches(chunks: nn.ModuleList, topology: Topology) -> Iterator[Position]:
    """Each layer keeps keys and values, but under context parallelism; the next tokens are at the yielded position."""
    position = Position()
    modules = list(chunks.modules())
    attention = [module for module in modules if isinstance(module, CoreAttention)] if topology.cp == 1 else []
    rotary = [module for module in modules if isinstance(module, RotaryEmbedding)]
    for layer in attention:
        layer.cache = KeyValueCache(position, layer.query_block_size)
    for embedding in rotary:
        embedding.position = position
    try:
        yield position
    finally:
        for layer in attention:
            layer.cache = None
        for embedding in rotary:
            embedding.position = Position()


def likeliest(probabilities: Tensor, top_p: float) -> Tensor:
    """[vocab] -> the same, but 0 for what comes after the fewest tokens that have ``top_p`` together."""
    if top_p >= 1:
        return probabilities
    values, order = probabilities.sort(descending=True)
    before = values.cumsum(-1) - values
    return probabilities.index_fill(0, order[before >= top_p], 0.0)


def _of_first_rank(token: int, device: torch.device) -> int:
    """Ranks may round near-ties differently; if their texts parted, one would stop before the others."""
    chosen = torch.tensor(token, device=device)
    dist.broadcast(chosen, src=0)
    return int(chosen)


def next_token_logits(
    chunks: nn.ModuleList, recipe: Recipe, topology: Topology, tokens: list[int], start: int = 0
) -> Tensor:
    """Float32 logits [vocab] of the token after ``tokens``, on every rank. Caches hold the first ``start`` of them."""
    device = next(chunks.parameters()).device
    # Sequence and context parallelism split the length; what follows the last token changes nothing.
    multiple = topology.tp * (2 * topology.cp if topology.cp > 1 else 1)
    length = math.ceil((len(tokens) - start) / multiple) * multiple
    ids = torch.tensor([tokens[start:] + [0] * (start + length - len(tokens))], device=device)
    numbers = torch.arange(start, start + length, device=device).unsqueeze(0)
    if topology.cp > 1:
        ids, numbers = (zigzag(x, topology.cp_rank, topology.cp) for x in (ids, numbers))
    local = _forward(chunks, recipe, topology, ids, numbers, len(tokens))
    logits = torch.zeros(_vocab_size(chunks), device=device)
    if local is not None:
        here = numbers[0] == len(tokens) - 1
        if here.any():
            logits = _whole_vocabulary(chunks, topology, local[0, here][0])
        if topology.cp > 1:  # zeros but for the rank that has the token
            dist.all_reduce(logits, group=topology.cp_group)
    return _of_last_stage(topology, logits).cpu()


@torch.no_grad()
def all_logits(chunks: nn.ModuleList, recipe: Recipe, topology: Topology, tokens: Tensor) -> Tensor:
    """Float32 logits [batch, seq, vocab] after each of ``tokens`` [batch, seq], the same on every rank; each
    data-parallel rank computes a part of the batch. Not with context parallelism."""
    assert topology.cp == 1
    batch, seq = tokens.shape
    device = next(chunks.parameters()).device
    rows, length = math.ceil(batch / topology.dp), math.ceil(seq / topology.tp) * topology.tp
    ids = torch.zeros(rows * topology.dp, length, dtype=torch.int64, device=device)
    ids[:batch, :seq] = tokens
    ids = ids[topology.dp_rank * rows :][:rows]
    numbers = torch.arange(length, device=device).expand(rows, length)
    local = _forward(chunks, recipe, topology, ids, numbers, seq)
    if local is None:
        logits = torch.empty(rows, seq, _vocab_size(chunks), device=device)
    else:
        logits = _whole_vocabulary(chunks, topology, local[:, :seq])
    logits = _of_last_stage(topology, logits)
    if topology.dp == 1:
        return logits
    parts = [torch.empty_like(logits) for _ in range(topology.dp)]
    dist.all_gather(parts, logits, group=topology.replica_group)
    return torch.cat(parts)[:batch]


def _forward(
    chunks: nn.ModuleList, recipe: Recipe, topology: Topology, ids: Tensor, numbers: Tensor, tokens: int
) -> Tensor | None:
    """Logits [batch, length, vocab / tp] of this process's part of ``ids`` [batch, length], of whose places in the
    sequence (``numbers``) the first ``tokens`` count; None but on the last stage."""
    positions = numbers.clamp(max=max(recipe.data.seq_length, tokens) - 1)  # of what follows: any that exists

    def forward(_: object, model: GPTModel) -> tuple[Tensor, object]:
        return model(ids, positions, attention_mask=None), lambda output, non_loss_data: output

    interleaved = topology.vp > 1
    outputs = get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=[None] * topology.vp if interleaved else None,  # type: ignore[arg-type]
        model=list(chunks) if interleaved else chunks[0],
        num_microbatches=topology.pp if interleaved else 1,  # it wants as many as stages: copies
        seq_length=ids.shape[1] * topology.cp,
        micro_batch_size=ids.shape[0],
        forward_only=True,
        collect_non_loss_data=True,
    )
    return outputs[0] if topology.is_last_stage else None


def _vocab_size(chunks: nn.ModuleList) -> int:
    first: Any = chunks[0]
    return first.true_vocab_size


def _whole_vocabulary(chunks: nn.ModuleList, topology: Topology, logits: Tensor) -> Tensor:
    """Of every tensor-parallel rank its part [..., vocab / tp] -> float32 [..., vocab], without what only pads it."""
    if topology.tp > 1:
        parts = [torch.empty_like(logits, memory_format=torch.contiguous_format) for _ in range(topology.tp)]
        dist.all_gather(parts, logits.contiguous(), group=topology.tp_group)
        logits = torch.cat(parts, -1)[..., : _vocab_size(chunks)]
    return logits.float().contiguous()


def _of_last_stage(topology: Topology, logits: Tensor) -> Tensor:
    """What the last stage has of the pipeline, in place."""
    if topology.pp > 1:
        last = parallel_state.get_pipeline_model_parallel_last_rank()
        dist.broadcast(logits, src=last, group=parallel_state.get_pipeline_model_parallel_group())
    return logits
