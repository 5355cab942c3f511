from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.checkpoint.hf.conversion import EXPERTS, check, convert, theirs

ROPE = {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}
SIZES: dict[str, Any] = {
    **{"num_hidden_layers": 3, "first_k_dense_replace": 1, "head_dim": 16, "rope_parameters": ROPE},
    **{"n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "n_shared_experts": 2},
    **{"routed_scaling_factor": 2.5, "num_nextn_predict_layers": 0},
}


def test_there_and_back(tmp_path: Path) -> None:
    """As GLM-4.5: biases and norms of queries and keys, groups of experts."""
    check(tmp_path, "glm4_moe", EXPERTS, **SIZES, n_group=4, topk_group=2, attention_bias=True, use_qk_norm=True)


def test_plain(tmp_path: Path) -> None:
    """As GLM-4.5-Air: no norms; here no biases and one group either."""
    check(tmp_path, "glm4_moe", (), **SIZES)


def test_layers_that_predict_further_tokens(tmp_path: Path) -> None:
    """Left out only if that is asked for."""
    folder = theirs(tmp_path / "theirs", "glm4_moe", **SIZES)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.3.eh_proj.weight"] = torch.zeros(2, 2)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"model\.layers\.3\.eh_proj\.weight .*--ignore"):
        convert(folder, tmp_path / "ours")
    convert(folder, tmp_path / "ours", ignored=["model.layers.3."])
