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
ROUNDED = {"loss": 3e-3, "auxiliary": 1e-2, "norm": 2e-2, "own norm": 1e-5, "sizes": 5e-2, "updates": 5e-2}
"""bf16 and fp16: sums in another order round otherwise, and tokens take other routes. In five recipes and six layouts,
three to five steps of one seed, the worst was loss 8e-4, auxiliary 4e-3, norm 6e-3, own norm 7e-7, sizes 2e-2, updates
7e-3."""
CAPACITY = 4  # differing routes, noisy gradients and the like that are listed


@dataclass
class Whole:
    """A run, put together from its ranks."""

    scalars: list[dict[str, float]]
    gradients: list[dict[str, Tensor]]  # of each step, by name; whole tensors
    weights: dict[str, Tensor]  # and buffers
    routes: dict[tuple[int, ...], tuple[int, ...]]  # and lists of key blocks
    margin: float
    moved: dict[str, Tensor] = field(default_factory=dict)  # how far the optimizer's weights came in all steps
    contradictions: list[str] = field(default_factory=list)  # what ranks should agree on and do not


def assemble(ranks: list[Seen]) -> Whole:
    """AssertionError if they tell of different steps or shapes, or together hold too little of a tensor."""
    scalars = ranks[0].scalars
    found: list[str] = []
    for rank in ranks:
        assert len(rank.scalars) == len(rank.gradients) == len(scalars), "ranks took different numbers of steps"
    if any(repr(rank.scalars) != repr(scalars) for rank in ranks):  # as text: nan is not itself
        found.append("ranks report different losses or norms")
    return Whole(
        scalars=scalars,
        gradients=[
            _tensors([part for rank in ranks for part in rank.gradients[step]], "gradient", found, own["grad_norm"])
            for step, own in enumerate(scalars)
        ],
        weights=_tensors([part for rank in ranks for part in rank.weights], "weight", found),
        routes=_routes(ranks, found),
        margin=min(rank.margin for rank in ranks),
        moved=_tensors([part for rank in ranks for part in rank.moved], "update", found),
        contradictions=found,
    )


def _routes(ranks: list[Seen], contradictions: list[str]) -> dict[tuple[int, ...], tuple[int, ...]]:
    """Ranks that route the same token, as tensor-parallel ones do, must agree."""
    routes: dict[tuple[int, ...], tuple[int, ...]] = {}
    for rank in ranks:
        for key, route in rank.routes.items():
            if routes.setdefault(key, route) != route:
                contradictions.append(f"ranks take different routes in {_place(key)}")
    return routes


def _place(key: tuple[int, ...]) -> str:
    """Of a route, or of a list of key blocks."""
    names = ("step", "layer", "token", "K/V head")
    return ", ".join(f"{name} {number}" for name, number in zip(names, key, strict=False))


def _tensors(parts: Parts, kind: str, contradictions: list[str], norm: float = 0.0) -> dict[str, Tensor]:
    """The whole tensors. Ranks that hold the same elements must agree on them, but for rounding below NOISE * norm."""
    whole: dict[str, Tensor] = {}
    held: dict[str, Tensor] = {}
    apart: dict[str, float] = {}
    for name, shape, offsets, part in parts:
        tensor = whole.setdefault(name, torch.zeros(shape))
        assert tuple(tensor.shape) == tuple(shape), f"ranks disagree on the shape of {name}"
        covered = held.setdefault(name, torch.zeros(shape, dtype=torch.bool))
        place = tuple(slice(o, o + n) for o, n in zip(offsets, part.shape, strict=True))
        again = (part - tensor[place])[covered[place]]
        if again.numel():
            apart[name] = worst_of([apart.get(name, 0.0), again.abs().max().item()])
        tensor[place], covered[place] = part, True
    missing = [name for name, covered in held.items() if not covered.all()]
    assert not missing, f"no rank holds all of {missing}"
    for name, difference in apart.items():
        largest = worst_of([whole[name].abs().max().item(), difference])
        if not (difference <= TOLERANCE * largest or largest < NOISE * norm):
            contradictions.append(f"ranks that hold the same {kind} of {name} differ by {difference / largest:.1e}")
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
    flipped: list[str] = field(default_factory=list)  # routes and lists of key blocks that differ, by _place
    margin: float = math.inf
    first: str = ""  # the first parameter that differs, in the order of steps and of the model
    diagnosis: str = ""
    contradictions: list[str] = field(default_factory=list)  # what its ranks should agree on and do not
    error: str = ""  # the layout did not run to the end: nothing was compared

    @property
    def worst(self) -> float:
        if self.error:
            return math.inf
        groups = self.groups.values()
        return worst_of([*self.scalars.values(), *(g.gradient for g in groups), *(g.weight for g in groups)])

    @property
    def passed(self) -> bool:
        return self.worst <= TOLERANCE and not self.flipped and not self.contradictions


