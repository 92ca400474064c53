"""What the requests look like and how they behave on a model: lengths, acceptance, expert popularity."""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, field_validator
from pydantic_core import PydanticCustomError

from specmoeoff.errors import BadInput
from specmoeoff.specs.base import FileSpec, Spec

Share = Annotated[float, Field(ge=0, le=1)]


class Lengths(Spec):
    """Tokens per request. Published lengths may lack what nobody states."""

    mean: float
    p50: int | None = None
    p95: int | None = None
    max: int | None = None
    std: float | None = None


class Acceptance(Spec):
    """conditional[i]: share of rounds in which draft token i+1 was accepted, among those in which token i was.

    of_text: the rounds counted are those that follow a rejection, and whether a token is accepted depends on the text before
    it alone, not on where its round began: rounds of every draft length follow from these.
    """

    conditional: tuple[Share, ...]
    n_rounds: int
    provenance: str
    of_text: bool = False


class UnionPoint(Spec):
    """Distinct experts per layer (mean over layers) touched by `requests` requests of `tokens` consecutive tokens."""

    requests: int
    tokens: int
    distinct: float


class Workload(FileSpec):
    """As `specmoeoff workload` writes it; a published one belongs to no model (no fingerprint), may leave the output's
    length open, and knows no popularity, for which `popularity_zipf` stands: experts' weights fall as rank**-exponent."""

    what: ClassVar[str] = "workload"
    name: str
    kind: Literal["measured", "published"] = "measured"
    created: str
    model_name: str
    model_fingerprint: str | None = None
    draft_fingerprint: str | None = None
    prompts_sha256: str | None = None
    n_requests: int
    prompt_tokens: Lengths
    output_tokens: Lengths | None = None
    acceptance: dict[str, Acceptance]
    popularity: tuple[tuple[Share, ...], ...] | None = Field(
        default=None,
        description="per layer and expert: share of tokens that choose it; a layer sums to n_active, one without experts to 0",
    )
    popularity_zipf: Annotated[float, Field(ge=0)] = 0.0
    provenance: str = "measured here"
    union_exponent: Share = Field(
        description="consecutive tokens share experts: w of them count as w**union_exponent independent ones"
    )
    union: tuple[UnionPoint, ...]
    n_tokens_measured: int

    @field_validator("popularity")
    @classmethod
    def _equally_long(cls, popularity: tuple[tuple[float, ...], ...] | None) -> tuple[tuple[float, ...], ...] | None:
        if popularity is not None and len({len(layer) for layer in popularity}) != 1:
            raise PydanticCustomError("layers", "every layer must list the same experts; measure the workload anew")
        return popularity

    @property
    def longest_request_tokens(self) -> int:
        """Of the longest prompt and answer. Raises BadInput where one is not known."""
        if self.output_tokens is None or self.prompt_tokens.max is None or self.output_tokens.max is None:
            raise BadInput(f"workload {self.name}: the longest request is not known; give --context.")
        return self.prompt_tokens.max + self.output_tokens.max

    @property
    def middle_context_tokens(self) -> float:
        """What a request's KV cache holds on average. Raises BadInput where the output's length is open."""
        if self.output_tokens is None:
            raise BadInput(f"workload {self.name}: it leaves the output's length open; give --output-tokens.")
        return self.prompt_tokens.mean + self.output_tokens.mean / 2

    def with_output_tokens(self, n: int | None) -> Self:
        """Where the output's length is left open it is n for every request. Raises BadInput where n is missing or was
        measured."""
        if (n is None) == (self.output_tokens is None):
            told = (
                "leaves the output's length open; give --output-tokens" if n is None else "has its own output lengths"
            )
            raise BadInput(f"workload {self.name}: it {told}.")
        return self if n is None else self.model_copy(update={"output_tokens": Lengths(mean=n, p50=n, p95=n, max=n)})
