"""Perplexity and bits per byte are those of a float64 computation, token by token, with transformers; by checkpoints in
any layout and by Hugging Face folders."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megasparse import evaluate as module
from megasparse import topology
from megasparse.data.corpus import Corpus
from megasparse.data.tokenizer import SentencePieceTokenizer, load_tokenizer, train_sentencepiece
from megasparse.evaluate import evaluate, read_text, score, spans
from megasparse.inference import CheckpointModel, HuggingFaceModel, open_model
from megasparse.layout import Layout
from tests import small, trained
from tests.helpers import run_distributed

FILES = ("a.txt", "b.jsonl", "c.py")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """One document, three of which one is a single character, and one that is shorter than a window."""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "a.txt").write_text(trained.TEXTS[3])
    lines = [{"text": text} for text in (trained.TEXTS[1], "", trained.TEXTS[2], trained.TEXTS[0])]
    (folder / "b.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (folder / "c.py").write_text("of")
    return [folder / name for name in FILES]


@pytest.fixture(scope="module")
def tokenizer() -> SentencePieceTokenizer:
    return train_sentencepiece(trained.TEXTS * 3, vocab_size=trained.VOCAB - 3)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory, tokenizer: SentencePieceTokenizer) -> Iterator[CheckpointModel]:
    """A Llama, from its checkpoint."""
    folder = trained.save_checkpoint(tmp_path_factory.mktemp("llama"), trained.llama(), tokenizer)
    model = open_model(folder)
    assert isinstance(model, CheckpointModel)
    model.load()
    yield model
    topology.shutdown()


# What is expected -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def nats(theirs: torch.nn.Module, prefix: int, ids: list[int], window: int, stride: int) -> float:
    """Of each token after what the first window that has it shows of the tokens before it, in float64."""
    total, whole = 0.0, [prefix, *ids]
    for i, target in enumerate(ids):
        start = max(0, math.ceil((i - window + 1) / stride)) * stride
        logits = theirs(torch.tensor([whole[start : i + 1]])).logits[0, -1]
        total -= logits.log_softmax(-1)[target].item()
    return total


def expected(theirs: torch.nn.Module, model: Any, files: list[Path], window: int, stride: int) -> list[dict[str, Any]]:
    theirs, found = theirs.double().eval(), []
    for path in files:
        texts = [document.text for document in Corpus([path])]
        ids = [model.encode(text) for text in texts]
        total = sum(nats(theirs, model.prefix, document, window, stride) for document in ids)
        tokens, size = sum(map(len, ids)), sum(len(text.encode()) for text in texts)
        found.append(
            {
                "file": str(path),
                "documents": len(texts),
                "tokens": tokens,
                "bytes": size,
                "nats_per_token": total / tokens,
                "perplexity": math.exp(total / tokens),
                "bits_per_byte": total / math.log(2) / size,
            }
        )
    return found


def assert_figures(found: list[dict[str, Any]], wanted: list[dict[str, Any]], rtol: float = 1e-6) -> None:
    assert len(found) == len(wanted)
    for ours, theirs in zip(found, wanted, strict=True):
        assert {key: ours[key] for key in theirs} == {
            key: pytest.approx(value, rel=rtol) if isinstance(value, float) else value for key, value in theirs.items()
        }


# Windows --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [0, 1, 7, 8, 9, 15, 16, 50])
@pytest.mark.parametrize(("window", "stride"), [(8, 8), (8, 4), (8, 3), (8, 1), (1, 1), (64, 32)])
def test_every_token_is_scored_once_with_enough_context(tokens: int, window: int, stride: int) -> None:
    found = list(spans(tokens, window, stride))
    assert [i for _, end, scored in found for i in range(scored, end)] == list(range(tokens))
    for number, (start, end, scored) in enumerate(found):
        assert start == number * stride
        assert 1 <= end - start <= window
        assert scored - start >= (window - stride if number else 0)


# Figures --------------------------------------------------------------------------------------------------------------


def test_a_checkpoint(loaded: CheckpointModel, files: list[Path]) -> None:
    for window, stride in ((16, 5), (small.SEQ, small.SEQ // 2), (400, 400)):
        texts = [read_text(loaded, path, "text") for path in files]
        score(loaded, texts, window, stride, batch_size=4)
        wanted = expected(trained.llama(), loaded, files, window, stride)
        assert_figures([text.figures() for text in texts], wanted)


def test_the_batch_size_changes_nothing(loaded: CheckpointModel, files: list[Path]) -> None:
    found = []
    for batch_size in (1, 3, 100):
        texts = [read_text(loaded, path, "text") for path in files]
        score(loaded, texts, 9, 4, batch_size)
        found.append([text.figures() for text in texts])
    assert_figures(found[1], found[0])
    assert_figures(found[2], found[0])


def test_a_hugging_face_folder(tmp_path: Path, files: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    """... with the default windows, and what is printed and written."""
    tokenizer = trained.byte_level(tmp_path / "tokenizer")
    model = open_model(trained.save_huggingface(tmp_path / "hf", trained.llama(), tokenizer))
    assert isinstance(model, HuggingFaceModel)
    found = evaluate(model, files, json_path=tmp_path / "found.json")
    assert json.loads((tmp_path / "found.json").read_text()) == found
    assert (found["window"], found["stride"]) == (64, 32)
    assert_figures(found["files"], expected(trained.llama(), model, files, 64, 32))
    assert [text["skipped"] for text in found["files"]] == [{}, {"empty": 1}, {}]
    whole = found["all"]
    assert whole["tokens"] == sum(text["tokens"] for text in found["files"])
    bits = sum(text["bits_per_byte"] * text["bytes"] for text in found["files"])
    assert whole["bits_per_byte"] * whole["bytes"] == pytest.approx(bits)
    printed = " ".join(capsys.readouterr().out.split())
    assert f"{whole['bits_per_byte']:.4f}" in printed
    assert "windows of 64 tokens every 32" in printed


def figures_in(layout: str, path: Path, files: list[Path], out: Path) -> dict[str, Any]:
    return evaluate(open_model(path, layout=Layout.parse(layout)), files, stride=7, batch_size=5, json_path=out)


def saved_and_scored(folder: Path, tokenizer: Path, files: list[Path]) -> dict[str, Any]:
    path = trained.save_checkpoint(folder, trained.olmoe(), load_tokenizer(tokenizer))
    return figures_in("single", path, files, folder / "single.json")


def test_every_layout_finds_the_same(tmp_path: Path, files: list[Path], tokenizer: SentencePieceTokenizer) -> None:
    """A mixture of experts, whose vocabulary and windows tp does not divide; every rank has the figures, one writes."""
    tokenizer.save(tmp_path)
    path = tmp_path / "olmoe"
    (single,) = run_distributed(saved_and_scored, 1, path, tmp_path, files)
    wanted = expected(trained.olmoe(), open_model(path), files, small.SEQ, 7)
    assert_figures(single["files"], wanted)
    for layout in ("tp2+sp", "pp2", "ep2"):
        out = tmp_path / f"{layout}.json"
        found = run_distributed(figures_in, 2, layout, path, files, out)
        for figures in found:
            assert_figures([*figures["files"], figures["all"]], [*single["files"], single["all"]])
        assert json.loads(out.read_text()) == found[0]


# What is refused, before the model is loaded --------------------------------------------------------------------------


def refused(monkeypatch: pytest.MonkeyPatch, model: Any, *arguments: Any, **options: Any) -> str:
    monkeypatch.setattr(type(model), "load", lambda self: pytest.fail("it was loaded"))
    with pytest.raises(ValueError, match=r".") as error:
        evaluate(model, *arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_windows_that_cannot_be(monkeypatch: pytest.MonkeyPatch, loaded: CheckpointModel, files: list[Path]) -> None:
    assert "--stride 9 is more than --window 8" in refused(monkeypatch, loaded, files, window=8, stride=9)
    monkeypatch.setattr(loaded, "longest", 24)
    assert "--window 25 is more than the 24 positions of" in refused(monkeypatch, loaded, files, window=25)
    monkeypatch.setattr(loaded, "layout", Layout(cp=2))
    assert "--layout cp2: evaluation does not split the sequence" in refused(monkeypatch, loaded, files)


def test_files_that_cannot_be(monkeypatch: pytest.MonkeyPatch, loaded: CheckpointModel, tmp_path: Path) -> None:
    assert "nothing to evaluate: give files of text, or --tasks" in refused(monkeypatch, loaded, [])
    assert f"source {tmp_path / 'none.txt'} does not exist" in refused(monkeypatch, loaded, [tmp_path / "none.txt"])
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    assert f"{empty} holds no text to score (1 empty)" in refused(monkeypatch, loaded, [empty])
    out = tmp_path / "none" / "out.json"
    assert f"there is no folder {out.parent}" in refused(monkeypatch, loaded, [empty], json_path=out)


def test_lm_eval_is_not_installed(monkeypatch: pytest.MonkeyPatch, loaded: CheckpointModel) -> None:
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    said = refused(monkeypatch, loaded, [], ["hellaswag"])
    assert said == "--tasks needs lm_eval, which is not installed: pip install 'megasparse[eval]'"
