"""MoE-Lightning's model reproduced from its constants, and its operator table through our fits."""

import numpy as np
import pytest

from specmoeoff.estimate.hrm import HrmMachine, hrm
from specmoeoff.profiles.published import rows
from specmoeoff.roofline.fits import fit_transfer
from specmoeoff.specs.model import ModelSpec

GIB = 1 << 30
L4 = HrmMachine(24 * GIB, 197_880_360_960, 16 * GIB, 285 * GIB, 76 * GIB, 104e12, 1.6e12)
KV_BYTES = 4096  # of one token in one layer of Mixtral-8x7B


@pytest.fixture
def mixtral(target_spec: ModelSpec) -> ModelSpec:
    sizes = {"n_layers": 32, "hidden": 4096, "intermediate": 14336, "n_heads": 32, "n_kv_heads": 8, "head_dim": 128}
    return target_spec.model_copy(update=sizes)


def test_its_printed_optimum_comes_out(mixtral: ModelSpec) -> None:
    found = hrm(L4, mixtral, prompt=77, output=32, micro_batch=324, n_micro=14)
    printed = {row.quantity: row.value for row in rows("moe-lightning") if row.system == "HRM"}
    assert found.tokens_per_s == pytest.approx(printed["decode only"], abs=0.01)
    assert found.transfer_s == pytest.approx(printed["experts over the link, one layer"], abs=5e-5)
    assert 32 * found.transfer_s == pytest.approx(printed["one token of every request"], abs=5e-4)
    assert found.cpu_home_bytes / GIB == pytest.approx(printed["CPU home"], abs=0.005)
    assert found.cpu_pinned_bytes / GIB == pytest.approx(printed["CPU pinned"], abs=0.005)
    assert found.resident_share == pytest.approx(printed["resident share of experts"], abs=1e-8)
    assert found.fits


def test_a_batch_beyond_its_memory_does_not_fit(mixtral: ModelSpec) -> None:
    assert not hrm(L4, mixtral, prompt=77, output=32, micro_batch=324, n_micro=16).fits


@pytest.mark.parametrize(("operator", "limit"), [("KV copy", 0.01), ("CPU attention", 0.08)])
def test_a_line_foretells_each_of_its_operators_points_from_the_others(operator: str, limit: float) -> None:
    points = [
        (int(r.batch) * int(r.prompt_tokens) * KV_BYTES, r.value)
        for r in rows("moe-lightning")
        if r.quantity == operator
    ]
    assert len(points) == 20
    missed = []
    for i, (n_bytes, seconds) in enumerate(points):
        fit = fit_transfer(*zip(*(p for j, p in enumerate(points) if j != i), strict=True))
        missed.append(abs((fit.latency_s + n_bytes / fit.bytes_per_s) / seconds - 1))
    assert np.mean(missed) <= limit
