"""Recipe -> megatron-core ModuleSpec -> the GPTModel of this pipeline stage, with layout-independent weights."""

from __future__ import annotations

import hashlib
import logging
import math
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt import GPTModel as MegatronGPTModel
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor

from megasparse import platform
from megasparse.config import Model, Recipe
from megasparse.layers.attention import CoreAttention, PostNormSelfAttention
from megasparse.layers.moe import MoELayer, PostNormMLP, PostNormMoELayer
from megasparse.layers.norms import FullWidthRMSNorm, HeadRMSNorm, LayerNorm, RMSNorm
from megasparse.layers.rope import attention_factor, inverse_frequencies
from megasparse.layers.router import RouterState
from megasparse.topology import Topology

# It warns, layer by layer, of every mlp that is not one of its own classes.
logging.getLogger("megatron.core.transformer.transformer_layer").setLevel(logging.ERROR)

ACTIVATIONS = {"swiglu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}


class GPTModel(MegatronGPTModel):
    """megatron-core's GPTModel with the recipe's rotary frequencies and a padded vocabulary that cannot be chosen."""

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
            self.rotary_pos_emb.inv_freq = inverse_frequencies(recipe.rope, recipe.head_size).to(platform.device())

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """labels [batch, seq], logits [seq, batch, vocab / tp] -> nats of each token, float32 [batch, seq]."""
        self._mask_padding(logits)
        if self.config.tensor_model_parallel_size > 1:
            return super().compute_language_model_loss(labels, logits)
        seq, batch, vocab = logits.shape
        compute = torch.promote_types(logits.dtype, torch.float32)
        targets = labels.t().reshape(-1)
        loss = F.cross_entropy(logits.view(-1, vocab).to(compute), targets, reduction="none")
        return loss.view(seq, batch).t()

    def _mask_padding(self, logits: Tensor) -> None:
        """Rows that only pad the vocabulary to a multiple of tp get no probability."""
        padding = self.vocab_size - self.true_vocab_size
        if padding and self.pg_collection.tp.rank() == self.config.tensor_model_parallel_size - 1:
            logits.data[..., -padding:] = torch.finfo(logits.dtype).min


def build_model(recipe: Recipe, topology: Topology, vocab_size: int) -> tuple[GPTModel, RouterState]:
    """The part of the model this process holds, initialised, and the step state its routers share.

    The weights depend on recipe.training.seed alone: every layout starts from the same model.
    """
    model = recipe.model
    config = transformer_config(recipe, topology)
    state = RouterState(seed=recipe.training.seed, recompute=recipe.training.recompute == "full")
    per_stage = model.num_layers // topology.pp
    first = topology.pp_rank * per_stage
    layers = [layer_spec(model, index, topology, state) for index in range(first, first + per_stage)]
    gpt = GPTModel(
        config,
        model,
        vocab_size,
        transformer_layer_spec=TransformerBlockSubmodules(layer_specs=layers, layer_norm=norm_of(model)),
        max_sequence_length=model.max_position_embeddings or recipe.data.seq_length,
        pre_process=topology.is_first_stage,
        post_process=topology.is_last_stage,
    )
    moe_layers = model.moe_layers
    for layer in gpt.decoder.layers:
        if isinstance(layer.mlp, MoELayer):
            layer.mlp.router.num_moe_layers = sum(moe_layers)
            layer.mlp.router.is_last_moe_layer = not any(moe_layers[layer.layer_number :])
    if model.tie_embeddings and topology.pp > 1 and topology.is_last_stage:
        gpt.output_layer.weight.ds_pipe_replicated = True  # the first stage's copy counts in the gradient norm
    initialize_weights(gpt, model, recipe.training.seed, topology)
    return gpt.to(platform.device()), state


def transformer_config(recipe: Recipe, topology: Topology) -> TransformerConfig:
    """The one place where the recipe becomes megatron-core's TransformerConfig."""
    model, training = recipe.model, recipe.training
    dtype = platform.DTYPES[training.precision]
    cuda = platform.has_cuda()
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


def layer_spec(model: Model, index: int, topology: Topology, state: RouterState) -> ModuleSpec:
    """The transformer layer ``index`` (from 0)."""
    post = model.norm_placement == "post"
    input_norm = IdentityOp if post else norm_of(model)
    attention = ModuleSpec(
        module=PostNormSelfAttention if post else SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear,
            core_attention=CoreAttention,
            linear_proj=RowParallelLinear,
            q_layernorm=_qk_norm(model, model.num_attention_heads),
            k_layernorm=_qk_norm(model, model.kv_heads),
        ),
    )
    if model.moe is not None and model.moe_layers[index]:
        mlp = ModuleSpec(
            module=PostNormMoELayer if post else MoELayer,
            params={"moe": model.moe, "topology": topology, "state": state},
        )
    else:
        mlp = ModuleSpec(
            module=PostNormMLP if post else MLP,
            params={"ffn_hidden_size": model.ffn_size},
            submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
        )
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=input_norm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=input_norm,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
        ),
    )


