"""Text from a model in training: every rank runs the same prompt, so that expert parallelism has its partners."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
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
) -> list[int]:
    """Continue ``prompt``: the new tokens, up to and without ``stop``. Temperature 0 is greedy.

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
                token = int(torch.multinomial(torch.softmax(logits / temperature, -1), 1, generator=generator))
            token = _of_first_rank(token, next(chunks.parameters()).device)
            if token == stop:
                break
            tokens.append(token)
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
    positions = numbers.clamp(max=max(recipe.data.seq_length, len(tokens)) - 1)  # of what follows: any that exists

    def forward(_: object, model: GPTModel) -> tuple[Tensor, object]:
        return model(ids, positions, attention_mask=None), lambda output, non_loss_data: output

    interleaved = topology.vp > 1
    outputs = get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=[None] * topology.vp if interleaved else None,  # type: ignore[arg-type]
        model=list(chunks) if interleaved else chunks[0],
        num_microbatches=topology.pp if interleaved else 1,  # it wants as many as stages: copies
        seq_length=length,
        micro_batch_size=1,
        forward_only=True,
        collect_non_loss_data=True,
    )
    first: Any = chunks[0]
    vocab_size = first.true_vocab_size
    logits = torch.zeros(vocab_size, device=device)
    if topology.is_last_stage:
        here = numbers[0] == len(tokens) - 1
        if here.any():
            local = outputs[0][0, here.nonzero().item()].float()  # [vocab / tp]
            parts = [torch.empty_like(local) for _ in range(topology.tp)]
            dist.all_gather(parts, local.contiguous(), group=topology.tp_group)
            logits = torch.cat(parts)[:vocab_size].contiguous()
        if topology.cp > 1:  # zeros but for the rank that has the token
            dist.all_reduce(logits, group=topology.cp_group)
    if topology.pp > 1:
        last = parallel_state.get_pipeline_model_parallel_last_rank()
        dist.broadcast(logits, src=last, group=parallel_state.get_pipeline_model_parallel_group())
    return logits.cpu()
