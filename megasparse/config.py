"""The recipe: every number of a run, validated before any work starts.

A recipe is a YAML file with the sections below. Unknown keys are errors, and any value can be
overridden on the command line with a dotted path (``model.num_layers=4``). Field names are those of
Megatron-LM where it has the same number, else those of the paper named beside the field.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError, model_validator

NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """A part of the recipe: unknown keys are refused, values are fixed once read."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class DataSet(Section):
    """One data set written by ``megasparse prepare``."""

    path: Path  # the folder that holds train.bin/.idx, validation.bin/.idx, the tokenizer and manifest.json
    weight: PositiveFloat = 1.0  # share of training samples, relative to the other sets


class Data(Section):
    """What is read: which sets in which proportion, cut into sequences of which length."""

    sets: Annotated[list[DataSet], Field(min_length=1)]
    seq_length: PositiveInt = 512  # tokens per sample
    document_mask: bool = False  # tokens attend within their own document only, and never predict across its end
    reset_position_ids: bool = False  # positions restart at each document (learned positions only)


class Rope(Section):
    """Rotary position embedding (RoFormer) and the scalings of HF's ``modeling_rope_utils``."""

    theta: PositiveFloat = 10_000.0
    scaling: Literal["none", "linear", "llama3", "yarn"] = "none"
    factor: PositiveFloat = 1.0
    original_max_position_embeddings: PositiveInt | None = None  # llama3, yarn
    low_freq_factor: PositiveFloat = 1.0  # llama3
    high_freq_factor: PositiveFloat = 4.0  # llama3
    beta_fast: PositiveFloat = 32.0  # yarn
    beta_slow: PositiveFloat = 1.0  # yarn
    attention_factor: PositiveFloat | None = None  # yarn; None: 0.1 ln(factor) + 1

    @model_validator(mode="after")
    def _check(self) -> Rope:
        if self.scaling in ("llama3", "yarn") and self.original_max_position_embeddings is None:
            raise ValueError(f"scaling={self.scaling} needs original_max_position_embeddings")
        return self


