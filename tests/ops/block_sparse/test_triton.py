"""The Triton backend against naive, in Triton's interpreter; and what all its kernels compile to for sm_90."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megasparse.ops.block_sparse import BlockMask, block_sparse_attention

# max|ours - naive in float64| / max|naive|; naive gets the same rounded inputs. float32: seen up to 1.2e-6. bfloat16
# rounds weights, their gradients and results by up to 2^-9 = 2e-3: seen up to 1.3e-2. float16 has 3 bits more: 6.2e-4.
# dbias adds up the gradients of a tile's logits. They cancel to a few per cent of their size, their rounding errors do
# not: seen up to 2.7e-6, 9.2e-2 and 1.9e-3.
TOLERANCE = {torch.float32: 4e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
CANCELS = 8
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
REPORT = Path(__file__).parents[3] / "tools/bench/kernel_report.md"


@dataclass(frozen=True)
class Case:
    dtype: torch.dtype
    group: int
    head_dim: int
    queries: int
    keys: int
    query_block: int
    key_block: int
    kv_heads: int = 2
    batch: int = 1
    causal: bool = True
    documents: bool = True
    bias: bool = True
    density: float = 0.5
    first: bool = False  # all queries list the first block


def inputs(case: Case) -> tuple[list[Tensor], BlockMask, Tensor | None]:
    """q, k, v, not contiguous, and, if there is one, the bias; the lists, in random order, one of them empty; document
    ids."""
    generator = torch.Generator().manual_seed(1234)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(case.dtype).transpose(0, 1)

    blocks = (case.batch, case.kv_heads, -(-case.queries // case.query_block), -(-case.keys // case.key_block))
    keep = torch.rand(blocks, generator=generator) < case.density
    keep[..., 0] |= case.first
    keep[:, 0, blocks[2] // 2] = False
    order = torch.rand(blocks, generator=generator).argsort(-1)
    mask = BlockMask.from_index(order, keep.gather(-1, order), blocks[3], case.key_block, case.query_block)
    tensors = [normal(case.queries, case.batch, case.kv_heads * case.group, case.head_dim)]
    tensors += [normal(case.keys, case.batch, case.kv_heads, case.head_dim) for _ in range(2)]
    if case.bias:
        tensors.append(torch.randn(blocks, generator=generator))
    lengths = torch.rand(case.batch, case.keys, generator=generator) < 2 / case.keys  # three documents, about
    return tensors, mask, lengths.cumsum(-1) if case.documents else None


def run(case: Case, backend: str, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Outputs and gradients, all inputs in dtype (None: their own)."""
    tensors, mask, documents = inputs(case)
    tensors = [t.to(dtype or t.dtype).requires_grad_() for t in tensors]
    bias = tensors[3] if case.bias else None
    output, lse = block_sparse_attention(
        tensors[0],
        tensors[1],
        tensors[2],
        mask,
        causal=case.causal,
        document_ids=documents,
        block_bias=bias,
        backend=backend,  # type: ignore[arg-type]
        return_lse=True,
    )
    generator = torch.Generator().manual_seed(5)
    doutput, dlse = (torch.randn(t.mT.shape, generator=generator).to(case.dtype).mT for t in (output, lse))
    dlse = dlse.to(lse.dtype).masked_fill(lse == -torch.inf, torch.nan)  # what comes from an empty row counts nowhere
    gradients = torch.autograd.grad([output, lse], tensors, [doutput.to(output.dtype), dlse])
    names = ("dq", "dk", "dv", "dbias")[: len(gradients)]
    return {"output": output.detach(), "lse": lse.detach(), **dict(zip(names, gradients, strict=True))}


def errors(case: Case) -> dict[str, float]:
    """Of each result, against naive in float64."""
    expected, found = run(case, "naive", torch.float64), run(case, "triton")
    assert found["lse"].dtype == torch.float32
    empty = expected["lse"] == -torch.inf
    assert empty.any()
    assert torch.equal(found["lse"] == -torch.inf, empty)
    assert (found["output"][empty] == 0).all()
    assert (found["dq"][empty] == 0).all()
    worst = {}
    for name, a in found.items():
        a, b = (t.double().nan_to_num(neginf=0.0) if name == "lse" else t.double() for t in (a, expected[name]))
        assert a.isfinite().all(), name
        worst[name] = ((a - b).abs().max() / b.abs().max()).item()
    return worst


