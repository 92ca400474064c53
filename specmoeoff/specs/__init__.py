"""What the stages hand each other: pure data, versioned, validated at the edge."""

from specmoeoff.specs.model import ModelSpec
from specmoeoff.specs.plan import Plan
from specmoeoff.specs.profile import HardwareProfile
from specmoeoff.specs.record import RunRecord
from specmoeoff.specs.workload import Workload

__all__ = ["HardwareProfile", "ModelSpec", "Plan", "RunRecord", "Workload"]
