"""A plan of the made-up machine."""

import pytest

from specmoeoff.specs.model import ModelSpec
from specmoeoff.specs.plan import Plan
from specmoeoff.specs.profile import HardwareProfile
from specmoeoff.specs.workload import Workload
from specmoeoff.tuner.tune import TuneRequest, tune


@pytest.fixture(scope="session")
def plan(
    made_up_profile: HardwareProfile, made_up_workload: Workload, target_spec: ModelSpec, draft_spec: ModelSpec
) -> Plan:
    request = TuneRequest(
        profile=made_up_profile,
        model=target_spec,
        workload=made_up_workload,
        model_source="nowhere",
        host_memory_bytes=8 << 30,
        draft=draft_spec,
        draft_source="nowhere-draft",
        batch=16,
    )
    return tune(request)
