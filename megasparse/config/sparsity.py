"""``sparsity``: what of the weights is sparse, and when."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from megasparse.config.section import Fraction, NonNegative, Section


class WeightSparsity(Section):
    """2:4 weights: of every four in a row, two at most take part in the forward pass (sparsity/)."""

    method: Literal["dense", "ste", "sr_ste", "s_ste", "asp", "ast", "mdgf", "sdgf"]
    """dense: masks are made and what flips is counted, as the others are compared with it (2by4), but they are not
    applied. ste: the mask follows the weights, and every weight gets the gradient of its place in the product.
    sr_ste: the same, and what is masked decays (Zhou et al. 2021; before Adam: 2by4). ast: the same, and the decay is
    no part of Adam's momentum (AST). s_ste: soft thresholding, continuous in the weights (S-STE). asp: dense up to
    dense_start, then one mask to the end (Mishra et al. 2021). mdgf: what is masked fades out over ``ramp``, in the
    product and in the gradient; sdgf: more and more of each m is masked, down to n (Bambhaniya et al. 2024)."""
    targets: list[str] = Field(default=[r"\.mlp\.(linear|experts|shared_experts)"])
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
