"""``data``: what is read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, PositiveFloat, PositiveInt

from megasparse.config.section import Section


class DataSet(Section):
    """One data set written by ``megasparse prepare``."""

    path: Path  # the folder that holds train.bin/.idx, validation.bin/.idx, the tokenizer and manifest.json
    weight: PositiveFloat = 1.0  # share of training samples, relative to the other sets


class Data(Section):
    """What is read: which sets in which proportion, cut into sequences of which length."""

    sets: Annotated[list[DataSet], Field(min_length=1)]
    seq_length: PositiveInt = 512  # tokens per sample
    document_mask: bool = False  # tokens attend within their own document only, and never predict across its end
    reset_position_ids: bool = False  # positions restart at each document (learned positions only)
