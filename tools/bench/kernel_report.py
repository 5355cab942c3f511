"""What the Triton kernels become on sm_90: registers, spills, shared memory, tensor cores, loads and stores.

    python tools/bench/kernel_report.py                                  # all, to tools/bench/kernel_report.md
    python tools/bench/kernel_report.py forward/bf16/d64/q1/k64/g4/full  # one, to standard output
    python tools/bench/kernel_report.py mvue-exact/bf16/last/x16

Needs no GPU: each variant is compiled ahead of time, with the launcher's constants and options and the alignment that
it would find in its arguments, and the cubin is read with cuobjdump. Nothing here is a speed.

A variant of block-sparse attention is kernel/dtype/head_dim/query block/key block/group/inputs, where inputs is "plain"
(causal only), "full" (causal, documents and bias) or "ones" (full, and all sizes are 1, which Triton makes constants).
One of 2:4 sparsity is kernel/dtype/dimension/sizes: groups lie along the "last" or an "inner" dimension, and rows have
"x16" groups, a multiple of 16, as those of most models, or "any" number of them.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megasparse.ops.block_sparse import triton as kernels
from megasparse.ops.block_sparse import triton_mass
from megasparse.ops.two_four import triton as two_four

TARGET = GPUTarget("cuda", 90, 32)
KERNELS = kernels.KERNELS | triton_mass.KERNELS
OUTPUT = Path(__file__).with_suffix(".md")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
ELEMENT_SIZES = {"fp8": 1, "fp16": 2, "bf16": 2, "fp32": 4}  # bytes
BLOCKS = [(64, 64), (128, 128), (1, 64)]  # query block, key block
SHARED_LIMIT = 227 * 1024  # bytes a program may have on sm_90
HEADER = [
    "kernel", "a list for", "dtype", "head_dim", "key block", "group", "inputs", "tile, rows x keys", "warps", "stages",
    "registers", "spilled bytes (stores / loads)", "shared memory, bytes", "wgmma", "mma.sync",
]  # fmt: skip
TITLE = """# What the Triton kernels compile to

Written by `tools/bench/kernel_report.py` for sm_90, on a machine without a GPU: nothing was run, and there are no
speeds. Registers are of a thread; spills are its stack and the instructions that touch it.
"""
BLOCK_SPARSE = """
## Block-sparse attention

wgmma and mma.sync are counted in the PTX. "plain" is causal only, "full" also has documents and a bias; mass has no
bias.
"""
TWO_FOUR = """
## 2:4 sparsity

Groups of four lie along the last or along an inner dimension, and rows have a multiple of 16 of them or any number. A
tile is what a program has, of groups or of blocks of 4x4. Loads and stores are those of global memory in the machine
code, by their bits.
"""
TWO_FOUR_HEADER = [
    "kernel", "dtype", "dimension", "groups in a row", "tile, rows x groups", "warps",
    "registers", "spilled bytes (stores / loads)", "shared memory, bytes", "loads", "stores",
]  # fmt: skip


@dataclass(frozen=True)
class Variant:
    kernel: str
    dtype: str
    head_dim: int
    query_block: int
    key_block: int
    group: int
    inputs: str

    def __str__(self) -> str:
        sizes = f"d{self.head_dim}/q{self.query_block}/k{self.key_block}/g{self.group}"
        return f"{self.kernel}/{self.dtype}/{sizes}/{self.inputs}"

    @staticmethod
    def parse(text: str) -> Variant:
        kernel, dtype, *sizes, inputs = text.split("/")
        head_dim, query_block, key_block, group = (int(size[1:]) for size in sizes)
        return Variant(kernel, dtype, head_dim, query_block, key_block, group, inputs)


@dataclass(frozen=True)
class TwoFourVariant:
    kernel: str  # and, for some, its method
    dtype: str
    dimension: str
    sizes: str

    def __str__(self) -> str:
        return f"{self.kernel}/{self.dtype}/{self.dimension}/{self.sizes}"


@dataclass(frozen=True)
class Resources:
    registers: int  # of a thread
    stack: int  # bytes
    spill_stores: int  # instructions
    spill_loads: int
    shared: int  # bytes

    @property
    def spills(self) -> str:
        return f"{self.stack} ({self.spill_stores} / {self.spill_loads})"


@dataclass(frozen=True)
class Compiled(Resources):
    launch: kernels.Launch
    wgmma: int  # instructions
    mma: int


@dataclass(frozen=True)
class TwoFourCompiled(Resources):
    tile: dict[str, int]
    loads: Counter[int]  # instructions, by the bits of each
    stores: Counter[int]
    inexact: int  # instructions that round otherwise than each operation by itself


def parse(text: str) -> Variant | TwoFourVariant:
    return TwoFourVariant(*text.split("/")) if text.count("/") == 3 else Variant.parse(text)


def variants() -> list[Variant]:
    """What training launches. fp16 as one of bf16's, as only the names of instructions differ; fp32 likewise."""
    found = [
        Variant(kernel, "bf16", head_dim, *blocks, group, inputs)
        for kernel, blocks, head_dim, group, inputs in itertools.product(
            KERNELS, BLOCKS, (64, 128), (4, 8), ("plain", "full")
        )
    ]
    for kernel, dtype, blocks in itertools.product(KERNELS, ("fp16", "fp32"), BLOCKS):
        found.append(Variant(kernel, dtype, 128, *blocks, 4, "full"))
    return found


