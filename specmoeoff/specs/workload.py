"""What the requests look like and how they behave on a model: lengths, acceptance, expert popularity."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, field_validator
from pydantic_core import PydanticCustomError

from specmoeoff.specs.base import FileSpec, Spec

Share = Annotated[float, Field(ge=0, le=1)]


class Lengths(Spec):
    """Tokens per request."""

    mean: float
    p50: int
    p95: int
    max: int


class Acceptance(Spec):
    """conditional[i]: share of rounds in which draft token i+1 was accepted, among those in which token i was."""

    conditional: tuple[Share, ...]
    n_rounds: int
    provenance: str


class UnionPoint(Spec):
    """Distinct experts per layer (mean over layers) touched by `requests` requests of `tokens` consecutive tokens."""

    requests: int
    tokens: int
    distinct: float


class Workload(FileSpec):
    """As `specmoeoff workload` writes it."""

    what: ClassVar[str] = "workload"
    name: str
    kind: Literal["measured", "published"] = "measured"
    created: str
    model_name: str
    model_fingerprint: str
    draft_fingerprint: str | None = None
    prompts_sha256: str | None = None
    n_requests: int
    prompt_tokens: Lengths
    output_tokens: Lengths
    acceptance: dict[str, Acceptance]
    popularity: tuple[tuple[Share, ...], ...] = Field(
        description="per layer and expert: share of tokens that choose it; a layer sums to n_active"
    )
    union_exponent: Share = Field(
        description="consecutive tokens share experts: w of them count as w**union_exponent independent ones"
    )
    union: tuple[UnionPoint, ...]
    n_tokens_measured: int

    @field_validator("popularity")
    @classmethod
    def _equally_long(cls, popularity: tuple[tuple[float, ...], ...]) -> tuple[tuple[float, ...], ...]:
        if len({len(layer) for layer in popularity}) != 1:
            raise PydanticCustomError("layers", "every layer must list the same experts; measure the workload anew")
        return popularity
