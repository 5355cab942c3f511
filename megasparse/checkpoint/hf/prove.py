"""Do a checkpoint of ours and a folder of theirs compute the same logits? In float32, each with its own code."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from megasparse.checkpoint.hf import packed
from megasparse.checkpoint.hf.folder import Folder
from megasparse.checkpoint.hf.megasparse import MEGASPARSE
from megasparse.checkpoint.reader import Reader
from megasparse.config import parse_recipe
from megasparse.launch import launch
from megasparse.layout import Layout, check_layout

Run = Callable[..., list[Any]]  # processes.Workers.run
SEQUENCES, TOKENS = 2, 64
BLOCKS = 8  # of keys in a sequence, at least, where attention is block-sparse
ERROR = 1e-5  # the largest difference of two logits, to the largest logit
DIVERGENCE = 1e-10  # mean KL of a token, in nats
LAYERS = 8  # of more, float32 rounds more: 30 block-sparse ones of SmolLM2 were 1.7e-5 apart, ours 1.1e-5 from float64
TIMEOUT = 3600.0


@dataclass(frozen=True)
class Proof:
    """How far their logits are from ours, over so many tokens."""

    error: float  # max |theirs - ours| / max |ours|
    divergence: float  # mean KL(ours || theirs), nats, float64
    tokens: int
    layout: str

    def __str__(self) -> str:
        return (
            f"logits of {self.tokens} random tokens, ours in {self.layout}: relative difference {self.error:.1e}, "
            f"KL {self.divergence:.1e} nats"
        )


def check_memory(parameters: int) -> None:
    """ValueError if there is no room for both models in float32."""
    needed, free = 2 * 4 * parameters, psutil.virtual_memory().available
    if needed > free:
        raise ValueError(
            f"to compare logits both models are loaded in float32: {needed / 2**30:.0f} GiB, {free / 2**30:.0f} GiB of "
            "memory are free: pass --no-verify, and compare where there is more"
        )


def prove(checkpoint: Path, theirs: Path, dtype: torch.dtype, layout: Layout, run: Run) -> Proof:
    """Compare logits of ``checkpoint``, its weights rounded to ``dtype``, with those of the folder ``theirs``. Ours are
    computed in ``layout``, by ``run``. ValueError if they differ."""
    tokens = _tokens(checkpoint)
    ours = run(_ours, layout.world_size, checkpoint, dtype, layout.parallel(), tokens, timeout=TIMEOUT)[0]
    ((other, problem),) = run(_theirs, 1, theirs, tokens, timeout=TIMEOUT)
    if problem:
        raise ValueError(f"{theirs}: {problem}")
    difference = (other.double() - ours.double()).abs().max() / ours.double().abs().max()
    log_p, log_q = (x.double().log_softmax(-1) for x in (ours, other))
    divergence = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    proof = Proof(float(difference), float(divergence), tokens.numel(), str(layout))
    depth = max(1.0, Reader(checkpoint).manifest["recipe"]["model"]["num_layers"] / LAYERS)
    if not (proof.error <= depth * ERROR and proof.divergence <= depth**2 * DIVERGENCE):
        raise ValueError(f"{theirs} and {checkpoint} are not the same model: {proof}")
    return proof


def _tokens(checkpoint: Path) -> Tensor:
    reader = Reader(checkpoint)
    recipe = parse_recipe(reader.manifest["recipe"], source=f"the recipe of {checkpoint}")
    vocab_size = reader.tensors["model.embedding.word_embeddings.weight"].shape[0]
    length, sparse = TOKENS, recipe.model.sparse_attention
    if sparse is not None:
        length = max(length, BLOCKS * max(sparse.block_size, sparse.query_block_size))
    length = min(length, recipe.model.max_position_embeddings or recipe.data.seq_length)
    return torch.randint(vocab_size, (SEQUENCES, length), generator=torch.Generator().manual_seed(0))


def _ours(checkpoint: Path, dtype: torch.dtype, parallel: dict[str, Any], tokens: Tensor) -> Tensor:
    """On each rank of the layout. What it imports takes more memory than a conversion may."""
    from megasparse import platform, topology
    from megasparse.checkpoint.weights import inference_source, load_model
    from megasparse.generate import all_logits
    from megasparse.sparsity.weight import sparse_weights

    platform.activate()
    source, vocabulary = inference_source(checkpoint, parallel, "fp32", fp8=False)
    place = topology.initialize(check_layout(source.recipe, launch().world_size))
    chunks = load_model(source, place, vocabulary.size)
    for parameter in chunks.parameters():
        parameter.data = parameter.data.to(dtype)
    for sparse in sparse_weights(chunks):  # as to_hf does
        sparse.product = sparse._product(sparse.weight[0]).float()
    for parameter in chunks.parameters():
        parameter.data = parameter.data.float()
    return all_logits(chunks, source.recipe, place, tokens).cpu()


def _theirs(folder: Path, tokens: Tensor) -> tuple[Tensor | None, str]:
    """Logits, or what is wrong with the folder."""
    from transformers import AutoModelForCausalLM

    load: Any = AutoModelForCausalLM.from_pretrained
    if (folder / packed.STEM.single).is_file() or (folder / packed.STEM.index).is_file():
        load = packed.load_packed
    elif Folder(folder).raw_config()["model_type"] == MEGASPARSE.model_type:
        from megasparse.checkpoint.hf.modeling_megasparse import MegasparseForCausalLM

        load = MegasparseForCausalLM.from_pretrained
    model, loading = load(folder, dtype=torch.float32, output_loading_info=True)
    for what in ("missing_keys", "mismatched_keys"):
        if loading[what]:
            return None, f"transformers finds {what} {', '.join(sorted(map(str, loading[what])))}"
    with torch.no_grad():
        return model.eval()(tokens).logits.float(), ""
