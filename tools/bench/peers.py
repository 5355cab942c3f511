"""One training step of the same model by ours, by transformers' OLMoE and by megatron-core's own layers.

Each contender is built from the same weights by their names in our model and takes the same batches. What a step does:
forward, backward, the norm over all gradients, clipping to it, AdamW (torch's, fused), gradients cleared. With bf16
weights all three keep fp32 master weights and moments.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from megasparse import platform, topology
from megasparse.config import Recipe, parse_recipe
from megasparse.data.loader import Batch
from megasparse.topology import Topology


def recipe(model: dict[str, Any], seq: int, batch: int, precision: str) -> Recipe:
    """What OLMoE, megatron-core and we can all say: RoPE, full-width norm of q and k, no scaling of the k scores.

    No load-balance loss: each defines its own, and all are to compute the same function.
    """
    moe = {"normalize_scores": False, "aux_loss_coefficient": 0.0, **model.pop("moe")}
    return parse_recipe(
        {
            "name": "train-step",
            "data": {"sets": [{"path": "unused"}], "seq_length": seq},
            "model": {"qk_norm": "full", "moe": moe, **model},
            "training": {
                "steps": 1,
                "global_batch_size": batch,
                "micro_batch_size": batch,
                "precision": precision,
            },
            "parallel": {"zero_stage": 0 if precision == "fp32" else 1},
            "optimizer": {"lr": 1e-3},
        }
    )


def draw_batch(recipe: Recipe, step: int) -> Batch:
    """Tokens whose frequency falls as 1 / rank, as words' does: there is something to learn and experts specialise."""
    size, seq, vocab = recipe.training.micro_batch_size, recipe.data.seq_length, recipe.model.vocab_size
    assert vocab is not None
    generator = torch.Generator().manual_seed(step)
    frequency = 1.0 / torch.arange(1, vocab + 1)
    ids = torch.multinomial(frequency, size * (seq + 1), replacement=True, generator=generator).view(size, seq + 1)
    position = torch.arange(seq).expand(size, seq).contiguous()
    return Batch(
        tokens=ids[:, :-1].contiguous(),
        labels=ids[:, 1:].contiguous(),
        loss_mask=torch.ones(size, seq),
        position_ids=position,
        document_ids=None,
        token_index=(step * size + torch.arange(size)[:, None]) * seq + position,
    )


class Ours:
    """The engine as `megasparse train` runs it."""

    def __init__(self, recipe: Recipe) -> None:
        from megasparse.engine import Engine
        from megasparse.model import build_model

        groups = topology.initialize(seed=recipe.training.seed)
        assert recipe.model.vocab_size is not None
        self.learning_rate = recipe.optimizer.lr
        self.engine = Engine(recipe, groups, *build_model(recipe, groups, recipe.model.vocab_size))

    def step(self, batch: Batch, number: int) -> tuple[float, float]:
        result = self.engine.train_step([batch], number, self.learning_rate)
        return result.loss, result.grad_norm


class Peer:
    """A model of someone else's in a plain training loop."""

    def __init__(self, recipe: Recipe, model: nn.Module) -> None:
        self.model, self.clip = model.train(), recipe.optimizer.clip_grad
        self.weights = list(model.parameters())
        self.masters = self.weights
        if recipe.training.precision != "fp32":
            self.masters = [nn.Parameter(weight.detach().float()) for weight in self.weights]
        optimizer = recipe.optimizer
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [w for w in self.masters if w.dim() > 1], "weight_decay": optimizer.weight_decay},
                {"params": [w for w in self.masters if w.dim() == 1], "weight_decay": 0.0},
            ],
            lr=optimizer.lr,
            betas=(optimizer.beta1, optimizer.beta2),
            eps=optimizer.eps,
            fused=True,
        )

    def loss(self, batch: Batch) -> Tensor:
        """Cross-entropy per token."""
        raise NotImplementedError

    def step(self, batch: Batch, number: int) -> tuple[float, float]:
        loss = self.loss(batch)
        loss.backward()
        if self.masters is not self.weights:
            for master, weight in zip(self.masters, self.weights, strict=True):
                assert weight.grad is not None
                master.grad, weight.grad = weight.grad.float(), None
        norm = torch.nn.utils.clip_grad_norm_(self.masters, self.clip)
        self.optimizer.step()
        if self.masters is not self.weights:
            with torch.no_grad():
                for weight, master in zip(self.weights, self.masters, strict=True):
                    weight.copy_(master)
        self.optimizer.zero_grad()
        return loss.item(), norm.item()