class MoE(Section):
    """Top-k mixture of experts: which layers, how tokens are routed, how the load is balanced."""

    num_experts: PositiveInt
    top_k: PositiveInt = 2
    ffn_hidden_size: PositiveInt  # of one expert
    layers: Literal["all"] | PositiveInt | list[Literal[0, 1]] = "all"
    """"all"; n: every n-th layer, the n-th first; or one 0/1 per layer (Megatron's moe_layer_freq)."""
    shared_expert_ffn_hidden_size: int = Field(default=0, ge=0)  # 0: none
    score_function: Literal["softmax", "sigmoid"] = "softmax"
    normalize_scores: bool = True  # the k scores of a token are divided by their sum
    score_scale: PositiveFloat = 1.0  # multiplies the scores (DeepSeek-V3's routed_scaling_factor)
    num_groups: PositiveInt | None = None  # group-limited routing (DeepSeek-V2/V3): experts in this many groups,
    top_k_groups: PositiveInt | None = None  # of which a token may use only this many
    aux_loss_coefficient: NonNegative = 0.01
    aux_loss_scope: Literal["micro_batch", "global_batch", "all_layers"] = "micro_batch"
    """Where the load statistics f of the Switch loss E * sum(f_e * P_e) are taken. micro_batch: over the
    sequences of one micro-batch. global_batch: f is the whole previous optimizer step's, so that the loss is a
    plain sum over tokens and the same under any split. all_layers: as transformers does, counts and
    probabilities pooled over layers and not divided by top_k (one pipeline stage only)."""
    z_loss_coefficient: NonNegative = 0.0  # ST-MoE
    bias_update_rate: NonNegative = 0.0  # auxiliary-loss-free balancing (DeepSeek-V3); 0: no bias
    jitter: Fraction = 0.0  # input is multiplied by uniform(1 - jitter, 1 + jitter) before the router (Switch)
    capacity_factor: PositiveFloat | None = None  # in training; None: dropless, as evaluation always is
    drop_policy: Literal["probs", "position"] = "probs"  # which tokens an expert over capacity keeps: best or first

    @model_validator(mode="after")
    def _check(self) -> MoE:
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k={self.top_k} is more than num_experts={self.num_experts}: lower top_k")
        if (self.num_groups is None) != (self.top_k_groups is None):
            raise ValueError("num_groups and top_k_groups go together: set both or neither")
        if self.num_groups is not None and self.top_k_groups is not None:
            if self.num_experts % self.num_groups:
                raise ValueError(f"num_experts={self.num_experts} is not divisible by num_groups={self.num_groups}")
            if self.top_k_groups > self.num_groups:
                raise ValueError(f"top_k_groups={self.top_k_groups} is more than num_groups={self.num_groups}")
            if self.num_experts // self.num_groups < 2:
                raise ValueError("a group is scored by its two best experts: num_experts / num_groups must be >= 2")
            if self.top_k > self.top_k_groups * (self.num_experts // self.num_groups):
                raise ValueError(
                    f"top_k={self.top_k} is more than the experts in top_k_groups={self.top_k_groups} groups"
                )
        return self


class SparseAttention(Section):
    """Block-sparse attention: each query, or block of queries, sees some blocks of keys (layers/selectors.py)."""

    selector: Literal["local", "strided", "pooled", "gate", "nsa", "clusters"]
    block_size: PositiveInt = 64  # keys of a block
    query_block_size: PositiveInt = 1  # queries that share a list; 1: each has its own
    blocks: PositiveInt | None = None  # that a query sees in all; none for the fixed patterns, local and strided
    mass: Annotated[float, Field(gt=0, le=1)] | None = None
    """No more of the chosen blocks than have this share of the softmax over scores; None: all."""
    stride: PositiveInt = 8  # strided: every so many blocks, shifted by head
    local_blocks: PositiveInt = 2  # always seen: the own one and those right before it
    sink_blocks: int = Field(default=1, ge=0)  # always seen: the first of the sequence
    gate_dim: PositiveInt = 64  # gate: width of its queries and keys
    gate_loss_coefficient: PositiveFloat = 0.1
    compression_size: PositiveInt = 32  # nsa: keys that become one compressed key,
    compression_stride: PositiveInt = 16  # every so many keys
    window_blocks: PositiveInt = 8  # nsa: of the window branch, which has keys of its own
    clusters: PositiveInt = 16  # clusters: of queries and keys, for each K/V head
    cluster_loss_coefficient: PositiveFloat = 0.1
    layers: Literal["all"] | list[Literal[0, 1]] = "all"  # one flag per layer; the others are dense
    dense_start: Fraction = 0.0  # share of the run's steps, at its beginning, with dense attention
    dense_end: Fraction = 0.0  # and at its end
    ramp: Fraction = 0.0  # with a budget: share of the steps, after dense_start, in which all blocks become ``blocks``

    @property
    def chooses(self) -> bool:
        """Does it choose blocks by a score, up to a budget?"""
        return self.selector not in ("local", "strided")

    @model_validator(mode="after")
    def _check(self) -> SparseAttention:
        if self.dense_start + self.ramp + self.dense_end > 1:
            raise ValueError(
                f"dense_start={self.dense_start} + ramp={self.ramp} + dense_end={self.dense_end} are more than the run"
            )
        if not self.chooses:
            for field, value in (("blocks", self.blocks), ("mass", self.mass), ("ramp", self.ramp or None)):
                if value is not None:
                    raise ValueError(f"{field}={value} with selector={self.selector}: its pattern is fixed, unset it")
        elif self.blocks is None:
            raise ValueError(f"selector={self.selector} needs blocks: how many a query sees in all")
        if self.selector in ("gate", "nsa") and self.query_block_size > 1:
            raise ValueError(
                f"query_block_size={self.query_block_size}: selector={self.selector} chooses for single queries, set 1"
            )
        always = self.sink_blocks + self.local_blocks + max(0, math.ceil(self.query_block_size / self.block_size) - 1)
        if self.blocks is not None and self.blocks <= always:
            raise ValueError(
                f"blocks={self.blocks} leaves none to choose: {always} are always seen (sink_blocks={self.sink_blocks}"
                f", local_blocks={self.local_blocks}, query_block_size={self.query_block_size})"
            )
        if self.selector == "nsa":
            for field in ("block_size", "compression_size"):
                if getattr(self, field) % self.compression_stride:
                    raise ValueError(
                        f"{field}={getattr(self, field)} is not divisible by "
                        f"compression_stride={self.compression_stride}"
                    )
        return self


class Model(Section):
    """The transformer: enough to say GPT-2, Llama, Qwen2/3, OLMo2, Mixtral and OLMoE."""

    num_layers: PositiveInt
    hidden_size: PositiveInt
    num_attention_heads: PositiveInt
    num_query_groups: PositiveInt | None = None  # K/V heads of grouped-query attention; None: as many as heads
    head_dim: PositiveInt | None = None  # None: hidden_size / num_attention_heads
    ffn_hidden_size: PositiveInt | None = None  # of dense layers; None: 4 x hidden_size
    vocab_size: PositiveInt | None = None  # None: the tokenizer's
    activation: Literal["swiglu", "gelu", "gelu_tanh"] = "swiglu"
    normalization: Literal["RMSNorm", "LayerNorm"] = "RMSNorm"
    norm_epsilon: PositiveFloat = 1e-5
    norm_placement: Literal["pre", "post"] = "pre"  # post: norms the sublayer's output, before the residual (OLMo2)
    qk_norm: Literal["none", "head", "full"] = "none"  # per head (Qwen3) or over all heads together (OLMo2, OLMoE)
    bias: Literal["none", "qkv", "all"] = "none"
    tie_embeddings: bool = False
    position_embedding: Literal["rope", "learned"] = "rope"
    max_position_embeddings: PositiveInt | None = None  # rows of the learned table; None: data.seq_length
    rope: Rope = Rope()
    attention_dropout: Fraction = 0.0
    hidden_dropout: Fraction = 0.0
    init_std: PositiveFloat = 0.02  # output projections: divided by sqrt(2 * num_layers) (GPT-2)
    moe: MoE | None = None
    sparse_attention: SparseAttention | None = None

    @property
    def kv_heads(self) -> int:
        return self.num_query_groups or self.num_attention_heads

    @property
    def head_size(self) -> int:
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def ffn_size(self) -> int:
        return self.ffn_hidden_size or 4 * self.hidden_size

    @property
    def moe_layers(self) -> list[bool]:
        """One flag per layer: is it a mixture of experts?"""
        if self.moe is None:
            return [False] * self.num_layers
        if self.moe.layers == "all":
            return [True] * self.num_layers
        if isinstance(self.moe.layers, int):
            return [(i + 1) % self.moe.layers == 0 for i in range(self.num_layers)]
        return [bool(flag) for flag in self.moe.layers]

    @property
    def sparse_layers(self) -> list[bool]:
        """One flag per layer: is its attention block-sparse?"""
        if self.sparse_attention is None:
            return [False] * self.num_layers
        if self.sparse_attention.layers == "all":
            return [True] * self.num_layers
        return [bool(flag) for flag in self.sparse_attention.layers]

    @property
    def linear_weights(self) -> list[str]:
        """Names of the matrices that can be 2:4: of attention, MLPs and experts."""
        names = []
        for index, moe in enumerate(self.moe_layers):
            attention, mlp = (f"decoder.layers.{index}.{part}" for part in ("self_attention", "mlp"))
            names += [f"{attention}.linear_qkv.weight", f"{attention}.linear_proj.weight"]
            if moe:
                names += [f"{mlp}.experts.{name}" for name in ("w1", "w2", "w3")]
                if self.moe and self.moe.shared_expert_ffn_hidden_size:
                    names += [f"{mlp}.shared_experts.{name}.weight" for name in ("linear_fc1", "linear_fc2")]
            else:
                names += [f"{mlp}.linear_fc1.weight", f"{mlp}.linear_fc2.weight"]
        return names

    @model_validator(mode="after")
    def _check(self) -> Model:
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} is not divisible by num_attention_heads={self.num_attention_heads}: "
                "change one or set head_dim"
            )
        if self.num_attention_heads % self.kv_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} is not divisible by num_query_groups={self.kv_heads}"
            )
        if self.position_embedding == "rope" and self.head_size % 2:
            raise ValueError(f"head_dim={self.head_size} is odd: rotary embedding needs pairs")
        if self.qk_norm != "none" and self.normalization != "RMSNorm":
            raise ValueError(f"qk_norm={self.qk_norm} needs normalization=RMSNorm")
        if self.sparse_attention is not None:
            if len(self.sparse_layers) != self.num_layers:
                raise ValueError(
                    f"sparse_attention.layers has {len(self.sparse_layers)} flags for num_layers={self.num_layers}"
                )
            if self.attention_dropout > 0:
                raise ValueError(f"attention_dropout={self.attention_dropout} is not possible with sparse_attention")
        if self.moe is not None:
            if isinstance(self.moe.layers, list) and len(self.moe.layers) != self.num_layers:
                raise ValueError(f"moe.layers has {len(self.moe.layers)} flags for num_layers={self.num_layers}")
            if not any(self.moe_layers):
                raise ValueError("moe.layers selects no layer: remove the moe section or select one")
            if self.activation != "swiglu" or self.bias == "all":
                raise ValueError("moe experts are bias-free SwiGLU: set activation=swiglu and bias to none or qkv")
        return self


