"""Text from a model in training: every rank runs the same prompt, so that expert parallelism has its partners."""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megasparse.config import Recipe
from megasparse.model import GPTModel
from megasparse.topology import Topology


@torch.no_grad()
def generate(
    gpt: GPTModel,
    recipe: Recipe,
    topology: Topology,
    prompt: list[int],
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    stop: int | None = None,
) -> list[int]:
    """Continue ``prompt``: the new tokens, up to and without ``stop``. Temperature 0 is greedy.

    No key/value cache: each token costs a forward pass over at most data.seq_length tokens. Every rank calls it and
    gets the same tokens.
    """
    gpt.eval()
    generator = torch.Generator().manual_seed(seed)
    tokens = list(prompt)
    for _ in range(max_new_tokens):
        logits = next_token_logits(gpt, recipe, topology, tokens[-recipe.data.seq_length :])
        if temperature == 0:
            token = int(logits.argmax())
        else:
            token = int(torch.multinomial(torch.softmax(logits / temperature, -1), 1, generator=generator))
        token = _of_first_rank(token, next(gpt.parameters()).device)
        if token == stop:
            break
        tokens.append(token)
    return tokens[len(prompt) :]


def _of_first_rank(token: int, device: torch.device) -> int:
    """Ranks may round near-ties differently; if their texts parted, one would stop before the others."""
    chosen = torch.tensor(token, device=device)
    dist.broadcast(chosen, src=0)
    return int(chosen)


def next_token_logits(gpt: GPTModel, recipe: Recipe, topology: Topology, tokens: list[int]) -> Tensor:
    """Float32 logits [vocab] of the token after ``tokens``, on every rank."""
    device = next(gpt.parameters()).device
    padding = -len(tokens) % topology.tp  # sequence parallelism splits the length; what follows changes nothing
    ids = torch.tensor([tokens + [0] * padding], device=device)
    positions = torch.arange(ids.shape[1], device=device).unsqueeze(0)

    def forward(_: object, model: GPTModel) -> tuple[Tensor, object]:
        return model(ids, positions, attention_mask=None), lambda output, non_loss_data: output

    outputs = get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=None,
        model=gpt,
        num_microbatches=1,
        seq_length=ids.shape[1],
        micro_batch_size=1,
        forward_only=True,
        collect_non_loss_data=True,
    )
    logits = torch.zeros(gpt.true_vocab_size, device=device)
    if topology.is_last_stage:
        local = outputs[0][0, len(tokens) - 1].float()  # [vocab / tp]
        parts = [torch.empty_like(local) for _ in range(topology.tp)]
        dist.all_gather(parts, local.contiguous(), group=topology.tp_group)
        logits = torch.cat(parts)[: gpt.true_vocab_size].contiguous()
    if topology.pp > 1:
        last = parallel_state.get_pipeline_model_parallel_last_rank()
        dist.broadcast(logits, src=last, group=parallel_state.get_pipeline_model_parallel_group())
    return logits.cpu()
