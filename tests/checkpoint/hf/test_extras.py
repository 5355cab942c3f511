"""What goes along with exported weights: tokenizer, config, and what came with a Hugging Face folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from megasparse.checkpoint.hf.families import FAMILIES
from megasparse.checkpoint.hf.megasparse import MEGASPARSE, MODELING
from megasparse.checkpoint.hf.qwen2 import QWEN2
from megasparse.checkpoint.reader import Reader
from megasparse.config import load_recipe
from megasparse.data.tokenizer import SentencePieceTokenizer, train_sentencepiece
from tests import small
from tests.checkpoint.hf.conversion import convert, export, theirs
from tests.checkpoint.hf.made import tensors_of, write
from tests.checkpoint.hf.trained import VOCAB, recipe_of
from tests.data.conftest import sentences

TEXTS = ["def f(x):\n    return x  # naïve", "稀疏 of the tokens ", " two  spaces\n\n\tand a tab", "</s> is text"]


@pytest.fixture(scope="module")
def tokenizer() -> SentencePieceTokenizer:
    return train_sentencepiece(sentences(seed=5), vocab_size=330)


@pytest.fixture(scope="module")
def other() -> SentencePieceTokenizer:
    return train_sentencepiece(sentences(seed=6), vocab_size=330)


def made(folder: Path, tokenizer: SentencePieceTokenizer, own: bool = True, **model: Any) -> Path:
    """A checkpoint that was trained with ``tokenizer``; ``own``: it has it."""
    folder.mkdir(parents=True)
    if own:
        tokenizer.save(folder)
    recipe = recipe_of({"max_position_embeddings": 64, **model})
    return write(folder, recipe, tensors_of(recipe, tokenizer.vocab_size), tokenizer=tokenizer.hash)


@pytest.fixture(scope="module")
def folder(tokenizer: SentencePieceTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("extras")
    export(made(path / "ours", tokenizer), path / "theirs", run=None)
    return path / "theirs"


# Tokenizer ------------------------------------------------------------------------------------------------------------


def test_the_tokenizer_is_the_same(folder: Path, tokenizer: SentencePieceTokenizer) -> None:
    fast = AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert fast(text)["input_ids"] == ids
        assert fast.decode(ids) == text
    assert fast.eos_token_id == tokenizer.eod
    assert fast.model_max_length == 64


@pytest.mark.parametrize("name", [family.model_type for family in FAMILIES if family not in (QWEN2, MEGASPARSE)])
def test_beside_the_config_of_any_family(
    folder: Path, tmp_path: Path, tokenizer: SentencePieceTokenizer, name: str
) -> None:
    """transformers has tokenizers of its own for some, which would read the file otherwise."""
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / file).write_bytes((folder / file).read_bytes())
    AutoConfig.for_model(name).save_pretrained(tmp_path)
    fast = AutoTokenizer.from_pretrained(tmp_path)
    assert [fast(text)["input_ids"] for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]


def test_qwen2_takes_its_own_kind_alone(tmp_path: Path, tokenizer: SentencePieceTokenizer) -> None:
    """transformers makes a Qwen2Tokenizer of any file: refused before anything is written."""
    checkpoint = made(tmp_path / "ours", tokenizer, bias="qkv")
    with pytest.raises(ValueError, match=r"makes a Qwen2Tokenizer of every tokenizer .*--family megasparse"):
        export(checkpoint, tmp_path / "theirs", run=None)
    assert not list(tmp_path.glob("theirs*"))
    export(checkpoint, tmp_path / "theirs", run=None, family="megasparse")
    fast = AutoTokenizer.from_pretrained(tmp_path / "theirs", trust_remote_code=True)
    assert [fast(text)["input_ids"] for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]


def test_ids_in_config_and_generation_config(folder: Path, tokenizer: SentencePieceTokenizer) -> None:
    for config in (AutoConfig.from_pretrained(folder), GenerationConfig.from_pretrained(folder)):
        assert config.eos_token_id == tokenizer.eod
        assert config.bos_token_id is None
        assert config.pad_token_id is None
    raw = json.loads((folder / "config.json").read_text())
    assert raw["architectures"] == ["LlamaForCausalLM"]
    assert raw["dtype"] == "float32"
    assert raw["vocab_size"] == tokenizer.vocab_size


def test_a_tokenizer_that_is_given(
    tmp_path: Path, tokenizer: SentencePieceTokenizer, other: SentencePieceTokenizer
) -> None:
    """It must be the checkpoint's, whether that has it or not."""
    for name, one in (("right", tokenizer), ("wrong", other)):
        (tmp_path / name).mkdir()
        one.save(tmp_path / name)
    without = made(tmp_path / "without", tokenizer, own=False)
    for checkpoint in (without, made(tmp_path / "with", tokenizer)):
        with pytest.raises(ValueError, match=r"--tokenizer .*wrong: it is not the tokenizer that .* was trained with"):
            export(checkpoint, tmp_path / "theirs", run=None, tokenizer=tmp_path / "wrong")
        assert not (tmp_path / "theirs").exists()
    export(without, tmp_path / "theirs", run=None, tokenizer=tmp_path / "right")
    fast = AutoTokenizer.from_pretrained(tmp_path / "theirs")
    assert fast(TEXTS[0])["input_ids"] == tokenizer.encode(TEXTS[0])


