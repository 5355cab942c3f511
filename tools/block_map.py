"""A picture of which key blocks a trained model's attention sees in a held-out text: layers x K/V heads.

    python tools/block_map.py runs/NAME [--output block_map.png] [--window 0]

Rows of a map are queries, columns key blocks; light is what every query sees (its own, the local and the first
blocks), dark what the selector chose. The model is that of the run's newest checkpoint, with its last sparse step's
budget.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import yaml
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from torch import Tensor

from megasparse import platform, topology
from megasparse.checkpoint import folder as checkpoints
from megasparse.checkpoint.load import load
from megasparse.config import Recipe, parse_recipe
from megasparse.data.loader import Batch, ValidationWindows
from megasparse.engine import Engine
from megasparse.files import written_aside
from megasparse.layers.block_sparse import BlockSparseAttention
from megasparse.layout import check_layout
from megasparse.model import build_model
from megasparse.ops.block_sparse import BlockMask
from megasparse.train import vocabulary

Maps = dict[int, Tensor]  # by layer: [kv_heads, q_blocks, k_blocks]; 0 not seen, 1 always seen, 2 chosen


def read_recipe(run_dir: Path) -> Recipe:
    """The run's, in one process. ValueError where it has no block-sparse attention."""
    path = run_dir / "recipe.yaml"
    if not path.is_file():
        raise ValueError(f"{run_dir} is not a run: it has no recipe.yaml")
    recipe = parse_recipe({**yaml.safe_load(path.read_text()), "parallel": {}})
    if recipe.model.sparse_attention is None:
        raise ValueError(f"{path} has no model.sparse_attention: there are no blocks to show")
    return recipe


def block_maps(recipe: Recipe, checkpoint: Path, window: int) -> Maps:
    """What the model saved at ``checkpoint`` lists for held-out window ``window``."""
    validation = ValidationWindows(recipe.data)
    place = topology.initialize(check_layout(recipe, 1), recipe.training.seed)
    chunks, state = build_model(recipe, place, vocabulary(recipe, validation.tokenizer.vocab_size))
    engine = Engine(recipe, place, chunks, state)
    load(engine, checkpoint)
    assert recipe.model.sparse_attention is not None
    state.progress = 1 - recipe.model.sparse_attention.dense_end
    maps: Maps = {}
    model: Any = chunks[0]
    for layer in model.decoder.layers:
        attention = layer.self_attention.core_attention
        if isinstance(attention, BlockSparseAttention):
            attention.select = _recorded(attention, maps, layer.layer_number - 1)  # type: ignore[method-assign]
    batches = validation.batches(1, 0, 1)
    engine.evaluate([_nth(batches, window)])
    return maps


def _recorded(attention: BlockSparseAttention, maps: Maps, layer: int) -> Any:
    select = attention.select

    def recorded(q: Tensor, k: Tensor, *arguments: Any) -> BlockMask:
        mask = select(q, k, *arguments)
        first, last = attention.grid.own(q.shape[1], 0, k.device)
        always = attention.grid.always(first, last, torch.arange(mask.num_key_blocks))
        seen = mask.to_dense()[0]
        maps[layer] = seen.int() + (seen & ~always)
        return mask

    return recorded


def _nth(batches: Any, window: int) -> Batch:
    for number, batch in enumerate(batches):
        if number == window:
            return batch
    raise ValueError(f"--window {window}: the held-out text has fewer")


def plot(maps: Maps, title: str, path: Path) -> None:
    heads = len(next(iter(maps.values())))
    figure = Figure(figsize=(1 + 1.9 * len(maps), 0.8 + 1.9 * heads), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    axes = figure.subplots(heads, len(maps), squeeze=False, sharex=True, sharey=True)
    colors = ListedColormap(["white", "#c6dbef", "#08306b"])
    for column, (layer, by_head) in enumerate(sorted(maps.items())):
        for head, seen in enumerate(by_head.numpy()):
            axis = axes[head][column]
            axis.imshow(seen, cmap=colors, vmin=0, vmax=2, aspect="auto", interpolation="nearest")
            axis.set_xticks([0, seen.shape[1] - 1])
            axis.set_yticks([0, seen.shape[0] - 1])
            if head == 0:
                axis.set_title(f"layer {layer}", fontsize=9)
            if column == 0:
                axis.set_ylabel(f"K/V head {head}\nqueries", fontsize=9)
            if head == heads - 1:
                axis.set_xlabel("key blocks", fontsize=9)
    figure.suptitle(title, fontsize=10)
    with written_aside(path) as aside:
        figure.savefig(aside, format="png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--output", type=Path, default=Path("block_map.png"))
    parser.add_argument("--window", type=int, default=0, help="which held-out window")
    options = parser.parse_args()
    try:
        recipe = read_recipe(options.run_dir)
        checkpoint = checkpoints.latest(options.run_dir / "checkpoints")
        if checkpoint is None:
            raise ValueError(f"{options.run_dir} has no checkpoint yet")
        platform.activate()
        maps = block_maps(recipe, checkpoint, options.window)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    sparse = recipe.model.sparse_attention
    assert sparse is not None
    plot(
        maps, f"{recipe.name}, {checkpoint.name}: {sparse.selector}, blocks of {sparse.block_size} keys", options.output
    )
    print(f"{options.output}: {len(maps)} layers")


if __name__ == "__main__":
    main()