class WeightSparsity(Section):
    """2:4 weights: of every four in a row, two at most take part in the forward pass (sparsity/)."""

    method: Literal["dense", "ste", "sr_ste", "s_ste", "asp", "ast", "mdgf", "sdgf"]
    """dense: masks are made and what flips is counted, as the others are compared with it (2by4), but they are not
    applied. ste: the mask follows the weights, and every weight gets the gradient of its place in the product.
    sr_ste: the same, and what is masked decays (Zhou et al. 2021; before Adam: 2by4). ast: the same, and the decay is
    no part of Adam's momentum (AST). s_ste: soft thresholding, continuous in the weights (S-STE). asp: dense up to
    dense_start, then one mask to the end (Mishra et al. 2021). mdgf: what is masked fades out over ``ramp``, in the
    product and in the gradient; sdgf: more and more of each m is masked, down to n (Bambhaniya et al. 2024)."""
    targets: list[str] = [r"\.mlp\.(linear|experts|shared_experts)"]
    """Regular expressions, searched for in the names of Model.linear_weights: what becomes 2:4. Default: MLPs."""
    pattern: Annotated[str, Field(pattern=r"^[1-9]\d*:[1-9]\d*$")] = "2:4"  # n:m, others for mdgf and sdgf only
    mask: Literal["transposable", "row"] | None = None
    """transposable: two of four in rows and columns, so that the product for the input's gradient is 2:4 as well.
    None: transposable for sr_ste, row for the others."""
    search: Literal["exact", "greedy"] = "exact"  # of transposable masks (ops.two_four.transposable_mask)
    score: Literal["magnitude", "wanda"] = "magnitude"
    """What the mask keeps the largest of: |w|, or |w| times the root mean square of its input over the samples of the
    first sparse step (Wanda), which then stays."""
    refresh_interval: PositiveInt | None = None
    """Optimizer steps between masks. None: 1 for ste, 10 for ast (AST), 40 for the others (2by4)."""
    decay: NonNegative | None = None  # sr_ste, ast: times the weight, what is added to a masked weight's gradient
    boost: PositiveInt | None = None  # ast: columns that share a weight beside the 2:4 ones (SLoRB's k); None: no boost
    ramp: Fraction = 0.0
    """Share of the run's steps, after dense_start, in which the decay grows (AST), or what is masked fades."""
    mvue: Literal["none", "exact", "approx"] = "none"
    """The gradient of a weight from an unbiased estimate of its output's, 2:4 along the tokens (ops.two_four.mvue_24);
    experts' gradients stay whole: which tokens lie side by side there depends on the layout."""
    products: Literal["auto", "masked", "semi_structured"] = "auto"
    """How products are computed (ops/two_four/matmul.py): masked, as those of dense weights; semi_structured by CUDA's
    2:4 kernels, linear layers only; auto: semi_structured where it runs. The log says which."""
    dense_start: Fraction = 0.0  # share of the run's steps, at its beginning, with dense weights
    dense_end: Fraction = 0.0  # and at its end

    @property
    def transposable(self) -> bool:
        return (self.mask or ("transposable" if self.method == "sr_ste" else "row")) == "transposable"

    @property
    def interval(self) -> int:
        return self.refresh_interval or {"ste": 1, "ast": 10}.get(self.method, 40)

    @property
    def cuts_gradients(self) -> bool:
        """Does a masked weight get no gradient, or less of it?"""
        return self.method in ("asp", "mdgf", "sdgf")

    @property
    def n_of_m(self) -> tuple[int, int]:
        n, m = self.pattern.split(":")
        return int(n), int(m)

    @model_validator(mode="after")
    def _check(self) -> WeightSparsity:
        if self.dense_start + self.ramp + self.dense_end > 1:
            raise ValueError(
                f"dense_start={self.dense_start} + ramp={self.ramp} + dense_end={self.dense_end} are more than the run"
            )
        decays, fades = ("sr_ste", "ast"), ("mdgf", "sdgf")
        masks = ("dense", "ste", "sr_ste", "asp", "ast", *fades)
        for field, unset, methods in (
            ("decay", None, decays),
            ("ramp", 0.0, decays + fades),
            ("pattern", "2:4", fades),
            ("boost", None, ("ast",)),
            ("refresh_interval", None, ("dense", "ste", "sr_ste", "s_ste", "ast", *fades)),
            ("mask", None, masks),
            ("score", "magnitude", masks),
            ("dense_end", 0.0, masks),
        ):
            if getattr(self, field) != unset and self.method not in methods:
                raise ValueError(f"{field}={getattr(self, field)} with method={self.method}: it has none, unset it")
        if self.method in decays and self.decay is None:
            raise ValueError(
                f"method={self.method} needs decay: 6e-5 to 2e-4 for GPT-2 (2by4), tools/find_decay.py finds it"
            )
        if self.boost and self.dense_end:
            raise ValueError(
                f"boost={self.boost} with dense_end={self.dense_end}: it belongs to sparse weights, unset one"
            )
        n, m = self.n_of_m
        if n >= m:
            raise ValueError(f"pattern={self.pattern} masks nothing: n of each m are kept, n < m")
        if self.transposable and self.pattern != "2:4":
            raise ValueError(f"mask=transposable with pattern={self.pattern}: it is 2:4")
        if self.method == "sdgf" and (self.ramp == 0 or self.transposable):
            raise ValueError("method=sdgf goes from m-1 of m to n of m in rows: set ramp, and unset mask")
        for target in self.targets:
            try:
                re.compile(target)
            except re.error as error:
                raise ValueError(f"targets: {target!r} is not a regular expression: {error}") from None
        return self


