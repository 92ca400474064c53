"""The whole grid of `bench/lossless.py` on a tiny model: no token differs, and a false acceptance is seen."""

import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from specmoeoff.runtime.pack import PackedModel, pack_model
from specmoeoff.runtime.sequence import Request

SCRIPT = Path(__file__).parents[2] / "bench" / "lossless.py"
N_CELLS = 2 * 8 * 3


@pytest.fixture
def bench() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("lossless", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["lossless"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["lossless"]


@pytest.fixture
def pair(save_model: Callable[..., Path]) -> list[PackedModel]:
    """Weights large enough that drafts differ from the target and from each other."""
    return [pack_model(save_model(kind, num_hidden_layers=2, initializer_range=0.1)) for kind in ("mixtral", "llama")]


def requests(n: int) -> list[Request]:
    """Of few different tokens, so that prompt lookup finds something."""
    rng = np.random.default_rng(0)
    return [
        Request(f"r{i}", tuple(rng.integers(3, 9, int(rng.integers(1, 40))).tolist()), int(rng.integers(1, 24)))
        for i in range(n)
    ]


def test_no_cell_of_the_grid_differs(bench: ModuleType, pair: list[PackedModel]) -> None:
    cells = list(bench.run_grid(*pair, requests(10 * N_CELLS)))
    assert len({(c.drafter, c.draft_length, c.batch) for c in cells}) == N_CELLS
    assert {c.requests for c in cells} == {10}
    assert sum(c.different for c in cells) == 0
    assert all(c.tokens > 0 for c in cells)


def test_accepting_what_the_target_did_not_choose_is_seen(bench: ModuleType, pair: list[PackedModel]) -> None:
    cells = list(bench.run_grid(*pair, requests(3 * N_CELLS), accept_=lambda drafted, chosen: len(drafted)))
    assert all(c.different > 0 for c in cells if c.drafter == "model")
