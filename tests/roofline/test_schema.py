"""The published JSON Schema is the profile's own, and what is shipped keeps to it."""

import json
import runpy
from pathlib import Path

import pytest

from specmoeoff.profiles import find, names

SCHEMA = Path(__file__).parents[2] / "docs" / "profile.schema.json"


def test_the_committed_schema_is_the_profiles() -> None:
    made = runpy.run_path(str(SCHEMA.parents[1] / "tools" / "profile_schema.py"))["text"]()
    assert SCHEMA.read_text() == made, "run tools/profile_schema.py"


@pytest.mark.parametrize("name", names("machines"))
def test_a_shipped_profile_keeps_to_it_and_an_unknown_field_does_not(name: str) -> None:
    jsonschema = pytest.importorskip(
        "jsonschema", reason="`pip install jsonschema` checks shipped profiles by the schema"
    )
    validator = jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text()))
    profile = json.loads(find("machines", name).read_text())
    assert not list(validator.iter_errors(profile))
    assert list(validator.iter_errors(profile | {"surprise": 1}))
