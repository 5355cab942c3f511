"""What ``megasparse inspect`` says of a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megasparse.checkpoint.inspect import inspect
from megasparse.checkpoint.save import Saver
from megasparse.topology import Topology
from tests.checkpoint.runs import FINGERPRINT, engine_of, recipe_of, run


@pytest.fixture
def checkpoint(single: Topology, tmp_path: Path) -> Path:
    engine = engine_of(recipe_of(), single)
    run(engine, 0, 1)
    Saver(engine, tmp_path, FINGERPRINT).save(1)
    return tmp_path / "step_1"


def test_inspect(checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    output = checkpoint.parent / "out.json"
    inspect(checkpoint, hashes=True, output=output)
    text = capsys.readouterr().out
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    for said in (
        "small, step 1 (8 samples), saved by 1 x single, fp32",
        "SHA-256, verified",
        manifest["files"]["__0_0.distcp"]["sha256"][:12],
        "model.embedding.word_embeddings.weight",
        "95 x 32",
        "optimizer.exp_avg_sq.decoder.layers.3.mlp.experts.w1",
        "model.decoder.layers.1.mlp.router.bias",
        "random.0.torch",
        "uint8",
    ):
        assert said in text, said
    written = json.loads(output.read_text())
    assert written["tensors"]["model.embedding.word_embeddings.weight"] == {
        "shape": [95, 32],
        "dtype": "float32",
        "pieces": 1,
    }
    assert written["files"] == manifest["files"]
    assert written["recipe"]["training"]["global_batch_size"] == 8


def test_hashes_are_read_when_asked(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = checkpoint / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    content[5000] ^= 1
    file.write_bytes(content)
    inspect(checkpoint)
    assert "not verified" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"the SHA-256 of __0_0\.distcp"):
        inspect(checkpoint, hashes=True)


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is not a whole checkpoint"):
        inspect(tmp_path)
