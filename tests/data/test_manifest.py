"""What prepare records, and that a data set that is not whole, or not one, is refused by name."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from megasparse.data.manifest import read_manifest, read_tokenizer


@pytest.fixture
def copy(small_set: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small_set, tmp_path / "copy"))


def test_records_what_lies_there(small_set: Path):
    manifest = read_manifest(small_set)
    assert manifest.validation is not None
    for name, split in (("train", manifest.train), ("validation", manifest.validation)):
        for kind, size, digest in (
            ("bin", split.bin_bytes, split.bin_sha256),
            ("idx", split.idx_bytes, split.idx_sha256),
        ):
            content = (small_set / f"{name}.{kind}").read_bytes()
            assert (len(content), hashlib.sha256(content).hexdigest()) == (size, digest)
    assert read_tokenizer(small_set, manifest).vocab_size == manifest.vocab_size


@pytest.mark.parametrize("name", ["train.bin", "train.idx", "validation.bin", "validation.idx"])
def test_a_missing_or_cut_file_is_named(copy: Path, name: str):
    path = copy / name
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    with pytest.raises(ValueError, match=f"{name} has {len(content) - 1} bytes, not the {len(content)}"):
        read_manifest(copy)
    path.unlink()
    with pytest.raises(ValueError, match=f"{name} is missing"):
        read_manifest(copy)


def test_a_folder_without_manifest_is_no_data_set(copy: Path):
    (copy / "manifest.json").unlink()
    with pytest.raises(ValueError, match="not a finished data set"):
        read_manifest(copy)


def test_a_foreign_manifest_is_refused_naming_the_field(copy: Path):
    content = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps({**content, "colour": "blue"}))
    with pytest.raises(ValueError, match="colour"):
        read_manifest(copy)


def test_another_tokenizer_is_refused(copy: Path):
    manifest = read_manifest(copy).model_copy(update={"tokenizer_hash": "0" * 64})
    with pytest.raises(ValueError, match="not the one that made its tokens"):
        read_tokenizer(copy, manifest)