class Transformers(Peer):
    """OlmoeForCausalLM with SDPA attention and grouped_mm experts."""

    def __init__(self, recipe: Recipe, weights: dict[str, Tensor]) -> None:
        from transformers import OlmoeConfig, OlmoeForCausalLM

        model, moe = recipe.model, recipe.model.moe
        assert moe is not None
        assert model.vocab_size is not None
        config = OlmoeConfig(
            vocab_size=model.vocab_size,
            hidden_size=model.hidden_size,
            intermediate_size=moe.ffn_hidden_size,
            num_hidden_layers=model.num_layers,
            num_attention_heads=model.num_attention_heads,
            num_key_value_heads=model.kv_heads,
            num_experts=moe.num_experts,
            num_experts_per_tok=moe.top_k,
            norm_topk_prob=moe.normalize_scores,
            tie_word_embeddings=model.tie_embeddings,
            max_position_embeddings=recipe.data.seq_length,
            rms_norm_eps=model.norm_epsilon,
            rope_parameters={"rope_type": "default", "rope_theta": model.rope.theta},
            use_cache=False,
            eos_token_id=None,
            pad_token_id=None,  # else that row of the embedding gets no gradient
        )
        config._attn_implementation, config._experts_implementation = "sdpa", "grouped_mm"
        olmoe = OlmoeForCausalLM(config)
        for weight in olmoe.parameters():
            weight.data = weight.data.to(platform.DTYPES[recipe.training.precision])
        assert (olmoe.config._attn_implementation, olmoe.config._experts_implementation) == ("sdpa", "grouped_mm")
        load(olmoe, olmoe_weights(weights, recipe))
        super().__init__(recipe, olmoe)

    def loss(self, batch: Batch) -> Tensor:
        return self.model(input_ids=batch.tokens, shift_labels=batch.labels, labels=batch.labels).loss


class Megatron(Peer):
    """megatron-core's GPTModel of its local spec: DotProductAttention, MoELayer with SequentialMLP, its cross-entropy.

    From us it has the full-width norm of q and k, which it does not offer. GroupedMLP would need grouped_gemm, which
    is CUDA only.
    """

    def __init__(self, recipe: Recipe, weights: dict[str, Tensor], dispatcher: str) -> None:
        groups = topology.initialize(seed=recipe.training.seed)
        load_balancing_tracker(recipe)
        model = megatron_model(recipe, groups, dispatcher)
        load(model, megatron_weights(weights, recipe))
        super().__init__(recipe, model)
        self.future = torch.ones(recipe.data.seq_length, recipe.data.seq_length).triu(1).bool()  # mcore's own asks CUDA

    def loss(self, batch: Batch) -> Tensor:
        return self.model(batch.tokens, batch.position_ids, self.future, labels=batch.labels).float().mean()


def load_balancing_tracker(recipe: Recipe) -> None:
    """What mcore's MoE needs besides platform.activate: where it would ask CUDA for a tensor, a stream, or TE."""
    utils: Any = importlib.import_module("megatron.core.transformer.moe.moe_utils")
    utils.te_general_gemm = None  # a name it reads without having bound it where Transformer Engine is absent
    utils.get_moe_layer_wise_logging_tracker()["load_balancing_loss"] = {
        "values": torch.zeros(recipe.model.num_layers),
        "reduce_group": None,
        "avg_group": None,
        "reduce_group_has_dp": False,
    }
    torch.cuda.Stream = NoStream  # type: ignore[misc,assignment]
    torch.cuda.current_stream = lambda *_: NoStream()  # type: ignore[assignment]
    torch.cuda.stream = lambda stream: stream  # type: ignore[assignment]


class NoStream:
    """In the place of a CUDA stream and its event: the CPU runs in order."""

    def __enter__(self) -> None: ...

    def __exit__(self, *_: Any) -> None: ...

    def wait_stream(self, stream: Any) -> None: ...

    def record_event(self) -> NoStream:
        return self

    def synchronize(self) -> None: ...