class Sparsity(Section):
    """What of the weights is sparse."""

    weights: WeightSparsity | None = None


class Optimizer(Section):
    """AdamW with decoupled weight decay; one-dimensional weights (norms, biases) are not decayed."""

    lr: PositiveFloat = 3e-4
    beta1: Fraction = 0.9
    beta2: Fraction = 0.95
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegative = 0.1
    clip_grad: NonNegative = 1.0  # largest global gradient norm; 0: no clipping


class Schedule(Section):
    """Learning rate as a function of tokens seen: linear warm-up, then one of four shapes."""

    type: Literal["cosine", "wsd", "linear", "constant"] = "cosine"
    warmup_tokens: int = Field(default=0, ge=0)
    decay_tokens: int = Field(default=0, ge=0)  # wsd: length of the final linear decay
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 0.1  # lr at the end / optimizer.lr


class Parallel(Section):
    """How the run is split. Data parallelism is what is left of the world: world / (tp * pp * cp). What goes together
    is topology.check_layout's to say."""

    tp: PositiveInt = 1  # tensor parallel
    sequence_parallel: bool = False  # with tp: norms and residuals are split along the sequence
    pp: PositiveInt = 1  # pipeline parallel
    vp: PositiveInt = 1  # virtual pipeline: model chunks a stage holds, interleaved (Narayanan et al. 2021)
    layers_per_stage: list[PositiveInt] | None = None
    """Layers of each of the pp * vp stages, in the order of the model. None: even, with these weights:"""
    embedding_weight: NonNegative = 0.0  # the embedding's share of the first stage, in layers
    loss_weight: NonNegative = 0.0  # the output layer and loss's share of the last stage, in layers
    cp: PositiveInt = 1  # context parallel: the sequence is split, keys and values are gathered
    ep: PositiveInt = 1  # expert parallel, folded over tp x cp x dp
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 1
    offload_optimizer: bool = False  # ZeRO's master weights and moments, and the step, on the CPU