@dataclass
class Rounded:
    """How far a run in bf16 or fp16 is from one process's in the same, by ROUNDED's names."""

    layout: str
    precision: str
    figures: dict[str, float] = field(default_factory=dict)
    """loss, auxiliary, norm: relative differences, the worst of the steps. own norm: that of the reported
    norm to the gradients of the same run. sizes: |factor - 1| of the first step's gradients and |ratio - 1| of every
    step's norms, the worst group's. updates: both of how far the weights came."""
    factors: dict[str, float] = field(default_factory=dict)  # by group, as Group.factor
    contradictions: list[str] = field(default_factory=list)
    error: str = ""

    @property
    def off(self) -> list[str]:
        """The names of those that are further off than rounding explains."""
        return [name for name, value in self.figures.items() if not value <= ROUNDED[name]]

    @property
    def passed(self) -> bool:
        return not (self.error or self.off or self.contradictions)


def worst_of(values: list[float]) -> float:
    """The largest; not-a-number is larger than any number."""
    return math.nan if any(math.isnan(value) for value in values) else max(values)


def worse(new: float, old: float) -> bool:
    return new > old or (math.isnan(new) and not math.isnan(old))


def misfit(ours: Whole, reference: Whole) -> str:
    """Why the two cannot be compared; '' if they can."""

    def shapes(tensors: dict[str, Tensor]) -> dict[str, torch.Size]:
        return {name: tensor.shape for name, tensor in tensors.items()}

    if len(ours.scalars) != len(reference.scalars):
        return f"it took {len(ours.scalars)} steps, one process {len(reference.scalars)}"
    if [step.keys() for step in ours.scalars] != [step.keys() for step in reference.scalars]:
        return "it reports other losses than one process"
    for kind, a, b in [
        ("weights", ours.weights, reference.weights),
        ("updates", ours.moved, reference.moved),
        *[("gradients", a, b) for a, b in zip(ours.gradients, reference.gradients, strict=True)],
    ]:
        other = sorted(str(name) for name, _ in shapes(a).items() ^ shapes(b).items())
        if other:
            return f"it has other {kind} than one process: {', '.join(other[:CAPACITY])}"
    return ""


def compare(
    layout: str, ranks: int, ours: Whole | str, reference: Whole, lr: float = 0.0, eps: float = 1.0
) -> Comparison:
    """A layout's run, or why it failed, against one process's. lr, eps: Adam's, which say how far a gradient that is
    rounding can move a weight."""
    error = ours if isinstance(ours, str) else misfit(ours, reference)
    if isinstance(ours, str) or error:
        return Comparison(layout, ranks, error=error)
    result = Comparison(layout, ranks, margin=min(ours.margin, reference.margin), contradictions=ours.contradictions)
    result.scalars = _compare_scalars(ours, reference)
    noise = NOISE * max(step["grad_norm"] for step in reference.scalars)
    reach = 2 * len(reference.scalars) * lr * min(1.0, noise / eps)
    for name, weight in reference.weights.items():
        group = result.groups.setdefault(group_of(name), Group())
        gradient = 0.0  # of a buffer
        if name in reference.gradients[0]:
            gradient = _compare_gradients(result, group, name, ours, reference)
        difference = _relative(ours.weights[name], weight)
        if gradient is None:
            apart = (ours.weights[name].double() - weight.double()).abs().max().item()
            if apart <= reach + TOLERANCE * weight.abs().max().item():  # its update is rounding too
                continue
            gradient = 0.0
        result.tensors[name] = (gradient, difference)
        if worse(difference, group.weight):
            group.weight, group.worst_weight = difference, name
    result.flipped = [
        _place(key)
        for key in sorted(reference.routes.keys() | ours.routes.keys())
        if ours.routes.get(key) != reference.routes.get(key)
    ]
    result.first = _first_to_differ(result, ours, reference)
    for kind, (factor, _) in _sizes(ours.gradients[0], reference.gradients[0]).items():
        result.groups[kind].factor = factor
    result.diagnosis = "" if result.passed else diagnose(result, ours, reference)
    return result


