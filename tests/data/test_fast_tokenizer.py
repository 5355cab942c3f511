"""What transformers makes of an exported tokenizer, beside the tokenizer: ids and texts are the same."""

from __future__ import annotations

import io
import itertools
import json
import random
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import transformers
from transformers import AutoTokenizer

from megasparse.data.fast_tokenizer import HARD_TEXTS, compare, fast_tokenizer, save_fast_tokenizer
from megasparse.data.tokenizer import (
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    load_tokenizer,
    train_sentencepiece,
)
from tests.helpers import REPOSITORY

from .conftest import sentences
from .test_tokenizer import huggingface

SOURCES = sorted((REPOSITORY / "megasparse").rglob("*.py"))
IDENTITY = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
LLAMA = {"model_type": "bpe", "byte_fallback": True, "split_digits": True, "allow_whitespace_only_pieces": True}
SETTINGS: dict[str, dict[str, Any]] = {
    "llama": {**LLAMA, **IDENTITY},
    "bpe": {"model_type": "bpe"},  # nmt_nfkc, dummy prefix, one space for many
    "gemma": {
        **{**LLAMA, **IDENTITY, "add_dummy_prefix": False, "pad_id": 3, "control_symbols": ["[INST]"]},
        "user_defined_symbols": ["<start>", "\n\n", "\u2581\u2581\u2581", "self"],
    },
    "unigram": {"model_type": "unigram"},
    "unigram_bytes": {"model_type": "unigram", "byte_fallback": True, "add_dummy_prefix": False, **IDENTITY},
    "unigram_nfkc": {"model_type": "unigram", "normalization_rule_name": "nfkc", "user_defined_symbols": ["de", "<m>"]},
}
MODELS = ["ours", *SETTINGS]


def corpus() -> list[str]:
    return [path.read_text() for path in SOURCES[:8]] + sentences(seed=3)


def trained(**settings: Any) -> SentencePieceTokenizer:
    model = io.BytesIO()
    lines = [line for text in corpus() for line in text.splitlines() if line.strip()]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, num_threads=1, minloglevel=2, **settings
    )
    return SentencePieceTokenizer(model.getvalue(), source="settings")


@pytest.fixture(scope="module", params=MODELS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """A SentencePiece model, and what AutoTokenizer makes of its export."""
    if request.param == "ours":
        tokenizer = train_sentencepiece(corpus(), vocab_size=700)
    else:
        tokenizer = trained(vocab_size=700, **SETTINGS[request.param])
    folder = tmp_path_factory.mktemp(request.param)
    save_fast_tokenizer(tokenizer, folder, max_length=512)
    return tokenizer, AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def small() -> SentencePieceTokenizer:
    return train_sentencepiece(sentences(seed=3), vocab_size=400)


def random_texts(count: int) -> Iterator[str]:
    rng = random.Random(0)
    characters = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    assigned = [c for c in characters if unicodedata.category(c) not in ("Cn", "Co")]
    # One mark after another is what NFKC and SentencePiece compose differently.
    plain = [c for c in assigned if not unicodedata.combining(c)]
    for _ in range(count):
        yield "".join(rng.choices(characters, k=30))
        yield "".join(rng.choices(plain, k=30))
        yield "".join(rng.choices(plain[:600], k=30))
        yield "".join(rng.choices("ab <s>/unk\n\t\u2581é0x41ﬁself", k=60))
        yield "".join(rng.choice(" \n-=#.\t") * rng.randrange(1, 20) for _ in range(6))


def unigram_score(tokenizer: SentencePieceTokenizer, ids: list[int]) -> float:
    processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model)
    return sum(processor.get_score(ids))


