"""What a model costs: floating-point operations, and the device's rate at them."""

from __future__ import annotations

import time

import torch

from megasparse import platform
from megasparse.config import Model

# Dense peak rates of NVIDIA's data sheets, without sparsity; float32 without TF32, as torch computes by default.
H100_SXM = {torch.bfloat16: 989.4e12, torch.float16: 989.4e12, torch.float32: 66.9e12}
PEAK_FLOPS = {"NVIDIA H100 80GB HBM3": H100_SXM, "NVIDIA H200": H100_SXM}


def flops_per_token(model: Model, vocab_size: int, seq_length: int, block_density: float = 1.0) -> float:
    """Floating-point operations of one token's forward and backward pass: matrix products, a multiply-add is two.

    Backward is twice forward; recomputation does not count (PaLM's model FLOPs). Attention is counted as causal: a
    token sees (seq_length + 1) / 2 positions on average, documents not separated, and in block-sparse layers
    ``block_density`` of them; choosing them does not count. Of the experts, top_k count, tokens dropped over capacity
    included. A teacher's forward pass does not count (training.teacher).
    """
    hidden = model.hidden_size
    query, key_value = model.head_size * model.num_attention_heads, model.head_size * model.kv_heads
    projections = 2 * hidden * (query + key_value)
    scores_and_values = 2 * query * (seq_length + 1) / 2
    dense = (3 if model.activation == "swiglu" else 2) * hidden * model.ffn_size
    sparse_layers = sum(model.moe_layers)
    multiply_adds = vocab_size * hidden + model.num_layers * (projections + scores_and_values)
    multiply_adds -= sum(model.sparse_layers) * scores_and_values * (1 - block_density)
    multiply_adds += (model.num_layers - sparse_layers) * dense
    if (sparse := model.sparse_attention) and sparse.selector == "nsa":
        branches = hidden * (4 * key_value + 3 * model.num_attention_heads)
        compression = 2 * key_value * (sparse.compression_size + 1) * model.head_size / sparse.compression_stride
        multiply_adds += sum(model.sparse_layers) * (branches + compression)
    if moe := model.moe:
        experts = moe.top_k * moe.ffn_hidden_size + moe.shared_expert_ffn_hidden_size
        multiply_adds += sparse_layers * (hidden * moe.num_experts + 3 * hidden * experts)
    return 3 * 2 * multiply_adds


def matmul_flops(dtype: torch.dtype, seconds: float = 0.3) -> float:
    """FLOP/s of this process's device at matrix products: the denominator of MFU.

    The data sheet's peak of a GPU in PEAK_FLOPS; else measured here with this process's threads, as the median rate
    of square products, 1024 wide unless those are too slow, over ``seconds``. Ranks that share a host measure at the
    same time, so that the sum over ranks is what the host can do: call it on all of them at once, then add up.
    """
    device = platform.device()
    if device.type == "cuda":
        peak = PEAK_FLOPS.get(torch.cuda.get_device_name(device), {}).get(dtype)
        if peak is not None:
            return peak
    size = 64
    while size < 1024 and _matmul_seconds(size, dtype, device) < seconds / 20:
        size *= 2
    durations = []
    end = time.perf_counter() + seconds
    while not durations or time.perf_counter() < end:
        durations.append(_matmul_seconds(size, dtype, device))
    return 2 * size**3 / sorted(durations)[len(durations) // 2]


def _matmul_seconds(size: int, dtype: torch.dtype, device: torch.device) -> float:
    a = torch.full((size, size), 0.5, dtype=dtype, device=device)  # not random: a run's random state is its own
    b = torch.full((size, size), 0.5, dtype=dtype, device=device)
    start = time.perf_counter()
    torch.mm(a, b)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start
