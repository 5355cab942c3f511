"""A Hugging Face folder: config.json, and safetensors read one tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megasparse.checkpoint.hf.family import Fields, by_names

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


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


class Folder:
    """The folder at ``path``; ValueError, naming the file, if it is not one or lacks one. Reads headers only."""

    def __init__(self, path: Path, stem: Stem = Stem()) -> None:
        self.path, self.stem = path, stem
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
        """Rows of one tensor, mapped: those that are not looked at take no memory, and none do when it is gone."""
        with safe_open(self.path / self.tensors[name].file, framework="pt") as file:
            return file.get_slice(name)[start:stop] if self.tensors[name].shape else file.get_tensor(name)

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
        try:
            with safe_open(self.path / file, framework="pt") as tensors:
                slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118
                shapes = {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
        except SafetensorError as error:
            raise ValueError(f"{self.path / file} is damaged ({error}): download it again") from None
        known = DTYPES if self.stem == Stem() else {**DTYPES, "U8": torch.uint8}
        for name, (_, dtype) in shapes.items():
            if dtype not in known:
                raise ValueError(f"{self.path / file}: {name} is {dtype}: only {', '.join(DTYPES)} can be converted")
        return {name: Stored(file, shape, known[dtype]) for name, (shape, dtype) in shapes.items()}
