"""Which model a folder holds, with which tokenizer, and that it writes what transformers does with the same weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megasparse import topology
from megasparse.checkpoint.folder import read_manifest, write_manifest
from megasparse.data.tokenizer import Tokenizer, train_sentencepiece
from megasparse.inference import CheckpointModel, HuggingFaceModel, open_model
from megasparse.layout import Layout
from tests import small, trained

PROMPT = "a mixture"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return trained.byte_level(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    return trained.save_checkpoint(tmp_path_factory.mktemp("run"), trained.llama(0.5), tokenizer)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    return trained.save_huggingface(tmp_path_factory.mktemp("hf"), trained.llama(0.5), tokenizer)


@pytest.fixture(scope="module")
def models(run: Path, folder: Path) -> Iterator[tuple[CheckpointModel, HuggingFaceModel]]:
    ours, theirs = open_model(run / "checkpoints" / "step_1"), open_model(folder)
    assert isinstance(ours, CheckpointModel)
    assert isinstance(theirs, HuggingFaceModel)
    ours.load()
    theirs.load()
    yield ours, theirs
    topology.shutdown()


# Text -----------------------------------------------------------------------------------------------------------------


def test_logits_are_those_of_transformers(models: tuple[CheckpointModel, HuggingFaceModel]) -> None:
    tokens = torch.randint(0, trained.VOCAB, (3, 17))
    for model in models:
        logits = model.logits(tokens)
        assert logits.dtype == torch.float32
        with torch.no_grad():
            torch.testing.assert_close(logits, trained.llama(0.5).eval()(tokens).logits, rtol=1e-5, atol=1e-5)


def test_greedy_text_is_that_of_transformers(models: tuple[CheckpointModel, HuggingFaceModel]) -> None:
    found = []
    for model in models:
        prompt = model.encode(PROMPT)
        new = model.generate(prompt, 12)
        found.append((prompt, new, model.decode(prompt + new)))
    theirs, prompt = trained.llama(0.5).eval(), torch.tensor([found[0][0]])
    whole = theirs.generate(prompt, max_new_tokens=12, do_sample=False, attention_mask=torch.ones_like(prompt))  # type: ignore[operator]
    assert found[0] == found[1]
    assert found[0][1] == whole[0, prompt.shape[1] :].tolist()
    assert len(set(found[0][1])) > 3
    assert found[0][2].startswith(PROMPT)


def test_a_seed_is_a_text(models: tuple[CheckpointModel, HuggingFaceModel]) -> None:
    for model in models:
        prompt = model.encode(PROMPT)
        texts = [model.generate(prompt, 12, temperature=2.0, top_p=0.9, seed=seed) for seed in (1, 1, 2)]
        assert texts[0] == texts[1] != texts[2]
        assert model.generate(prompt, 12, temperature=2.0, top_p=1e-6) == model.generate(prompt, 12)


def test_text_ends_where_a_document_does(
    monkeypatch: pytest.MonkeyPatch, models: tuple[CheckpointModel, HuggingFaceModel]
) -> None:
    ours, theirs = models
    prompt = ours.encode(PROMPT)
    whole = ours.generate(prompt, 12)
    end = whole[5]
    monkeypatch.setattr(ours.tokenizer, "eod", end)
    monkeypatch.setattr(theirs.model.generation_config, "eos_token_id", [end, 0])
    for model in models:
        assert model.generate(prompt, 12) == whole[: whole.index(end)]


# Which model ----------------------------------------------------------------------------------------------------------


def test_the_latest_checkpoint_of_a_run(run: Path) -> None:
    model = open_model(run)
    assert isinstance(model, CheckpointModel)
    assert model.path == run / "checkpoints" / "step_1"
    assert (model.window, model.longest, model.prefix) == (small.SEQ, None, 0)
    assert model.recipe.training.precision == "fp32"
    changed = open_model(run, precision="bf16")
    assert isinstance(changed, CheckpointModel)
    assert changed.recipe.training.precision == "bf16"


def test_positions_of_a_learned_table(run: Path, tmp_path: Path) -> None:
    path = tmp_path / "step_1"
    shutil.copytree(run / "checkpoints" / "step_1", path)
    rewrite(path, lambda manifest: manifest["recipe"]["model"].update(position_embedding="learned"))
    assert open_model(path).longest == small.SEQ


def rewrite(path: Path, change: Any) -> None:
    manifest = read_manifest(path)
    change(manifest)
    write_manifest(path, manifest)


def test_rules_of_training_alone_are_set_aside(run: Path, tmp_path: Path) -> None:
    path = tmp_path / "step_1"
    shutil.copytree(run / "checkpoints" / "step_1", path)

    def change(manifest: dict[str, Any]) -> None:
        manifest["recipe"]["schedule"] = {"warmup_tokens": 100}
        manifest["recipe"]["parallel"] = {"tp": 4, "pp": 2, "zero_stage": 0, "layers_per_stage": [1, 1]}
        manifest["recipe"]["training"].update(recompute="full", global_batch_size=24, micro_batch_size=6)

    rewrite(path, change)
    model = open_model(path)
    assert isinstance(model, CheckpointModel)
    assert str(model.layout) == "single"


def refused(path: Path, **options: Any) -> str:
    with pytest.raises(ValueError, match=r".") as error:
        open_model(path, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_is_no_model(run: Path, folder: Path, tmp_path: Path) -> None:
    assert refused(tmp_path / "none").startswith(f"no folder at {tmp_path / 'none'}: give a checkpoint step_N")
    assert refused(tmp_path).startswith(
        f"{tmp_path} is neither a checkpoint (it has no manifest.json), nor a run folder"
    )
    (tmp_path / "checkpoints").mkdir()
    assert refused(tmp_path) == f"no checkpoint in {tmp_path / 'checkpoints'}: train until one is saved"
    assert refused(run, precision="fp8") == "--precision fp8: give one of fp32, bf16, fp16"
    assert "ep2" in refused(run, layout=Layout.parse("ep2"))
    assert "tp=3" in refused(run, layout=Layout.parse("tp3"))
    assert "runs in one process: start megasparse without" in refused(folder, layout=Layout.parse("tp2"))


def test_what_is_no_hugging_face_model(monkeypatch: pytest.MonkeyPatch, folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "hf"
    shutil.copytree(folder, path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "vocab_size": 100}))
    assert refused(path).startswith(
        f"the tokenizer in {path} has {trained.VOCAB - 20} tokens, the model of {path} 100: give the one"
    )
    (path / "config.json").write_text(json.dumps({**config, "model_type": "mine", "auto_map": {"AutoConfig": "x.Y"}}))
    assert refused(path) == f"{path} brings its own code: read it, then pass --trust-remote-code"
    shutil.copy(folder / "config.json", path / "config.json")
    (path / "tokenizer.json").unlink()
    (path / "tokenizer_config.json").unlink()
    assert refused(path).startswith(f"no tokenizer in {path}: give a folder with tokenizer.model or tokenizer.json")
    assert open_model(path, tokenizer=folder).prefix == 0
    (path / "model.safetensors").unlink()
    assert refused(path) == f"{path} has a config.json but no weights: *.safetensors is missing"
    for name, value in {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_SIZE": 2, "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    assert "runs in one process" in refused(folder)


# Tokenizers -----------------------------------------------------------------------------------------------------------


def test_where_the_tokenizer_is(run: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """With the checkpoint; in older ones not: given, or that of the data set, if it is the one of the manifest."""
    path, data_set, other = tmp_path / "step_1", tmp_path / "set", tmp_path / "other"
    shutil.copytree(run / "checkpoints" / "step_1", path)
    data_set.mkdir()
    other.mkdir()
    train_sentencepiece(trained.TEXTS * 3, trained.VOCAB - 3).save(other)
    tokenizer.save(data_set)

    def older(manifest: dict[str, Any]) -> None:
        manifest["files"] = {name: file for name, file in manifest["files"].items() if "tokenizer" not in name}
        manifest["recipe"]["data"]["sets"][0]["path"] = str(data_set)

    rewrite(path, older)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (path / name).unlink()
    for options in ({}, {"tokenizer": data_set}):
        model = open_model(path, **options)
        assert isinstance(model, CheckpointModel)
        assert model.tokenizer.hash == tokenizer.hash
    assert (
        refused(path, tokenizer=other)
        == f"--tokenizer {other} is not the one {path} was trained with: its hash is another"
    )
    shutil.rmtree(data_set)
    shutil.copytree(other, data_set)
    assert refused(path).startswith(f"no tokenizer in {path}, and not the one it was trained with in {data_set}: give")
    rewrite(path, lambda manifest: manifest.update(tokenizer=None))
    assert refused(path).startswith(f"no tokenizer in {path}, and not the one it was trained with in {data_set}: give")
    assert open_model(path, tokenizer=other).encode("x")


def test_a_tokenizer_with_more_tokens_than_the_model(run: Path, tmp_path: Path) -> None:
    """... that an older checkpoint cannot say is not its own."""
    path = tmp_path / "step_1"
    shutil.copytree(run / "checkpoints" / "step_1", path)
    rewrite(path, lambda manifest: manifest.update(tokenizer=None))
    train_sentencepiece(trained.TEXTS * 3, trained.VOCAB + 1).save(tmp_path)
    said = refused(path, tokenizer=tmp_path)
    assert said.startswith(f"the tokenizer has {trained.VOCAB + 1} tokens, the model of {path} {trained.VOCAB}: give")
