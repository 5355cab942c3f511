"""Recipe -> megatron-core ModuleSpec -> the GPTModel chunks of this pipeline stage, with layout-independent weights."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt import GPTModel as MegatronGPTModel
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules
from torch import Tensor

from megasparse import platform
from megasparse.config import Fp8, Model, Recipe, WeightSparsity
from megasparse.layers import te
from megasparse.layers.attention import CoreAttention, PostNormSelfAttention
from megasparse.layers.block_sparse import BlockSparseAttention
from megasparse.layers.linear import ColumnParallelLinear, NumberedTransformerLayer, Product, RowParallelLinear
from megasparse.layers.moe import MoELayer, PostNormMLP, PostNormMoELayer
from megasparse.layers.norms import FullWidthRMSNorm, HeadRMSNorm, LayerNorm, RMSNorm
from megasparse.layers.nsa import Branches, NativeSparseAttention, PostNormBranches
from megasparse.layers.rope import RotaryEmbedding, attention_factor
from megasparse.layers.step import StepState
from megasparse.layout import stage_layers
from megasparse.placement import local_weights
from megasparse.topology import Topology

# It warns, layer by layer, of every mlp that is not one of its own classes.
logging.getLogger("megatron.core.transformer.transformer_layer").setLevel(logging.ERROR)

ACTIVATIONS = {"swiglu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}


class GPTModel(MegatronGPTModel):
    """megatron-core's GPTModel with the recipe's rotary frequencies and a padded vocabulary that cannot be chosen."""

    distill: Callable[[Tensor], Tensor] | None = None
    """With a teacher, what its loss of a micro-batch's tokens, [batch, seq], is made by (distillation.py)."""

    def __init__(self, config: TransformerConfig, recipe: Model, vocab_size: int, **kwargs: Any) -> None:
        self.true_vocab_size = vocab_size
        tp = config.tensor_model_parallel_size
        rope = recipe.position_embedding == "rope"
        super().__init__(
            config,
            vocab_size=math.ceil(vocab_size / tp) * tp,
            position_embedding_type="rope" if rope else "learned_absolute",
            rotary_base=recipe.rope.theta,  # type: ignore[arg-type]
            share_embeddings_and_output_weights=recipe.tie_embeddings,
            **kwargs,
        )
        if rope:
            self.rotary_pos_emb = RotaryEmbedding(
                recipe.rope, recipe.rotary_dim, platform.device(), self.pg_collection.cp
            )

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """labels [batch, seq], logits [seq, batch, vocab / tp] -> nats of each token, float32 [batch, seq]; where there
        is ``distill``, [2, batch, seq], with its loss as the second."""
        if self.distill is None:
            return self._cross_entropy(labels, logits)
        distilled = self.distill(self.unpadded(logits))  # first: megatron-core's cross-entropy overwrites logits
        return torch.stack([self._cross_entropy(labels, logits), distilled])

    def unpadded(self, logits: Tensor) -> Tensor:
        """[..., vocab / tp] -> a view without the columns that only pad the vocabulary to a multiple of tp."""
        return logits[..., : logits.shape[-1] - self._padding]

    def _cross_entropy(self, labels: Tensor, logits: Tensor) -> Tensor:
        if self._padding:  # it gets no probability
            logits.data[..., -self._padding :] = torch.finfo(logits.dtype).min
        if self.config.tensor_model_parallel_size > 1:
            return super().compute_language_model_loss(labels, logits)
        seq, batch, vocab = logits.shape
        compute = torch.promote_types(logits.dtype, torch.float32)
        targets = labels.t().reshape(-1)
        loss = F.cross_entropy(logits.view(-1, vocab).to(compute), targets, reduction="none")
        return loss.view(seq, batch).t().contiguous()

    @property
    def _padding(self) -> int:
        """Columns of this process that only pad the vocabulary."""
        last = self.pg_collection.tp.rank() == self.config.tensor_model_parallel_size - 1
        return self.vocab_size - self.true_vocab_size if last else 0


