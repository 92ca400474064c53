"""What weights, activations and KV cache are made of. Alone here, for specs and kernels both name it."""

from typing import Literal

Precision = Literal["bf16", "fp32"]
