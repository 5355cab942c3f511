from __future__ import annotations

from pathlib import Path

from tests.checkpoint.hf.conversion import EXPERTS, check


def test_there_and_back(tmp_path: Path) -> None:
    """Dense layers among those of experts."""
    sizes = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True}
    layers = {"num_hidden_layers": 4, "mlp_only_layers": [0, 2], "decoder_sparse_step": 1}
    check(tmp_path, "qwen3_moe", EXPERTS, head_dim=16, **sizes, **layers)
