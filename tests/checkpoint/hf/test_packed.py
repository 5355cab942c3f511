"""2:4 weights packed: the same model in 9/16 of their size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, dynamic_module_utils

from megasparse.checkpoint.hf.packed import PLACES, STEM, VALUES, load_packed, unpacked
from tests.checkpoint.hf.conversion import export, read
from tests.checkpoint.hf.made import make
from tests.checkpoint.hf.trained import VOCAB, recipe_of, train_here

SPARSITY = {"method": "sr_ste", "decay": 0.01, "refresh_interval": 1, "targets": [r"\."]}
POOLED = {"selector": "pooled", "block_size": 4, "blocks": 3, "local_blocks": 1}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With experts, which are packed one by one, and columns that are no multiple of 8."""
    recipe = recipe_of(
        {"bias": "qkv", "ffn_hidden_size": 44},
        {"layers": [0, 1], "ffn_hidden_size": 36, "num_experts": 4},
        sparsity={"weights": SPARSITY},
        training={"precision": "bf16"},
    )
    return train_here(recipe, tmp_path_factory.mktemp("packed"))


@pytest.fixture(scope="module")
def folders(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Dense and packed."""
    folder = tmp_path_factory.mktemp("theirs")
    export(checkpoint, folder / "dense", run=None)
    export(checkpoint, folder / "packed", run=None, packed=True)
    return folder / "dense", folder / "packed"


def test_every_tensor_is_the_dense_one(folders: tuple[Path, Path]) -> None:
    dense, packed = folders
    expected, found = read(dense), dict(unpacked(packed))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def test_the_same_logits(folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    dense = AutoModelForCausalLM.from_pretrained(folders[0], trust_remote_code=True)
    packed, loading = load_packed(folders[1], output_loading_info=True)
    assert not any(loading.values())
    tokens = torch.randint(VOCAB, (2, 20))
    assert packed.dtype == torch.bfloat16
    assert packed.config.to_dict().keys() == dense.config.to_dict().keys()
    with torch.no_grad():
        assert torch.equal(packed(tokens).logits, dense(tokens).logits)
        assert load_packed(folders[1], dtype=torch.float32)(tokens).logits.dtype == torch.float32


def test_a_model_of_transformers(tmp_path: Path) -> None:
    """No file goes along."""
    recipe = recipe_of({"bias": "qkv"}, None, sparsity={"weights": SPARSITY})
    made = make(tmp_path / "made", recipe)
    export(made, tmp_path / "dense", run=None)
    export(made, tmp_path / "packed", run=None, packed=True)
    dense, tokens = AutoModelForCausalLM.from_pretrained(tmp_path / "dense"), torch.randint(VOCAB, (2, 20))
    with torch.no_grad():
        assert torch.equal(load_packed(tmp_path / "packed")(tokens).logits, dense(tokens).logits)


def test_sizes_and_names(folders: tuple[Path, Path]) -> None:
    """Of each four bf16 weights two values and half a byte: 4.5 bytes of 8, where rows are whole bytes."""
    dense, packed = folders
    tensors, stored = read(dense), read(packed)
    assert [path.name for path in packed.glob("*.safetensors*")] == [STEM.single]
    assert not (dense / STEM.single).exists()
    assert {name for name in stored if name.endswith((VALUES, PLACES))} == {
        name + ending for name in tensors if "proj" in name and "bias" not in name for ending in (VALUES, PLACES)
    }
    ratios = {
        name: (stored[name + VALUES].nbytes + stored[name + PLACES].nbytes) / tensor.nbytes
        for name, tensor in tensors.items()
        if name + VALUES in stored
    }
    assert len(ratios) == 2 * 4 + 3 + 4 * 3
    for name, ratio in ratios.items():
        columns = tensors[name].shape[1]
        assert ratio == (9 / 16 if columns % 8 == 0 else (columns + -(-columns // 8)) / (2 * columns)), name
    same = {name for name in tensors if name + VALUES not in stored}
    assert all(torch.equal(stored[name], tensors[name]) for name in same)


def test_shards(checkpoint: Path, folders: tuple[Path, Path], tmp_path: Path) -> None:
    export(checkpoint, tmp_path / "shards", run=None, packed=True, shard_bytes=20_000)
    files = sorted(path.name for path in (tmp_path / "shards").glob("*.safetensors"))
    assert len(files) > 2
    assert files == [STEM.file(i, len(files)) for i in range(len(files))]
    index = json.loads((tmp_path / "shards" / STEM.index).read_text())
    assert set(index["weight_map"].values()) == set(files)
    expected = dict(unpacked(folders[1]))
    for name, tensor in unpacked(tmp_path / "shards"):
        assert torch.equal(tensor, expected.pop(name))
    assert expected == {}


@pytest.mark.parametrize("weights", [None, {**SPARSITY, "dense_end": 0.3}, {"method": "mdgf", "ramp": 0.9}])
def test_weights_that_are_not_24_are_refused(tmp_path: Path, weights: dict | None) -> None:
    recipe = recipe_of({}, sparsity={"weights": weights})
    made = make(tmp_path / "made", recipe, step=3 if weights and weights["method"] == "mdgf" else 4)
    with pytest.raises(ValueError, match=r"--packed: .* has no 2:4 weights that can be packed: leave it out"):
        export(made, tmp_path / "packed", run=None, packed=True)
    assert not (tmp_path / "packed").exists()


def test_columns_of_gpt2_are_rows_of_ours(tmp_path: Path) -> None:
    """What lies transposed there is not 2:4 along its rows, and stays as it is."""
    gpt2 = {"normalization": "LayerNorm", "position_embedding": "learned", "bias": "all", "activation": "gelu"}
    made = make(tmp_path / "made", recipe_of({**gpt2, "num_query_groups": 4}, sparsity={"weights": SPARSITY}))
    with pytest.raises(ValueError, match="no 2:4 weights that can be packed"):
        export(made, tmp_path / "packed", run=None, packed=True, family="gpt2")


def test_a_truncated_file_is_refused(folders: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((folders[1] / "config.json").read_bytes())
    file = tmp_path / STEM.single
    file.write_bytes((folders[1] / STEM.single).read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"packed\.safetensors is damaged .*download it again"):
        dict(unpacked(tmp_path))
    file.unlink()
    with pytest.raises(ValueError, match=r"has neither packed\.safetensors nor packed\.safetensors\.index\.json"):
        dict(unpacked(tmp_path))
