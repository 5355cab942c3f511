"""Tiny recipes and learnable batches that tests share."""

from __future__ import annotations

import os
from typing import Any

import tokenizers
import torch
from tokenizers import models

from megasparse import topology
from megasparse.config import Recipe, parse_recipe
from megasparse.data.loader import Batch
from megasparse.data.tokenizer import HuggingFaceTokenizer
from megasparse.layout import check_layout

VOCAB, SEQ = 96, 24
MOE = {"num_experts": 8, "top_k": 2, "ffn_hidden_size": 48}
WORDS = {"<eod>": 0, **{f"w{i}": i for i in range(1, VOCAB - 1)}}
TOKENIZER = HuggingFaceTokenizer(
    tokenizers.Tokenizer(models.WordLevel(WORDS, "<eod>")).to_str().encode(), "<eod>", source="WORDS"
)


def recipe(
    model: dict[str, Any] | None = None,
    moe: dict[str, Any] | None = None,
    training: dict[str, Any] | None = None,
    **sections: Any,
) -> Recipe:
    """Two layers, hidden 32, GQA 4/2; a mixture of experts if ``moe`` is given (its changes to MOE)."""
    base = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "num_query_groups": 2, "ffn_hidden_size": 48}
    if moe is not None:
        base["moe"] = {**MOE, **moe}  # type: ignore[assignment]
    return parse_recipe(
        {
            "name": "small",
            "data": {"sets": [{"path": "unused"}], "seq_length": SEQ, **sections.pop("data", {})},
            "model": {**base, **(model or {})},
            "training": {"steps": 20, "global_batch_size": 8, "micro_batch_size": 2, **(training or {})},
            "optimizer": {"lr": 3e-3, **sections.pop("optimizer", {})},
            **sections,
        }
    )


def start(recipe: Recipe) -> topology.Topology:
    """Join the process group in the recipe's layout."""
    return topology.initialize(check_layout(recipe, int(os.environ.get("WORLD_SIZE", "1"))))


def batches(recipe: Recipe, step: int, dp_rank: int = 0, dp: int = 1, masked: bool = False) -> list[Batch]:
    """This rank's micro-batches of ``step``: sequences that rise by 0, 1 or 2. ``masked``: uneven loss masks."""
    size, seq = recipe.training.micro_batch_size, recipe.data.seq_length
    count = recipe.training.global_batch_size // size
    generator = torch.Generator().manual_seed(step)
    made = []
    for j in range(count):
        ids = torch.randint(0, 3, (size, seq + 1), generator=generator).cumsum(1) % VOCAB
        number = torch.arange(size)[:, None] + (step * count + j) * size
        mask = torch.ones(size, seq)
        if masked:
            mask[:, : 2 * j] = 0.0  # later micro-batches have fewer scored tokens
        documents = torch.arange(seq).expand(size, seq) // 9 if recipe.data.document_mask else None
        made.append(
            Batch(
                tokens=ids[:, :-1].contiguous(),
                labels=ids[:, 1:].contiguous(),
                loss_mask=mask,
                position_ids=torch.arange(seq).expand(size, seq).contiguous(),
                document_ids=documents,
                token_index=number * seq + torch.arange(seq),
            )
        )
    mine = count // dp
    return made[dp_rank * mine : (dp_rank + 1) * mine]
