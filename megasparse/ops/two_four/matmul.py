"""Products with a 2:4 weight, through a door that is chosen once and named in the log.

masked           the dense product of the masked weight, everywhere
semi_structured  torch.sparse's kernels on CUDA: cuSPARSELt where torch has it, else CUTLASS (sm_8x only)
fp8_sparse       inference on Hopper: torchao's kernel, e4m3 with a scale a row

The hardware takes its sparse operand first and never two of them: y = (W x^T)^T, and dW = dy^T x runs sparse if dy is
2:4 along tokens. Tokens are padded here or in torch: any number of them will do. Masks are ours, so torch's tile kernel
(_sparse_semi_structured_tile), whose default algorithm ranks signed values, is not used. Nothing here was timed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.sparse import (
    SparseSemiStructuredTensor,
    SparseSemiStructuredTensorCUSPARSELT,
    SparseSemiStructuredTensorCUTLASS,
)

from megasparse import platform

Door = Literal["masked", "semi_structured", "fp8_sparse"]
Backend = Literal["cusparselt", "cutlass"]
Estimate = Callable[[Tensor], Tensor]  # of dy [tokens, out], of the same shape

KERNELS: dict[Backend, type[SparseSemiStructuredTensor]] = {
    "cusparselt": SparseSemiStructuredTensorCUSPARSELT,
    "cutlass": SparseSemiStructuredTensorCUTLASS,
}
# Of float32 the hardware keeps one of two: torch would drop values that a 2:4 mask keeps, and not say so.
DTYPES = (torch.float16, torch.bfloat16)
# Rows: torchao's check_inputs asks for 8, but metadata of [max(rows, 64), ...], which CUTLASS pads to multiples of 64.
FP8_MULTIPLES = (64, 32)
FP8_KERNELS = ("to_sparse_semi_structured_cutlass_sm9x_f8", "rowwise_scaled_linear_sparse_cutlass_f8f8")
TORCHAO = "pip install 'torchao>=0.18', beside a torch for CUDA 13"
MIN_EXPERT_TOKENS = 8192  # see expert_door

# The choice -----------------------------------------------------------------------------------------------------------


def choose(
    wanted: Door | Literal["auto"],
    shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    transposable: bool = False,
) -> tuple[Door, str | None]:
    """The door for a weight [..., rows, columns], and for the log why "auto" did not take semi_structured, else None.

    transposable: the transpose is 2:4 as well. "auto" is semi_structured where it runs, else masked. Raises ValueError
    where a door that is asked for by name does not run.
    """
    reason = missing("semi_structured" if wanted == "auto" else wanted, shape, dtype, device, transposable)
    if wanted == "auto":
        return "semi_structured" if reason is None else "masked", reason
    if reason is not None:
        raise ValueError(f"2:4 products through the door {wanted} are asked for, but {reason}")
    return wanted, None


def missing(
    door: Door, shape: Sequence[int], dtype: torch.dtype, device: torch.device, transposable: bool = False
) -> str | None:
    """What keeps a weight [..., rows, columns] from going through this door; None if nothing does."""
    match door:
        case "masked":
            return None
        case "semi_structured":
            cutlass = backend() == "cutlass"
            kernels = "torch's CUTLASS kernels (it has no cuSPARSELt)" if cutlass else "cuSPARSELt"
            lack = _device_lacks(device, kernels, *(("sm_8x", 8, 8) if cutlass else ("sm_80 or newer", 8, 99)))
            return lack or misfit(shape, dtype, backend(), transposable)
        case "fp8_sparse":
            kernels = "torchao's FP8 2:4 kernels"
            lack = _device_lacks(device, kernels, "sm_90", 9, 9) or _torchao_lacks()
            return lack or _not_multiples(shape, *FP8_MULTIPLES, kernels)
    raise ValueError(f"door={door!r}: use 'masked', 'semi_structured' or 'fp8_sparse'")


def backend() -> Backend:
    """Whose kernels semi_structured runs."""
    return "cusparselt" if torch.backends.cusparselt.is_available() else "cutlass"


def misfit(shape: Sequence[int], dtype: torch.dtype, backend: Backend, transposable: bool = False) -> str | None:
    """Why torch cannot compress a weight [..., rows, columns], and its transpose if transposable; None if it can.

    The multiples are torch's own: SparseSemiStructuredTensor._DTYPE_SHAPE_CONSTRAINTS.
    """
    if dtype not in DTYPES:
        return f"2:4 kernels take float16 and bfloat16, not {dtype}: use one of them or the masked door"
    rules = KERNELS[backend]._DTYPE_SHAPE_CONSTRAINTS[dtype]
    of_rows, of_columns = rules.sparse_min_rows, rules.sparse_min_cols
    if transposable:
        of_rows = of_columns = math.lcm(of_rows, of_columns)
    return _not_multiples(shape, of_rows, of_columns, backend)


def products(door: Door, transposable: bool = False, mvue: bool = False) -> str:
    """For the log: which of a layer's products run sparse through the door, and which could.

    transposable: the mask is; row masks and S-STE are not. mvue: dW is made of a dy that is 2:4 along tokens.
    """
    all_three = {"forward": True, "input-gradient": transposable, "weight-gradient": mvue}
    sparse, dense = (", ".join(name for name, is_24 in all_three.items() if is_24 == which) for which in (True, False))
    if door == "masked":
        return f"2:4 products (masked): all dense; could run sparse on CUDA: {sparse}"
    if door == "fp8_sparse":
        return "2:4 products (torchao, FP8): sparse: forward; inference only"
    return f"2:4 products ({backend()}): sparse: {sparse}" + (f"; dense: {dense}" if dense else "")


def expert_door(tokens: int, door: Door, min_tokens: int = MIN_EXPERT_TOKENS) -> Door:
    """The door for one expert with so many tokens: ``door`` from ``min_tokens`` on, below it the masked one.

    No grouped 2:4 product is public: each sparse expert is a call of its own, against one grouped dense product for
    all. The default was not measured: it is a careful guess, above what sparse products were reported to lose at (one
    token: pytorch #111339; 3072 on an H100: #153825). Measure yours.
    """
    return door if tokens >= min_tokens else "masked"


def _device_lacks(device: torch.device, kernels: str, gpu: str, first: int, last: int) -> str | None:
    if device.type != "cuda" or not platform.has_cuda():
        return f"the weight is on {device}: {kernels} need a CUDA GPU of {gpu}"
    major, minor = torch.cuda.get_device_capability(device)
    return None if first <= major <= last else f"{device} is sm_{major}{minor}: {kernels} need {gpu}"


def _torchao_lacks() -> str | None:
    try:
        import torchao  # type: ignore[import-not-found]  # loads the kernels
    except (ImportError, OSError) as error:
        return f"torchao cannot be imported ({error}); to install it: {TORCHAO}"
    for name in FP8_KERNELS:
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"torchao::{name}", "CUDA"):
            return f"torchao {torchao.__version__} did not load {name}; what it needs: {TORCHAO}"
    return None


def _not_multiples(shape: Sequence[int], of_rows: int, of_columns: int, kernels: str) -> str | None:
    *_, rows, columns = shape
    sizes = [(rows, "rows", of_rows), (columns, "columns", of_columns)]
    wrong = [f"{size} {what} are no multiple of {of}" for size, what, of in sizes if size == 0 or size % of]
    fix = "change the size or the number of ranks that share it, or use the masked door"
    return f"a weight [{rows}, {columns}] does not fit {kernels}: {' and '.join(wrong)}; {fix}" if wrong else None


# Training -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Operands:
    """A 2:4 weight as its products take it: made once an optimizer step, for all micro-batches."""

    weight: Tensor  # [out, in], compressed or dense
    transposed: Tensor  # [in, out], compressed if the mask is transposable, else dense


def prepare(w: Tensor, door: Door, transposable: bool = False) -> Operands:
    """The masked weight w [out, in] for ``linear_24``.

    Raises ValueError where w does not fit the door, and where it is not 2:4, as in a dense phase: torch would drop what
    is too much. To know that, it waits for the device.
    """
    reason = missing(door, w.shape, w.dtype, w.device, transposable)
    if door == "fp8_sparse" or reason is not None:
        raise ValueError(reason or "fp8_sparse has no gradients: train through masked or semi_structured")
    w = w.detach()
    return Operands(w, w.t()) if door == "masked" else _compress(w, KERNELS[backend()], transposable)


def _compress(w: Tensor, kernels: type[SparseSemiStructuredTensor], transposable: bool) -> Operands:
    _check_24(w)
    w = torch.where(w == 0, 0.0, w).contiguous()  # S-STE's -0.0 could pass for a value
    if not transposable:
        return Operands(kernels.from_dense(w), w.t())
    _check_24(w.t())
    return Operands(kernels.from_dense(w), kernels.from_dense(w.t().contiguous()))


def linear_24(
    x: Tensor, weight: Tensor, operands: Operands, dy_of_dw: Estimate | None = None, dw_is_24: bool = False
) -> Tensor:
    """y = x W^T; in backward dx = dy W and dW = dy^T x, where W is what ``operands`` were made of.

    x: [..., in] -> [..., out], of W's type. weight: [out, in], is not read but gets the gradient dW: with STE and S-STE
    the layer's parameter itself. dy_of_dw takes dy [tokens, out] to the one that dW is made of (pruned by MVUE, say).
    dw_is_24: that one is 2:4 along tokens, so where W is compressed, dW runs sparse too. Fours are rows in a row: hand
    over [batch, seq, in], not [seq, batch, in]. If it is not 2:4: RuntimeError, on CUDA a device-side assertion.
    """
    if dw_is_24 and dy_of_dw is None:
        raise ValueError("dw_is_24 needs dy_of_dw: dy itself is not 2:4")
    return _Linear.apply(x, weight, operands, dy_of_dw, dw_is_24)  # type: ignore[no-any-return]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, operands: Operands, dy_of_dw: Estimate | None, dw_is_24: bool):
        ctx.save_for_backward(x)
        ctx.operands, ctx.dy_of_dw, ctx.dw_is_24 = operands, dy_of_dw, dw_is_24
        y = _times_transposed(x.reshape(-1, x.shape[-1]), operands.weight)
        return y.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        (x,) = ctx.saved_tensors
        weight, transposed = ctx.operands.weight, ctx.operands.transposed
        rows, dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = _times_transposed(dy, transposed).view(x.shape)
        if ctx.needs_input_grad[1]:
            dy = dy if ctx.dy_of_dw is None else ctx.dy_of_dw(dy)
            sparse = ctx.dw_is_24 and isinstance(weight, SparseSemiStructuredTensor) and len(rows) > 0
            dw = _weight_gradient_24(dy, rows, type(weight)) if sparse else dy.t() @ rows
        return dx, dw, None, None, None


def _times_transposed(rows: Tensor, w: Tensor) -> Tensor:
    """rows [n, k] times w [m, k] transposed. The sparse kernels want a row at least, and cuSPARSELt's reads memory as
    contiguous whatever the strides are: the gradient of a sum, which is expanded, would be read beyond its end."""
    if not isinstance(w, SparseSemiStructuredTensor):
        return rows @ w.t()
    return rows.contiguous() @ w.t() if len(rows) else rows.new_empty(0, w.shape[0])


def _weight_gradient_24(dy: Tensor, rows: Tensor, kernels: type[SparseSemiStructuredTensor]) -> Tensor:
    """dy [tokens, out], 2:4 along tokens, compressed and transposed, times rows [tokens, in]."""
    short = -len(dy) % kernels._DTYPE_SHAPE_CONSTRAINTS[dy.dtype].sparse_min_cols
    dy, rows = (F.pad(tensor, (0, 0, 0, short)) for tensor in (dy, rows))
    torch._assert_async(_full_fours(dy.t()) == 0, "dw_is_24, but dy_of_dw's result is not 2:4 along tokens")
    return kernels.from_dense(dy.t().contiguous()) @ rows.contiguous()


def _full_fours(w: Tensor) -> Tensor:
    return (w.unflatten(1, (-1, 4)) != 0).sum(2, dtype=torch.int8).gt(2).sum()


def _check_24(w: Tensor) -> None:
    full = int(_full_fours(w))
    if full:
        raise ValueError(
            f"{full} groups of four in the rows of [{w.shape[0]}, {w.shape[1]}] have more than two values that are not "
            "zero: mask the weight first; while weights are dense, use the masked door"
        )


# Inference in FP8 -----------------------------------------------------------------------------------------------------


class Fp8Operand(NamedTuple):
    """A 2:4 weight [out, in] in torchao's layout: e4m3 times a scale a row."""

    data: Tensor  # e4m3 [out, in / 2]
    metadata: Tensor  # uint8
    scale: Tensor  # float32 [out]


def prepare_fp8(w: Tensor) -> Fp8Operand:
    """The masked weight w [out, in] for ``fp8_linear_24``. Raises ValueError where it does not fit or is not 2:4."""
    reason = missing("fp8_sparse", w.shape, w.dtype, w.device)
    if reason is not None:
        raise ValueError(reason)
    _check_24(w)
    dense, scale = fp8_rows(w.detach())
    data, metadata = torch.ops.torchao.to_sparse_semi_structured_cutlass_sm9x_f8(dense)
    return Fp8Operand(data, metadata, scale)


@torch.no_grad()
def fp8_linear_24(x: Tensor, weight: Fp8Operand) -> Tensor:
    """y = x W^T without gradients, x in e4m3 with a scale a token: float16 or bfloat16 [..., in] -> [..., out]."""
    if x.dtype not in DTYPES:
        raise ValueError(f"x is {x.dtype}: torchao's FP8 2:4 kernel returns float16 or bfloat16")
    data, scale = fp8_rows(x.reshape(-1, x.shape[-1]))
    y = x.new_empty(0, len(weight.data))
    if len(data):
        y = torch.ops.torchao.rowwise_scaled_linear_sparse_cutlass_f8f8(data, scale, *weight, out_dtype=x.dtype)
    return y.view(*x.shape[:-1], len(weight.data))


def fp8_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [rows, columns] as data * scale a row: e4m3 and float32 [rows]. No zero is -0.0, to which small values round:
    CUTLASS's compressor took it for a value before NVIDIA/cutlass #2110."""
    largest = torch.finfo(torch.float8_e4m3fn).max
    x = x.float()
    scale = x.abs().amax(1).clamp(min=1e-12) / largest
    bits = (x / scale[:, None]).clamp(-largest, largest).to(torch.float8_e4m3fn).view(torch.uint8)
    return bits.masked_fill(bits == 0x80, 0).view(torch.float8_e4m3fn), scale
