"""The mixture of experts for mcore's ``mlp`` slot: router, all-to-all over DeepSpeed's expert group, experts."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from deepspeed.checkpoint.autoep_affine import (
    autoep_experts_for_rank,
    autoep_placement_to_affine_map,
    legacy_uniform_autoep_placement_descriptor,
)
from deepspeed.checkpoint.constants import (
    AFFINE_MAP,
    AUTOEP_EXPERT_PLACEMENT,
    AUTOEP_PARAM_EP_RANK,
    AUTOEP_PARAM_LOCAL_EXPERTS,
    AUTOEP_PARAM_LOGICAL_SHAPE,
    DS_AUTOEP_UC_META,
)
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer, _AllToAllV, compute_split_plan
from deepspeed.moe.ep_experts import GroupedExperts
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from torch import Tensor

from megasparse.config import Fp8, MoE, WeightSparsity
from megasparse.layers import te
from megasparse.layers.attention import post_norm
from megasparse.layers.fp8 import Fp8Scales, Fp8State
from megasparse.layers.router import Router
from megasparse.layers.step import StepState
from megasparse.ops import experts as ops
from megasparse.ops.fp8 import fp8_grouped_swiglu
from megasparse.ops.two_four.matmul import expert_door, linear_24
from megasparse.sparsity.weight import SparseWeight
from megasparse.topology import Topology

WEIGHTS = ("w1", "w2", "w3")  # of the experts: gate, down, up
DENSE = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)


class MoELayer(AutoEPMoELayer):
    """Top-k mixture of SwiGLU experts, split over the expert-parallel group, dropless or with a capacity.

    A DeepSpeed AutoEPMoELayer by type, so that its engine averages, clips, partitions and saves the experts over
    their own data-parallel group; routing, dispatch and arithmetic are ours.
    """

    def __init__(
        self,
        config: Any,
        moe: MoE,
        topology: Topology,
        state: StepState,
        sparsity: dict[str, WeightSparsity] | None = None,
        shared: MLPSubmodules = DENSE,
        fp8: Fp8 | None = None,
        fp8_by_te: bool = False,
        submodules: Any = None,
    ) -> None:
        """``sparsity``: of w1, w2, w3, those that are 2:4. ``shared``: the linear layers of shared experts. ``fp8``: of
        the experts, ``fp8_by_te``: by Transformer Engine, whose autocast has the scales."""
        nn.Module.__init__(self)  # AutoEPMoELayer's own constructor wraps a Hugging Face block
        self.config, self.moe, self.topology = config, moe, topology
        self.router = Router(config, moe, state, topology.tp_cp_group)
        self.num_experts, self.num_local_experts = moe.num_experts, moe.num_experts // topology.ep
        self.ep_size, self.ep_rank, self.ep_group = topology.ep, topology.ep_rank, topology.ep_group
        self.ep_group_name = f"ep_size_{topology.ep}"
        self.experts = GroupedExperts(
            config.hidden_size, moe.ffn_hidden_size, self.num_local_experts, use_grouped_mm=False
        ).to(config.params_dtype)
        self.shared_experts = shared_experts(config, moe, shared) if moe.shared_expert_ffn_hidden_size else None
        self.experts.sparsity = nn.ModuleDict(
            {w: SparseWeight(f"experts.{w}", getattr(self.experts, w), how) for w, how in (sparsity or {}).items()}
        )
        first = self.ep_rank * self.num_local_experts
        experts = (self.num_experts, range(first, first + self.num_local_experts))
        self.te: dict[str, te.GroupedLinear] = {}
        if fp8 is not None and fp8_by_te:
            for name in WEIGHTS:
                count, out_features, in_features = getattr(self.experts, name).shape
                self.te[name] = te.GroupedLinear(count, in_features, out_features, config.params_dtype)
        scales: dict[str, Fp8State] = {}
        if fp8 is not None and not fp8_by_te:
            scales = {w: Fp8Scales(fp8, state, topology.tp_cp_group, experts) for w in WEIGHTS}
        elif fp8 is not None and fp8.recipe == "delayed":
            scales = {w: te.DelayedScales(fp8, self.te[w].linear, config, experts) for w in WEIGHTS}
        self.experts.fp8_scales = nn.ModuleDict(scales)
        self.observe: Callable[[Tensor, Tensor], None] | None = None  # what experts see, for Wanda (layers/wanda.py)
        self._describe_experts()

    def set_layer_number(self, layer_number: int) -> None:
        self.router.layer_number = layer_number

    def set_deepspeed_parallelism(self, *_: Any, **__: Any) -> None:
        """Groups are topology's; DeepSpeed need not choose them."""

    def forward(self, hidden_states: Tensor, padding_mask: Tensor | None = None, **_: Any) -> tuple[Tensor, None]:
        """[seq, batch, hidden] -> the same shape, and no bias.

        mcore hands ``padding_mask`` through untouched to this layer: it carries each token's number in the run,
        int64 [batch, seq].
        """
        split = self.topology.tp > 1 and not self.config.sequence_parallel
        local = scatter_to_sequence_parallel_region(hidden_states) if split else hidden_states
        seq, batch, hidden = local.shape
        x = local.reshape(seq * batch, hidden)
        routed = self.router(x, self._token_index(padding_mask, seq, batch))
        y = self._experts(x, routed.weights, routed.experts, routed.keep)
        if routed.loss is not None:
            y = MoEAuxLossAutoScaler.apply(y, routed.loss)
        output = y.view(seq, batch, hidden)
        if split:
            output = gather_from_sequence_parallel_region(output, tensor_parallel_output_grad=False)
        if self.shared_experts is not None:
            output = output + self.shared_experts(hidden_states)[0]
        return output, None

    def _token_index(self, token_index: Tensor | None, seq: int, batch: int) -> Tensor:
        """This rank's tokens' numbers, [seq * batch] in the order of the flattened hidden states."""
        if token_index is None:  # generation: any distinct numbers do
            total = seq * self.topology.tp
            token_index = torch.arange(batch * total, device=self.router.weight.device).view(batch, total)
        if token_index.shape[1] != seq:
            token_index = token_index[:, self.topology.tp_rank * seq :][:, :seq]
        return token_index.t().reshape(-1)

    def _experts(self, x: Tensor, weights: Tensor, experts: Tensor, keep: Tensor | None) -> Tensor:
        """[tokens, hidden] -> [tokens, hidden]: to the experts' ranks, through the experts, back, weighted sum."""
        order, counts = ops.sort_by_expert(experts, self.num_experts, keep)
        rows = ops.gather(x, order, self.moe.top_k)
        if self.ep_size == 1:
            return ops.combine(self._compute(rows, counts), order, weights)
        plan = compute_split_plan(
            experts, self.num_experts, self.ep_size, self.num_local_experts, self.ep_group, counts.int()
        )
        rows = _AllToAllV.apply(self.ep_group, rows, plan.input_splits, plan.output_splits)
        to_experts, to_sources = local_expert_order(plan.local_counts_by_source)
        rows = self._compute(rows.index_select(0, to_experts), plan.local_counts_by_source.sum(0))
        rows = _AllToAllV.apply(self.ep_group, rows.index_select(0, to_sources), plan.output_splits, plan.input_splits)
        return ops.combine(rows, order, weights)

    def _compute(self, rows: Tensor, counts: Tensor) -> Tensor:
        if self.observe is not None:
            self.observe(rows, counts)
        weights, sparsity = self.experts, self.experts.sparsity
        made = {
            name: sparsity[name](weight) if name in sparsity else weight  # type: ignore[operator]
            for name, weight in ((name, getattr(weights, name)) for name in WEIGHTS)
        }
        if self.te:
            return te.grouped_swiglu(rows, counts, made, self.te)
        w1, w2, w3 = made.values()
        if weights.fp8_scales:
            scales: Any = weights.fp8_scales
            scaling = [tuple(scales[name].scaling(expert) for name in WEIGHTS) for expert in range(len(counts))]
            return fp8_grouped_swiglu(rows, counts, w1, w2, w3, scaling)  # type: ignore[arg-type]
        if any(sparse.door_now != "masked" for sparse in sparsity.values()):  # type: ignore[union-attr]
            return self._sparse_products(rows, counts, w1, w2, w3)
        return ops.grouped_swiglu(rows, counts, w1, w2, w3)

    def _sparse_products(self, rows: Tensor, counts: Tensor, w1: Tensor, w2: Tensor, w3: Tensor) -> Tensor:
        """As grouped_swiglu. Experts with many rows multiply by 2:4 kernels, each by itself; the others together."""
        sparsity: Any = self.experts.sparsity
        sizes = counts.tolist()
        alone = [expert_door(size, "semi_structured") != "masked" for size in sizes]
        parts = rows.split(sizes)
        others = [part for part, apart in zip(parts, alone, strict=True) if not apart]
        few = counts * ~torch.tensor(alone, device=counts.device)
        together = ops.grouped_swiglu(torch.cat(others), few, w1, w2, w3).split(few.tolist()) if others else ()
        weights = {"w1": w1.unbind(), "w2": w2.unbind(), "w3": w3.unbind()}

        def product(name: str, expert: int, x: Tensor) -> Tensor:
            weight = weights[name][expert]
            if name not in sparsity or sparsity[name].door_now == "masked":
                return x @ weight.t()
            return linear_24(x, weight, sparsity[name].prepared(weight, expert))

        outputs = []
        for expert, (part, apart) in enumerate(zip(parts, alone, strict=True)):
            if apart:
                hidden = F.silu(product("w1", expert, part)) * product("w3", expert, part)
                outputs.append(product("w2", expert, hidden))
            else:
                outputs.append(together[expert])
        return torch.cat(outputs)

    def _describe_experts(self) -> None:
        """What DeepSpeed must know of the expert weights: they are averaged over the expert-data-parallel group,
        count once in the norm on every tensor-parallel rank, and are saved one file an expert."""
        placement = legacy_uniform_autoep_placement_descriptor(self.num_experts, self.num_local_experts, self.ep_size)
        self.expert_placement_descriptor = placement
        for weight in self.experts.parameters():
            shape = [self.num_experts, *weight.shape[1:]]
            weight.allreduce = False  # type: ignore[attr-defined]
            weight.group_name = self.ep_group_name  # type: ignore[attr-defined]
            weight.tensor_model_parallel = True  # type: ignore[attr-defined]
            weight.partition_dim, weight.partition_stride = 0, 1  # type: ignore[attr-defined]
            metadata = {
                AUTOEP_EXPERT_PLACEMENT: placement,
                AFFINE_MAP: autoep_placement_to_affine_map(placement, shape).to_dict(),
                AUTOEP_PARAM_LOGICAL_SHAPE: shape,
                AUTOEP_PARAM_EP_RANK: self.ep_rank,
                AUTOEP_PARAM_LOCAL_EXPERTS: list(autoep_experts_for_rank(placement, self.ep_rank)),
            }
            setattr(weight, DS_AUTOEP_UC_META, metadata)