def errors_in_parts(case: Case) -> dict[str, float]:
    """With inverse lists cut as long ones are."""
    from megasparse.ops.block_sparse import triton

    rows, triton.PART_ROWS = triton.PART_ROWS, 64
    try:
        return errors(case)
    finally:
        triton.PART_ROWS = rows


def check(interpreter: ProcessPoolExecutor, case: Case, errors: Callable[[Case], dict[str, float]] = errors) -> None:
    found = interpreter.submit(errors, case).result()
    tolerance = TOLERANCE[case.dtype]
    assert all(error <= tolerance * (CANCELS if name == "dbias" else 1) for name, error in found.items()), found


@pytest.mark.parametrize(
    ("length", "head_dim", "block", "batch", "kv_heads"),
    [(63, 64, 16, 1, 2), (111, 128, 32, 2, 1), (200, 64, 64, 1, 1), (200, 128, 128, 1, 1)],
)
@pytest.mark.parametrize(("dtype", "group"), [*itertools.product((F32, BF16), (1, 4, 8)), (F16, 4)], ids=str)
def test_blocks_of_queries(
    interpreter: ProcessPoolExecutor,
    dtype: torch.dtype,
    group: int,
    length: int,
    head_dim: int,
    block: int,
    batch: int,
    kv_heads: int,
) -> None:
    check(interpreter, Case(dtype, group, head_dim, length, length, block, block, kv_heads, batch))


@pytest.mark.parametrize(
    ("dtype", "group", "length", "head_dim", "block", "kv_heads"),
    [
        (F32, 1, 63, 64, 16, 1),
        (F32, 4, 40, 64, 32, 2),
        (F32, 8, 63, 64, 64, 1),
        (F16, 4, 63, 64, 32, 1),
        (BF16, 1, 63, 64, 64, 1),
        (BF16, 4, 111, 128, 32, 1),
        (BF16, 8, 40, 64, 16, 2),
    ],
    ids=str,
)
def test_a_list_for_each_query(
    interpreter: ProcessPoolExecutor,
    dtype: torch.dtype,
    group: int,
    length: int,
    head_dim: int,
    block: int,
    kv_heads: int,
) -> None:
    check(interpreter, Case(dtype, group, head_dim, length, length, 1, block, kv_heads))


def test_a_list_for_each_of_200_queries(interpreter: ProcessPoolExecutor) -> None:
    check(interpreter, Case(BF16, 8, 128, 200, 200, 1, 64, kv_heads=1))


@pytest.mark.parametrize(
    "case",
    [
        Case(F32, 4, 64, 111, 111, 1, 16, kv_heads=1, density=0.1, first=True),
        Case(F32, 4, 64, 200, 200, 16, 32, batch=2, density=0.1, first=True),
        Case(BF16, 3, 80, 200, 200, 24, 24, density=0.1, first=True),
    ],
    ids=str,
)
def test_long_lists_are_cut(interpreter: ProcessPoolExecutor, case: Case) -> None:
    check(interpreter, case, errors_in_parts)


@pytest.mark.parametrize(
    "case",
    [
        Case(BF16, 4, 64, 50, 111, 16, 32),
        Case(BF16, 4, 64, 40, 200, 1, 64),
        Case(F32, 1, 64, 1, 63, 1, 16, density=0.8),
        Case(F32, 8, 128, 1, 111, 64, 64, density=0.8),
    ],
    ids=str,
)
def test_fewer_queries_than_keys(interpreter: ProcessPoolExecutor, case: Case) -> None:
    check(interpreter, case)


@pytest.mark.parametrize(
    "case",
    [
        Case(F32, 3, 80, 63, 63, 24, 40),
        Case(F32, 2, 16, 63, 63, 2, 8),
        Case(F32, 1, 24, 31, 31, 5, 1),
        Case(F32, 6, 96, 111, 111, 100, 100, kv_heads=1),
        Case(F32, 16, 32, 63, 63, 16, 7),
        Case(F32, 24, 32, 20, 63, 1, 48),
        Case(BF16, 2, 64, 300, 300, 64, 256, kv_heads=1),
    ],
    ids=str,
)
def test_odd_sizes(interpreter: ProcessPoolExecutor, case: Case) -> None:
    check(interpreter, case)


