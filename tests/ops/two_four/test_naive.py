"""The definitions, against what the papers say of them, written down once more here."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from megasparse.ops.two_four import mvue_24, naive, prune_24, soft_threshold_24, sste_scale, transposable_mask

DRAWS = 200_000


def every_pattern() -> list[Tensor]:
    """All 0/1 blocks of 4x4 with two in each row and each column, in another way than naive's."""
    rows = [torch.tensor(row) for row in itertools.product((0, 1), repeat=4) if sum(row) == 2]
    blocks = (torch.stack(block) for block in itertools.product(rows, repeat=4))
    return [block for block in blocks if (block.sum(0) == 2).all()]


def weights(kind: str) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    w = torch.randn(16, 24, generator=generator, dtype=torch.float64)
    match kind:
        case "tied":
            return w.round()
        case "zero":
            return w * (torch.rand(w.shape, generator=generator) < 0.3)
        case "negative":
            return -w.abs()
        case "all zero":
            return torch.zeros_like(w)
    return w


def test_there_are_ninety_patterns() -> None:
    ours = {tuple(pattern.flatten().tolist()) for pattern in naive.transposable_patterns()}
    assert ours == {tuple(block.bool().flatten().tolist()) for block in every_pattern()}
    assert len(ours) == len(naive.transposable_patterns()) == 90


@pytest.mark.parametrize("kind", ["random", "tied", "zero", "negative", "all zero"])
def test_the_exact_mask_is_the_best_of_all_patterns(kind: str) -> None:
    w = weights(kind)
    patterns = every_pattern()
    mask = transposable_mask(w, backend="naive")
    for i, j in itertools.product(range(0, 16, 4), range(0, 24, 4)):
        block, kept = w[i : i + 4, j : j + 4].abs(), mask[i : i + 4, j : j + 4]
        best = max((block * pattern).sum().item() for pattern in patterns)
        assert (block * kept).sum().item() == pytest.approx(best, rel=1e-15)
        assert (kept.sum(0) == 2).all()
        assert (kept.sum(1) == 2).all()


@pytest.mark.parametrize("kind", ["random", "tied", "zero", "negative"])
def test_the_greedy_mask_takes_the_largest_that_has_room(kind: str) -> None:
    w = weights(kind)
    mask = transposable_mask(w, "greedy", backend="naive")
    exact = transposable_mask(w, backend="naive")
    for i, j in itertools.product(range(0, 16, 4), range(0, 24, 4)):
        block = w[i : i + 4, j : j + 4].abs()
        chosen = torch.zeros(4, 4)
        for place in sorted(range(16), key=lambda p: (-block.flatten()[p].item(), p)):
            row, column = divmod(place, 4)
            if chosen[row].sum() < 2 and chosen[:, column].sum() < 2:
                chosen[row, column] = 1
        assert torch.equal(mask[i : i + 4, j : j + 4], chosen.bool())
        # No block is worse than half of the best; seven that leave no room can be better than each eight.
        assert (block * exact[i : i + 4, j : j + 4]).sum() / 2 <= (block * chosen).sum()


def test_the_mass_that_masks_keep_of_gaussian_weights() -> None:
    """Row-wise 74.4 %, exact 70.2 %, greedy 69.2 %, and 84 % of greedy blocks keep eight."""
    w = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))
    greedy = transposable_mask(w, "greedy", backend="naive")
    masks = {0.7445: prune_24(w, backend="naive")[1], 0.7025: transposable_mask(w, backend="naive"), 0.692: greedy}
    for share, mask in masks.items():
        assert ((w.abs() * mask).sum() / w.abs().sum()).item() == pytest.approx(share, abs=1e-3)
    eights = greedy.view(256, 4, 256, 4).sum((1, 3)) == 8
    assert eights.float().mean().item() == pytest.approx(0.84, abs=5e-3)


def test_pruning_keeps_the_two_largest_and_the_first_of_equals() -> None:
    w = torch.tensor([[3.0, -4.0, 1.0, 2.0, 1.0, -1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0, 0.0, 5.0, -0.5, 0.0]])
    values, mask = prune_24(w, backend="naive")
    assert mask.long().tolist() == [[1, 1, 0, 0, 1, 1, 0, 0], [1, 1, 0, 0, 0, 1, 1, 0]]
    assert torch.equal(values, w * mask)
    assert torch.equal(prune_24(w.t(), dim=0, backend="naive")[0], values.t())
    score = torch.arange(16.0).view(2, 8)
    assert prune_24(w, score=score, backend="naive")[1].long().tolist() == [[0, 0, 1, 1] * 2] * 2


