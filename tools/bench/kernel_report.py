"""What the Triton kernels of block-sparse attention become on sm_90: registers, spills, shared memory, tensor cores.

    python tools/bench/kernel_report.py                                  # all, to tools/bench/kernel_report.md
    python tools/bench/kernel_report.py forward/bf16/d64/q1/k64/g4/full  # one, to standard output

Needs no GPU: each variant is compiled ahead of time, with the launcher's constants and options and the alignment that
it would find in its arguments, and the cubin is read with cuobjdump. Nothing here is a speed.

A variant is kernel/dtype/head_dim/query block/key block/group/inputs, where inputs is "plain" (causal only), "full"
(causal, documents and bias) or "ones" (full, and all sizes are 1, which Triton makes constants).
"""

from __future__ import annotations

import argparse
import itertools
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megasparse.ops.block_sparse import triton as kernels
from megasparse.ops.block_sparse import triton_mass

TARGET = GPUTarget("cuda", 90, 32)
KERNELS = kernels.KERNELS | triton_mass.KERNELS
OUTPUT = Path(__file__).with_suffix(".md")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
BLOCKS = [(64, 64), (128, 128), (1, 64)]  # query block, key block
SHARED_LIMIT = 227 * 1024  # bytes a program may have on sm_90
HEADER = [
    "kernel", "a list for", "dtype", "head_dim", "key block", "group", "inputs", "tile, rows x keys", "warps", "stages",
    "registers", "spilled bytes (stores / loads)", "shared memory, bytes", "wgmma", "mma.sync",
]  # fmt: skip
TITLE = """# What the kernels of block-sparse attention compile to

Written by `tools/bench/kernel_report.py` for sm_90, on a machine without a GPU: nothing was run, and there are no
speeds. Registers are of a thread; spills are its stack and the instructions that touch it; wgmma and mma.sync are
counted in the PTX. "plain" is causal only, "full" also has documents and a bias; mass has no bias.
"""


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
class Compiled:
    launch: kernels.Launch
    registers: int  # of a thread
    stack: int  # bytes
    spill_stores: int  # instructions
    spill_loads: int
    shared: int  # bytes
    wgmma: int  # instructions
    mma: int


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


def compile_variant(variant: Variant) -> Compiled:
    kernel = KERNELS[variant.kernel]
    sizes = (variant.head_dim, variant.group, variant.query_block, variant.key_block)
    launch = kernels.launch_of(variant.kernel, DTYPES[variant.dtype], *sizes, causal=True)
    absent = ("bias", "documents", "dbias") if variant.inputs == "plain" else ()
    constants = launch.constants | {name: None for name in absent if name in kernel.arg_names}
    if variant.inputs == "ones":
        constants |= {name: 1 for name in kernel.arg_names if argument_type(name, variant.dtype) == "i32"}
    signature = {n: "constexpr" if n in constants else argument_type(n, variant.dtype) for n in kernel.arg_names}
    pointers = [i for i, kind in enumerate(signature.values()) if kind.startswith("*")]
    aligned = {(i,): [["tt.divisibility", 16]] for i in pointers}  # as torch's tensors are
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    built = triton.compile(ASTSource(kernel, signature, constants, aligned), target=TARGET, options=options)
    wgmma, mma = (len(re.findall(rf"\b{name}\b", built.asm["ptx"])) for name in (r"wgmma\.mma_async", r"mma\.sync"))
    return Compiled(launch, *resources(built.asm["cubin"]), built.metadata.shared, wgmma, mma)


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


def resources(cubin: bytes) -> tuple[int, int, int, int]:
    """Registers of a thread, its stack in bytes, and the instructions that store to and load from it."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (
            subprocess.run(
                [triton.knobs.nvidia.cuobjdump.path, flag, file.name], capture_output=True, text=True, check=True
            ).stdout
            for flag in ("-res-usage", "-sass")
        )
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    stores, loads = (len(re.findall(rf"\b{name}\b", code)) for name in ("STL", "LDL"))
    return int(found[1]), int(found[2]), stores, loads


def table(compiled: dict[Variant, Compiled]) -> str:
    rows = [HEADER, ["---"] * len(HEADER)]
    for variant, result in compiled.items():
        sizes = result.launch.constants
        tile = f"{sizes['BLOCK_M']} x {sizes['BLOCK_N']}"
        granularity = "token" if variant.query_block == 1 else f"block of {variant.query_block}"
        chosen = (variant.dtype, variant.head_dim, variant.key_block, variant.group, variant.inputs)
        launch = (tile, result.launch.num_warps, result.launch.num_stages)
        spills = f"{result.stack} ({result.spill_stores} / {result.spill_loads})"
        measured = (result.registers, spills, f"{result.shared:,}", result.wgmma, result.mma)
        rows.append([str(x) for x in (variant.kernel, granularity, *chosen, *launch, *measured)])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def summary(compiled: dict[Variant, Compiled]) -> str:
    results = compiled.values()
    spilling = sum(r.stack > 0 or r.spill_stores + r.spill_loads > 0 for r in results)
    registers, shared = max(r.registers for r in results), max(r.shared for r in results)
    return (
        f"{len(compiled)} variants, {spilling} of them with spills; at most {registers} registers of 255 and "
        f"{shared:,} bytes of shared memory of {SHARED_LIMIT:,}.\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="*", type=Variant.parse, help="all if none is given")
    parser.add_argument("--output", type=Path, help=f"a file for the table; default: standard output, {OUTPUT} for all")
    arguments = parser.parse_args()
    compiled = {variant: compile_variant(variant) for variant in arguments.variants or variants()}
    output = arguments.output or (None if arguments.variants else OUTPUT)
    text = f"{TITLE}\n{summary(compiled)}\n{table(compiled)}"
    if output is None:
        print(text)
    else:
        output.write_text(text)


if __name__ == "__main__":
    main()
