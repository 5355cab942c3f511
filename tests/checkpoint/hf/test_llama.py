"""Llama and Mistral, with the odd cases of all Llama-like models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.hf.conversion import DENSE, check

LLAMA3 = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
CASES: dict[str, dict[str, Any]] = {
    "tied": {"tie_word_embeddings": True},
    "heads of any size": {"head_dim": 12},
    "9 heads, 3 K/V heads": {"hidden_size": 36, "num_attention_heads": 9, "num_key_value_heads": 3},
    "1 K/V head": {"num_key_value_heads": 1},
    "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 3.0}},
    "llama3": {"rope_parameters": {"rope_type": "llama3", "rope_theta": 500.0, **LLAMA3}},
    "yarn": {
        "rope_parameters": {
            **{"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16},
            **{"beta_fast": 8.0, "beta_slow": 0.5},
        }
    },
    "yarn, given factor": {
        "rope_parameters": {
            **{"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16},
            **{"attention_factor": 0.8, "beta_fast": 32.0, "beta_slow": 1.0},
        }
    },
}


@pytest.mark.parametrize("model_type", ["llama", "mistral"])
def test_there_and_back(tmp_path: Path, model_type: str) -> None:
    more = {"sliding_window": None} if model_type == "mistral" else {}
    check(tmp_path, model_type, DENSE, **more)


@pytest.mark.parametrize("case", CASES)
def test_odd_cases(tmp_path: Path, case: str) -> None:
    check(tmp_path, "llama", ("pp2",) if "K/V" in case else ("tp2pp2dp2",), **CASES[case])