def _qk_norm(model: Model, heads: int) -> Any:
    match model.qk_norm:
        case "none":
            return None
        case "head":
            return HeadRMSNorm
        case "full":
            return ModuleSpec(module=FullWidthRMSNorm, params={"heads": heads})


@torch.no_grad()
def initialize_weights(gpt: GPTModel, model: Model, seed: int, topology: Topology) -> None:
    """Normal(0, init_std) for matrices, output projections divided by sqrt(2 * layers); norms 1, biases 0.

    Each weight is drawn from a generator keyed by its global name, so its value does not depend on the layout.
    """
    for name, parameter in global_parameters(gpt):
        if parameter.dim() == 1:
            parameter.fill_(1.0 if name.endswith("norm.weight") else 0.0)
            continue
        output = name.endswith(("linear_proj.weight", "linear_fc2.weight", "experts.w2"))
        std = model.init_std / math.sqrt(2 * model.num_layers) if output else model.init_std
        if ".experts.w" in name:
            first = topology.ep_rank * parameter.shape[0]
            for local, expert in enumerate(parameter):
                expert.copy_(_normal(f"{name}.{first + local}", tuple(expert.shape), std, seed))
        else:
            parameter.copy_(_tensor_parallel_shard(name, parameter, std, seed, topology))


def _normal(name: str, shape: tuple[int, ...], std: float, seed: int) -> Tensor:
    # torch's CPU generator takes the low 32 bits of a seed and ignores the others.
    key = int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:4], "big")
    generator = torch.Generator().manual_seed(key)
    return torch.randn(shape, generator=generator) * std


def _tensor_parallel_shard(name: str, parameter: nn.Parameter, std: float, seed: int, topology: Topology) -> Tensor:
    """This rank's part of the whole weight; a SwiGLU's gate and up halves are split each by itself."""
    shape = list(parameter.shape)
    if not getattr(parameter, "tensor_model_parallel", False):
        return _normal(name, tuple(shape), std, seed)
    dim: int = parameter.partition_dim  # type: ignore[attr-defined]
    stride: int = parameter.partition_stride  # type: ignore[attr-defined]
    shape[dim] *= topology.tp
    parts = _normal(name, tuple(shape), std, seed).chunk(stride, dim)
    return torch.cat([part.chunk(topology.tp, dim)[topology.tp_rank] for part in parts], dim)


def global_parameters(gpt: GPTModel) -> list[tuple[str, nn.Parameter]]:
    """Parameters under the names they have in the whole model: layers counted from 0 over all pipeline stages; the
    last stage's copy of a tied embedding under the embedding's name."""
    named = []
    for name, parameter in gpt.named_parameters():
        parts = name.split(".")
        if parts[:2] == ["decoder", "layers"]:
            parts[2] = str(gpt.decoder.layers[int(parts[2])].layer_number - 1)
        name = ".".join(parts)
        if name == "output_layer.weight" and gpt.share_embeddings_and_output_weights:
            name = "embedding.word_embeddings.weight"
        named.append((name, parameter))
    return named


def moe_layers(gpt: GPTModel) -> list[tuple[int, MoELayer]]:
    """(layer index in the whole model, its mixture of experts) of this stage."""
    return [(layer.layer_number - 1, layer.mlp) for layer in gpt.decoder.layers if isinstance(layer.mlp, MoELayer)]
