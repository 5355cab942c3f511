"""The same weights as a checkpoint and as a Hugging Face folder, with tokenizers and texts to ask them about."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, trainers

from megasparse import topology
from megasparse.checkpoint.save import Saver
from megasparse.config import Recipe
from megasparse.data.tokenizer import HuggingFaceTokenizer, Tokenizer, load_tokenizer
from megasparse.engine import Engine
from megasparse.model import build_model
from tests import oracle, small

VOCAB = 331
TEXTS = [
    "The sparse mixture of experts, in layers.\n\n    and its gradient;\n",
    "naïve 稀疏 tokens of the router\t" * 3,
    "x",
    "a mixture of the tokens in the layer of the expert of the mixture in the router. " * 4,
]


def byte_level(folder: Path) -> HuggingFaceTokenizer:
    """A tokenizer.json of every byte and some merges, which transformers reads as well."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - 20,
        special_tokens=["<eod>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    loaded = load_tokenizer(folder / "tokenizer.json", "<eod>")
    assert isinstance(loaded, HuggingFaceTokenizer)
    return loaded


def llama(std: float = 0.15) -> torch.nn.Module:
    """With a ``std`` of 0.5 the next token depends on the ones before it."""
    return oracle.decoder("llama", vocab_size=VOCAB, initializer_range=std)


def olmoe() -> torch.nn.Module:
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
    model: Any = oracle.decoder("olmoe", vocab_size=VOCAB, **experts)
    model.set_experts_implementation("eager")  # which runs in float64
    return model


def recipe_of(theirs: torch.nn.Module) -> Recipe:
    if theirs.config.model_type == "llama":
        return small.recipe()
    return small.recipe({"qk_norm": "full"}, {"normalize_scores": False})


def save_checkpoint(folder: Path, theirs: torch.nn.Module, tokenizer: Tokenizer) -> Path:
    """``theirs`` as a run saves it at its first step: a run folder."""
    place = topology.initialize()
    recipe = recipe_of(theirs)
    chunks, state = build_model(recipe, place, VOCAB)
    oracle.copy_weights(chunks[0], theirs)  # type: ignore[arg-type]
    engine = Engine(recipe, place, chunks, state)
    Saver(engine, folder / "checkpoints", "data", tokenizer).save(1)
    topology.shutdown()
    return folder


def save_huggingface(folder: Path, theirs: Any, tokenizer: Tokenizer) -> Path:
    theirs.config.eos_token_id = theirs.generation_config.eos_token_id = tokenizer.eod
    theirs.save_pretrained(folder)
    tokenizer.save(folder)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eod>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder
