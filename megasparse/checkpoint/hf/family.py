"""What a family of Hugging Face's models is: which fields of config.json are which of the recipe, and which tensors.

A family can say a model if writing it as their config and reading that back gives the same model. Fields that only
training knows (dropout, auxiliary losses, initialisation) are not theirs to say, and take no part in that.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from megasparse.checkpoint.hf.tensors import Entry, Piece, Shape
from megasparse.config import Model, parse_model
from megasparse.parameters import parameters, router_buffers

Fields = dict[str, Any]

# Fields that every config has and that change no logits.
NEUTRAL = frozenset(
    (
        *("transformers_version", "architectures", "output_hidden_states", "output_attentions", "return_dict", "dtype"),
        *("torch_dtype", "chunk_size_feed_forward", "is_encoder_decoder", "id2label", "label2id", "problem_type"),
        *("_name_or_path", "model_type", "use_cache", "bos_token_id", "eos_token_id", "pad_token_id", "auto_map"),
        *("initializer_range", "attention_dropout", "output_router_logits", "router_aux_loss_coef", "megasparse"),
    )
)
# What a recipe's model has for training alone.
TRAINING = ("attention_dropout", "hidden_dropout", "init_std")
MOE_TRAINING = (
    *("aux_loss_coefficient", "aux_loss_scope", "z_loss_coefficient", "jitter", "capacity_factor", "drop_policy"),
)
LAYER = "decoder.layers."
BIAS_UPDATE_RATE = 0.001  # DeepSeek-V3's: a model that has selection biases goes on moving them


def unchanged(_: Any) -> Fields:
    return {}


@dataclass(frozen=True)
class Family:
    """``fields``: theirs -> ours, dotted below ``model``, or a pair of that and of their values -> ours. ``fixed``:
    values that theirs must have (the first of a tuple is written). ``ours``: values that ours must have. ``read`` and
    ``write``: what no table says, from their config and from our model. ``top`` and ``layer``: our tensors, those of a
    layer without its number, and how they are made of theirs."""

    model_type: str
    architecture: str
    fields: Mapping[str, str | tuple[str, dict[Any, Any]]]
    ours: Fields
    top: Mapping[str, Entry]
    layer: Mapping[str, Entry]
    fixed: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    read: Callable[[Fields], Fields] = unchanged
    write: Callable[[Model], Fields] = unchanged
    reads: tuple[str, ...] = ()  # what ``read`` reads
    aliases: tuple[str, ...] = ()  # other model_types of the same config and tensors
    neutral: tuple[str, ...] = ()  # more fields that change no logits
    prefix: str = "model.layers.{}."
    root: str = ""  # that names of tensors may lack (real GPT-2's have no "transformer.")
    unsaved: str = r"rotary_emb\.inv_freq$"  # buffers that older versions saved, and that are computed

    # Fields ----------------------------------------------------------------------------------------------------------

    def model(self, config: Fields, ignored: frozenset[str] = frozenset()) -> Model:
        """The recipe's model of their config; ValueError naming a field that we cannot say. ``ignored``: fields that
        may have any value, on the user's word."""
        known = {*NEUTRAL, *self.neutral, *self.reads, *self.fields, *self.fixed, "rope_parameters", *ignored}
        for name, value in config.items():
            if name not in known and value is not None:
                raise ValueError(
                    f"config.json has {name}={value!r}, which this version does not know in a {self.model_type}: if it "
                    f"changes no logits, pass --ignore {name}"
                )
        for name, values in self.fixed.items():
            if name not in ignored and config.get(name, values[0]) not in values:
                raise ValueError(
                    f"config.json has {name}={config[name]!r}, which no recipe can say: only {_listed(values)} can be "
                    f"converted; if it changes no logits of yours, pass --ignore {name}"
                )
        raw: Fields = {}
        for path, value in self.ours.items():
            _put(raw, path, value)
        for name, target in self.fields.items():
            value = config.get(name)
            path, values = (target, None) if isinstance(target, str) else target
            if values is not None:
                if value not in values:
                    raise ValueError(f"config.json has {name}={value!r}: only {_listed(values)} can be converted")
                value = values[value]
            _put(raw, path, value)
        if raw["position_embedding"] == "rope":
            raw["rope"] = read_rope(config)
        for path, value in self.read(config).items():
            _put(raw, path, value)
        return parse_model(raw, "the model of config.json")

    def config(self, model: Model, vocab_size: int, positions: int) -> Fields:
        """Their config of our model; ValueError naming the first field that it cannot say. ``positions``: how many
        there are where the recipe leaves it open."""
        said = resolved(model, vocab_size, positions)
        config: Fields = {name: values[0] for name, values in self.fixed.items()}
        for name, target in self.fields.items():
            path, values = (target, None) if isinstance(target, str) else target
            value = _dig(said, path)
            if values is not None:
                theirs = [theirs for theirs, ours in values.items() if ours == value]
                if not theirs:
                    raise ValueError(f"model.{path}={value!r}: a {self.model_type} has {_listed(values.values())}")
                value = theirs[0]
            config[name] = value
        if model.position_embedding == "rope":
            config["rope_parameters"] = write_rope(model)
        config |= self.write(model)
        read_back = resolved(self.model(self.read_back(config)), vocab_size, positions)
        for path, value, theirs in differences(bearing(said), bearing(read_back)):
            raise ValueError(f"model.{path}={value!r}: a {self.model_type} has {theirs!r}")
        return config

    def read_back(self, config: Fields) -> Fields:
        """As transformers reads it: a field that is not written has its default. ValueError if it refuses it."""
        from huggingface_hub.errors import StrictDataclassError
        from transformers import AutoConfig

        try:
            return by_names(AutoConfig.for_model(self.model_type, **config), self.fields)
        except StrictDataclassError as error:
            raise ValueError(f"transformers refuses the config of such a {self.model_type}: {error}") from None

    # Tensors ---------------------------------------------------------------------------------------------------------

    def tensors(self, model: Model, vocab_size: int, positions: int) -> dict[str, tuple[Shape, list[Piece]]]:
        """Our tensors in the order of the model: their shapes, and how they are made of theirs. Those without pieces
        have no place with them: loads of routers, and selection biases where the model has none."""
        shapes = {**parameters(model, vocab_size, positions), **router_buffers(model)}
        return {name: (shape, self._pieces(name, shape, model)) for name, shape in shapes.items()}

    def _pieces(self, name: str, shape: Shape, model: Model) -> list[Piece]:
        if not name.startswith(LAYER):
            return self.top[name].pieces("", shape, model)
        layer, within = name.removeprefix(LAYER).split(".", 1)
        biased = model.moe is not None and model.moe.bias_update_rate > 0
        if within == "mlp.router.load" or (within == "mlp.router.bias" and not biased):
            return []
        return self.layer[within].pieces(self.prefix.format(layer), shape, model)

    def is_unsaved(self, name: str) -> bool:
        return re.search(self.unsaved, name) is not None


def by_names(config: Any, names: Collection[str]) -> Fields:
    """The fields of a config of transformers; one that has several names, by that in ``names``."""
    fields = config.to_dict()
    for alias, real in config.attribute_map.items():
        if alias in names:
            fields[alias] = fields.pop(real)
    return fields


def resolved(model: Model, vocab_size: int, positions: int) -> Fields:
    """The recipe's model with no field left open."""
    said = model.model_dump(mode="json")
    said |= {"head_dim": model.head_size, "num_query_groups": model.kv_heads, "ffn_hidden_size": model.ffn_size}
    said |= {"vocab_size": vocab_size, "max_position_embeddings": model.max_position_embeddings or positions}
    if model.moe is not None:
        said["moe"]["layers"] = [int(flag) for flag in model.moe_layers]
    return said


def bearing(said: Fields) -> Fields:
    """What bears on the logits."""
    said = {name: value for name, value in said.items() if name not in TRAINING}
    if moe := said["moe"]:
        moe = {name: value for name, value in moe.items() if name not in MOE_TRAINING}
        moe["bias_update_rate"] = moe["bias_update_rate"] > 0
        if moe["num_groups"] == 1:  # which limits nothing
            moe |= {"num_groups": None, "top_k_groups": None}
        if all(moe["layers"]):
            del said["ffn_hidden_size"]  # of dense layers: there are none
        said["moe"] = moe
    if said["position_embedding"] == "learned":
        del said["rope"]
    return said


def differences(then: Any, now: Any, path: str = "") -> list[tuple[str, Any, Any]]:
    """(path, value then, value now) of every leaf that differs."""
    if isinstance(then, dict) and isinstance(now, dict):
        found = []
        for key in {**then, **now}:
            found += differences(then.get(key), now.get(key), f"{path}.{key}" if path else key)
        return found
    return [] if then == now else [(path, then, now)]


# Rotary embedding -----------------------------------------------------------------------------------------------------

ROPE_TYPES = {"default": "none", "linear": "linear", "llama3": "llama3", "yarn": "yarn"}
ROPE_FIELDS = {  # theirs -> ours, of each type
    "default": {},
    "linear": {"factor": "factor"},
    "llama3": {
        name: name for name in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    },
    "yarn": {
        name: name
        for name in ("factor", "beta_fast", "beta_slow", "original_max_position_embeddings", "attention_factor")
    },
}


def read_rope(config: Fields) -> Fields:
    """model.rope of transformers' ``rope_parameters``; ValueError naming what we cannot say."""
    theirs = dict(config["rope_parameters"])
    kind = theirs.pop("rope_type")
    if kind not in ROPE_TYPES:
        raise ValueError(
            f"config.json has rope_parameters.rope_type={kind!r}: only {_listed(ROPE_TYPES)} can be converted"
        )
    ours = {"theta": theirs.pop("rope_theta"), "scaling": ROPE_TYPES[kind]}
    ours["percent"] = theirs.pop("partial_rotary_factor", None) or 1.0
    if kind == "yarn" and theirs.get("original_max_position_embeddings") is None:
        theirs["original_max_position_embeddings"] = config["max_position_embeddings"]  # as transformers does
    for name, value in theirs.items():
        if name in ROPE_FIELDS[kind]:
            if value is not None:
                ours[ROPE_FIELDS[kind][name]] = value
        elif value is not None and kind != "default" and (name, value) not in (("truncate", True), ("type", kind)):
            raise ValueError(
                f"config.json has rope_parameters.{name}={value!r} for rope_type={kind}: no recipe can say it"
            )
    return ours


def write_rope(model: Model) -> Fields:
    rope = model.rope
    kind = next(theirs for theirs, ours in ROPE_TYPES.items() if ours == rope.scaling)
    theirs: Fields = {"rope_type": kind, "rope_theta": rope.theta}
    if rope.percent != 1.0:
        theirs["partial_rotary_factor"] = rope.percent
    for name, ours in ROPE_FIELDS[kind].items():
        value = rope.model_dump()[ours]
        if value is not None:
            theirs[name] = value
    return theirs


def _put(raw: Fields, path: str, value: Any) -> None:
    *parents, leaf = path.split(".")
    for parent in parents:
        raw = raw.setdefault(parent, {})
    raw[leaf] = value


def _dig(said: Fields, path: str) -> Any:
    for key in path.split("."):
        if said is None:
            raise ValueError(f"model.{path.rpartition('.')[0]} is not there")
        said = said[key]
    return said


def _listed(values: Any) -> str:
    return " or ".join(map(repr, values))
