"""A profile's tables lose nothing, and their statistics are pandas' own."""

import csv
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from specmoeoff.errors import BadInput
from specmoeoff.roofline.tables import results_table, samples_table, write_csv
from specmoeoff.roofline.timing import measurement
from specmoeoff.specs.profile import DiskPoint, HardwareProfile, LinkCurve, LinkPoint, Roof

FLIPPING = (32.0, 56.1, 31.9, 56.0, 32.1, 55.9, 32.05, 56.2)
TIMES = ("device_s", "api_s", "end_to_end_s")


@pytest.fixture
def measured(made_up_profile: HardwareProfile) -> HardwareProfile:
    """With a GPU's roof that flips, a link and a sweep."""
    profile = made_up_profile
    roof = Roof(name="memory_read", n_threads=0, rate=measurement(FLIPPING, "GB/s"), device="gpu")
    copies = [
        LinkPoint(n_bytes=n, **{what: measurement([1.1e-5, t, 0.9e-5], "s") for what in TIMES})
        for n, t in ((4096, 1e-5), (8192, 1.05e-5))
    ]
    link = LinkCurve(
        direction="h2d",
        host_memory="pinned",
        beside="nothing",
        points=tuple(copies),
        latency_s=9e-6,
        latency_interval_s=(8e-6, 1e-5),
        gb_per_s=4.1,
        fit_error=0.01,
        pcie_generation=4,
        pcie_width=8,
    )
    point = DiskPoint(chunk_bytes=1 << 20, n_readers=2, gb_per_s=measurement([0.1 + 0.2, 1 / 3], "GB/s"))
    disk = profile.disk.model_copy(update={"sweep": (point,)})
    return profile.model_copy(update={"memory": (*profile.memory, roof), "links": (link,), "disk": disk})


def test_every_raw_sample_is_a_row_in_the_order_it_was_taken(measured: HardwareProfile) -> None:
    table = samples_table(measured)
    assert list(table.columns) == ["what", "device", "n_threads", "unit", "index", "value"]
    gpu = table[(table.what == "memory_read") & (table.device == "gpu")]
    assert tuple(gpu.value) == FLIPPING
    assert list(gpu["index"]) == list(range(8))
    kept = _all_samples(measured.model_dump(mode="json"))
    assert sorted(table.value) == sorted(value for samples in kept for value in samples)
    assert table.groupby(["what", "device", "n_threads"], dropna=False).ngroups == len(kept)


def _all_samples(value: object) -> list[list[float]]:
    """Every list of samples in the file's JSON."""
    if isinstance(value, dict):
        own = [value["samples"]] if "samples" in value else []
        return own + [s for v in value.values() for s in _all_samples(v)]
    return [s for v in value for s in _all_samples(v)] if isinstance(value, list) else []


def test_statistics_are_those_of_the_samples(measured: HardwareProfile) -> None:
    samples, results = samples_table(measured), results_table(measured)
    row = results[(results.what == "memory_read") & (results.device == "gpu")].iloc[0]
    values = pd.Series(FLIPPING)
    expected = [values.max(), values.quantile(0.95), values.median(), values.quantile(0.1), len(values)]
    assert list(row[["max", "p95", "median", "p10", "n"]]) == pytest.approx(expected)
    assert row.variation == pytest.approx(np.std(FLIPPING) / np.mean(FLIPPING))
    assert row.modes == "32.025; 56.05"
    keys = ["what", "device", "n_threads"]
    assert samples.groupby(keys, dropna=False).ngroups == len(results.dropna(subset=["max"]))


def test_operators_and_links_are_numbers_too(measured: HardwareProfile) -> None:
    results = results_table(measured).set_index("what")
    assert results.loc["h2d pinned beside nothing, fit", "value"] == 4.1
    assert results.loc["h2d pinned beside nothing, 8192 bytes waited for", "value"] == 1.05e-5
    assert list(results.loc["h2d pinned beside nothing, fitted latency", ["low", "high"]]) == [8e-6, 1e-5]
    assert results.loc["h2d pinned beside nothing, PCIe lanes", "value"] == pytest.approx(15.75, abs=0.01)
    n_points = sum(len(t.seconds) for t in measured.operators)
    assert results.index.str.contains(" of ").sum() == n_points
    assert not results[["value", "unit", "statistic", "provenance"]].isna().any(axis=None)


def test_csv_files_give_back_every_digit(measured: HardwareProfile, tmp_path: Path) -> None:
    assert [p.name for p in write_csv(measured, tmp_path)] == ["samples.csv", "results.csv"]
    for name, table in (("samples.csv", samples_table(measured)), ("results.csv", results_table(measured))):
        with (tmp_path / name).open(newline="") as stream:
            rows = list(csv.DictReader(stream))
        assert [row["what"] for row in rows] == list(table.what)
        for column in table.select_dtypes("float"):
            assert [float(row[column] or "nan") for row in rows] == pytest.approx(
                list(table[column]), rel=0, nan_ok=True
            )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["results.csv", "samples.csv"]


def test_a_folder_that_cannot_be_made_is_a_sentence(measured: HardwareProfile, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"tables: cannot write: the folder .* does not exist; create it first"):
        write_csv(measured, tmp_path / "missing" / "tables")
