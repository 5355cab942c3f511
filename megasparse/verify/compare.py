"""One layout's run against one process's: how far apart everything is, and what that looks like."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megasparse.verify.observe import Parts, Seen

TOLERANCE = 1e-5  # float32, after a few steps: sums in another order differ by 1e-7 a step
NOISE = 1e-6
"""A gradient is rounding where its largest element is below this times the norm of all gradients: a key bias's true
gradient is zero (softmax does not see it), and float32 leaves 1e-8 of the norm. Listed apart, not judged."""
CAPACITY = 4  # differing routes, noisy gradients and the like that are listed


@dataclass
class Whole:
    """A run, put together from its ranks."""

    scalars: list[dict[str, float]]
    gradients: list[dict[str, Tensor]]  # of each step, by name; whole tensors
    weights: dict[str, Tensor]
    routes: dict[tuple[int, int, int], tuple[int, ...]]
    margin: float


def assemble(ranks: list[Seen]) -> Whole:
    """AssertionError if ranks disagree on a number that all report, or hold too little of a tensor. Where several hold
    the same element, the last one's counts: they are not compared with each other."""
    for rank in ranks[1:]:
        assert rank.scalars == ranks[0].scalars, "ranks report different losses or norms"
    steps = range(len(ranks[0].gradients))
    return Whole(
        scalars=ranks[0].scalars,
        gradients=[_tensors([part for rank in ranks for part in rank.gradients[step]]) for step in steps],
        weights=_tensors([part for rank in ranks for part in rank.weights]),
        routes={key: route for rank in ranks for key, route in rank.routes.items()},
        margin=min(rank.margin for rank in ranks),
    )


def _tensors(parts: Parts) -> dict[str, Tensor]:
    whole: dict[str, Tensor] = {}
    for name, shape, offsets, part in parts:
        if name not in whole:
            whole[name] = torch.full(shape, torch.nan)
        whole[name][tuple(slice(o, o + n) for o, n in zip(offsets, part.shape, strict=True))] = part
    missing = [name for name, tensor in whole.items() if tensor.isnan().any()]
    assert not missing, f"no rank holds all of {missing}, or it is not a number"
    return whole


@dataclass
class Group:
    """The worst of a group of parameters, over steps for gradients, after the last step for weights."""

    gradient: float = 0.0
    worst_gradient: str = ""
    weight: float = 0.0
    worst_weight: str = ""
    factor: float = 1.0  # by which the first step's gradients are too large, in least squares
    first_gradient: float = 0.0  # the first step's worst, before differences grow


@dataclass
class Comparison:
    """Relative differences, max|a - b| / max|b| for each tensor, of a layout's run to one process's."""

    layout: str
    ranks: int
    scalars: dict[str, float] = field(default_factory=dict)  # loss, auxiliary losses, grad_norm: worst over steps
    groups: dict[str, Group] = field(default_factory=dict)
    tensors: dict[str, tuple[float, float]] = field(default_factory=dict)  # name -> (worst gradient, weight)
    noise: dict[str, float] = field(default_factory=dict)  # gradients that are rounding: not judged
    flipped: list[str] = field(default_factory=list)  # routes that differ: "step, layer, token"
    margin: float = math.inf
    first: str = ""  # the first parameter that differs, in the order of steps and of the model
    diagnosis: str = ""

    @property
    def worst(self) -> float:
        groups = self.groups.values()
        return worst_of([*self.scalars.values(), *(g.gradient for g in groups), *(g.weight for g in groups)])

    @property
    def passed(self) -> bool:
        return self.worst <= TOLERANCE and not self.flipped


def worst_of(values: list[float]) -> float:
    """The largest; not-a-number is larger than any number."""
    return math.nan if any(math.isnan(value) for value in values) else max(values)


def worse(new: float, old: float) -> bool:
    return new > old or (math.isnan(new) and not math.isnan(old))


def compare(layout: str, ranks: int, ours: Whole, reference: Whole) -> Comparison:
    result = Comparison(layout, ranks, margin=min(ours.margin, reference.margin))
    for key in reference.scalars[0]:
        pairs = torch.tensor(
            [(a[key], b[key]) for a, b in zip(ours.scalars, reference.scalars, strict=True)], dtype=torch.float64
        )
        result.scalars[key] = worst_of([_relative(a, b) for a, b in pairs])
    assert ours.weights.keys() == reference.weights.keys(), "the layout has other parameters"
    for name, weight in reference.weights.items():
        group = result.groups.setdefault(group_of(name), Group())
        gradient = _compare_gradients(result, group, name, ours, reference)
        difference = _relative(ours.weights[name], weight)
        if gradient is None:  # its update is rounding too
            continue
        result.tensors[name] = (gradient, difference)
        if worse(difference, group.weight):
            group.weight, group.worst_weight = difference, name
    result.flipped = [
        f"step {step}, layer {layer}, token {token}"
        for (step, layer, token), route in reference.routes.items()
        if ours.routes.get((step, layer, token)) != route
    ]
    result.first = _first_to_differ(result, ours, reference)
    _measure_factors(result, ours, reference)
    result.diagnosis = "" if result.passed else diagnose(result, ours, reference)
    return result


