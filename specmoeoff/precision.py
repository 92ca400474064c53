"""What weights, activations and KV cache are made of. Alone here, for specs and kernels both name it."""

from typing import Literal

Precision = Literal["bf16", "fp32"]
ExpertFormat = Literal["bf16", "int8", "int4", "mxfp4"]
PackedFormat = Literal["fp32", "bf16", "int8", "int4", "mxfp4"]