def two_four_variants() -> list[TwoFourVariant]:
    """Packed rows lie along the last dimension, and transposable masks along both."""
    grouped = itertools.product(("prune", "soft_threshold", "mvue-exact", "mvue-approx"), ("last", "inner"))
    places = [*grouped, *itertools.product(("transposable-exact", "transposable-greedy", "pack", "unpack"), ("last",))]
    kinds = [("bf16", "x16"), ("bf16", "any"), ("fp16", "x16"), ("fp32", "x16")]
    found = [TwoFourVariant(kernel, dtype, place, sizes) for (kernel, place) in places for dtype, sizes in kinds]
    return found + [TwoFourVariant(kernel, "fp8", "last", "x16") for kernel in ("pack", "unpack")]


def compile_variant(variant: Variant) -> Compiled:
    kernel = KERNELS[variant.kernel]
    sizes = (variant.head_dim, variant.group, variant.query_block, variant.key_block)
    launch = kernels.launch_of(variant.kernel, DTYPES[variant.dtype], *sizes, causal=True)
    absent = ("bias", "documents", "dbias") if variant.inputs == "plain" else ()
    constants = launch.constants | {name: None for name in absent if name in kernel.arg_names}
    if variant.inputs == "ones":
        constants |= {name: 1 for name in kernel.arg_names if argument_type(name, variant.dtype) == "i32"}
    types = {name: argument_type(name, variant.dtype) for name in kernel.arg_names}
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    built = build(kernel, types, constants, options)
    wgmma, mma = (len(re.findall(rf"\b{name}\b", built.asm["ptx"])) for name in (r"wgmma\.mma_async", r"mma\.sync"))
    return Compiled(*resources(built), launch, wgmma, mma)


def compile_two_four(variant: TwoFourVariant) -> TwoFourCompiled:
    name, _, method = variant.kernel.partition("-")
    kernel, last = two_four.KERNELS[name], variant.dimension == "last"
    size = ELEMENT_SIZES[variant.dtype]
    tile = two_four.tile_of(size, last, width=4096)
    element = f"i{8 * size}" if name in ("pack", "unpack") else variant.dtype
    types = {argument: two_four_argument_type(argument, element, last) for argument in kernel.arg_names}
    flags = {"LAST": last, "EXACT": method == "exact"}
    constants = tile | {flag: value for flag, value in flags.items() if flag in kernel.arg_names}
    multiples = ("width", "groups", "row_bytes") if variant.sizes == "x16" else ()
    built = build(kernel, types, constants, two_four.OPTIONS, multiples)
    code = disassembly(built.asm["cubin"], "-sass")
    inexact = len(re.findall(r"\b(?:fma|mad)\.\w*\.?f|\.approx|\.full|\.ftz", built.asm["ptx"]))
    return TwoFourCompiled(*resources(built), tile, accesses(code, "LDG"), accesses(code, "STG"), inexact)


def build(kernel: Any, types: dict[str, str], constants: dict[str, Any], options: dict[str, Any], multiples=()) -> Any:
    """The kernel as it is compiled when pointers, as torch's, and ``multiples`` are multiples of 16."""
    signature = {name: "constexpr" if name in constants else kind for name, kind in types.items()}
    aligned = [i for i, (name, kind) in enumerate(signature.items()) if kind.startswith("*") or name in multiples]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    return triton.compile(ASTSource(kernel, signature, constants, attributes), target=TARGET, options=options)


def argument_type(name: str, dtype: str) -> str:
    """Of a kernel's argument, as the launcher finds it. Sizes are not taken to be multiples of 16."""
    match name:
        case "scale":
            return "fp32"
        case "queries" | "keys" | "kv_heads" | "q_blocks" | "k_blocks" | "longest" | "limit":
            return "i32"
        case "count" | "index" | "documents" | "lists" | "firsts":
            return "*i32"
        case "bias" | "dbias" | "lse" | "delta" | "dk_parts" | "dv_parts" | "mass":
            return "*fp32"
        case _:
            return f"*{dtype}"


