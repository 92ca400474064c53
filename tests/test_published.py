"""Published numbers: each says where it is from and what it includes; what follows from arithmetic comes out."""

import runpy
from pathlib import Path

import pytest

from specmoeoff.profiles.published import Row, names, rows

BENCH = runpy.run_path(str(Path(__file__).parents[1] / "bench" / "published.py"))
PAPER = {row.quantity + row.setting[:4]: row for row in rows("specmoeoff") if row.where == "text"}


def replay(row: Row, name: str = "specmoeoff") -> float:
    """Of the first model that has one."""
    return next(found.value for found in BENCH["REPLAYS"][name](row) if found.value is not None)


@pytest.mark.parametrize("name", names())
def test_every_row_names_its_source_its_setting_and_what_it_includes(name: str) -> None:
    found = rows(name)
    assert all(r.source and r.where and r.setting and r.model and r.system and r.quantity and r.includes for r in found)
    assert all(r.value > 0 for r in found)
    assert len({r[: BENCH["N_KEYS"]] for r in found}) == len(found), "two rows for one number"
    assert name in BENCH["REPLAYS"]


@pytest.mark.parametrize(
    ("quantity", "expected"),
    [
        ("largest batchA30 ", 824),
        ("largest batch4090", 515),
        ("two-layer expert bufferA30 ", 5.25),
        ("expertsA30 ", 84.0),
    ],
)
def test_the_papers_counts_come_out_exactly(quantity: str, expected: float) -> None:
    assert replay(PAPER[quantity]) == PAPER[quantity].value == expected


def test_the_papers_kv_split_and_utilisation_come_out() -> None:
    split = {row.system + row.quantity: replay(row) for row in rows("specmoeoff") if row.where == "sec. 5.2"}
    assert [round(v, 1) for v in split.values()] == [142.2, 17.8]
    utilisation = next(r for r in rows("specmoeoff") if r.quantity.startswith("GPU utilisation") and r.batch == "824")
    assert replay(utilisation) == pytest.approx(3.12, abs=0.005)


def test_every_row_has_a_replay_or_a_reason() -> None:
    for name in names():
        for row in rows(name):
            for found in BENCH["REPLAYS"][name](row):
                assert found.assumes
                assert (found.value is None) == (found.by == "not modelled")