def build_model(recipe: Recipe, topology: Topology, vocab_size: int) -> tuple[nn.ModuleList, StepState]:
    """The part of the model this process holds, initialised: one GPTModel, or with virtual pipeline stages several,
    in the order of the model; and the step state its layers share.

    The weights depend on recipe.training.seed alone: every layout starts from the same model. Within
    ``torch.device("meta")`` they have shapes and no values.
    """
    model = recipe.model
    config = transformer_config(recipe, topology)
    state = StepState(
        seed=recipe.training.seed,
        recompute=recipe.training.recompute == "full",
        seq_length=recipe.data.seq_length,
        context_parallel=topology.cp,
        context_rank=topology.cp_rank,
    )
    counts = stage_layers(recipe.parallel, model.num_layers)
    chunks = nn.ModuleList()
    for vp_stage in range(topology.vp):
        stage = vp_stage * topology.pp + topology.pp_rank
        first = sum(counts[:stage])
        layers = [layer_spec(recipe, index, topology, state) for index in range(first, first + counts[stage])]
        chunk = GPTModel(
            config,
            model,
            vocab_size,
            transformer_layer_spec=TransformerBlockSubmodules(layer_specs=layers, layer_norm=norm_of(model)),
            max_sequence_length=model.max_position_embeddings or recipe.data.seq_length,
            pre_process=stage == 0,
            post_process=stage == len(counts) - 1,
            vp_stage=vp_stage if topology.vp > 1 else None,
        )
        chunks.append(chunk)
    flags = model.moe_layers
    for index, moe in moe_layers(chunks):
        moe.router.num_moe_layers = sum(flags)
        moe.router.is_last_moe_layer = not any(flags[index + 1 :])
    if model.tie_embeddings and topology.pp > 1 and topology.is_last_stage:
        last: Any = chunks[-1]
        last.output_layer.weight.ds_pipe_replicated = True  # the first stage's copy counts in the gradient norm
    initialize_weights(chunks, model, recipe.training.seed, topology)
    return chunks.to(platform.device()), state


def transformer_config(recipe: Recipe, topology: Topology) -> TransformerConfig:
    """The one place where the recipe becomes megatron-core's TransformerConfig."""
    model, training = recipe.model, recipe.training
    dtype = platform.DTYPES[training.precision]
    cuda = platform.has_cuda()
    stages: Any = [["decoder"] * count for count in stage_layers(recipe.parallel, model.num_layers)]
    stages[0].insert(0, "embedding")
    stages[-1].append("loss")
    config = TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.kv_heads,
        kv_channels=model.head_size,
        ffn_hidden_size=model.ffn_size,
        activation_func=ACTIVATIONS[model.activation],
        gated_linear_unit=model.activation == "swiglu",
        add_bias_linear=model.bias == "all",
        add_qkv_bias=model.bias in ("qkv", "all"),
        normalization=model.normalization,
        layernorm_epsilon=model.norm_epsilon,
        attention_dropout=model.attention_dropout,
        hidden_dropout=model.hidden_dropout,
        num_moe_experts=model.moe.num_experts if model.moe else None,
        moe_ffn_hidden_size=model.moe.ffn_hidden_size if model.moe else None,
        tensor_model_parallel_size=topology.tp,
        pipeline_model_parallel_size=topology.pp,
        pipeline_model_parallel_layout=stages if topology.pp > 1 else None,
        context_parallel_size=topology.cp,
        sequence_parallel=topology.sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=training.precision == "bf16",
        fp16=training.precision == "fp16",
        calculate_per_token_loss=True,
        recompute_granularity="full" if training.recompute == "full" else None,
        recompute_method="uniform" if training.recompute == "full" else None,
        recompute_num_layers=1 if training.recompute == "full" else None,
        use_cpu_initialization=True,
        perform_initialization=True,  # marks tensor-parallel weights; initialize_weights then draws them anew
        batch_p2p_comm=False,  # gloo: batched point-to-point gives wrong interleaved gradients
        persist_layer_norm=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        apply_rope_fusion=False,
        bias_dropout_fusion=cuda,
        bias_activation_fusion=cuda and model.activation == "swiglu",
        **(te.checked_fields(recipe, topology.tp, topology.cp) if te.trains(recipe) else {}),
    )
    if model.position_embedding == "rope" and attention_factor(model.rope) != 1.0:
        _set_rotary_scale(config, attention_factor(model.rope))
    return config