def assert_same(tokenizer: SentencePieceTokenizer, fast: Any, texts: list[str]) -> None:
    expected = [tokenizer.encode(text) for text in texts]
    found = fast(texts, verbose=False)["input_ids"]
    ties = 0
    for text, a, b in zip(texts, found, expected, strict=True):
        if a != b:  # a unigram model's two ways of one score
            ties += 1
            assert unigram_score(tokenizer, a) == pytest.approx(unigram_score(tokenizer, b), rel=1e-6), text
    is_unigram = fast.backend_tokenizer.model.__class__.__name__ == "Unigram"
    assert ties <= (len(texts) // 20 if is_unigram else 0)
    assert fast.batch_decode(found) == [tokenizer.decode(ids) for ids in expected]


def test_random_texts(pair: tuple[SentencePieceTokenizer, Any]):
    assert_same(*pair, list(random_texts(300)))


def test_this_repository(pair: tuple[SentencePieceTokenizer, Any]):
    texts = [path.read_text() for path in SOURCES[20:50]]
    assert_same(*pair, [*texts, *(line for text in texts[:10] for line in text.splitlines(keepends=True))])


def test_the_users_ways_to_encode_and_decode(pair: tuple[SentencePieceTokenizer, Any]):
    """Nothing is added, special tokens that occur in a text are text, and they stand where the config says."""
    tokenizer, fast = pair
    for text in HARD_TEXTS:
        expected = fast(text, verbose=False)["input_ids"]
        assert expected == tokenizer.encode(text) or "unigram" in fast.name_or_path
        assert tokenizer.eod not in expected
        assert fast.encode(text) == fast([text])["input_ids"][0] == expected
        assert fast(text, add_special_tokens=False)["input_ids"] == expected
        assert fast.convert_tokens_to_ids(fast.tokenize(text)) == expected
        assert fast.decode(expected) == tokenizer.decode(expected)
    assert (fast.is_fast, len(fast), fast.model_max_length) == (True, tokenizer.vocab_size, 512)
    assert (fast.eos_token, fast.eos_token_id, fast.bos_token) == ("</s>", tokenizer.eod, None)
    assert (fast.unk_token_id, fast.pad_token_id) == (0, 3 if "gemma" in fast.name_or_path else None)
    ids = [*tokenizer.encode("a b"), tokenizer.eod]
    assert fast.decode(ids) == tokenizer.decode(ids) + "</s>"
    assert fast.decode(ids, skip_special_tokens=True) == tokenizer.decode(ids)


def test_random_ids(pair: tuple[SentencePieceTokenizer, Any]):
    """Control pieces aside, as SentencePiece does; a run of byte pieces that is no UTF-8 is one U+FFFD a byte."""
    tokenizer, fast = pair
    processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model)
    control = {i for i in range(tokenizer.vocab_size) if processor.is_control(i)}
    ids = [i for i in range(tokenizer.vocab_size) if i not in control]
    byte_of = {i: int(processor.id_to_piece(i)[3:5], 16) for i in ids if processor.is_byte(i)}
    rng = random.Random(0)
    whole = 0
    for _ in range(1500):
        sequence = rng.choices(ids, k=12)
        if rng.random() < 0.3 and byte_of:  # a character that is spelt
            spelt = {value: i for i, value in byte_of.items()}
            sequence[5:5] = [spelt[b] for b in rng.choice(["稀", "😀", "é", "\0"]).encode()]
        text = ""
        runs = [(is_byte, list(run)) for is_byte, run in itertools.groupby(sequence, byte_of.__contains__)]
        broken = [is_byte and not is_utf8(bytes(byte_of[i] for i in run)) for is_byte, run in runs]
        if not any(broken):
            whole += 1
            assert fast.decode(sequence) == tokenizer.decode(sequence)
        for (_, run), is_broken in zip(runs, broken, strict=True):
            context = run if not text else [*tokenizer.encode("x"), *run]  # a first space is left out
            text += "\ufffd" * len(run) if is_broken else tokenizer.decode(context)[1 if text else 0 :]
        assert fast.decode(sequence) == text
    assert whole > 100


def is_utf8(content: bytes) -> bool:
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return True


