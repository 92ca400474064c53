"""The second opinion: what is predicted to be best is run, and what ran fastest is planned.

Runs are handed in as a function of a plan; one that fails rules out its choice and nothing else.
"""

from collections.abc import Callable, Hashable, Iterable, Sequence
from itertools import islice
from statistics import median
from typing import Generic, Protocol, TypeVar

from specmoeoff.errors import AnswerIsNo, TrialFailed
from specmoeoff.specs.plan import DrafterName, MeasuredTrial, Plan
from specmoeoff.tuner.search import Price, Progress, optuna_trials
from specmoeoff.tuner.space import Choice, Index, Space

Measure = Callable[[Plan], float]  # tokens per second; raises TrialFailed
ROUNDS, FINALISTS = 3, 3


class Runnable(Hashable, Protocol):
    """A choice of either kind of machine."""

    @property
    def drafter(self) -> DrafterName: ...

    @property
    def draft_length(self) -> int: ...

    @property
    def batch(self) -> int: ...


C = TypeVar("C", bound=Runnable)


class Trials(Generic[C]):
    """Runs of choices, and what came of them. `plan_of` makes a choice's plan."""

    def __init__(self, plan_of: Callable[[C], Plan], measure: Measure) -> None:
        self._plan_of, self._measure = plan_of, measure
        self._rates: dict[C, list[float]] = {}
        self._failures: dict[C, str] = {}

    def run(self, choice: C) -> float | None:
        """Tokens per second of one more run, None where it failed, now or before."""
        self._rates.setdefault(choice, [])
        if choice in self._failures:
            return None
        try:
            self._rates[choice].append(self._measure(self._plan_of(choice)))
        except TrialFailed as failure:
            self._failures[choice] = f"{failure.kind}: {failure}"
            return None
        return self._rates[choice][-1]

    def best(self, candidates: Iterable[C]) -> C:
        """The highest median of a few rounds in which all take turns. Raises AnswerIsNo where none survives."""
        candidates = list(dict.fromkeys(candidates))
        for _ in range(ROUNDS):
            for choice in candidates:
                self.run(choice)
        alive = [c for c in candidates if c not in self._failures]
        if not alive:
            raise AnswerIsNo(f"--measure: no run ended well; the first failed with {self._failures[candidates[0]]}")
        return max(alive, key=lambda c: median(self._rates[c]))

    @property
    def told(self) -> tuple[MeasuredTrial, ...]:
        """For the plan, in the order of first runs."""
        return tuple(
            MeasuredTrial(
                drafter=c.drafter,
                draft_length=c.draft_length,
                batch=c.batch,
                predicted_tokens_per_s=self._plan_of(c).predicted.tokens_per_s,
                tokens_per_s=tuple(rates),
                failure=self._failures.get(c, ""),
            )
            for c, rates in self._rates.items()
        )


def best_by_optuna(
    trials: Trials[Choice],
    space: Space,
    price: Price,
    starts: Sequence[Choice],
    n_trials: int,
    seed: int,
    problem: str,
    storage: str | None,
    progress: Progress,
) -> Choice:
    """Of trials that begin with `starts`, the first of which stands for what is certain. The fastest are run off against it and
    each other: the best of many noisy runs was also lucky."""

    def evaluate(index: Index) -> float | None:
        choice = space.choice(index)
        return trials.run(choice) if price(choice) else None

    first = [space.index(c) for c in dict.fromkeys(starts)]
    tried = optuna_trials(space.sizes, evaluate, first, n_trials, seed, problem, storage, progress)
    fastest = sorted((t for t in tried if t[1]), key=lambda t: -(t[1] or 0.0))
    return trials.best([*islice(dict.fromkeys(space.choice(index) for index, _ in fastest), FINALISTS), starts[0]])
