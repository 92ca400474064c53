"""Writes docs/profile.schema.json, the JSON Schema of a hardware profile: `python tools/profile_schema.py`."""

import json
from pathlib import Path

from specmoeoff.specs.profile import HardwareProfile

TARGET = Path(__file__).parents[1] / "docs" / "profile.schema.json"


def text() -> str:
    """The schema as it is committed."""
    return json.dumps(HardwareProfile.model_json_schema(), indent=1) + "\n"


if __name__ == "__main__":
    TARGET.write_text(text())