def local_expert_order(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Rows as they arrive, by source rank then expert, to by expert then source, and back.

    counts: rows from each source rank for each local expert, [ep, local experts]. Returns two permutations [rows].
    """
    sources, local_experts = counts.shape
    expert_of_row = torch.arange(local_experts, device=counts.device).repeat(sources)
    expert_of_row = expert_of_row.repeat_interleave(counts.reshape(-1).long())
    forward = torch.argsort(expert_of_row, stable=True)
    backward = torch.empty_like(forward)
    backward[forward] = torch.arange(len(forward), device=forward.device)
    return forward, backward


def shared_experts(config: Any, moe: MoE, submodules: MLPSubmodules) -> MLP:
    """A dense SwiGLU that every token goes through, beside the routed experts (DeepSeekMoE)."""
    config = copy.copy(config)  # mcore's MLP takes fc2's width from the config, whatever ffn_hidden_size it is given
    config.ffn_hidden_size = moe.shared_expert_ffn_hidden_size
    return MLP(config, submodules, ffn_hidden_size=moe.shared_expert_ffn_hidden_size)


class PostNormMLP(MLP):
    """A dense MLP whose output is normed before the residual is added (OLMo2)."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.post_layernorm = post_norm(config)

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        output, bias = super().forward(*args, **kwargs)
        return self.post_layernorm(output if bias is None else output + bias), None


class PostNormMoELayer(MoELayer):
    """A mixture of experts whose output is normed before the residual is added."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.post_layernorm = post_norm(config)

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        output, _ = super().forward(*args, **kwargs)
        return self.post_layernorm(output), None
