"""What `validate` asks on every kind of machine."""

from collections.abc import Mapping, Sequence

from specmoeoff.specs.record import Check


def check(name: str, passed: bool, detail: str, cause: str) -> Check:
    """A question with its answer; the cause is told where the answer is no."""
    return Check(name=name, passed=passed, detail=detail, cause="" if passed else cause)


def lossless(plain: Mapping[str, Sequence[int]], tuned: Mapping[str, Sequence[int]]) -> Check:
    """Whether the tokens of every request, by its id, are those of plain decoding."""
    different, cause = [i for i in plain if plain[i] != tuned.get(i)], ""
    if different:
        first = different[0]
        pairs = zip(plain[first], tuned.get(first, ()), strict=False)
        at = next((i for i, (a, b) in enumerate(pairs) if a != b), 0)
        cause = (
            f"{len(different)} requests differ from plain decoding, {first!r} first, at token {at}: verification "
            "accepts tokens the target did not choose"
        )
    n_tokens = sum(map(len, plain.values()))
    detail = f"{len(plain) - len(different)} of {len(plain)} requests, {n_tokens} tokens equal to plain decoding"
    return check("lossless", not different, detail, cause)