# S-STE ----------------------------------------------------------------------------------------------------------------


def test_the_soft_threshold_by_hand() -> None:
    w = torch.tensor([[4.0, -3.0, 1.0, 2.0], [0.5, 0.5, -0.5, 0.5], [0.0, 0.0, -1.0, 0.0]])
    expected = torch.tensor([[2.0, -1.0, 0.0, 0.0], [0.0] * 4, [0.0, 0.0, -1.0, 0.0]])
    assert torch.equal(soft_threshold_24(w, backend="naive"), expected)


def test_the_soft_threshold_is_continuous_and_the_mask_is_not() -> None:
    """Where the second and the third largest tie, a step as small as you like moves pruned weights by their size; soft
    ones move by no more than twice the step."""
    step = 1e-9
    tied = torch.randn(1000, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    order = tied.abs().argsort(1, descending=True)
    tied.scatter_(1, order[:, 2:3], tied.gather(1, order[:, 1:2]))
    up = tied.scatter_add(1, order[:, 2:3], step * tied.gather(1, order[:, 2:3]).sign())
    down = tied.scatter_add(1, order[:, 2:3], -step * tied.gather(1, order[:, 2:3]).sign())
    soft = soft_threshold_24(up, backend="naive") - soft_threshold_24(down, backend="naive")
    hard = prune_24(up, backend="naive")[0] - prune_24(down, backend="naive")[0]
    assert soft.abs().max().item() <= 4 * step
    assert hard.abs().amax(1).min().item() > 1e-4
    assert (soft_threshold_24(up, backend="naive") != 0).sum(1).max() <= 2


def test_the_scale_is_the_best_one_and_148_for_gaussian_weights() -> None:
    w = torch.randn(1000, 400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    soft, scale = soft_threshold_24(w, backend="naive"), sste_scale(w, backend="naive").item()
    assert scale == pytest.approx(1.484, abs=2e-3)
    error = [((w - factor * soft) ** 2).sum().item() for factor in (scale, scale - 1e-3, scale + 1e-3)]
    assert error[0] < min(error[1:])
    assert error[0] / (w**2).sum().item() == pytest.approx(0.258, abs=1e-3)
    assert sste_scale(torch.ones(4, 4), backend="naive").item() == 1.0


# MVUE -----------------------------------------------------------------------------------------------------------------

# One that is larger than the others together (2 kinds), near and far from it, zeros, equals.
GROUPS = [
    [1.0, 2.0, 3.0, 4.0],
    [-0.1, 0.2, -0.3, 5.0],
    [0.5, 0.4, 0.45, -1.3],
    [1.0, 1.1, -1.2, 1.3],
    [0.0, 0.0, 2.0, -1.0],
    [0.0, 0.0, 0.0, -3.0],
    [1.0, 1.0, 1.0, 1.0],
    [0.1, 1.0, 1.0, 1.05],
]


def pair_probabilities(group: list[float]) -> dict[tuple[int, int], float]:
    """Of each pair of places, by the paper's formulas over the sorted magnitudes."""
    order = sorted(range(4), key=lambda i: abs(group[i]))
    a1, a2, a3, a4 = (abs(group[i]) for i in order)
    total = a1 + a2 + a3 + a4
    if a4 > a1 + a2 + a3:
        rest = a1 + a2 + a3
        found = {(i, 3): a / rest if rest else 1 / 3 for i, a in enumerate((a1, a2, a3))}
    else:
        found = {(2, 3): (a3 + a4 - a1 - a2) / total}
        if 2 * a1 + a3 > a4:
            found[0, 2], found[0, 3] = (2 * a1 + a3 - a4) / (2 * total), (2 * a1 - a3 + a4) / (2 * total)
            found[1, 2], found[1, 3] = (2 * a2 + a3 - a4) / (2 * total), (2 * a2 - a3 + a4) / (2 * total)
        else:
            found[0, 3] = 2 * a1 / total
            found[1, 2], found[1, 3] = (a1 + a2 + a3 - a4) / total, (a2 - a1 - a3 + a4) / total
    return {(order[i], order[j]): p for (i, j), p in found.items()}


def variance(group: list[float], inclusion: list[float]) -> float:
    return sum(a * a * (1 / p - 1) for a, p in zip(group, inclusion, strict=True) if a)


def exact_inclusion(group: list[float]) -> list[float]:
    probabilities = pair_probabilities(group)
    return [sum(p for pair, p in probabilities.items() if i in pair) for i in range(4)]


def approx_inclusion(group: list[float]) -> list[float]:
    a = [abs(x) for x in group]
    total = sum(a)
    first = [x / total for x in a]
    second = [sum(first[j] * a[i] / (total - a[j]) for j in range(4) if j != i and total > a[j]) for i in range(4)]
    return [p + q for p, q in zip(first, second, strict=True)]


@pytest.mark.parametrize("method", ["exact", "approx"])
@pytest.mark.parametrize("group", GROUPS, ids=str)
def test_the_estimate_is_unbiased_and_keeps_each_with_its_probability(group: list[float], method: str) -> None:
    """The mean of the draws is the group, and each share of draws its probability, to five standard errors."""
    g = torch.tensor(group).expand(DRAWS, 4)
    estimates = mvue_24(g, method=method, seed=7, backend="naive")  # type: ignore[arg-type]
    kept = (estimates != 0).double()
    assert kept.sum(1).max() <= 2
    inclusion = exact_inclusion(group) if method == "exact" else approx_inclusion(group)
    for i, (x, p) in enumerate(zip(group, inclusion, strict=True)):
        p = p if x else 0.0
        deviation = 5 * (p * (1 - p) / DRAWS) ** 0.5
        assert kept[:, i].mean().item() == pytest.approx(p, abs=deviation + 1e-6)
        scale = abs(x) / p if p else 0.0
        assert estimates[:, i].double().mean().item() == pytest.approx(x, abs=scale * deviation + 1e-6)
    if method == "exact":
        counts = {}
        for pair, p in pair_probabilities(group).items():
            if all(group[i] for i in pair):
                counts[pair] = (kept[:, pair[0]] * kept[:, pair[1]]).mean().item() - p
        assert all(abs(difference) < 5 * (0.25 / DRAWS) ** 0.5 for difference in counts.values())


def test_the_approximate_estimate_has_seven_percent_more_variance_at_most() -> None:
    """Over Gaussian groups; where a4 > a1 + a2 + a3 (32 % of them) the exact one keeps a4 as it is."""
    groups = torch.randn(20_000, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).tolist()
    exact = sum(variance(group, exact_inclusion(group)) for group in groups)
    approx = sum(variance(group, approx_inclusion(group)) for group in groups)
    assert 1.0 < approx / exact < 1.07
    g = torch.tensor(groups)
    for method, expected in (("exact", exact), ("approx", approx)):
        draws = [((mvue_24(g, method=method, seed=s) - g) ** 2).sum().item() for s in range(20)]  # type: ignore[arg-type]
        assert sum(draws) / 20 == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("method", ["exact", "approx"])
def test_a_seed_is_a_draw(method: str) -> None:
    g = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    one, same, other = (mvue_24(g, method=method, seed=seed) for seed in (3, 3, 2**40 + 3))  # type: ignore[arg-type]
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_a_sum_that_is_not_finite_is_seen() -> None:
    g = torch.tensor([[1.0, torch.inf, 2.0, 3.0], [torch.nan, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    for method in ("exact", "approx"):
        estimate = mvue_24(g, method=method, seed=0, backend="naive")  # type: ignore[arg-type]
        assert estimate.isnan().sum(1).tolist() == [2, 2, 0]


def test_random_words_are_those_of_random123() -> None:
    """Its known answers: philox4x32-10 of zeros, and of ones everywhere but in the two counters we do not use."""
    zero = torch.zeros(1, dtype=torch.long)
    words = [int(word) for word in naive.philox(0, zero, zero)]
    assert words == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    generator = torch.Generator().manual_seed(0)
    counters = torch.randint(0, 2**32, (2, 50), generator=generator)
    for i in range(50):
        state, key = [int(counters[0, i]), int(counters[1, i]), 0, 0], [0x89ABCDEF, 0x01234567]
        for _ in range(10):
            left, right = 0xD2511F53 * state[0], 0xCD9E8D57 * state[2]
            state = [right >> 32 ^ state[1] ^ key[0], right % 2**32, left >> 32 ^ state[3] ^ key[1], left % 2**32]
            key = [(key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32]
        ours = naive.philox(0x0123456789ABCDEF, counters[0, i : i + 1], counters[1, i : i + 1])
        assert [int(word) for word in ours] == state
