"""lm-eval's figures of a checkpoint are those that its own class for transformers finds with the same weights. No task
comes from the network."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from lm_eval.tasks import TaskManager

from megasparse import harness, topology
from megasparse.evaluate import table_of_tasks
from megasparse.inference import CheckpointModel, HuggingFaceModel, open_model
from tests import trained

WINDOW = 48
NAMES = ["choices", "written", "rolled"]
DOCUMENTS = [
    {"question": "the mixture of", "choices": [" experts", " the", " the router in the layer", "s"], "answer": 0},
    {"question": "tokens of the router\t" * 4, "choices": [" naïve", " 稀疏", " x", "y"], "answer": 2},
    {"question": "in", "choices": [" a", " layer. in the layer", " expert", " of"], "answer": 3},
]
TASKS: dict[str, dict[str, Any]] = {
    "choices": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": "",
        "num_fewshot": 0,
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}, {"metric": "brier_score"}],
    },
    "written": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{choices[answer]}}",
        "generation_kwargs": {"until": ["the", "\n\n"], "max_gen_toks": 12, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
    "rolled": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{question * 3}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "byte_perplexity"}, {"metric": "bits_per_byte"}],
    },
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "documents.jsonl").write_text("\n".join(map(json.dumps, DOCUMENTS)))
    for name, task in TASKS.items():
        data = {"data_files": {"test": str(folder / "documents.jsonl")}, "cache_dir": str(folder / "cache")}
        task = {"task": name, "dataset_path": "json", "dataset_kwargs": data, "test_split": "test", **task}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[CheckpointModel, HuggingFaceModel]]:
    """The same Llama."""
    folder, theirs = tmp_path_factory.mktemp("llama"), trained.llama(0.5)
    tokenizer = trained.byte_level(folder / "tokenizer")
    ours = open_model(trained.save_checkpoint(folder / "run", theirs, tokenizer))
    hf = open_model(trained.save_huggingface(folder / "hf", theirs, tokenizer))
    assert isinstance(ours, CheckpointModel)
    assert isinstance(hf, HuggingFaceModel)
    ours.load()
    hf.load()
    yield ours, hf
    topology.shutdown()


def test_figures_are_those_of_transformers(tasks: Path, models: tuple[CheckpointModel, HuggingFaceModel]) -> None:
    ours, hf = models
    assert ours.recipe.data.seq_length < WINDOW
    manager = harness.find_tasks(NAMES, tasks)
    found = harness.run_tasks(ours, NAMES, manager, WINDOW, 2, None)
    wanted = harness.run_tasks(hf, NAMES, manager, WINDOW, 3, None)
    assert json.loads(json.dumps(found)) == found
    figures = {
        (task, metric): value
        for task in NAMES
        for metric, value in wanted["results"][task].items()
        if isinstance(value, float | int)
    }
    assert {("choices", "brier_score,none"), ("written", "exact_match,none"), ("rolled", "bits_per_byte,none")} <= set(
        figures
    )
    for (task, metric), value in figures.items():
        assert found["results"][task][metric] == pytest.approx(value, rel=1e-5), (task, metric)
    assert found["n-samples"]["choices"]["effective"] == 3
    assert table_of_tasks(found).row_count >= 7
    assert harness.run_tasks(ours, NAMES[:1], manager, WINDOW, 2, 2)["n-samples"]["choices"]["effective"] == 2


def greedy_pair(model: CheckpointModel) -> tuple[str, str]:
    """A text and the token after it by greedy search, which is encoded as that token after the text, too."""
    for context in "abcdefghijklmnopqrstuvwxyz":
        ids = model.encode(context)
        new = model.generate(ids, 1)
        if model.encode(context + model.decode(new)) == ids + new:
            return context, model.decode(new)
    raise AssertionError("none is")


def test_every_answer_is_that_of_transformers(models: tuple[CheckpointModel, HuggingFaceModel]) -> None:
    """Log-probabilities, whether greedy, and texts of contexts that are empty, cut off, and stopped in a word."""
    from lm_eval.models.huggingface import HFLM

    ours, hf = models
    lm = harness.CheckpointLM(ours, 20, 3)
    theirs = HFLM(pretrained=hf.model, tokenizer=hf.tokenizer, max_length=20, batch_size=2)

    def asked(*arguments: Any) -> list[Any]:
        return [SimpleNamespace(args=argument, task_name="a task") for argument in arguments]

    pairs = [
        ("", "the router"),
        ("a", " of"),
        ("a", " in"),
        ("a", " layers"),
        (trained.TEXTS[3], " the expert"),
        ("b ", "c"),
    ]
    pairs.append(greedy_pair(ours))
    found = lm.loglikelihood(asked(*pairs))
    for (ours_is, ours_greedy), (theirs_is, theirs_greedy) in zip(
        found, theirs.loglikelihood(asked(*pairs)), strict=True
    ):
        assert ours_is == pytest.approx(theirs_is, rel=1e-5)
        assert ours_greedy == theirs_greedy
    assert found[-1][1]
    rolled = asked(*((text,) for text in trained.TEXTS))
    assert lm.loglikelihood_rolling(rolled) == pytest.approx(theirs.loglikelihood_rolling(rolled), rel=1e-5)
    whole = lm.generate_until(asked((trained.TEXTS[0], {"until": [], "max_gen_toks": 12})))[0]
    plain = max(re.findall(r"[ -~]+", whole), key=len)  # of whole characters, not of bytes that are parts of them
    for until in ([], ["\n\n"], ["\n\n", plain[-1]], [plain[-1], plain[:2]]):
        settings = asked(*((text, {"until": until, "max_gen_toks": 12}) for text in trained.TEXTS))
        written = lm.generate_until(settings)
        assert written == theirs.generate_until(settings)
    assert len(written[0]) < len(whole)


def test_what_cannot_be_asked(models: tuple[CheckpointModel, HuggingFaceModel]) -> None:
    lm = harness.CheckpointLM(models[0], 8, 2)
    scored = [SimpleNamespace(args=("a", trained.TEXTS[3]), task_name="long")]
    with pytest.raises(ValueError, match=r"--window 8 is less than the \d+ tokens of"):
        lm.loglikelihood(scored)
    written = [SimpleNamespace(args=("a", {"until": [], "max_gen_toks": 8}), task_name="long")]
    with pytest.raises(ValueError, match="--window 8 has no room for the 8 tokens that --tasks long asks for"):
        lm.generate_until(written)
    sampled = [SimpleNamespace(args=("a", {"until": [], "do_sample": True, "temperature": 1.0}), task_name="drawn")]
    with pytest.raises(ValueError, match="--tasks drawn samples"):
        lm.generate_until(sampled)


def test_a_task_that_is_not_there(monkeypatch: pytest.MonkeyPatch, tasks: Path, tmp_path: Path) -> None:
    """lm-eval's own, which take long to read, are taken for none."""
    monkeypatch.setattr(harness, "TaskManager", lambda include_path, **_: TaskManager(None, include_path, False))
    with pytest.raises(ValueError, match=r"--tasks choises: lm-eval has no such task: did you mean choices\?"):
        harness.find_tasks(["written", "choises"], tasks)
    with pytest.raises(ValueError, match="--tasks xyz: lm-eval has no such task: give its folder as --task-path"):
        harness.find_tasks(["xyz"], None)
    with pytest.raises(ValueError, match="no such folder"):
        harness.find_tasks(["choices"], tmp_path / "none")
