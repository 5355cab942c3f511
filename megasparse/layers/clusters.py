"""Centroids of queries and keys, by which attention finds blocks of its own cluster.

After the Routing Transformer (arXiv 2003.05997): spherical k-means in each K/V head's space. There centroids are moving
averages; here they are weights that descend the same objective, so that every layout, optimizer and checkpoint treats
them as it does any weight. Queries and keys are detached: the loss trains the centroids alone.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from torch import Tensor

from megasparse.layers.selectors import nearest


class Centroids(nn.Module):
    """weight [kv_heads, clusters, head_dim]: of this tensor-parallel rank's K/V heads; only their directions count."""

    def __init__(self, config: Any, kv_heads: int, clusters: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(kv_heads, clusters, config.kv_channels, dtype=config.params_dtype))
        set_tensor_model_parallel_attributes(self.weight, is_parallel=True, dim=0, stride=1)

    def forward(self) -> Tensor:
        """float32 [kv_heads, clusters, head_dim] of length 1."""
        return F.normalize(self.weight.float(), dim=-1)

    def loss(self, q: Tensor, k: Tensor) -> Tensor:
        """Sum over the keys, and the queries summed over their group, of 1 - cos(x, nearest centroid).

        q [batch, seq, heads, head_dim], k [batch, seq, kv_heads, head_dim].
        """
        queries = q.detach().float().unflatten(2, (k.shape[2], -1)).sum(3)
        x = F.normalize(torch.cat([queries, k.detach().float()], 1), dim=-1).transpose(1, 2)
        centroids = self()
        own = nearest(x, centroids.detach())
        chosen = centroids.gather(1, own.transpose(0, 1).flatten(1).unsqueeze(-1).expand(-1, -1, x.shape[-1]))
        return (1 - (x.transpose(0, 1).flatten(1, 2) * chosen).sum(-1)).sum()
