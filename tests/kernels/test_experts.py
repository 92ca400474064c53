"""Experts in every format against float64 on the weights that were packed, and bit for bit against themselves."""

import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specmoeoff.kernels import cpu, reference

QUANTISED = ("int8", "int4", "mxfp4")
GPT_OSS = cpu.Swiglu(1.702, 7.0, 1.0)
EXAMPLES = settings(max_examples=int(os.environ.get("SPECMOEOFF_EXAMPLES", "25")), deadline=None)
SIZES = st.integers(1, 75).map(lambda half: 2 * half)


def bf16(rng: np.random.Generator, *shape: int, scale: float = 1.0) -> np.ndarray:
    return reference.f32_to_bf16(rng.standard_normal(shape) * scale)


def expert_of(
    rng: np.random.Generator, hidden: int, intermediate: int, format: str
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Packed, and gate, up and down in float64 as packed."""
    gate, up = (bf16(rng, intermediate, hidden, scale=hidden**-0.5) for _ in range(2))
    down = bf16(rng, hidden, intermediate, scale=intermediate**-0.5)
    packed = cpu.aligned_empty(cpu.packed_expert_bytes(hidden, intermediate, format))
    cpu.pack_expert(gate, up, down, packed, format)
    if format == "bf16":
        return packed, [reference.bf16_to_f64(w) for w in (gate, up, down)]
    return packed, list(reference.unpack_expert(packed, format, hidden, intermediate))


@EXAMPLES
@given(
    hidden=SIZES,
    intermediate=SIZES,
    m=st.integers(1, 60),
    n_active=st.integers(1, 3),
    format=st.sampled_from(("bf16", *QUANTISED)),
    with_biases=st.booleans(),
    swiglu=st.sampled_from((cpu.SILU, GPT_OSS)),
    seed=st.integers(0, 999),
)
def test_experts_are_what_float64_makes_of_the_packed_weights(
    hidden: int,
    intermediate: int,
    m: int,
    n_active: int,
    format: str,
    with_biases: bool,
    swiglu: cpu.Swiglu,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    x, group = bf16(rng, m, hidden), {"bf16": 0, "mxfp4": 32}.get(format, 64)
    packed, weights = zip(*(expert_of(rng, hidden, intermediate, format) for _ in range(2)), strict=True)
    biases = (
        [rng.standard_normal(2 * intermediate + hidden).astype(np.float32) for _ in packed] if with_biases else None
    )
    slots = np.split(rng.permutation(m * n_active).astype(np.int32), [m // 2])
    for isa in cpu.supported_isas():
        out = np.full((m * n_active, hidden), np.nan, np.float32)
        cpu.Kernels(2, isa).experts(x, packed, slots, out, intermediate, format, biases, swiglu)
        for e, part in enumerate(slots):
            clamp = (swiglu.alpha, swiglu.limit, swiglu.shift)
            bias = biases[e] if biases else None
            exact = reference.expert(x[part // n_active], *weights[e], bias, clamp, group)
            # An activation between that is rounded to the other side moves the sum by one step of bf16, or of int8.
            step = 2.0**-8 if format == "bf16" else 1 / 127
            assert np.abs(out[part] - exact).max(initial=0.0) <= 2 * step * (np.abs(exact).max(initial=0.0) + 1)


@EXAMPLES
@given(
    m=st.integers(1, 60),
    hidden=SIZES,
    intermediate=SIZES,
    threads=st.integers(1, 3),
    format=st.sampled_from(QUANTISED),
    seed=st.integers(0, 99),
)
def test_rows_do_not_know_their_neighbours(
    m: int, hidden: int, intermediate: int, threads: int, format: str, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    x, (packed, _), row = bf16(rng, m, hidden), expert_of(rng, hidden, intermediate, format), m // 2
    for isa in cpu.supported_isas():
        together, alone = np.empty((m, hidden), np.float32), np.empty((1, hidden), np.float32)
        slots = rng.permutation(m).astype(np.int32)
        cpu.Kernels(threads, isa).experts(x, [packed], [slots], together, intermediate, format, None, GPT_OSS)
        one = cpu.Kernels(1, isa)
        one.experts(
            x[row : row + 1].copy(), [packed], [np.zeros(1, np.int32)], alone, intermediate, format, None, GPT_OSS
        )
        assert np.array_equal(together[row], alone[0])


@pytest.mark.parametrize("format", ["bf16", *QUANTISED])
def test_rows_do_not_know_in_how_many_pieces_a_long_strip_is_read(format: str) -> None:
    """Pieces are of bytes, so that formats are cut at other inputs; seven rows are two tiles, each fetching its share."""
    rng, hidden, intermediate = np.random.default_rng(0), 5000, 128
    x, (packed, weights) = bf16(rng, 7, hidden), expert_of(rng, hidden, intermediate, format)
    out, alone = np.empty((7, hidden), np.float32), np.empty((1, hidden), np.float32)
    kernels = cpu.Kernels(2)
    kernels.experts(x, [packed], [np.arange(7, dtype=np.int32)], out, intermediate, format)
    kernels.experts(x[6:].copy(), [packed], [np.zeros(1, np.int32)], alone, intermediate, format)
    assert np.array_equal(out[6], alone[0])
    exact = reference.expert(x, *weights, group={"bf16": 0, "mxfp4": 32}.get(format, 64))
    assert np.abs(out - exact).max() <= 2.0**-6 * np.abs(exact).max()


@pytest.mark.parametrize(
    ("format", "low", "high"), [("int8", 0.004, 0.009), ("int4", 0.07, 0.12), ("mxfp4", 0.09, 0.14)]
)
def test_the_error_that_packing_reports_is_that_of_the_packed_weights(format: str, low: float, high: float) -> None:
    rng = np.random.default_rng(0)
    parts = [bf16(rng, 96, 200), bf16(rng, 96, 200), bf16(rng, 200, 96)]
    packed = cpu.aligned_empty(cpu.packed_expert_bytes(200, 96, format))
    reported = cpu.pack_expert(*parts, packed, format)
    exact = np.concatenate([reference.bf16_to_f64(p).ravel() for p in parts])
    found = np.concatenate([w.ravel() for w in reference.unpack_expert(packed, format, 200, 96)])
    assert reported == pytest.approx(np.linalg.norm(found - exact) / np.linalg.norm(exact), rel=1e-6)
    assert low < reported < high  # normal weights


def test_weights_that_were_mxfp4_before_are_packed_without_error() -> None:
    rng = np.random.default_rng(0)

    def weights(n_out: int, n_in: int) -> np.ndarray:
        scales = np.repeat(2.0 ** rng.integers(-20, 3, (n_out, n_in // 32)), 32, axis=1)
        return reference.f32_to_bf16(reference.E2M1[rng.integers(0, 16, (n_out, n_in))] * scales)

    parts = [weights(64, 128), weights(64, 128), weights(128, 64)]
    packed = cpu.aligned_empty(cpu.packed_expert_bytes(128, 64, "mxfp4"))
    assert cpu.pack_expert(*parts, packed, "mxfp4") == 0
    for found, part in zip(reference.unpack_expert(packed, "mxfp4", 128, 64), parts, strict=True):
        assert np.array_equal(found, reference.bf16_to_f64(part))


@pytest.mark.parametrize("format", QUANTISED)
def test_codes_of_any_instruction_set_give_the_same_sums(format: str) -> None:
    """Integers add up exactly; what is left is the rounding of one activation between."""
    rng = np.random.default_rng(1)
    x, (packed, _) = bf16(rng, 5, 32), expert_of(rng, 32, 32, format)
    found = []
    for isa in cpu.supported_isas():
        out = np.empty((5, 32), np.float32)
        cpu.Kernels(1, isa).experts(x, [packed], [np.arange(5, dtype=np.int32)], out, 32, format)
        found.append(out)
    for out in found:
        assert np.abs(out - found[0]).max() <= np.abs(found[0]).max() / 127


@pytest.mark.parametrize("format", ["bf16", *QUANTISED])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_stays_visible_and_in_its_row(format: str, bad: float) -> None:
    rng = np.random.default_rng(1)
    x, (packed, _) = bf16(rng, 3, 80), expert_of(rng, 80, 96, format)
    x[1, 70] = reference.f32_to_bf16(np.array([bad]))[0]
    for isa in cpu.supported_isas():
        out = np.empty((3, 80), np.float32)
        cpu.Kernels(2, isa).experts(x, [packed], [np.arange(3, dtype=np.int32)], out, 96, format)
        assert np.isfinite(out[[0, 2]]).all()
        assert not np.isfinite(out[1]).any()


def test_a_format_that_does_not_fit_is_refused() -> None:
    rng = np.random.default_rng(0)
    x, (packed, _), out = bf16(rng, 1, 64), expert_of(rng, 64, 64, "int8"), np.empty((1, 64), np.float32)
    slots = [np.zeros(1, np.int32)]
    with pytest.raises(ValueError, match="format must be one of"):
        cpu.Kernels(1).experts(x, [packed], slots, out, 64, "int3")
    with pytest.raises(ValueError, match="format: int8 is not for kernels of precision fp32"):
        cpu.Kernels(1, precision="fp32").experts(x.astype(np.float32), [packed], slots, out, 64, "int8")
    with pytest.raises(ValueError, match="experts: shape"):
        cpu.Kernels(1).experts(x, [packed], slots, out, 64, "int4")
    with pytest.raises(ValueError, match="biases: 0 for 1 experts"):
        cpu.Kernels(1).experts(x, [packed], slots, out, 64, "int8", [])