class Teacher(Section):
    """Knowledge distillation: the loss of a token is (1 - weight) times its cross-entropy, plus weight * temperature^2
    times KL(teacher || student), both softened to softmax(logits / temperature) (Hinton et al. 2015)."""

    checkpoint: Path  # a folder step_N of a run, of any model with the same vocabulary
    temperature: PositiveFloat = 2.0  # AST
    weight: Annotated[float, Field(ge=0, le=1)] = 0.67  # AST


class Fp8(Section):
    """FP8 products of attention's and MLPs' linear layers and of experts, by one of Transformer Engine's recipes.

    x and weights are cast to e4m3. Embedding, output layer, routers, norms, and what attention has besides its linear
    layers, stay in training.precision. NVIDIA GPUs run Transformer Engine, a CPU emulates it (ops/fp8).
    """

    recipe: Literal["delayed", "current", "block"]
    """Where scales come from. delayed: the largest values of earlier steps. current: each tensor itself. block: each
    128 of its values, or 128 x 128 of a weight's (DeepSeek-V3). Megatron's fp8_recipe calls the last two tensorwise and
    blockwise."""
    gradients: Literal["e5m2", "e4m3"] = "e5m2"  # of outputs: Megatron's fp8 is hybrid or e4m3
    margin: int = Field(default=0, ge=0)  # delayed: as many powers of two below the largest number of the type
    amax_history_len: PositiveInt = 1024  # delayed: steps looked back on
    amax_compute_algo: Literal["max", "most_recent"] = "max"  # delayed: what of them counts
    num_layers_at_start_in_bf16: int = Field(default=0, ge=0)  # transformer layers that stay in training.precision,
    num_layers_at_end_in_bf16: int = Field(default=0, ge=0)  # at both ends of the model
    experts: bool = True  # routed experts too
    emulate: bool = False  # on a GPU as well: what Transformer Engine cannot do, slower than without FP8
    rounding: Literal["nearest", "smooth"] = "nearest"
    """smooth: emulation with a continuous map in place of the cast, by the same scales: verify's."""

    @model_validator(mode="after")
    def _check(self) -> Fp8:
        for field, unset in (("margin", 0), ("amax_history_len", 1024), ("amax_compute_algo", "max")):
            if getattr(self, field) != unset and self.recipe != "delayed":
                raise ValueError(f"{field}={getattr(self, field)} with recipe={self.recipe}: it has none, unset it")
        return self