@pytest.mark.parametrize("query_block", [1, 32])
@pytest.mark.parametrize(("documents", "bias"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("causal", [True, False])
def test_each_input_is_optional(
    interpreter: ProcessPoolExecutor, causal: bool, documents: bool, bias: bool, query_block: int
) -> None:
    check(interpreter, Case(F32, 4, 64, 40, 40, query_block, 16, causal=causal, documents=documents, bias=bias))


@pytest.mark.parametrize("query_block", [1, 16])
def test_all_lists_are_empty(interpreter: ProcessPoolExecutor, query_block: int) -> None:
    found = interpreter.submit(run, Case(BF16, 4, 64, 40, 40, query_block, 16, density=0.0), "triton").result()
    assert (found.pop("lse") == -torch.inf).all()
    for name, tensor in found.items():
        assert (tensor == 0).all(), name


def test_repeats_to_the_bit(interpreter: ProcessPoolExecutor) -> None:
    first, second = (interpreter.submit(run, Case(BF16, 4, 64, 63, 63, 16, 16), "triton").result() for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_refuses_float64_and_large_heads(interpreter: ProcessPoolExecutor) -> None:
    with pytest.raises(ValueError, match="float64"):
        interpreter.submit(run, Case(F32, 1, 64, 16, 16, 16, 16), "triton", torch.float64).result()
    with pytest.raises(ValueError, match="head_dim 192"):
        interpreter.submit(run, Case(F32, 1, 192, 16, 16, 16, 16), "triton").result()


def test_refuses_the_cpu_outside_of_the_interpreter(compiler: ProcessPoolExecutor) -> None:
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        compiler.submit(run, Case(F32, 1, 64, 16, 16, 16, 16), "triton").result()


def compiled(variant: str) -> tuple[int, int, int, int]:
    """Bytes or instructions of spills, bytes of shared memory, wgmma and mma.sync instructions."""
    from tools.bench import kernel_report

    result = kernel_report.compile_variant(kernel_report.Variant.parse(variant))
    assert result.shared <= kernel_report.SHARED_LIMIT
    return result.stack + result.spill_stores + result.spill_loads, result.shared, result.wgmma, result.mma


@pytest.mark.parametrize(("head_dim", "group"), [(64, 8), (128, 4)])
@pytest.mark.parametrize("blocks", ["q64/k64", "q128/k128", "q1/k64"])
@pytest.mark.parametrize("kernel", ["forward", "backward_q", "backward_kv", "mass"])
def test_compiles_to_tensor_cores_without_spills(
    compiler: ProcessPoolExecutor, kernel: str, blocks: str, head_dim: int, group: int
) -> None:
    variant = f"{kernel}/bf16/d{head_dim}/{blocks}/g{group}/full"
    spills, _, wgmma, mma = compiler.submit(compiled, variant).result()
    assert spills == 0
    assert wgmma > 0 or (blocks == "q1/k64" and mma > 0)


@pytest.mark.parametrize("blocks", ["q64/k64", "q1/k64"])
@pytest.mark.parametrize("kernel", ["forward", "backward_q", "backward_kv", "mass"])
def test_compiles_with_one_head_and_one_block(compiler: ProcessPoolExecutor, kernel: str, blocks: str) -> None:
    """Triton compiles numbers that are 1 as constants."""
    compiler.submit(compiled, f"{kernel}/bf16/d64/{blocks}/g4/ones").result()


def every_variant() -> int:
    from tools.bench import kernel_report

    return len(kernel_report.variants())


def test_the_table_has_every_variant_and_no_spill(compiler: ProcessPoolExecutor) -> None:
    """It is what the report last wrote, not what the kernels are now: the test above compiles them."""
    rows = [line for line in REPORT.read_text().splitlines() if line.startswith(("| forward", "| backward", "| mass"))]
    assert len(rows) == compiler.submit(every_variant).result()
    assert all("| 0 (0 / 0) |" in row for row in rows)