def _set_rotary_scale(config: Any, scale: float) -> None:
    """mcore multiplies cos and sin by 0.1 * mscale * ln(factor) + 1 of these attributes, where they exist."""
    config.yarn_rotary_scaling_factor = math.e
    config.yarn_mscale = (scale - 1.0) / 0.1
    config.yarn_mscale_all_dim = 0.0


def norm_of(model: Model) -> type:
    return RMSNorm if model.normalization == "RMSNorm" else LayerNorm


def layer_spec(recipe: Recipe, index: int, topology: Topology, state: StepState) -> ModuleSpec:
    """The transformer layer ``index`` (from 0)."""
    model, linears = recipe.model, Linears(recipe, index, state, topology)
    post = model.norm_placement == "post"
    norm = norm_of(model)
    attention = ModuleSpec(
        module=_self_attention(model, index, post),
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=linears.column("self_attention.linear_qkv"),
            core_attention=_core_attention(recipe, index, topology, state),
            linear_proj=linears.row("self_attention.linear_proj"),
            q_layernorm=_qk_norm(model, model.num_attention_heads),
            k_layernorm=_qk_norm(model, model.kv_heads),
        ),
    )
    if model.moe is not None and model.moe_layers[index]:
        mlp = ModuleSpec(
            module=PostNormMoELayer if post else MoELayer,
            params={
                **{"moe": model.moe, "topology": topology, "state": state},
                "sparsity": linears.sparse_experts(),
                "fp8": linears.fp8_of("mlp.experts.w1"),
                "fp8_by_te": te.trains(recipe),
                "shared": linears.mlp("mlp.shared_experts"),
            },
        )
    else:
        mlp = ModuleSpec(
            module=PostNormMLP if post else MLP,
            params={"ffn_hidden_size": model.ffn_size},
            submodules=linears.mlp("mlp"),
        )
    return ModuleSpec(
        module=NumberedTransformerLayer,
        params={"state": state},
        submodules=TransformerLayerSubmodules(
            input_layernorm=IdentityOp if post or linears.has_norm("self_attention.linear_qkv") else norm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=IdentityOp if post or linears.has_norm("mlp.linear_fc1") else norm,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
        ),
    )


@dataclass(frozen=True)
class Linears:
    """The linear layers of transformer layer ``index``: sparse, and in FP8, where the recipe says so."""

    recipe: Recipe
    index: int
    state: StepState
    topology: Topology

    def column(self, name: str) -> Any:
        if self._by_te(name):
            return self._of_te(name, te.layers().norm_column if self.has_norm(name) else te.layers().column)
        return self._linear(name, ColumnParallelLinear)

    def row(self, name: str) -> Any:
        return self._of_te(name, te.layers().row) if self._by_te(name) else self._linear(name, RowParallelLinear)

    def has_norm(self, name: str) -> bool:
        """Is the norm before this layer a part of it, as Transformer Engine has it?"""
        model = self.recipe.model
        nsa = model.sparse_layers[self.index] and model.sparse_attention and model.sparse_attention.selector == "nsa"
        before = ["mlp.linear_fc1"] + (["self_attention.linear_qkv"] if not nsa else [])  # NSA projects the normed, too
        return name in before and model.norm_placement == "pre" and self._by_te(name)

    def mlp(self, name: str) -> MLPSubmodules:
        return MLPSubmodules(linear_fc1=self.column(f"{name}.linear_fc1"), linear_fc2=self.row(f"{name}.linear_fc2"))

    def sparse_experts(self) -> dict[str, WeightSparsity]:
        """Of the experts' weights w1, w2, w3, those that are sparse, and how."""
        found = {weight: self._sparsity(f"mlp.experts.{weight}") for weight in ("w1", "w2", "w3")}
        return {weight: sparsity for weight, sparsity in found.items() if sparsity is not None}

    def fp8_of(self, weight: str) -> Fp8 | None:
        return self.recipe.training.fp8 if f"{self._layer}.{weight}" in self.recipe.fp8_weights else None

    def _linear(self, name: str, layer: type) -> Any:
        return ModuleSpec(module=layer, params={"product": self._product(name)})

    def _of_te(self, name: str, layer: type) -> Any:
        product = self._product(name)
        return te.linear(layer, product, self.topology.tp_group)

    def _product(self, name: str) -> Product:
        sparsity, fp8 = self._sparsity(f"{name}.weight"), self.fp8_of(f"{name}.weight")
        return Product(f"{self._layer}.{name}", self.state, self.topology.tp_cp_group, sparsity, fp8)

    def _by_te(self, name: str) -> bool:
        return te.trains(self.recipe) and self.fp8_of(f"{name}.weight") is not None

    def _sparsity(self, weight: str) -> WeightSparsity | None:
        return self.recipe.sparsity.weights if f"{self._layer}.{weight}" in self.recipe.sparse_weights else None

    @property
    def _layer(self) -> str:
        return f"decoder.layers.{self.index}"