def two_four_argument_type(name: str, element: str, last: bool) -> str:
    match name:
        case "rows" | "width" | "strips" | "groups" | "row_bytes" | "seed" | "first_group" | "first_column":
            return "i64"
        case "mask":
            return "*i32" if last else "*i8"
        case "metadata":
            return "*u8"
        case _:
            return f"*{element}"


def resources(built: Any) -> tuple[int, int, int, int, int]:
    """Registers of a thread, its stack in bytes, the instructions that store to and load from it, and shared memory."""
    usage, code = (disassembly(built.asm["cubin"], flag) for flag in ("-res-usage", "-sass"))
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    stores, loads = (len(re.findall(rf"\b{name}\b", code)) for name in ("STL", "LDL"))
    return int(found[1]), int(found[2]), stores, loads, built.metadata.shared


def accesses(code: str, name: str) -> Counter[int]:
    """How many instructions of machine code load or store how many bits; 32 if they do not say."""
    found = re.findall(rf"\b{name}\.E(?:\.[A-Z]*(\d+))?", code)
    return Counter(int(bits or 32) for bits in found)


@functools.cache
def disassembly(cubin: bytes, flag: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, flag, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def table(compiled: dict[Variant, Compiled]) -> str:
    rows = [HEADER, ["---"] * len(HEADER)]
    for variant, result in compiled.items():
        sizes = result.launch.constants
        tile = f"{sizes['BLOCK_M']} x {sizes['BLOCK_N']}"
        granularity = "token" if variant.query_block == 1 else f"block of {variant.query_block}"
        chosen = (variant.dtype, variant.head_dim, variant.key_block, variant.group, variant.inputs)
        launch = (tile, result.launch.num_warps, result.launch.num_stages)
        measured = (result.registers, result.spills, f"{result.shared:,}", result.wgmma, result.mma)
        rows.append([str(x) for x in (variant.kernel, granularity, *chosen, *launch, *measured)])
    return markdown(rows)


def two_four_table(compiled: dict[TwoFourVariant, TwoFourCompiled]) -> str:
    rows = [TWO_FOUR_HEADER, ["---"] * len(TWO_FOUR_HEADER)]
    for variant, result in compiled.items():
        tile = f"{result.tile['ROWS']} x {result.tile['WIDTH']}"
        sizes = "16 n" if variant.sizes == "x16" else "any"
        chosen = (variant.kernel, variant.dtype, variant.dimension, sizes, tile, two_four.WARPS)
        moved = (
            ", ".join(f"{count} x {bits}" for bits, count in sorted(kind.items(), reverse=True))
            for kind in (result.loads, result.stores)
        )
        rows.append([str(x) for x in (*chosen, result.registers, result.spills, f"{result.shared:,}", *moved)])
    return markdown(rows)


def markdown(rows: list[list[str]]) -> str:
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def summary(results: Collection[Resources]) -> str:
    spilling = sum(r.stack > 0 or r.spill_stores + r.spill_loads > 0 for r in results)
    registers, shared = max(r.registers for r in results), max(r.shared for r in results)
    return (
        f"{len(results)} variants, {spilling} of them with spills; at most {registers} registers of 255 and "
        f"{shared:,} bytes of shared memory of {SHARED_LIMIT:,}.\n"
    )


def report(variants: list[Variant | TwoFourVariant]) -> str:
    text = TITLE
    if compiled := {v: compile_variant(v) for v in variants if isinstance(v, Variant)}:
        text += f"{BLOCK_SPARSE}\n{summary(compiled.values())}\n{table(compiled)}"
    if grouped := {v: compile_two_four(v) for v in variants if isinstance(v, TwoFourVariant)}:
        inexact = sum(result.inexact for result in grouped.values())
        rounding = f"{inexact} floating-point instructions are fused or approximate.\n"
        text += f"{TWO_FOUR}\n{summary(grouped.values())}{rounding}\n{two_four_table(grouped)}"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="*", type=parse, help="all if none is given")
    parser.add_argument("--output", type=Path, help=f"a file for the table; default: standard output, {OUTPUT} for all")
    arguments = parser.parse_args()
    text = report(arguments.variants or [*variants(), *two_four_variants()])
    output = arguments.output or (None if arguments.variants else OUTPUT)
    if output is None:
        print(text)
    else:
        output.write_text(text)


if __name__ == "__main__":
    main()
