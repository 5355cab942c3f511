"""The doors: the layer's formula in float64, what torch and torchao offer, and what is handed to them. Kernels run on
CUDA only."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.sparse import SparseSemiStructuredTensorCUTLASS
from torch.sparse import _semi_structured_conversions as conversions

from megasparse.ops.two_four import matmul as doors
from megasparse.ops.two_four import mvue_24, pack_24, prune_24, soft_threshold_24, transposable_mask, unpack_24
from megasparse.ops.two_four.matmul import (
    FP8_KERNELS,
    KERNELS,
    Operands,
    backend,
    choose,
    expert_door,
    fp8_linear_24,
    fp8_rows,
    linear_24,
    misfit,
    missing,
    prepare,
    prepare_fp8,
    products,
)
from tests.helpers import assert_close

CPU, BF16 = torch.device("cpu"), torch.bfloat16
HALVES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
MASKS = pytest.mark.parametrize("transposable", [True, False], ids=["transposable", "row"])
TORCHAO = "0.18.0"

needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0),
    reason="needs a CUDA GPU of sm_80 or newer",
)
needs_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9,
    reason="needs a CUDA GPU of sm_90, and torchao",
)


def masked(rows: int, columns: int, dtype: torch.dtype = BF16, transposable: bool = True, device=CPU) -> Tensor:
    w = torch.randn(rows, columns).to(device, dtype)
    return torch.where(transposable_mask(w), w, 0.0) if transposable else prune_24(w)[0]


def estimate(dy: Tensor) -> Tensor:
    return mvue_24(dy, dim=0, seed=5)


# The formula ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 5), (7,), (2, 0)], ids=str)
@MASKS
def test_masked_is_autograd_of_the_dense_product(transposable: bool, shape: tuple[int, ...]) -> None:
    w = masked(12, 8, torch.float64, transposable)
    x = torch.randn(*shape, 8, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(*shape, 12, dtype=torch.float64)
    parameter = torch.full_like(w, torch.nan, requires_grad=True)  # whose values are not read
    y = linear_24(x, parameter, prepare(w, "masked", transposable))
    dx, dw = torch.autograd.grad(y, (x, parameter), dy)
    reference = w.clone().requires_grad_()
    expected = x @ reference.t()
    assert_close([y, dx, dw], [expected, *torch.autograd.grad(expected, (x, reference), dy)], 1e-14)


def test_gradients_by_differences() -> None:
    w = masked(8, 4, torch.float64)
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: linear_24(x, w, prepare(w, "masked")), (x,))


def test_an_estimate_of_dy_goes_into_dw_only() -> None:
    w = masked(12, 8, torch.float64).requires_grad_()
    x = torch.randn(16, 8, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(16, 12, dtype=torch.float64)
    for is_24 in (False, True):
        y = linear_24(x, w, prepare(w, "masked"), estimate, is_24)
        dx, dw = torch.autograd.grad(y, (x, w), dy)
        assert_close([dx, dw], [dy @ w, estimate(dy).t() @ x], 1e-14)
    with pytest.raises(ValueError, match="dw_is_24 needs dy_of_dw"):
        linear_24(x, w, prepare(w, "masked"), dw_is_24=True)


def test_only_what_is_asked_for_is_computed() -> None:
    w = masked(8, 8, torch.float64)
    x = torch.randn(4, 8, dtype=torch.float64, requires_grad=True)

    def unwanted(dy: Tensor) -> Tensor:
        raise AssertionError("dW is not asked for")

    linear_24(x, w, prepare(w, "masked"), unwanted).sum().backward()
    assert_close(x.grad, torch.ones(4, 8, dtype=torch.float64) @ w, 1e-14)


# What torch is handed -------------------------------------------------------------------------------------------------


class Decompressed(SparseSemiStructuredTensorCUTLASS):
    """CUTLASS's layout by torch's Python code, multiplied after it was decompressed: it shows what the kernels are
    handed and that they would be handed it rightly, not what they do."""

    compressed: ClassVar[list[tuple[int, ...]]] = []  # the shapes of all since a test began

    @classmethod
    def from_dense(cls, original_tensor: Tensor, alg_id: int = 0) -> Decompressed:
        rows, columns, *_ = cls._DTYPE_SHAPE_CONSTRAINTS[original_tensor.dtype]
        assert original_tensor.is_contiguous()
        assert (original_tensor.shape[0] % rows, original_tensor.shape[1] % columns) == (0, 0)
        assert not ((original_tensor == 0) & original_tensor.signbit()).any()
        cls.compressed.append(tuple(original_tensor.shape))
        packed, meta = conversions.sparse_semi_structured_from_dense_cutlass(original_tensor)
        return cls(original_tensor.shape, packed, meta, None, None, None)

    def _mm(self, B: Tensor, *, bias=None, should_transpose_dense: bool = False, **kwargs) -> Tensor:
        assert B.is_contiguous()
        assert len(B)
        assert bias is None
        w = self.to_dense().float()
        return (B.float() @ w.t() if should_transpose_dense else w @ B.float()).to(B.dtype)


@pytest.mark.parametrize("tokens", [0, 1, 60, 64])
@HALVES
@MASKS
@pytest.mark.filterwarnings("ignore:The PyTorch API of SparseSemiStructuredTensor")
def test_compressed_is_masked(transposable: bool, dtype: torch.dtype, tokens: int) -> None:
    w = masked(128, 64, dtype, transposable)
    compressed = doors._compress(w, Decompressed, transposable)
    assert isinstance(compressed.weight, Decompressed)
    assert isinstance(compressed.transposed, Decompressed) == transposable
    x = torch.randn(tokens, 64).to(dtype).requires_grad_()
    weight = w.clone().requires_grad_()
    dy = torch.randn(tokens, 128).to(dtype)
    for dy_of_dw, is_24 in ((None, False), (estimate, False), (estimate, True))[: 1 if tokens % 4 else 3]:
        results = []
        Decompressed.compressed.clear()
        for operands in (compressed, prepare(w, "masked")):
            y = linear_24(x, weight, operands, dy_of_dw, is_24)
            results.append([y, *torch.autograd.grad(y, (x, weight), dy)])
        assert Decompressed.compressed == ([(128, 64)] if is_24 and tokens else [])
        assert_close(*results, rtol=1e-2)


@pytest.mark.filterwarnings("ignore:The PyTorch API of SparseSemiStructuredTensor")
def test_a_gradient_that_is_expanded_is_copied() -> None:
    w = masked(64, 64)
    x = torch.randn(8, 64, dtype=BF16, requires_grad=True)
    linear_24(x, w, doors._compress(w, Decompressed, True)).sum().backward()
    assert_close(x.grad, torch.ones(8, 64) @ w.float(), 1e-2)


@pytest.mark.filterwarnings("ignore:The PyTorch API of SparseSemiStructuredTensor")
def test_an_estimate_that_is_not_24_along_tokens_is_refused() -> None:
    """As one of two sequences is, with rows in the order of [seq, batch]."""
    w = masked(64, 64)
    operands, weight = doors._compress(w, Decompressed, True), w.clone().requires_grad_()
    x, dy = torch.randn(16, 2, 64, dtype=BF16), torch.randn(16, 2, 64, dtype=BF16)
    sparse = mvue_24(dy, dim=0, seed=1)
    expected = sparse.flatten(0, 1).float().t() @ x.flatten(0, 1).float()
    y = linear_24(x.transpose(0, 1), weight, operands, lambda _: sparse.transpose(0, 1).flatten(0, 1), True)
    assert_close(torch.autograd.grad(y, weight, dy.transpose(0, 1)), [expected], 1e-2)
    y = linear_24(x, weight, operands, lambda _: sparse.flatten(0, 1), True)
    with pytest.raises(RuntimeError, match="dy_of_dw's result is not 2:4 along tokens"):
        torch.autograd.grad(y, weight, dy)


@pytest.mark.filterwarnings("ignore:The PyTorch API of SparseSemiStructuredTensor")
def test_minus_zero_is_no_value() -> None:
    soft = soft_threshold_24(torch.randn(64, 64)).to(BF16)
    assert ((soft == 0) & soft.signbit()).any()
    assert torch.equal(doors._compress(soft, Decompressed, False).weight.to_dense(), soft)


def test_what_is_not_24_is_refused() -> None:
    dense = torch.randn(64, 64, dtype=BF16)
    with pytest.raises(ValueError, match=r"1024 groups of four in the rows of \[64, 64\] .* while weights are dense"):
        doors._compress(dense, Decompressed, False)
    with pytest.raises(ValueError, match=r"groups of four in the rows of \[64, 128\] have more than two"):
        doors._compress(masked(128, 64, transposable=False), Decompressed, True)
    nan = masked(64, 64).index_fill(1, torch.tensor([0, 1, 2]), torch.nan)
    with pytest.raises(ValueError, match="64 groups of four"):
        doors._compress(nan, Decompressed, False)


@pytest.mark.parametrize("kernels", ["cusparselt", "cutlass"])
@pytest.mark.filterwarnings("ignore:The PyTorch API of SparseSemiStructuredTensor")
def test_torch_takes_the_products(kernels: doors.Backend) -> None:
    """Through torch's own dispatch, with its fake kernels, for any number of tokens."""

    def compressed(rows: int, columns: int) -> Tensor:
        half = torch.empty(rows, columns // 2, dtype=BF16)
        meta = torch.empty(rows, columns // 16, dtype=torch.int16)
        whole = torch.empty(rows * columns * 9 // 16, dtype=BF16)
        parts = (half, meta) if kernels == "cutlass" else (whole, None)
        return KERNELS[kernels](torch.Size((rows, columns)), *parts, None, None, None)

    with FakeTensorMode():
        operands = Operands(compressed(128, 64), compressed(64, 128))
        for tokens in (0, 1, 37, 64):
            x = torch.empty(2, tokens, 64, dtype=BF16, requires_grad=True)
            weight = torch.empty(128, 64, dtype=BF16, requires_grad=True)
            y = linear_24(x, weight, operands)
            dx, dw = torch.autograd.grad(y, (x, weight), torch.empty_like(y))
            assert y.shape == (2, tokens, 128)
            assert dx.shape == x.shape
            assert dw.shape == weight.shape
            assert {y.dtype, dx.dtype, dw.dtype} == {BF16}


# What torch offers ----------------------------------------------------------------------------------------------------


def arguments(schema: str) -> list[tuple[str, str]]:
    return [(argument.name, str(argument.type)) for argument in torch._C.parse_schema(schema).arguments]


@pytest.mark.parametrize(
    "schema",
    [
        "aten::_cslt_compress(Tensor input) -> Tensor",
        "aten::_cslt_sparse_mm(Tensor compressed_A, Tensor dense_B, Tensor? bias=None, Tensor? alpha=None, "
        "ScalarType? out_dtype=None, bool transpose_result=False, int alg_id=0, int split_k=1, int split_k_mode=-1) "
        "-> Tensor",
        "aten::_sparse_semi_structured_mm(Tensor mat1, Tensor mat1_meta, Tensor mat2, *, ScalarType? out_dtype=None) "
        "-> Tensor",
    ],
)
def test_schemas(schema: str) -> None:
    """Of the operators behind torch's classes; a change of them is a change to look at before it runs on a GPU."""
    name = schema.partition("(")[0].removeprefix("aten::")
    assert str(getattr(torch.ops.aten, name).default._schema) == schema


@HALVES
def test_multiples_are_those_known(dtype: torch.dtype) -> None:
    rules = {name: tuple(kernels._DTYPE_SHAPE_CONSTRAINTS[dtype]) for name, kernels in KERNELS.items()}
    assert rules == {"cusparselt": (16, 16, 8, 8), "cutlass": (32, 64, 8, 8)}


@HALVES
@MASKS
def test_torch_packs_as_we_do(transposable: bool, dtype: torch.dtype) -> None:
    """But for the order that the hardware wants metadata in, and where less than two of four are not zero."""
    w = masked(64, 128, dtype, transposable)
    packed, reordered = conversions.sparse_semi_structured_from_dense_cutlass(w)
    places = conversions._calculate_meta_reordering_scatter_offsets(*reordered.shape, reordered.dtype, CPU)
    metadata = reordered.view(-1)[places].view(reordered.shape).view(torch.uint8)
    values, ours = pack_24(w)
    assert torch.equal(packed, values)
    assert torch.equal(metadata, ours)
    w[:, ::3] = 0
    packed, reordered = conversions.sparse_semi_structured_from_dense_cutlass(w)
    metadata = reordered.view(-1)[places].view(reordered.shape).view(torch.uint8)
    assert torch.equal(unpack_24(packed, metadata), w)
    assert torch.equal(conversions.sparse_semi_structured_to_dense_cutlass(packed, reordered), w)


def test_torch_would_drop_half_of_float32() -> None:
    """The reason for DTYPES: it takes one of two, without a word."""
    w = masked(64, 64, torch.float32)
    kept = conversions.sparse_semi_structured_to_dense_cutlass(
        *conversions.sparse_semi_structured_from_dense_cutlass(w)
    )
    assert (kept != w).any()
    assert "not torch.float32: use one of them or the masked door" in str(misfit(w.shape, w.dtype, "cutlass"))


@pytest.mark.parametrize(
    ("shape", "kernels", "transposable", "message"),
    [
        ((16, 32), "cusparselt", True, None),
        ((32, 64), "cutlass", False, None),
        ((4, 64, 128), "cutlass", True, None),  # experts
        ((32, 64), "cutlass", True, "32 rows are no multiple of 64; change"),
        ((64, 96), "cutlass", False, r"a weight \[64, 96\] does not fit cutlass: 96 columns are no multiple of 64;"),
        ((24, 40), "cusparselt", False, "24 rows are no multiple of 16 and 40 columns are no multiple of 16"),
        ((0, 16), "cusparselt", False, "0 rows are no multiple of 16"),
    ],
)
def test_shapes(shape, kernels: doors.Backend, transposable: bool, message: str | None) -> None:
    reason = misfit(shape, BF16, kernels, transposable)
    if message is None:
        assert reason is None
    else:
        with pytest.raises(ValueError, match=message):
            raise ValueError(reason)


# The choice -----------------------------------------------------------------------------------------------------------


def test_on_the_cpu_there_is_the_masked_door() -> None:
    door, reason = choose("auto", (64, 64), BF16, CPU)
    assert door == "masked"
    assert reason is not None
    assert "the weight is on cpu" in reason
    assert "CUDA GPU of sm_8" in reason
    assert choose("masked", (3, 5), torch.float64, CPU) == ("masked", None)
    with pytest.raises(ValueError, match="through the door semi_structured are asked for, but the weight is on cpu"):
        choose("semi_structured", (64, 64), BF16, CPU)
    with pytest.raises(
        ValueError, match="but the weight is on cpu: torchao's FP8 2:4 kernels need a CUDA GPU of sm_90"
    ):
        choose("fp8_sparse", (64, 64), BF16, CPU)
    with pytest.raises(ValueError, match="the weight is on cpu"):
        prepare(masked(64, 64), "semi_structured")
    with pytest.raises(ValueError, match="the weight is on cpu"):
        prepare_fp8(masked(64, 64))
    with pytest.raises(ValueError, match="door='sparse': use"):
        missing("sparse", (64, 64), BF16, CPU)  # type: ignore[arg-type]


def test_the_log_says_what_runs_sparse() -> None:
    assert products("masked", True) == (
        "2:4 products (masked): all dense; could run sparse on CUDA: forward, input-gradient"
    )
    sparse = f"2:4 products ({backend()}): sparse: "
    assert products("semi_structured") == sparse + "forward; dense: input-gradient, weight-gradient"
    assert products("semi_structured", True) == sparse + "forward, input-gradient; dense: weight-gradient"
    assert products("semi_structured", False, True) == sparse + "forward, weight-gradient; dense: input-gradient"
    assert products("semi_structured", True, True) == sparse + "forward, input-gradient, weight-gradient"
    assert products("fp8_sparse", True) == "2:4 products (torchao, FP8): sparse: forward; inference only"


def test_an_expert_with_few_tokens_is_masked() -> None:
    assert expert_door(99, "semi_structured", min_tokens=100) == "masked"
    assert expert_door(100, "semi_structured", min_tokens=100) == "semi_structured"
    assert expert_door(100, "masked", min_tokens=100) == "masked"
    assert expert_door(1024, "semi_structured") == "masked"


# FP8 ------------------------------------------------------------------------------------------------------------------


def test_fp8_rows() -> None:
    x = torch.randn(6, 32) * torch.tensor([1.0, 1e-3, 1e4, 0.0, 1.0, 1.0])[:, None]
    x[1, :3] = torch.tensor([-1e-9, -0.0, 0.0])  # the first rounds to zero
    x[4, 5], x[5, 6] = torch.nan, torch.inf
    data, scale = fp8_rows(x)
    assert (data.dtype, scale.dtype, scale.shape) == (torch.float8_e4m3fn, torch.float32, (6,))
    assert not (data.view(torch.uint8) == 0x80).any()
    values = data.float() * scale[:, None]
    assert values[4, 5].isnan()
    assert values[5, 6].isnan()
    assert not values[3].any()
    finite = x[:4]
    bound = finite.abs() * 2**-4 + finite.abs().amax(1, keepdim=True) / 448 * 2**-10
    assert ((values[:4] - finite).abs() <= bound).all()
    assert_close(values[:3].abs().amax(1), finite[:3].abs().amax(1), 1e-6)
    assert (data[:3].float().abs().amax(1) == 448).all()


def test_torchao_has_the_kernels() -> None:
    """Of its wheel: the operators with the arguments that we give them, and the library that holds their kernels."""
    wheel = zipfile.ZipFile(torchao_wheel())
    assert "torchao/_C_cutlass_90a.abi3.so" in wheel.namelist()
    texts = [
        node.value
        for node in ast.walk(ast.parse(wheel.read("torchao/ops.py")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    schemas = {name: [text for text in texts if text.startswith(name + "(")] for name in FP8_KERNELS}
    (compress,), (multiply,) = (schemas[name] for name in FP8_KERNELS)
    assert compress.endswith("-> (Tensor, Tensor)")
    assert arguments(compress) == [("weight", "Tensor")]
    tensors = ["input", "input_scale", "weight", "weight_meta", "weight_scale"]
    assert arguments(multiply)[:5] == [(name, "Tensor") for name in tensors]
    assert ("out_dtype", "Optional[int]") in arguments(multiply)


def torchao_wheel() -> Path:
    """The wheel, downloaded once into a cache folder."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or tempfile.gettempdir()) / "megasparse-wheels"
    cache.mkdir(parents=True, exist_ok=True)
    if not [*cache.glob(f"torchao-{TORCHAO}-*.whl")]:
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            command = [sys.executable, "-m", "pip", "download", "--no-deps", f"torchao=={TORCHAO}", "-d", folder]
            result = subprocess.run(command, capture_output=True, text=True, timeout=200)
            if result.returncode:
                pytest.fail(f"no wheel of torchao {TORCHAO} from the index: {result.stderr.strip()[-200:]}")
            (wheel,) = Path(folder).glob("*.whl")
            os.replace(wheel, cache / wheel.name)
    return next(cache.glob(f"torchao-{TORCHAO}-*.whl"))


# On a GPU -------------------------------------------------------------------------------------------------------------


@needs_gpu
@pytest.mark.parametrize("tokens", [0, 1, 60, 512])
@HALVES
@MASKS
def test_kernels_agree_with_masked(transposable: bool, dtype: torch.dtype, tokens: int) -> None:
    cuda = torch.device("cuda")
    w = masked(256, 128, dtype, transposable, cuda)
    if choose("auto", w.shape, dtype, cuda, transposable)[0] != "semi_structured":
        pytest.skip(str(missing("semi_structured", w.shape, dtype, cuda, transposable)))
    x = torch.randn(tokens, 128, device=cuda).to(dtype).requires_grad_()
    weight, dy = w.clone().requires_grad_(), torch.randn(tokens, 256, device=cuda).to(dtype)
    for dy_of_dw, is_24 in ((None, False), (estimate, True)) if tokens % 4 == 0 else ((None, False),):
        results = []
        for door in ("semi_structured", "masked"):
            y = linear_24(x, weight, prepare(w, door, transposable), dy_of_dw, is_24)
            results.append([y, *torch.autograd.grad(y, (x, weight), dy)])
        assert_close(*results, rtol=1e-2)


@needs_gpu
def test_kernels_take_a_gradient_that_is_expanded() -> None:
    w = masked(256, 128, device=torch.device("cuda"))
    x = torch.randn(64, 128, device="cuda", dtype=BF16, requires_grad=True)
    linear_24(x, w, prepare(w, "semi_structured", True)).sum().backward()
    assert_close(x.grad, torch.ones(64, 256, device="cuda") @ w.float(), 1e-2)


@needs_hopper
@pytest.mark.parametrize("tokens", [0, 1, 60, 512])
def test_fp8_agrees_with_its_own_numbers(tokens: int) -> None:
    pytest.importorskip("torchao")
    w = masked(256, 128, transposable=False, device=torch.device("cuda"))
    x = torch.randn(tokens, 128, device="cuda", dtype=BF16)
    y = fp8_linear_24(x, prepare_fp8(w))
    (a, of_a), (b, of_b) = fp8_rows(x), fp8_rows(w)
    assert_close(y, (a.float() * of_a[:, None]) @ (b.float() * of_b[:, None]).t(), 2e-2)