class Training(Section):
    """How long, in what portions and in which precision."""

    steps: PositiveInt
    global_batch_size: PositiveInt = 32  # sequences per optimizer step, over all ranks
    micro_batch_size: PositiveInt = 8  # sequences per forward pass of one rank
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    fp8: Fp8 | None = None
    loss_scale: PositiveFloat = 65536.0  # fp16: the first dynamic loss scale
    loss_scale_window: PositiveInt = 1000  # fp16: good steps before the scale doubles
    recompute: Literal["none", "full"] = "none"  # full: each layer's activations are recomputed in backward
    seed: int = Field(default=1234, ge=0)
    max_skipped_steps: PositiveInt = 10  # steps in a row skipped for a non-finite loss or norm before the run ends
    eval_interval: int = Field(default=0, ge=0)  # steps; 0: only at the end
    eval_tokens: PositiveInt = 100_000  # validation tokens at each interval (the end uses all)
    eval_stride: PositiveInt | None = None
    """Tokens that a window of the last evaluation scores: each has seq_length - eval_stride of context or more. None:
    a quarter of seq_length, at four times the work of seq_length."""
    save_interval: int = Field(default=0, ge=0)  # steps; 0: only at the end
    keep_checkpoints: PositiveInt = 2  # the newest ones kept
    keep_every: int = Field(default=0, ge=0)  # steps; 0: none: checkpoints kept for good, a multiple of save_interval
    async_save: bool = False  # a checkpoint is copied and written while training goes on
    initial_checkpoint: Path | None = None
    """A folder step_N of another run, whose weights and router biases a new run begins with; None: drawn from seed."""
    teacher: Teacher | None = None

    @model_validator(mode="after")
    def _check(self) -> Training:
        if self.keep_every and (self.save_interval == 0 or self.keep_every % self.save_interval):
            raise ValueError(
                f"keep_every={self.keep_every} is not a multiple of save_interval={self.save_interval}: "
                "no such step is saved"
            )
        return self


