"""What the log says of kernels for NVIDIA GPUs."""

from __future__ import annotations

import pytest

from megasparse import hopper
from tests import small


def test_without_a_gpu_one_line_says_why_there_is_none() -> None:
    assert hopper.notes(small.recipe()) == [
        "Transformer Engine's fused attention, apex's fused norms, apex's weight gradients, DeepSpeed's FusedAdam: "
        "there is no CUDA device"
    ]


def test_each_door_has_its_own_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper.te, "missing", lambda: None)
    monkeypatch.setattr(hopper.apex, "norms_missing", lambda: None)
    monkeypatch.setattr(hopper.apex, "gradients_missing", lambda: None)
    monkeypatch.setattr(hopper, "fused_adam_missing", lambda _: "no compiler")
    recipe = small.recipe(training={"precision": "bf16"}, parallel={"zero_stage": 1})
    assert hopper.notes(recipe) == [
        "Transformer Engine's fused attention, apex's fused norms, apex's weight gradients: used",
        "DeepSpeed's FusedAdam: no compiler",
    ]
    attention, norms, gradients, _ = hopper.notes(small.recipe())
    assert attention.endswith("attention: it takes float16 and bfloat16, not training.precision=fp32")
    assert norms == "apex's fused norms: used"
    assert gradients.startswith("apex's weight gradients: they are summed in float32 with training.precision=bf16 and ")
    documents = small.recipe(training={"precision": "bf16"}, data={"document_mask": True})
    assert "documents' ends (data.document_mask=true)" in hopper.notes(documents)[0]
    dropout = small.recipe({"attention_dropout": 0.1}, training={"precision": "bf16"})
    assert "dropout would follow the ranks" in hopper.notes(dropout)[0]
