"""Shipped facts can be read, and a name stands for its file."""

from pathlib import Path

import pytest

from specmoeoff.errors import BadInput
from specmoeoff.profiles import find, names
from specmoeoff.specs.profile import HardwareProfile
from specmoeoff.specs.workload import Workload


def test_all_that_is_shipped_can_be_read() -> None:
    assert [HardwareProfile.load(find("machines", name)).kind for name in names("machines")] == ["measured"]
    assert [Workload.load(find("workloads", name)).kind for name in names("workloads")] == ["measured"]


def test_a_file_comes_before_a_name_and_what_is_neither_is_refused(tmp_path: Path) -> None:
    assert find("machines", str(tmp_path)) == tmp_path
    with pytest.raises(BadInput, match=r"nothing-like-it: no such file, and no shipped name; .* epyc-zen4-2c"):
        find("machines", "nothing-like-it")