class Logging(Section):
    """Where metrics go besides the console and metrics.jsonl."""

    log_interval: PositiveInt = 1
    tensorboard: bool = True
    wandb: Literal["offline", "online", "disabled"] = "offline"
    wandb_project: str = "megasparse"


class Recipe(Section):
    """A whole run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+$")]
    data: Data
    model: Model
    training: Training
    sparsity: Sparsity = Sparsity()
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    parallel: Parallel = Parallel()
    logging: Logging = Logging()

    @property
    def tokens_per_step(self) -> int:
        return self.training.global_batch_size * self.data.seq_length

    @property
    def total_tokens(self) -> int:
        return self.training.steps * self.tokens_per_step

    @property
    def sparse_weights(self) -> list[str]:
        """Names of the weights that are 2:4."""
        weights = self.sparsity.weights
        targets = weights.targets if weights else []
        return [name for name in self.model.linear_weights if any(re.search(target, name) for target in targets)]

    @property
    def fp8_weights(self) -> list[str]:
        """Names of the weights that are multiplied in FP8."""
        fp8 = self.training.fp8
        if fp8 is None:
            return []
        layers = range(fp8.num_layers_at_start_in_bf16, self.model.num_layers - fp8.num_layers_at_end_in_bf16)
        return [
            name
            for name in self.model.linear_weights
            if int(name.split(".")[2]) in layers and (fp8.experts or ".mlp.experts." not in name)
        ]

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        model, data, training = self.model, self.data, self.training
        weights = self.sparsity.weights
        if weights and weights.method == "asp" and weights.dense_start == 0 and training.initial_checkpoint is None:
            raise ValueError(
                "sparsity.weights.method=asp prunes a trained model: set training.initial_checkpoint, or "
                "sparsity.weights.dense_start, the share of the run before that"
            )
        for target in weights.targets if weights else []:
            if not any(re.search(target, name) for name in model.linear_weights):
                raise ValueError(
                    f"sparsity.weights.targets: {target!r} is in no name of {', '.join(model.linear_weights)}"
                )
        if training.fp8 is not None and not self.fp8_weights:
            raise ValueError(
                f"training.fp8: num_layers_at_start_in_bf16={training.fp8.num_layers_at_start_in_bf16} and "
                f"num_layers_at_end_in_bf16={training.fp8.num_layers_at_end_in_bf16} leave none of "
                f"model.num_layers={model.num_layers} in FP8: lower one"
            )
        if training.fp8 is not None and not training.fp8.experts and model.moe is None:
            raise ValueError("training.fp8.experts=false without model.moe: there are none, unset it")
        if training.global_batch_size % training.micro_batch_size:
            raise ValueError(
                f"training.global_batch_size={training.global_batch_size} is not divisible by "
                f"training.micro_batch_size={training.micro_batch_size}"
            )
        if training.eval_stride is not None and training.eval_stride > data.seq_length:
            raise ValueError(
                f"training.eval_stride={training.eval_stride} is more than data.seq_length={data.seq_length}: lower it"
            )
        if data.reset_position_ids and model.position_embedding != "learned":
            raise ValueError(
                "data.reset_position_ids=true needs model.position_embedding=learned: "
                "rotary attention is relative, data.document_mask is enough"
            )
        if model.position_embedding == "learned" and (model.max_position_embeddings or 2**63) < data.seq_length:
            raise ValueError(
                f"data.seq_length={data.seq_length} is more than "
                f"model.max_position_embeddings={model.max_position_embeddings}"
            )
        if self.schedule.warmup_tokens + self.schedule.decay_tokens > self.total_tokens:
            raise ValueError(
                f"schedule.warmup_tokens + decay_tokens is more than the run's {self.total_tokens} tokens "
                "(training.steps * global_batch_size * data.seq_length)"
            )
        if model.moe is not None and model.moe.aux_loss_scope == "all_layers" and training.recompute != "none":
            raise ValueError("model.moe.aux_loss_scope=all_layers keeps every layer's graph: set recompute=none")
        return self


def load_recipe(path: Path, overrides: list[str] | None = None) -> Recipe:
    """Read a YAML recipe and apply dotted overrides such as ``model.num_layers=4``.

    Raises ValueError with one line for each wrong field: its path, its value and what to do.
    """
    try:
        raw = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"no recipe at {path}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{path} is not a recipe: a mapping with name, data, model and training is expected")
    for override in overrides or []:
        _apply_override(raw, override)
    return parse_recipe(raw, source=str(path))


def parse_recipe(raw: dict[str, Any], source: str = "recipe") -> Recipe:
    """Validate a mapping as a recipe; ValueError as in load_recipe."""
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        raise ValueError(f"{source}: " + "; ".join(_describe(e) for e in error.errors())) from None


def dump_recipe(recipe: Recipe) -> str:
    """The fully resolved recipe as YAML: load_recipe reads it back equal."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)