def test_a_merge_out_of_order_is_seen(small: SentencePieceTokenizer, tmp_path: Path):
    """Two merges of the same letter that change places, one that is missing, and many."""
    save_fast_tokenizer(small, tmp_path)
    file = tmp_path / "tokenizer.json"
    content = json.loads(file.read_text())
    merges = content["model"]["merges"]
    pairs = itertools.combinations(range(len(merges)), 2)
    i, j = next(
        (i, j) for i, j in pairs if merges[i][1] == merges[j][0] and merges[i][1] in "abcdefghijklmnopqrstuvwxyz"
    )
    swapped = [*merges]
    swapped[i], swapped[j] = merges[j], merges[i]
    for changed in (swapped, merges[1:], [*merges[:40], *reversed(merges[40:])]):
        content["model"]["merges"] = changed
        file.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=r"the exported tokenizer encodes .* its source to"):
            compare(small, AutoTokenizer.from_pretrained(tmp_path))


@pytest.mark.parametrize("name", ["normalizer", "decoder"])
def test_another_difference_is_seen(small: SentencePieceTokenizer, tmp_path: Path, name: str):
    save_fast_tokenizer(small, tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content[name] = None
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"the exported tokenizer (en|de)codes .* its source to"):
        compare(small, AutoTokenizer.from_pretrained(tmp_path))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"model_type": "char"}, "no fast tokenizer for a SentencePiece model of type char: give BPE or unigram"),
        ({"model_type": "bpe", "treat_whitespace_as_suffix": True}, "the exported tokenizer encodes"),
        ({**SETTINGS["llama"], "user_defined_symbols": ["<start>"]}, "the exported tokenizer encodes '<start>'"),
    ],
    ids=["char", "suffix", "user_defined_after_dummy_prefix"],
)
def test_what_tokenizers_cannot_express_is_refused(tmp_path: Path, settings: dict[str, Any], said: str):
    with pytest.raises(ValueError, match=said):
        save_fast_tokenizer(trained(vocab_size=600, **settings, hard_vocab_limit=False), tmp_path)


def test_a_model_type_with_its_own_tokenizer_is_refused(small: SentencePieceTokenizer, tmp_path: Path):
    """transformers 5.23 takes no other than Qwen2Tokenizer for qwen2, whatever tokenizer_config.json says."""
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    save_fast_tokenizer(small, tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    with pytest.raises(ValueError, match=r"makes a Qwen2Tokenizer of every tokenizer beside a config\.json"):
        save_fast_tokenizer(small, tmp_path)


def test_a_tokenizer_json_stays_as_it_is(tmp_path: Path):
    """One saved with truncation, padding and a template that begins every text with a token."""
    given = huggingface(tmp_path / "given")
    content = json.loads(given.read_text())
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|pad|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|pad|>": {"id": "<|pad|>", "ids": [1], "tokens": ["<|pad|>"]}},
    }
    given.write_text(json.dumps(content))
    tokenizer = load_tokenizer(given, eod_token="<|endoftext|>")
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    save_fast_tokenizer(tokenizer, tmp_path, max_length=64)
    assert (tmp_path / "tokenizer.json").read_bytes() == given.read_bytes()
    assert load_tokenizer(tmp_path).hash == tokenizer.hash
    for fast in (AutoTokenizer.from_pretrained(tmp_path), fast_tokenizer(tokenizer, 64)):
        assert isinstance(fast, transformers.PreTrainedTokenizerFast)
        assert (fast.eos_token_id, fast.model_max_length) == (0, 64)
        assert fast("a")["input_ids"] == [1, *tokenizer.encode("a")]
        for text in [*HARD_TEXTS, "<|endoftext|> quoted <|pad|>", "word " * 20]:
            assert fast.encode(text, add_special_tokens=False, verbose=False) == tokenizer.encode(text)
            assert fast.decode(tokenizer.encode(text)) == text