def test_without_a_tokenizer(tmp_path: Path, tokenizer: SentencePieceTokenizer) -> None:
    export(made(tmp_path / "ours", tokenizer, own=False), tmp_path / "theirs", run=None)
    assert not list((tmp_path / "theirs").glob("tokenizer*"))
    config = AutoConfig.from_pretrained(tmp_path / "theirs")
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (None, None, None)


# What lies there ------------------------------------------------------------------------------------------------------


def test_our_own_file_goes_along(tmp_path: Path, tokenizer: SentencePieceTokenizer) -> None:
    """Where no other family can say the model."""
    export(made(tmp_path / "ours", tokenizer, own=False, norm_placement="post"), tmp_path / "theirs", run=None)
    assert (tmp_path / "theirs" / MODELING.name).read_bytes() == MODELING.read_bytes()
    raw = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert raw["model_type"] == "megasparse"
    assert raw["auto_map"]["AutoConfig"] == "modeling_megasparse.MegasparseConfig"


def test_recipe_and_state_lie_beside(tmp_path: Path) -> None:
    recipe = recipe_of({}, {"bias_update_rate": 0.01})
    tensors = tensors_of(recipe)
    export(write(tmp_path / "ours", recipe, tensors), tmp_path / "theirs", run=None, family="megasparse")
    beside = tmp_path / "theirs" / "megasparse"
    assert load_recipe(beside / "recipe.yaml") == recipe
    state = load_file(beside / "state.safetensors")
    assert set(state) == {f"decoder.layers.{layer}.mlp.router.load" for layer in (0, 1)}
    assert all((tensor == tensors[f"model.{name}"]).all() for name, tensor in state.items())


def test_files_of_their_folder_come_back_byte_for_byte(tmp_path: Path) -> None:
    source = theirs(tmp_path / "source", "llama", bos_token_id=3, eos_token_id=0)
    files = {
        "tokenizer.json": small.TOKENIZER.model,
        "tokenizer_config.json": b'{ "eos_token":"<eod>","tokenizer_class" : "PreTrainedTokenizerFast"}',
        "special_tokens_map.json": b'{"eos_token": "<eod>"}\n\n',
        "generation_config.json": b'{"eos_token_id": [0, 5], "temperature": 0.5}',
        "chat_template.jinja": "{{ messages }} \u00e9".encode(),
        "added_tokens.json": b"{}",
        "vocab.json": b'{"w1":1}',
        "merges.txt": b"#version\n",
    }
    for name, content in {**files, "notes.txt": b"mine", "pytorch_model.bin": b""}.items():
        (source / name).write_bytes(content)
    convert(source, tmp_path / "ours", run=None)
    reader = Reader(tmp_path / "ours")
    reader.verify()
    assert reader.manifest["tokenizer"] == small.TOKENIZER.hash
    export(tmp_path / "ours", tmp_path / "back", run=None)
    for name, content in files.items():
        assert (tmp_path / "back" / name).read_bytes() == content, name
    assert not (tmp_path / "back" / "notes.txt").exists()
    config = AutoConfig.from_pretrained(tmp_path / "back")
    assert config.eos_token_id == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "back")("w4")["input_ids"] == [4]
    assert GenerationConfig.from_pretrained(tmp_path / "back").eos_token_id == [0, 5]
    assert AutoConfig.from_pretrained(source).vocab_size == config.vocab_size == VOCAB