def compare_rounded(layout: str, precision: str, ours: Whole | str, reference: Whole) -> Rounded:
    """What rounding leaves: where each rounding differs, sizes still agree."""
    error = ours if isinstance(ours, str) else misfit(ours, reference)
    if isinstance(ours, str) or error:
        return Rounded(layout, precision, error=error)
    scalars, first = _compare_scalars(ours, reference), _sizes(ours.gradients[0], reference.gradients[0])
    steps = [_sizes(a, b) for a, b in zip(ours.gradients, reference.gradients, strict=True)]
    ratios = [ratio for sizes in steps for _, ratio in sizes.values()]
    updates = [size for sizes in _sizes(ours.moved, reference.moved).values() for size in sizes]
    figures = {
        "loss": scalars.pop("loss"),
        "norm": scalars.pop("grad_norm"),
        "auxiliary": worst_of([0.0, *scalars.values()]),
        "own norm": worst_of(
            [
                _relative(torch.tensor(own["grad_norm"]), torch.tensor(_norm(gradients)))
                for own, gradients in zip(ours.scalars, ours.gradients, strict=True)
            ]
        ),
        "sizes": worst_of([abs(size - 1) for size in [*ratios, *[factor for factor, _ in first.values()]]]),
        "updates": worst_of([abs(size - 1) for size in updates]),
    }
    return Rounded(layout, precision, figures, {kind: f for kind, (f, _) in first.items()}, ours.contradictions)


def _norm(gradients: dict[str, Tensor]) -> float:
    return math.sqrt(sum(gradient.double().square().sum().item() for gradient in gradients.values()))


def _compare_scalars(ours: Whole, reference: Whole) -> dict[str, float]:
    """The worst of the steps, for each."""
    worst = {}
    for key in reference.scalars[0]:
        pairs = torch.tensor(
            [(a[key], b[key]) for a, b in zip(ours.scalars, reference.scalars, strict=True)], dtype=torch.float64
        )
        worst[key] = worst_of([_relative(a, b) for a, b in pairs])
    return worst


def _compare_gradients(result: Comparison, group: Group, name: str, ours: Whole, reference: Whole) -> float | None:
    """The worst of the steps; None where it is only rounding in all of them."""
    worst, judged = 0.0, False
    for step, (a, b) in enumerate(zip(ours.gradients, reference.gradients, strict=True)):
        difference = _relative(a[name], b[name])
        if is_noise(a[name], b[name], reference.scalars[step]):
            result.noise[name] = max(difference, result.noise.get(name, 0.0))
            continue
        judged = True
        worst = worst_of([worst, difference])
        if step == 0:
            group.first_gradient = worst_of([group.first_gradient, difference])
    if worse(worst, group.gradient):
        group.gradient, group.worst_gradient = worst, name
    return worst if judged else None


def is_noise(a: Tensor, b: Tensor, scalars: dict[str, float]) -> bool:
    """Are a gradient and its reference both rounding, in a step of these ``scalars``?"""
    return all(gradient.abs().max().item() < NOISE * scalars["grad_norm"] for gradient in (a, b))


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
            if not difference <= TOLERANCE and not is_noise(a[name], b[name], reference.scalars[step]):
                return f"gradient of {name} in step {step + 1}: {difference:.1e}"
    for name, (_, difference) in result.tensors.items():
        if not difference <= TOLERANCE:
            return f"weight {name} after the last step: {difference:.1e}"
    return ""


def _sizes(ours: dict[str, Tensor], reference: dict[str, Tensor]) -> dict[str, tuple[float, float]]:
    """By how much each group's tensors are too large: the factor of least squares, <a, b> / <b, b>, and the ratio of
    norms, |a| / |b|, which sees what is not along b."""
    sums: dict[str, list[float]] = {}
    for name, b in reference.items():
        a, b = ours[name].double(), b.double()
        products = ((a * b).sum().item(), a.square().sum().item(), b.square().sum().item())
        sums[group_of(name)] = [x + y for x, y in zip(sums.get(group_of(name), [0.0] * 3), products, strict=True)]
    return {
        kind: (ab / bb, math.sqrt(aa / bb)) if bb else (1.0, 1.0) if aa == 0 else (math.inf, math.inf)
        for kind, (ab, aa, bb) in sums.items()
    }


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
        if any("K/V head" in place for place in result.flipped):
            return f"the loss of the first step differs, and so do lists of key blocks, {result.flipped[0]} first"
        return "the loss of the first step differs: the forward pass computes something else"
    if not off:
        if abs(a["grad_norm"] - b["grad_norm"]) > TOLERANCE * b["grad_norm"]:
            return _diagnose_norm(a["grad_norm"], reference)
        if result.contradictions:
            return result.contradictions[0]
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
