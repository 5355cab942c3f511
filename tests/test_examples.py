"""Every recipe of examples: it dry-runs, it has as many parameters as published, and it is listed."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from megasparse import topology
from megasparse.config import Recipe, load_recipe
from megasparse.dry_run import DryRun, dry_run
from tests.helpers import REPOSITORY

EXAMPLES = REPOSITORY / "examples"
HERE = sorted(EXAMPLES.glob("*.yaml"))
HOPPER = sorted((EXAMPLES / "hopper").glob("*.yaml"))
ABLATION = (EXAMPLES / "hopper" / "ablation.txt").read_text().splitlines()
HBM = 80 * 10**9  # bytes of an H100
LEFT = 0.1  # of it, for CUDA's context, NCCL and fragmentation

# Total and active, in billions, as published: with as many digits, which some round and some cut off.
PUBLISHED = {
    "mixtral_8x7b": ("46.7", "12.9"),  # mistral.ai/news/mixtral-of-experts
    "mixtral_8x22b": ("141", "39"),  # mistral.ai/news/mixtral-8x22b
    "olmoe_1b_7b": ("6.9", "1.3"),  # arXiv 2409.02060
    "qwen3_30b_a3b": ("30.5", "3.3"),  # huggingface.co/Qwen/Qwen3-30B-A3B
    "qwen3_235b_a22b": ("235", "22"),  # huggingface.co/Qwen/Qwen3-235B-A22B
    "gpt2_124m": ("0.124", "0.124"),
    "gpt2_350m": ("0.355", "0.355"),
    "gpt2_774m": ("0.774", "0.774"),
    "gpt2_1558m": ("1.558", "1.558"),
    "llama_128k": ("1.23", "1.23"),  # huggingface.co/meta-llama/Llama-3.2-1B
    "depth_moe_7b_a1b": ("7", "1"),
    "depth_moe_2b_a400m": ("2", "0.4"),
}


def sizes(recipe: Recipe) -> dict[str, Any]:
    """What every config of transformers calls alike."""
    model = recipe.model
    return {
        "num_hidden_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_size,
        "intermediate_size": model.ffn_size,
        "vocab_size": model.vocab_size,
        "tie_word_embeddings": model.tie_embeddings,
    }


def transformers_config(name: str, recipe: Recipe) -> Any:
    """The config of the same model; the sizes that matter are those that transformers has as its defaults or names."""
    model, moe = recipe.model, recipe.model.moe
    match name.split("_")[0]:
        case "gpt2":
            return transformers.GPT2Config(
                n_layer=model.num_layers, n_embd=model.hidden_size, n_head=model.num_attention_heads
            )
        case "mixtral":
            return transformers.MixtralConfig(**sizes(recipe), num_local_experts=8)
        case "olmoe":
            return transformers.OlmoeConfig(**{**sizes(recipe), "intermediate_size": 1024}, num_experts=64)
        case "qwen3":
            assert moe is not None
            width = moe.ffn_hidden_size
            return transformers.Qwen3MoeConfig(**sizes(recipe), num_experts=128, moe_intermediate_size=width)
        case "llama":
            return transformers.LlamaConfig(**sizes(recipe))
    raise AssertionError(name)


@pytest.fixture(scope="module")
def runs() -> dict[str, DryRun]:
    """A dry run of each recipe; those without a vocabulary have that of the default corpus."""
    topology.leave()
    found = {}
    for path in [*HERE, *HOPPER]:
        recipe = load_recipe(path)
        if recipe.model.vocab_size is None:
            recipe = load_recipe(path, ["model.vocab_size=4096"])
        found[path.stem] = dry_run(recipe)
    return found


@pytest.mark.parametrize("path", [*HERE, *HOPPER], ids=lambda path: path.stem)
def test_recipes_dry_run(path: Path, runs: dict[str, DryRun]) -> None:
    run = runs[path.stem]
    assert load_recipe(path).name == path.stem
    if path in HOPPER:
        assert run.layout.world_size == load_recipe(path).parallel.world_size
        assert run.layout.world_size % 8 == 0
        assert run.fp8_misfit is None
        assert run.fullest.memory.total < (1 - LEFT) * HBM


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_the_published_ones(name: str, runs: dict[str, DryRun]) -> None:
    for count, published in zip(runs[name].count, PUBLISHED[name], strict=True):
        digits = len(published.partition(".")[2])
        billions = count / 1e9
        cut = math.floor(billions * 10**digits) / 10**digits
        assert published in (f"{billions:.{digits}f}", f"{cut:.{digits}f}"), billions


@pytest.mark.parametrize("name", [n for n in PUBLISHED if not n.startswith("depth")])
def test_parameters_are_transformers(name: str, runs: dict[str, DryRun]) -> None:
    """To the last one, of the model that transformers builds."""
    recipe = load_recipe(EXAMPLES / "hopper" / f"{name}.yaml")
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(transformers_config(name, recipe))
    assert runs[name].count.total == sum(parameter.numel() for parameter in theirs.parameters())


@pytest.mark.parametrize("line", ABLATION, ids=lambda line: line.split()[1])
def test_ablations_dry_run(line: str) -> None:
    """Each differs from its recipe in one thing, of as many tokens a step and in all."""
    topology.leave()
    path, *overrides = line.split()
    plain, changed = load_recipe(REPOSITORY / path), load_recipe(REPOSITORY / path, overrides)
    assert changed.name != plain.name
    assert changed.total_tokens == plain.total_tokens
    assert changed.tokens_per_step == plain.tokens_per_step
    assert dry_run(changed).fullest.memory.total < (1 - LEFT) * HBM


def test_every_recipe_is_listed(runs: dict[str, DryRun]) -> None:
    """With its parameters, its layout, the number of processes, and what its fullest one needs."""
    text = (EXAMPLES / "README.md").read_text()
    for path in HOPPER:
        run = runs[path.stem]
        (row,) = re.findall(rf"^\| `hopper/{path.name}` .*$", text, re.M)
        peak = f"{run.fullest.memory.total / 2**30:.0f}"
        total, active, *rest = (cell.strip() for cell in row.split("|")[3:8])
        assert (total, active) == (f"{run.count.total:,}", f"{run.count.active:,}")
        assert rest == [str(run.layout), str(run.layout.world_size), peak]
    for path in HERE:
        assert f"`{path.name}`" in text


def test_names_of_ablations_differ() -> None:
    names = [line.split()[1] for line in ABLATION]
    assert len(set(names)) == len(names)