def _self_attention(model: Model, index: int, post: bool) -> type:
    if model.sparse_layers[index] and model.sparse_attention and model.sparse_attention.selector == "nsa":
        return PostNormBranches if post else Branches
    return PostNormSelfAttention if post else SelfAttention


def _core_attention(recipe: Recipe, index: int, topology: Topology, state: StepState) -> Any:
    model = recipe.model
    if not model.sparse_layers[index] or model.sparse_attention is None:
        if te.attention_missing(recipe) is not None:
            return CoreAttention
        heads = (model.num_attention_heads // topology.tp, model.kv_heads // topology.tp)
        fused = te.attention(*heads, model.head_size, 1 / math.sqrt(model.head_size))
        return ModuleSpec(module=CoreAttention, params={"fused": fused})
    params = {
        **{"sparse": model.sparse_attention, "state": state},
        **{"tp_rank": topology.tp_rank, "kv_heads": model.kv_heads, "num_sparse_layers": sum(model.sparse_layers)},
    }
    if model.sparse_attention.selector == "nsa":
        return ModuleSpec(module=NativeSparseAttention, params={**params, "norm_keys": model.qk_norm != "none"})
    return ModuleSpec(module=BlockSparseAttention, params=params)


def _qk_norm(model: Model, heads: int) -> Any:
    match model.qk_norm:
        case "none":
            return None
        case "head":
            return HeadRMSNorm
        case "full":
            return ModuleSpec(module=FullWidthRMSNorm, params={"heads": heads})


@torch.no_grad()
def initialize_weights(chunks: nn.ModuleList, model: Model, seed: int, topology: Topology) -> None:
    """Normal(0, init_std) for matrices, output projections divided by sqrt(2 * layers); norms 1, biases 0, and 0 where
    a compression begins as a mean (layers/nsa.py).

    Each weight is drawn from a generator keyed by its name in the whole model, so its value does not depend on the
    layout. Rows that pad the vocabulary are zero.
    """
    for weight in local_weights(chunks, topology):
        name, parameter = weight.name, weight.tensor
        if parameter.dim() == 1:
            parameter.fill_(1.0 if name.endswith("norm.weight") else 0.0)
            continue
        output = name.endswith(("linear_proj.weight", "linear_fc2.weight", "experts.w2"))
        std = model.init_std / math.sqrt(2 * model.num_layers) if output else model.init_std
        parameter.zero_()
        if name.endswith(("compress_key.output", "compress_value.output", ".boost")):
            continue
        experts = ".experts.w" in name  # one generator each: no process draws the experts of another
        whole = None if experts else _normal(name, weight.shape, std, seed)
        for slab in weight.slabs:
            here = parameter.view(-1)[slab.start :][: math.prod(slab.shape)].view(slab.shape)
            if whole is None:
                for local, expert in enumerate(here, start=slab.offsets[0]):
                    expert.copy_(_normal(f"{name}.{local}", weight.shape[1:], std, seed))
            else:
                region = tuple(slice(o, o + n) for o, n in zip(slab.offsets, slab.shape, strict=True))
                here.copy_(whole[region])


def _normal(name: str, shape: tuple[int, ...], std: float, seed: int) -> Tensor:
    # torch's CPU generator takes the low 32 bits of a seed and ignores the others.
    key = int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:4], "big")
    generator = torch.Generator().manual_seed(key)
    return torch.randn(shape, generator=generator) * std


def moe_layers(chunks: nn.ModuleList) -> list[tuple[int, MoELayer]]:
    """(layer index in the whole model, its mixture of experts) of this process."""
    layers: list[Any] = [layer for chunk in chunks for layer in chunk.decoder.layers]  # type: ignore[union-attr]
    return [(layer.layer_number - 1, layer.mlp) for layer in layers if isinstance(layer.mlp, MoELayer)]
