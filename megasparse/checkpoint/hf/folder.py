"""A Hugging Face folder: config.json, and safetensors read one tensor at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megasparse.checkpoint.hf.family import Fields, by_names
from megasparse.checkpoint.memory import Memory
from megasparse.checkpoint.reader import read_elements

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
LENGTH_BYTES = 8  # of a file of safetensors, before its header


@dataclass(frozen=True)
class Stem:
    """How the files of safetensors are called."""

    name: str = "model"

    @property
    def single(self) -> str:
        return f"{self.name}.safetensors"

    @property
    def index(self) -> str:
        return f"{self.name}.safetensors.index.json"

    def file(self, number: int, count: int) -> str:
        """Of ``count`` files the one with this ``number``, from 0."""
        return self.single if count == 1 else f"{self.name}-{number + 1:05}-of-{count:05}.safetensors"


@dataclass(frozen=True)
class Stored:
    """A tensor of theirs."""

    file: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int  # byte of the file


class Folder:
    """The folder at ``path``; ValueError, naming the file, if it is not one or lacks one. Reads headers only."""

    def __init__(self, path: Path, stem: Stem = Stem()) -> None:
        self.path, self.stem, self.memory = path, stem, Memory()
        if not (path / "config.json").is_file():
            raise ValueError(f"{path} is no Hugging Face model: it has no config.json")
        self.raw_config()
        self.files = self._files()
        self.tensors = {name: stored for file in self.files for name, stored in self._header(file).items()}
        if (path / stem.index).is_file():
            for name, file in self._index().items():
                if name not in self.tensors or self.tensors[name].file != file:
                    raise ValueError(
                        f"{path / file} has no {name}, which {self.stem.index} says it has: download it again"
                    )

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows of one tensor; of one that has none, its element. ValueError, naming its file, if that was cut."""
        stored = self.tensors[name]
        if not stored.shape:
            return read_elements(self.path / stored.file, stored.start, (), stored.dtype, self.memory)
        first, last, _ = slice(start, stop).indices(stored.shape[0])
        row = math.prod(stored.shape[1:]) * stored.dtype.itemsize
        shape = (last - first, *stored.shape[1:])
        return read_elements(self.path / stored.file, stored.start + first * row, shape, stored.dtype, self.memory)

    def raw_config(self) -> Fields:
        """config.json as it lies there."""
        try:
            raw = json.loads((self.path / "config.json").read_text())
        except ValueError as error:
            raise ValueError(f"{self.path / 'config.json'} is not JSON: {error}") from None
        if not isinstance(raw, dict) or not isinstance(raw.get("model_type"), str):
            raise ValueError(f"{self.path / 'config.json'} has no model_type")
        if "quantization_config" in raw:
            method = raw["quantization_config"].get("quant_method")
            raise ValueError(
                f"{self.path / 'config.json'} has quantization_config ({method}): dequantize the model first"
            )
        return raw

    def config(self, names: Collection[str]) -> Fields:
        """config.json as transformers reads it, with its defaults; of a field that has several names, by that in
        ``names``."""
        from huggingface_hub.errors import StrictDataclassError
        from transformers import AutoConfig

        try:
            config = AutoConfig.from_pretrained(self.path)
        except (ValueError, KeyError, OSError, TypeError, StrictDataclassError) as error:
            raise ValueError(f"transformers cannot read {self.path / 'config.json'}: {error}") from None
        return by_names(config, names)

    def identity(self) -> dict[str, Any]:
        """What changes if a file does."""
        files = {file: (self.path / file).stat() for file in ("config.json", *self.files)}
        return {file: [stat.st_size, stat.st_mtime_ns] for file, stat in files.items()}

    def _files(self) -> list[str]:
        if (self.path / self.stem.index).is_file():
            files = sorted(set(self._index().values()))
        elif (self.path / self.stem.single).is_file():
            files = [self.stem.single]
        else:
            others = [
                p.name for pattern in ("*.bin", "*.gguf", "*.pt", "*.pth") for p in sorted(self.path.glob(pattern))
            ]
            cure = f": load {others[0]} with transformers and save_pretrained it" if others else ""
            raise ValueError(f"{self.path} has neither {self.stem.single} nor {self.stem.index}{cure}")
        for file in files:
            if not (self.path / file).is_file():
                raise ValueError(f"{self.path / file} is missing: {self.stem.index} names it")
        return files

    def _index(self) -> dict[str, str]:
        try:
            return dict(json.loads((self.path / self.stem.index).read_text())["weight_map"])
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{self.path / self.stem.index} is no index of safetensors: download it again") from None

    def _header(self, file: str) -> dict[str, Stored]:
        """Tensors lie one after the other behind the header, which begins with its length."""
        known = DTYPES if self.stem == Stem() else {**DTYPES, "U8": torch.uint8}
        found: dict[str, Stored] = {}
        try:
            with safe_open(self.path / file, framework="pt") as tensors, (self.path / file).open("rb") as raw:
                start = LENGTH_BYTES + int.from_bytes(raw.read(LENGTH_BYTES), "little")
                for name in tensors.offset_keys():
                    stored = tensors.get_slice(name)
                    shape, dtype = tuple(stored.get_shape()), stored.get_dtype()
                    if dtype not in known:
                        raise ValueError(
                            f"{self.path / file}: {name} is {dtype}: only {', '.join(DTYPES)} can be converted"
                        )
                    found[name] = Stored(file, shape, known[dtype], start)
                    start += math.prod(shape) * known[dtype].itemsize
        except SafetensorError as error:
            raise ValueError(f"{self.path / file} is damaged ({error}): download it again") from None
        return found
