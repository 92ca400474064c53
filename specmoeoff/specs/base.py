"""What all handed-on files share: frozen, versioned, strict at the edge."""

import json
import tomllib
from pathlib import Path
from typing import Any, ClassVar, Self

import tomli_w
from pydantic import BaseModel, ConfigDict, ValidationError

from specmoeoff.errors import BadInput
from specmoeoff.files import load_json, read_text, write_atomic


class Spec(BaseModel):
    """Pure data: frozen, unknown fields refused, NaN and infinity refused."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, ser_json_inf_nan="null", protected_namespaces=()
    )


class FileSpec(Spec):
    """A Spec that is a file: JSON, or TOML where the name ends in .toml."""

    what: ClassVar[str] = "file"
    schema_version: int = 1

    def text(self, suffix: str = ".json") -> str:
        """The file's text; None fields are left out of TOML, which has no null."""
        if suffix == ".toml":
            return tomli_w.dumps(self.model_dump(mode="json", exclude_none=True))
        return json.dumps(self.model_dump(mode="json"), indent=1) + "\n"

    def save(self, path: Path | str) -> None:
        """Write atomically."""
        write_atomic(path, self.text(Path(path).suffix))

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """Read and check; a BadInput sentence names the file, the field and what is wrong."""
        return cls.parse(read_text(path, cls.what), Path(path))

    @classmethod
    def parse(cls, text: str, path: Path) -> Self:
        """`load` of a text already read."""
        try:
            data: Any = tomllib.loads(text) if path.suffix == ".toml" else load_json(text)
        except (ValueError, RecursionError) as error:
            raise BadInput(f"{path}: not a {cls.what}: {error}.") from None
        if not isinstance(data, dict):
            raise BadInput(f"{path}: not a {cls.what}: an object is expected.")
        version = data.get("schema_version")
        known = cls.model_fields["schema_version"].default
        if version != known:
            raise BadInput(
                f"{path}: schema_version is {version!r}, this version reads {known}; make the {cls.what} anew."
            )
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"]) or "file"
            raise BadInput(f"{path}: not a valid {cls.what}: {field}: {first['msg']}.") from None
