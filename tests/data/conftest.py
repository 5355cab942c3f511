"""Small data sets, made once and shared."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from megasparse.data.prepare import PrepareConfig, prepare

WORDS = ["the", "of", "tokens", "sparse", "expert", "layer", "router", "mixture", "gradient", "in", "naïve", "稀疏"]


def sentences(seed: int, documents: int = 60, longest: int = 60) -> list[str]:
    """Texts of random words, lines and indentation."""
    rng = random.Random(seed)
    return [
        "".join(
            rng.choice(WORDS) + rng.choice([" ", " ", " ", "\n", "\n    ", "\t"])
            for _ in range(rng.randrange(1, longest))
        )
        for _ in range(documents)
    ]


def write_texts(folder: Path, texts: list[str]) -> Path:
    """One .txt file for each text."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, text in enumerate(texts):
        (folder / f"{i:04d}.txt").write_bytes(text.encode())
    return folder


MakeSet = Callable[..., Path]


@pytest.fixture(scope="session")
def make_set(tmp_path_factory: pytest.TempPathFactory) -> MakeSet:
    """Prepare a data set of random texts: ``make_set(seed, tokenizer=folder_of_another_set, documents=60)``."""

    def make(seed: int, tokenizer: Path | None = None, documents: int = 60) -> Path:
        folder = tmp_path_factory.mktemp("set")
        source = write_texts(folder / "texts", sentences(seed, documents))
        prepare(
            PrepareConfig(
                output=folder / "set",
                sources=[source],
                tokenizer="sentencepiece" if tokenizer is None else str(tokenizer / "tokenizer.model"),
                vocab_size=330,
                validation_fraction=0.2,
                workers=1,
            )
        )
        return folder / "set"

    return make


@pytest.fixture(scope="session")
def small_set(make_set: MakeSet) -> Path:
    """A data set of 60 short documents."""
    return make_set(seed=1)


@pytest.fixture(scope="session")
def stdlib_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default data set."""
    folder = tmp_path_factory.mktemp("stdlib") / "set"
    prepare(PrepareConfig(output=folder, workers=1))
    return folder
