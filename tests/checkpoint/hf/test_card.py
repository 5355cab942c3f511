"""README.md of an exported folder."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

from megasparse.checkpoint.hf.card import card
from megasparse.config import parse_recipe
from megasparse.parameters import parameter_count
from tests.checkpoint.hf.conversion import export
from tests.checkpoint.hf.made import make
from tests.checkpoint.hf.trained import VOCAB, recipe_of

RECIPE = recipe_of({"vocab_size": VOCAB}, {}, training={"precision": "bf16"})
DATA = [
    {
        **{"path": "/data/one", "weight": 0.25, "documents": 1234, "tokens": 5678901, "utf8_bytes": 23456789},
        "bin_sha256": "0123456789abcdef" * 4,
    },
    {"path": "two", "weight": 0.75, "documents": 2, "tokens": 3, "utf8_bytes": 4, "bin_sha256": "f" * 64},
]
MANIFEST: dict[str, Any] = {"step": 1500, "samples": 12_000, "world_size": 4, "layout": "tp2dp2", "data": DATA}


def written(run: Path, remote_code: bool = False, notes: list[str] | None = None, **manifest: Any) -> str:
    return card(RECIPE, {**MANIFEST, **manifest}, "mixtral", remote_code, notes or [], run)


def table(text: str, first: str) -> list[list[str]]:
    """Rows of the table whose first column is called so."""
    (found,) = re.findall(rf"(?:^\| {first} \|.*\n)(?:^\|.*\n)+", text, re.MULTILINE)
    return [line.strip("| ").split(" | ") for line in found.splitlines()[2:]]


def test_front_matter_is_yaml(tmp_path: Path) -> None:
    text = written(tmp_path)
    assert text.startswith("---\n")
    front = yaml.safe_load(text.split("---\n")[1])
    assert front["library_name"] == "transformers"
    assert front["pipeline_tag"] == "text-generation"
    assert front["tags"] == ["megasparse", "moe"]


def test_the_recipe_is_one(tmp_path: Path) -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", written(tmp_path), re.DOTALL)
    assert parse_recipe(yaml.safe_load(block)) == RECIPE


def test_what_it_says(tmp_path: Path) -> None:
    text = written(tmp_path, notes=["First note.", "Second note."])
    total, active = parameter_count(RECIPE.model, VOCAB, 24)
    assert f"# {RECIPE.name}\n" in text
    assert f"A mixtral of {total:,} parameters, {active:,} of them active for a token." in text
    assert "1,500 steps, 288,000 tokens, in bf16, on 4 processes in the layout tp2dp2." in text  # 12,000 x 24
    assert "First note. Second note." in text
    assert "trust_remote_code" not in text
    assert written(tmp_path, remote_code=True).count(", trust_remote_code=True)") == 2


def test_python_can_be_run(tmp_path: Path) -> None:
    for remote_code in (False, True):
        (block,) = re.findall(r"```python\n(.*?)```", written(tmp_path, remote_code), re.DOTALL)
        compile(block, "README.md", "exec")


def test_data_rows(tmp_path: Path) -> None:
    assert table(written(tmp_path), "data set") == [
        ["one", "0.25", "1,234", "5,678,901", "23,456,789", "0123456789ab"],
        ["two", "0.75", "2", "3", "4", "f" * 12],
    ]
    assert "data set" not in written(tmp_path, data=[])


def test_metrics_are_the_last_ones_up_to_the_step(tmp_path: Path) -> None:
    records = [
        {"step": 1400, "loss": 3.5, "validation_loss": 3.25, "validation_bits_per_byte": 1.125},
        {"step": 1500, "loss": 3.0, "grad_norm": 1.0},
        {"step": 1501, "loss": 2.0, "validation_loss": 2.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert table(written(tmp_path), "metric") == [
        ["loss", "1,500", "3.0000"],
        ["validation_loss", "1,400", "3.2500"],
        ["validation_bits_per_byte", "1,400", "1.1250"],
    ]


def test_without_metrics(tmp_path: Path) -> None:
    assert "| metric |" not in written(tmp_path)
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1600, "loss": 1.0}) + "\n")
    assert "| metric |" not in written(tmp_path), "of later steps alone"


def test_a_converted_checkpoint_was_not_trained(tmp_path: Path) -> None:
    text = written(tmp_path, converted_from={"path": "x", "model_type": "qwen3_moe"}, data=[])
    assert "Converted from a qwen3_moe; not trained since." in text
    assert "steps," not in text


def test_of_an_exported_run(tmp_path: Path) -> None:
    """With the run's metrics, and the vocabulary that a recipe leaves open."""
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 4, "loss": 3.125}) + "\n")
    weights = {"method": "sr_ste", "decay": 0.01}
    recipe = recipe_of({}, sparsity={"weights": weights})
    export(make(tmp_path / "checkpoints" / "step_4", recipe, data=DATA), tmp_path / "theirs", run=None)
    text = (tmp_path / "theirs" / "README.md").read_text()
    assert table(text, "metric") == [["loss", "4", "3.1250"]]
    assert len(table(text, "data set")) == 2
    assert "Logits were not compared." in text
    assert "2:4 weights are written as the forward pass takes them, with their zeros." in text
    (block,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    parsed = parse_recipe(yaml.safe_load(block))
    assert parsed.model.vocab_size == VOCAB
    assert parsed.sparsity == recipe.sparsity
    assert "moe" not in yaml.safe_load(text.split("---\n")[1])["tags"]