def megatron_model(recipe: Recipe, groups: Topology, dispatcher: str) -> nn.Module:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.spec_utils import ModuleSpec

    from megasparse.layers.norms import FullWidthRMSNorm
    from megasparse.model import transformer_config

    model, moe = recipe.model, recipe.model.moe
    assert moe is not None
    config: Any = transformer_config(recipe, groups)
    config.calculate_per_token_loss = False
    config.moe_router_topk = moe.top_k
    config.moe_router_pre_softmax = not moe.normalize_scores
    config.moe_router_load_balancing_type = "aux_loss"
    config.moe_aux_loss_coeff = moe.aux_loss_coefficient
    config.moe_router_dtype = "fp32"
    config.moe_token_dispatcher_type = dispatcher
    spec: Any = get_gpt_layer_local_spec(num_experts=moe.num_experts, qk_layernorm=True, normalization="RMSNorm")
    attention = spec.submodules.self_attention.submodules
    attention.q_layernorm = ModuleSpec(FullWidthRMSNorm, params={"heads": model.num_attention_heads})
    attention.k_layernorm = ModuleSpec(FullWidthRMSNorm, params={"heads": model.kv_heads})
    return GPTModel(
        config,
        spec,
        vocab_size=model.vocab_size,
        max_sequence_length=recipe.data.seq_length,
        position_embedding_type="rope",
        rotary_base=model.rope.theta,
        share_embeddings_and_output_weights=model.tie_embeddings,
    )


# The same weights under each one's names ------------------------------------------------------------------------------


def our_weights(recipe: Recipe) -> dict[str, Tensor]:
    """The first weights of ours, by name."""
    from megasparse.model import build_model
    from megasparse.placement import local_weights

    groups = topology.initialize(seed=recipe.training.seed)
    assert recipe.model.vocab_size is not None
    chunks, _ = build_model(recipe, groups, recipe.model.vocab_size)
    return {weight.name: weight.tensor.detach() for weight in local_weights(chunks, groups)}


def olmoe_weights(ours: dict[str, Tensor], recipe: Recipe) -> dict[str, Tensor]:
    model = recipe.model
    names = {
        "embedding.word_embeddings.weight": "model.embed_tokens.weight",
        "decoder.final_layernorm.weight": "model.norm.weight",
        "output_layer.weight": "lm_head.weight",
        "decoder.": "model.",
        "pre_mlp_layernorm": "post_attention_layernorm",
        "self_attention.q_layernorm": "self_attn.q_norm",
        "self_attention.k_layernorm": "self_attn.k_norm",
        "self_attention.linear_proj": "self_attn.o_proj",
        "mlp.router": "mlp.gate",
        "experts.w2": "experts.down_proj",
    }
    theirs = {}
    for name, weight in ours.items():
        for our, their in names.items():
            name = name.replace(our, their)
        if name.endswith("linear_qkv.weight"):
            group = weight.view(model.kv_heads, -1, model.head_size, model.hidden_size)
            q, k, v = group.split([group.shape[1] - 2, 1, 1], 1)
            for part, values in zip("qkv", (q, k, v), strict=True):
                their = name.replace("self_attention.linear_qkv", f"self_attn.{part}_proj")
                theirs[their] = values.reshape(-1, model.hidden_size)
        elif name.endswith("experts.w1"):
            theirs[name.replace("w1", "gate_up_proj")] = torch.cat(
                [weight, ours[name.replace("model.", "decoder.", 1).replace("w1", "w3")]], 1
            )
        elif not name.endswith("experts.w3"):
            theirs[name] = weight
    return theirs


def megatron_weights(ours: dict[str, Tensor], recipe: Recipe) -> dict[str, Tensor]:
    theirs = {name: weight for name, weight in ours.items() if ".experts.w" not in name}
    for name in (name for name in ours if name.endswith(".experts.w1")):
        prefix = name.removesuffix("w1")
        for expert, (w1, w2, w3) in enumerate(zip(*(ours[f"{prefix}w{i}"] for i in (1, 2, 3)), strict=True)):
            theirs[f"{prefix}local_experts.{expert}.linear_fc1.weight"] = torch.cat([w1, w3])
            theirs[f"{prefix}local_experts.{expert}.linear_fc2.weight"] = w2
    return theirs


@torch.no_grad()
def load(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Every parameter from ``weights``, and every one of these used."""
    parameters = dict(model.named_parameters())
    assert parameters.keys() == weights.keys(), parameters.keys() ^ weights.keys()
    for name, parameter in parameters.items():
        assert parameter.shape == weights[name].shape, name
        parameter.copy_(weights[name])
