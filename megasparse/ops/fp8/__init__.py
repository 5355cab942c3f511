"""FP8 training emulated with torch's float8 types, to the rounding of each element, for the three recipes of
Transformer Engine on Hopper: delayed, current and block scaling.

``scales`` has the factors, ``float8`` casts and multiplies, ``linear`` is the layer's product and its gradients.
"""

from megasparse.ops.fp8.float8 import Float8, dequantize, fp8_matmul, quantize
from megasparse.ops.fp8.linear import Scaling, fp8_grouped_swiglu, fp8_linear
from megasparse.ops.fp8.scales import E4M3, E5M2, TILE, amax, scale_from_amax, update_history

__all__ = [
    "E4M3",
    "E5M2",
    "TILE",
    "Float8",
    "Scaling",
    "amax",
    "dequantize",
    "fp8_grouped_swiglu",
    "fp8_linear",
    "fp8_matmul",
    "quantize",
    "scale_from_amax",
    "update_history",
]