def _compare_gradients(result: Comparison, group: Group, name: str, ours: Whole, reference: Whole) -> float | None:
    """The worst of the steps; None where it is only rounding in all of them."""
    worst, judged = 0.0, False
    for step, (a, b) in enumerate(zip(ours.gradients, reference.gradients, strict=True)):
        difference = _relative(a[name], b[name])
        if is_noise(b[name], reference.scalars[step]["grad_norm"]):
            result.noise[name] = max(difference, result.noise.get(name, 0.0))
            continue
        judged = True
        worst = worst_of([worst, difference])
        if step == 0:
            group.first_gradient = worst_of([group.first_gradient, difference])
    if worse(worst, group.gradient):
        group.gradient, group.worst_gradient = worst, name
    return worst if judged else None


def is_noise(gradient: Tensor, norm: float) -> bool:
    return gradient.abs().max().item() < NOISE * norm


def _relative(a: Tensor, b: Tensor) -> float:
    """max|a - b| / max|b|."""
    a, b = a.double(), b.double()
    difference = (a - b).abs().max().item()
    return 0.0 if difference == 0 else difference / b.abs().max().clamp(min=1e-300).item()


def group_of(name: str) -> str:
    """The row of the table a parameter belongs to."""
    if name.startswith("embedding."):
        return "embedding"
    if name.startswith("output_layer."):
        return "output"
    if "norm" in name:
        return "norms"
    if ".self_attention." in name:
        return "attention"
    if ".router." in name:
        return "router"
    return "experts" if ".experts." in name else "mlp"


def _first_to_differ(result: Comparison, ours: Whole, reference: Whole) -> str:
    for step, (a, b) in enumerate(zip(ours.gradients, reference.gradients, strict=True)):
        for name in b:
            difference = _relative(a[name], b[name])
            if not difference <= TOLERANCE and name not in result.noise:
                return f"gradient of {name} in step {step + 1}: {difference:.1e}"
    for name, (_, difference) in result.tensors.items():
        if not difference <= TOLERANCE:
            return f"weight {name} after the last step: {difference:.1e}"
    return ""


def _measure_factors(result: Comparison, ours: Whole, reference: Whole) -> None:
    for kind, group in result.groups.items():
        names = [name for name in reference.gradients[0] if group_of(name) == kind and name not in result.noise]
        a = torch.cat([ours.gradients[0][name].flatten().double() for name in names] or [torch.zeros(1)])
        b = torch.cat([reference.gradients[0][name].flatten().double() for name in names] or [torch.zeros(1)])
        square = b.square().sum().item()
        group.factor = (a * b).sum().item() / square if square else 1.0


# What it looks like ---------------------------------------------------------------------------------------------------


def diagnose(result: Comparison, ours: Whole, reference: Whole) -> str:
    """The likely mistake, from which groups' first gradients are off and how. The first step counts: later ones differ
    in everything."""
    a, b = ours.scalars[0], reference.scalars[0]
    groups = {kind: group for kind, group in result.groups.items() if group.worst_gradient or group.gradient == 0}
    off = {kind for kind, group in groups.items() if not group.first_gradient <= TOLERANCE}
    factors = [group.factor for kind, group in groups.items() if kind != "router"]  # that is the auxiliary loss's
    same_loss = abs(a["loss"] - b["loss"]) <= TOLERANCE * abs(b["loss"])
    if not same_loss:
        return "the loss of the first step differs: the forward pass computes something else"
    if not off:
        if abs(a["grad_norm"] - b["grad_norm"]) > TOLERANCE * b["grad_norm"]:
            return _diagnose_norm(a["grad_norm"], reference)
        if result.flipped:
            return f"{len(result.flipped)} tokens took another route, the least margin is {result.margin:.1e}"
        return "gradients of the first step agree: the optimizer's step or what follows it differs"
    if off == set(groups) and max(factors) - min(factors) < 0.1 and abs(factors[0] - 1) > 0.2:
        return (
            f"every gradient is {factors[0]:.2f} times what it should be: the loss is divided by the number of "
            "micro-batches, or by the replicas, another time"
        )
    if off == {"experts"}:
        factor = groups["experts"].factor
        return f"expert gradients alone are off, by {factor:.4g}: they are averaged over the wrong group"
    if off == {"embedding"} and "output" not in groups:
        return "the tied embedding's gradient alone is off: it is not summed over its first and its last stage"
    if "router" in off and groups["router"].first_gradient == max(g.first_gradient for g in groups.values()):
        return "the router's gradient is off most, the loss is right: the auxiliary loss is scaled by the layout"
    return f"gradients of {', '.join(sorted(off))} are off in the first step"


def _diagnose_norm(norm: float, reference: Whole) -> str:
    """Gradients agree and their norm does not: which weights, left out or counted twice, explain it?"""
    squares: dict[str, float] = {}
    for name, gradient in reference.gradients[0].items():
        kind = group_of(name)
        squares[kind] = squares.get(kind, 0.0) + gradient.double().square().sum().item()
        if kind == "experts":  # a rank has some of them: what if only the first of n ranks counted?
            for n in (n for n in (2, 4, 8) if len(gradient) % n == 0):
                others = gradient[len(gradient) // n :].double().square().sum().item()
                label = f"experts on the first of {n} ranks only"
                squares[label] = squares.get(label, 0.0) + others
    total = sum(square for label, square in squares.items() if " " not in label)
    missing = total - norm**2
    explanations = [
        (abs(missing - sign * square), label if " " in label else f"{label} {times}")
        for label, square in squares.items()
        for sign, times in ((1, "not at all"), (-1, "twice"))
        if " " not in label or sign == 1
    ]
    error, explanation = min(explanations)
    if error > 1e-3 * total:
        return "gradients agree, their norm does not: some weights are not counted once"
    return f"gradients agree, their norm does not: it counts {explanation}"
