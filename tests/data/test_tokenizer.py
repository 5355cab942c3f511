from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from megasparse.data.corpus import Corpus
from megasparse.data.tokenizer import SentencePieceTokenizer, load_tokenizer, train_sentencepiece

from .conftest import sentences

HARD = [
    "",
    " ",
    "\n",
    "\n\n\n  \n",
    "\t\tx\t",
    "  leading and trailing  ",
    "a" + " " * 50 + "b",
    "\r\nwindows\r\n",
    "\ufeffmark",
    "</s><s><unk><0x41>",
    "ﬁ ① Å e\u0301 \u00a0 \u200b \U0001f600 \ud7ff",  # what NFKC would change
    "\x01\x7f\x85\u2028",
]


@pytest.fixture(scope="module")
def trained() -> SentencePieceTokenizer:
    return train_sentencepiece(sentences(seed=3), vocab_size=330)


def huggingface(folder: Path, config: dict[str, object] | None = None) -> Path:
    """A byte-level BPE tokenizer.json that was saved with truncation and padding on."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sentences(seed=3), trainer)
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(pad_id=1, pad_token="<|pad|>", length=8)
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder / "tokenizer.json"


def test_sentencepiece_gives_every_text_back(trained: SentencePieceTokenizer):
    rng = random.Random(0)
    characters = [chr(c) for c in range(1, 0x3000) if chr(c) != "\u2581"] + [" ", "\n", "\t"] * 2000
    for text in HARD + ["".join(rng.choices(characters, k=200)) for _ in range(200)]:
        ids = trained.encode(text)
        assert trained.decode(ids) == text
        assert trained.eod not in ids
        assert all(0 <= i < trained.vocab_size for i in ids)


def test_sentencepiece_joins_line_ends_and_indentation(trained: SentencePieceTokenizer):
    tokenizer = train_sentencepiece(["def f(x):\n    return x\n\n\n"] * 50, vocab_size=290)
    assert len(tokenizer.encode("):\n")) == 1
    assert len(tokenizer.encode("    ")) == 1
    assert train_sentencepiece(sentences(seed=3), vocab_size=330).hash == trained.hash


def test_the_lossy_character_is_the_documented_one(trained: SentencePieceTokenizer):
    characters = "".join(chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000)
    assert trained.decode(trained.encode(characters)) == characters.replace("\u2581", " ")


def test_default_tokenizer_gives_every_held_out_document_back(stdlib_set: Path):
    tokenizer = load_tokenizer(stdlib_set)
    documents = [d for d in Corpus(None) if d.validation]
    assert len(documents) > 20
    for document in documents:
        assert tokenizer.decode(tokenizer.encode(document.text)) == document.text, document.name


def test_huggingface_gives_every_text_back(tmp_path: Path):
    tokenizer = load_tokenizer(huggingface(tmp_path), eod_token="<|endoftext|>")
    for text in [*HARD, "<|endoftext|> quoted <|pad|>", "\u2581\0"]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.eod not in ids
    assert tokenizer.vocab_size == 300
    assert tokenizer.eod == 0


@pytest.mark.parametrize("config", [{"eos_token": "<|endoftext|>"}, {"eos_token": {"content": "<|endoftext|>"}}])
def test_huggingface_reads_its_eos_token_from_the_config(tmp_path: Path, config: dict[str, object]):
    tokenizer = load_tokenizer(huggingface(tmp_path / "given", config))
    (tmp_path / "saved").mkdir()
    tokenizer.save(tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved")
    assert (again.eod, again.hash, again.vocab_size) == (0, tokenizer.hash, 300)
    other = load_tokenizer(huggingface(tmp_path / "given", config), eod_token="<|pad|>")
    assert other.hash != tokenizer.hash


def test_sentencepiece_is_saved_and_read_back(trained: SentencePieceTokenizer, tmp_path: Path):
    trained.save(tmp_path)
    for again in (load_tokenizer(tmp_path), load_tokenizer(tmp_path / "tokenizer.model")):
        assert (again.eod, again.hash, again.vocab_size) == (trained.eod, trained.hash, trained.vocab_size)


def test_wrong_tokenizers_are_refused(trained: SentencePieceTokenizer, tmp_path: Path):
    with pytest.raises(ValueError, match=r"no tokenizer at .*missing.model: give"):
        load_tokenizer(tmp_path / "missing.model")
    with pytest.raises(ValueError, match=r"no tokenizer.model or tokenizer.json in"):
        load_tokenizer(tmp_path)
    (tmp_path / "x.model").write_bytes(b"not a model")
    with pytest.raises(ValueError, match=r"x.model is not a SentencePiece model"):
        load_tokenizer(tmp_path / "x.model")
    (tmp_path / "x.json").write_bytes(b"{}")
    with pytest.raises(ValueError, match=r"x.json is not a tokenizer.json"):
        load_tokenizer(tmp_path / "x.json", eod_token="</s>")
    given = huggingface(tmp_path / "hf")
    with pytest.raises(ValueError, match=r"does not say which token ends a document: set eod_token"):
        load_tokenizer(given)
    with pytest.raises(ValueError, match=r"eod_token='<eos>' is not in .*tokenizer.json"):
        load_tokenizer(given, eod_token="<eos>")
    trained.save(tmp_path / "hf")
    with pytest.raises(ValueError, match=r"eod_token='</s>' is for a tokenizer.json"):
        load_tokenizer(tmp_path / "hf" / "tokenizer.model", eod_token="</s>")


@pytest.mark.parametrize("vocab_size", [100, 100_000])
def test_vocab_size_that_does_not_suit_the_corpus(vocab_size: int):
    with pytest.raises(ValueError, match=rf"vocab_size={vocab_size} does not suit this corpus: .+") as error:
        train_sentencepiece(sentences(seed=3), vocab_size)
    print(error.value)
