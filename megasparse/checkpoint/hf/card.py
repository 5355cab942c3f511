"""README.md of an exported folder: what the model is, what it was trained on, how well it does, how to load it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from megasparse import __version__
from megasparse.config import Recipe, dump_recipe
from megasparse.parameters import parameter_count

METRICS = ("loss", "validation_loss", "validation_bits_per_byte")  # of the last step that has them
RUN_METRICS = "metrics.jsonl"


def card(
    recipe: Recipe, manifest: dict[str, Any], model_type: str, remote_code: bool, notes: list[str], run: Path
) -> str:
    """``manifest``: of the checkpoint. ``remote_code``: does the folder bring a modelling file? ``notes``: sentences on
    the conversion. ``run``: the folder whose metrics are read, if it has some."""
    model = recipe.model
    vocab_size = model.vocab_size or 0
    total, active = parameter_count(model, vocab_size, recipe.data.seq_length)
    tags = ["megasparse", *(["moe"] if model.moe else [])]
    data = ModelCardData(library_name="transformers", pipeline_tag="text-generation", tags=tags)
    lines = ["---", data.to_yaml(), "---", "", f"# {recipe.name}", ""]
    lines += [f"A {model_type} of {total:,} parameters, {active:,} of them active for a token.", "", "## Use", ""]
    trust = ", trust_remote_code=True" if remote_code else ""
    lines += [
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'model = AutoModelForCausalLM.from_pretrained("path/of/this/folder"' + trust + ")",
        'tokenizer = AutoTokenizer.from_pretrained("path/of/this/folder"' + trust + ")",
        "```",
        "",
    ]
    lines += [
        "## Training",
        "",
        f"{_training(recipe, manifest)}",
        "",
        *_data(manifest),
        *_metrics(run, manifest["step"]),
    ]
    lines += ["## Conversion", "", f"Written by megasparse {__version__}. " + " ".join(notes), ""]
    lines += ["## Recipe", "", "```yaml", dump_recipe(recipe).rstrip(), "```", ""]
    return "\n".join(lines)


def _training(recipe: Recipe, manifest: dict[str, Any]) -> str:
    if source := manifest.get("converted_from"):
        return f"Converted from a {source['model_type']}; not trained since."
    tokens = manifest["samples"] * recipe.data.seq_length
    return (
        f"{manifest['step']:,} steps, {tokens:,} tokens, in {recipe.training.precision}, on {manifest['world_size']} "
        f"processes in the layout {manifest['layout']}."
    )


def _data(manifest: dict[str, Any]) -> list[str]:
    sets = manifest.get("data") or []
    if not sets:
        return []
    lines = ["| data set | weight | documents | tokens | bytes | SHA-256 |", "| --- | --- | --- | --- | --- | --- |"]
    for entry in sets:
        numbers = " | ".join(f"{entry[name]:,}" for name in ("documents", "tokens", "utf8_bytes"))
        lines.append(f"| {Path(entry['path']).name} | {entry['weight']:g} | {numbers} | {entry['bin_sha256'][:12]} |")
    return [*lines, ""]


def _metrics(run: Path, step: int) -> list[str]:
    """Of the last record up to ``step`` that has each."""
    if not (run / RUN_METRICS).is_file():
        return []
    found: dict[str, tuple[int, float]] = {}
    for line in (run / RUN_METRICS).read_text().splitlines():
        record = json.loads(line)
        if record["step"] <= step:
            found |= {name: (record["step"], record[name]) for name in METRICS if name in record}
    lines = ["| metric | step | value |", "| --- | --- | --- |"]
    lines += [f"| {name} | {at:,} | {value:.4f} |" for name, (at, value) in found.items()]
    return [*lines, ""] if found else []