def _apply_override(raw: dict[str, Any], override: str) -> None:
    path, separator, value = override.partition("=")
    if not separator or not path:
        raise ValueError(f"override {override!r} is not of the form section.key=value")
    node: Any = raw
    *parents, leaf = path.split(".")
    for depth, key in enumerate(parents):
        node = _child(node, key, override)
        if node is None or not isinstance(node, (dict, list)):
            raise ValueError(f"override {override!r}: {'.'.join(parents[: depth + 1])} is not a section")
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError:
        raise ValueError(f"override {override!r}: the value is not YAML") from None
    if isinstance(node, list):
        _child(node, leaf, override)
        node[int(leaf)] = parsed
    else:
        node[leaf] = parsed


def _child(node: Any, key: str, override: str) -> Any:
    if isinstance(node, list):
        if not key.isdigit() or int(key) >= len(node):
            raise ValueError(f"override {override!r}: {key!r} is not an index below {len(node)}")
        return node[int(key)]
    if node.get(key) is None:
        node[key] = {}
    return node[key]


def _describe(error: Any) -> str:
    """One pydantic error as ``path = value: what is wrong``."""
    path = ".".join(str(part) for part in error["loc"]) or "recipe"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        return f"{path}: unknown key"
    if error["type"] == "missing":
        return f"{path}: missing"
    if error["type"] == "value_error":
        return f"{path}: {message}"
    return f"{path} = {error['input']!r}: {message}"
