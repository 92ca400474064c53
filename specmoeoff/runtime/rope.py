"""Rotary positions: the angle of every position and frequency, scaled as the model was trained."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from specmoeoff.specs.model import ModelSpec, RopeScaling

F32 = np.float32


def rope_tables(spec: ModelSpec, n_positions: int) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin of every position and frequency, each (n_positions, rotary dimensions / 2) float32."""
    # float32 throughout, as the models were trained: the angle of a late position depends on it.
    dim = spec.rope_head_dim or spec.head_dim
    exponents = np.arange(0, dim, 2, dtype=F32) / F32(dim)
    frequencies = (F32(1) / F32(spec.rope_theta) ** exponents).astype(F32)
    scale = F32(1)
    if spec.rope_scaling:
        frequencies = _scaled(frequencies, spec.rope_scaling, dim, spec.rope_theta)
        scale = F32(spec.rope_scaling.table_scale)
    angles = np.arange(n_positions, dtype=F32)[:, None] * frequencies
    return np.cos(angles) * scale, np.sin(angles) * scale


def _scaled(frequencies: np.ndarray, rope: RopeScaling, dim: int, theta: float) -> np.ndarray:
    slow = frequencies / F32(rope.factor)
    if rope.kind == "linear":
        return slow
    if rope.kind == "llama3":
        turns = F32(rope.original_positions) / (F32(2 * math.pi) / frequencies)
        low, high = F32(rope.low_freq_factor), F32(rope.high_freq_factor)
        kept = np.clip((turns - low) / (high - low), F32(0), F32(1))
    else:
        kept = 1 - _yarn_ramp(rope, dim, theta)
    return (slow * (1 - kept) + frequencies * kept).astype(F32)


def _yarn_ramp(rope: RopeScaling, dim: int, theta: float) -> np.ndarray:
    """0 for frequencies that turn more than beta_fast times over the original positions, 1 below beta_slow (section 3.2)."""

    def dimension(turns: float) -> float:
        return dim * math.log(rope.original_positions / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    return np.clip((np.arange(dim // 2, dtype=F32) - F32(low)) / F32(high - low or 0.001), F32(0), F32(1))
