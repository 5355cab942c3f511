"""The Triton backend gives naive's bits, in Triton's interpreter; and what its kernels compile to for sm_90."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch

from megasparse.ops import two_four
from tests.ops.two_four.cases import BF16, F16, F32, check, run, values

FLOAT8 = [torch.float8_e4m3fn, torch.float8_e5m2]
REPORT = Path(__file__).parents[3] / "tools/bench/kernel_report.md"
MATRICES = [(4, 4), (3, 12, 20), (8, 1040), (0, 4, 8)]


@pytest.mark.parametrize("method", ["exact", "greedy"])
@pytest.mark.parametrize("kind", ["gaussian", "tied", "special"])
@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
def test_transposable_masks(interpreter: ProcessPoolExecutor, dtype: torch.dtype, kind: str, method: str) -> None:
    """Sums of the largest and the smallest numbers tie, or are infinite, in float32 and not in naive's float64."""
    reference = "cpu" if kind == "special" and method == "exact" else "naive"
    for shape in MATRICES:
        check(interpreter, "transposable_mask", values(kind, shape, dtype), method=method, reference=reference)


def test_sums_are_rounded_as_on_the_cpu(interpreter: ProcessPoolExecutor) -> None:
    """Of 1 and 2^-24, which naive adds up exactly: a different order of additions would keep others."""
    which = torch.randint(0, 2, (64, 256), generator=torch.Generator().manual_seed(0))
    w = torch.where(which == 0, 1.0, 2.0**-24)
    masks = (run("transposable_mask", w, backend=backend) for backend in ("cpu", "naive"))
    assert not torch.equal(*masks)
    check(interpreter, "transposable_mask", w, reference="cpu")


@pytest.mark.parametrize("dtype", [F32, F16, BF16, *FLOAT8], ids=str)
def test_packing(interpreter: ProcessPoolExecutor, dtype: torch.dtype) -> None:
    for shape in [(4,), (3, 20), (2, 3, 8), (2, 2056), (0, 8)]:
        for kind in ("gaussian", "tied"):
            w = two_four.prune_24(values(kind, shape, F32))[0].to(dtype)
            check(interpreter, "pack_24", w)
            packed = two_four.pack_24(w, "naive")
            check(interpreter, "unpack_24", *packed)


def test_packing_keeps_every_bit(interpreter: ProcessPoolExecutor) -> None:
    """Of all values of 8 bits: -0 is dropped as 0 is, NaN is kept."""
    bytes_ = torch.zeros(256, 4, dtype=torch.uint8)
    bytes_[torch.arange(256), torch.arange(3, 259) % 4] = torch.arange(256).byte()  # -0 in the last place
    for dtype in FLOAT8:
        w = bytes_.view(dtype)
        check(interpreter, "pack_24", w)
        again = interpreter.submit(run, "unpack_24", *two_four.pack_24(w), backend="triton").result()
        assert torch.equal(again.float().nan_to_num(7), w.float().nan_to_num(7))


def test_refuses_float64(interpreter: ProcessPoolExecutor) -> None:
    w = torch.zeros(4, 4, dtype=torch.float64)
    calls: list[tuple[str, dict[str, int]]] = [
        ("prune_24", {}),
        ("transposable_mask", {}),
        ("soft_threshold_24", {}),
        ("mvue_24", {"seed": 0}),
        ("pack_24", {}),
    ]
    for function, settings in calls:
        with pytest.raises(ValueError, match=r"torch\.float64 .* use backend='naive'"):
            interpreter.submit(run, function, w, backend="triton", **settings).result()


def test_refuses_the_cpu_outside_of_the_interpreter(compiler: ProcessPoolExecutor) -> None:
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        compiler.submit(run, "prune_24", torch.zeros(4, 4), backend="triton").result()


def compiled(variant: str) -> tuple[int, int, int, set[int]]:
    """Bytes or instructions of spills, bytes of shared memory, instructions that round otherwise than naive, and the
    bits of what is loaded and stored."""
    from tools.bench import kernel_report

    result = kernel_report.compile_two_four(kernel_report.TwoFourVariant(*variant.split("/")))
    spills = result.stack + result.spill_stores + result.spill_loads
    return spills, result.shared, result.inexact, {*result.loads, *result.stores}


@pytest.mark.parametrize(
    "variant",
    [
        *(f"{kernel}/bf16/last/x16" for kernel in ("prune", "soft_threshold", "mvue-exact", "mvue-approx")),
        *(f"{kernel}/bf16/inner/x16" for kernel in ("prune", "soft_threshold", "mvue-exact", "mvue-approx")),
        *(f"{kernel}/bf16/last/x16" for kernel in ("transposable-exact", "transposable-greedy", "pack", "unpack")),
        "transposable-exact/fp32/last/x16",
        "pack/fp8/last/x16",
        "unpack/fp8/last/x16",
    ],
)
def test_compiles_to_wide_loads_without_spills(compiler: ProcessPoolExecutor, variant: str) -> None:
    spills, shared, inexact, widths = compiler.submit(compiled, variant).result()
    assert (spills, shared, inexact) == (0, 0, 0)
    assert 128 in widths


@pytest.mark.parametrize("variant", ["mvue-approx/fp16/inner/any", "pack/fp32/last/any"])
def test_compiles_without_alignment(compiler: ProcessPoolExecutor, variant: str) -> None:
    spills, _, inexact, _ = compiler.submit(compiled, variant).result()
    assert (spills, inexact) == (0, 0)


def every_variant() -> list[str]:
    from tools.bench import kernel_report

    return [str(variant) for variant in kernel_report.two_four_variants()]


def test_the_table_has_every_variant_and_no_spill(compiler: ProcessPoolExecutor) -> None:
    """It is what the report last wrote, not what the kernels are now: the test above compiles them."""
    variants = compiler.submit(every_variant).result()
    kernels = tuple(f"| {variant.split('/')[0]} |" for variant in variants)
    rows = [line for line in REPORT.read_text().splitlines() if line.startswith(kernels)]
    assert len(rows) == len(variants)
    assert all("| 0 (0 / 0) |" in row for row in rows)
