"""A Hugging Face folder is read by headers; what is wrong with it is in test_from_hf."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from megasparse.checkpoint.hf.folder import Folder, Stem, Stored

CONFIG = {"model_type": "llama", "hidden_size": 32, "num_attention_heads": 4, "vocab_size": 90}


def folder(path: Path, files: dict[str, dict[str, Tensor]], index: dict[str, str] | None = None, **config: Any) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps({**CONFIG, **config}))
    for name, tensors in files.items():
        save_file(tensors, path / name, metadata={"format": "pt"})
    if index is not None:
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return path


def test_names_of_files() -> None:
    stem = Stem()
    assert stem.file(0, 1) == stem.single == "model.safetensors"
    assert [stem.file(i, 12) for i in (0, 11)] == [
        "model-00001-of-00012.safetensors",
        "model-00012-of-00012.safetensors",
    ]
    assert stem.index == "model.safetensors.index.json"
    assert Stem("packed").file(1, 3) == "packed-00002-of-00003.safetensors"


def test_one_file(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(2, 3),
        "b": torch.randn(4).bfloat16(),
        "c": torch.randn(1).half(),
        "d": torch.ones(()).double(),
    }
    read = Folder(folder(tmp_path, {"model.safetensors": tensors, "other.safetensors": {"e": torch.ones(1)}}))
    assert read.files == ["model.safetensors"]
    content = (tmp_path / "model.safetensors").read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    assert read.tensors == {
        name: Stored("model.safetensors", tuple(tensor.shape), tensor.dtype, start + header[name]["data_offsets"][0])
        for name, tensor in tensors.items()
    }
    assert all(torch.equal(read.read(name), tensor) for name, tensor in tensors.items())
    assert torch.equal(read.read("a", 1, 2), tensors["a"][1:2])
    assert torch.equal(read.read("b", 3, 9), tensors["b"][3:])


def test_a_file_that_is_cut_while_it_is_read(tmp_path: Path) -> None:
    read = Folder(folder(tmp_path, {"model.safetensors": {"a": torch.ones(4)}}))
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"model\.safetensors ends 5 bytes too early: copy it again"):
        read.read("a")


def test_an_index_names_the_files(tmp_path: Path) -> None:
    """And a model.safetensors beside it is not read, as in transformers."""
    files = {"x-1.safetensors": {"a": torch.ones(2)}, "x-2.safetensors": {"b": torch.zeros(3), "c": torch.zeros(1)}}
    index = {name: file for file, tensors in files.items() for name in tensors}
    read = Folder(folder(tmp_path, {**files, "model.safetensors": {"a": torch.zeros(9)}}, index))
    assert read.files == ["x-1.safetensors", "x-2.safetensors"]
    assert {name: stored.file for name, stored in read.tensors.items()} == index
    assert torch.equal(read.read("a"), torch.ones(2))


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 3}'])
def test_an_index_that_is_none(tmp_path: Path, text: str) -> None:
    folder(tmp_path, {"model.safetensors": {"a": torch.ones(2)}})
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match="is no index of safetensors: download it again"):
        Folder(tmp_path)


def test_a_field_of_several_names(tmp_path: Path) -> None:
    """GPT-2's config calls n_embd hidden_size as well, and Mixtral's num_local_experts num_experts."""
    written = folder(tmp_path / "a", {"model.safetensors": {}}, model_type="gpt2", hidden_size=48, n_layer=3)
    config = Folder(written).config(["n_embd", "num_hidden_layers"])
    assert (config["n_embd"], config["num_hidden_layers"], config["n_head"]) == (48, 3, 4)
    written = folder(tmp_path / "b", {"model.safetensors": {}}, model_type="mixtral", num_local_experts=6)
    assert Folder(written).config(["num_local_experts"])["num_local_experts"] == 6


def test_config_has_transformers_defaults(tmp_path: Path) -> None:
    read = Folder(folder(tmp_path, {"model.safetensors": {}}, rope_theta=5e5))
    assert "rope_parameters" not in read.raw_config()
    config = read.config([])
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 5e5}
    assert (config["num_key_value_heads"], config["head_dim"]) == (4, 8)


@pytest.mark.parametrize("text", ["[]", "{}", '{"model_type": 3}'])
def test_a_config_without_a_model_type(tmp_path: Path, text: str) -> None:
    folder(tmp_path, {"model.safetensors": {}})
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json has no model_type"):
        Folder(tmp_path)


def test_a_config_that_transformers_refuses(tmp_path: Path) -> None:
    read = Folder(folder(tmp_path, {"model.safetensors": {}}, model_type="llama", hidden_size="many"))
    with pytest.raises(ValueError, match=r"transformers cannot read .*config\.json: .*hidden_size"):
        read.config([])


def test_types_that_are_no_weights(tmp_path: Path) -> None:
    """Bytes are known in packed folders alone."""
    places = {"a": torch.ones(2, dtype=torch.uint8)}
    folder(tmp_path, {"model.safetensors": places, "packed.safetensors": places})
    with pytest.raises(ValueError, match="a is U8: only F64, F32, F16, BF16 can be converted"):
        Folder(tmp_path)
    assert Folder(tmp_path, Stem("packed")).tensors["a"].dtype == torch.uint8


def test_identity_changes_with_any_file(tmp_path: Path) -> None:
    read = Folder(folder(tmp_path, {"model.safetensors": {"a": torch.ones(2)}}))
    before = read.identity()
    assert before == read.identity()
    assert set(before) == {"config.json", "model.safetensors"}
    save_file({"a": torch.ones(3)}, tmp_path / "model.safetensors")
    assert read.identity() != before
