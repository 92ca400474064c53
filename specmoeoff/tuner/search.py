"""Two searches over one space: all of it, or Optuna's share of it. Both see the same prices."""

import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Literal

from specmoeoff.specs.plan import Prediction
from specmoeoff.tuner.space import Choice, Index, Space

SearchName = Literal["exhaustive", "optuna"]
# What is predicted of a choice, None where it does not fit or was not measured.
Price = Callable[[Choice], Prediction | None]
# Tokens per second that a choice cannot exceed, much cheaper than its price.
Bound = Callable[[Choice], float]
Progress = Callable[[float], None]

TIE = 0.995  # closer than any prediction is true: the choice that drafts less, then reads less, is taken


def rank(priced: dict[Choice, Prediction | None]) -> list[Choice]:
    """Feasible choices, best first; those that tie with the best by how little they draft and read."""
    feasible = {c: p for c, p in priced.items() if p is not None}
    best = max((p.tokens_per_s for p in feasible.values()), default=0.0)

    def key(choice: Choice) -> tuple[float, ...]:
        p = feasible[choice]
        if p.tokens_per_s >= TIE * best:
            return 0, choice.draft_length, p.disk_bytes
        return 1, -p.tokens_per_s

    return sorted(feasible, key=key)


def exhaustive(space: Space, price: Price, bound: Bound, progress: Progress = lambda share: None) -> list[Choice]:
    """The best of all choices, and of each draft length at its batch (within TIE).

    Choices are priced in the order of their bounds, until the bound of the next shows that no other can win.
    """
    choices = list(space.choices())
    priced: dict[Choice, Prediction | None] = {}

    def price_best(some: Iterable[Choice], margin: float) -> None:
        best = 0.0
        for choice in sorted(some, key=lambda c: -bound(c)):
            if bound(choice) <= margin * best:
                return
            if choice not in priced:
                priced[choice] = price(choice)
            found = priced[choice]
            best = max(best, found.tokens_per_s if found else 0.0)

    price_best(choices, 1.0)
    if ranked := rank(priced):
        lengths: dict[tuple[str, int], list[Choice]] = {}
        for choice in choices:
            if choice.batch == ranked[0].batch:
                lengths.setdefault((choice.drafter, choice.draft_length), []).append(choice)
        for i, some in enumerate(lengths.values()):
            price_best(some, 1 / TIE)
            progress((i + 1) / len(lengths))
    return rank(priced)


def optuna_search(
    space: Space,
    price: Price,
    n_trials: int,
    seed: int,
    problem: str,
    storage: str | None = None,
    progress: Progress = lambda share: None,
) -> list[Choice]:
    """The choices that Optuna looked at, best first."""
    sizes, priced = space.sizes, dict[Choice, Prediction | None]()

    def evaluate(index: Index) -> float | None:
        choice = space.choice(index)
        if choice not in priced:
            priced[choice] = price(choice)
        found = priced[choice]
        return found.tokens_per_s if found else None

    middle = {"batch": len(space.batches) // 2, "stream_slots": len(space.stream_slots) // 2}
    starts = [{**dict.fromkeys(sizes, 0), "draft": draft, **middle} for draft in (0, sizes["draft"] // 2)]
    for index, _ in optuna_trials(sizes, evaluate, starts, n_trials, seed, problem, storage, progress):
        evaluate(index)  # also those of an earlier sitting or another worker
    return rank(priced)


def optuna_trials(
    sizes: dict[str, int],
    evaluate: Callable[[Index], float | None],
    starts: Iterable[Index],
    n_trials: int,
    seed: int,
    problem: str,
    storage: str | None = None,
    progress: Progress = lambda share: None,
) -> list[tuple[Index, float | None]]:
    """Every trial's point of a grid of `sizes` and its value (None: does not fit or failed), in the order of trials.

    TPE is seeded anew from (seed, turn), and a trial whose worker died is failed and its turn taken again: a study that was
    killed and resumed tries what an uninterrupted one does. Nine turns of ten are a step along one axis from the best so far,
    in turn for each of the three best drafts, while there are steps not yet tried: TPE finds a region within a hundred trials
    but not its top, and the best of one draft length is far from another's. Workers that share a storage share the turns.
    `sizes` has the axis `draft`. `problem` names what is asked for: a study is resumed only for the same problem.
    """
    import optuna

    from specmoeoff.tuner.study import fail_dead, open_study, worker

    study = open_study(storage, f"specmoeoff-{problem}-{seed}")
    starts, states = list(starts), optuna.trial.TrialState
    while True:
        fail_dead(study)
        trials = study.get_trials(deepcopy=False, states=(states.COMPLETE, states.RUNNING))
        tried = [(t.params, t.value or None) for t in trials if t.state == states.COMPLETE]
        progress(min(1.0, len(tried) / n_trials))
        if len(tried) >= n_trials:
            return tried
        turn = len(trials)
        if turn >= n_trials:  # other workers have the last ones
            time.sleep(0.05)
            continue
        study.sampler = optuna.samplers.TPESampler(seed=seed * 100_003 + turn)
        point = starts[turn] if turn < len(starts) else None
        if turn >= len(starts) and turn % 10:
            point = _step_from_best(sizes, tried, [t.params for t in trials], turn)
        if point:
            with warnings.catch_warnings(category=optuna.exceptions.ExperimentalWarning, action="ignore"):
                study.sampler = optuna.samplers.PartialFixedSampler(point, study.sampler)
        trial = study.ask()
        trial.set_user_attr("worker", worker(os.getpid()))
        index = {name: trial.suggest_int(name, 0, n - 1) for name, n in sizes.items()}
        value = evaluate(index)
        trial.set_constraint("fits", 0.0 if value else 1.0)
        study.tell(trial, value or 0.0, skip_if_finished=True)


def _step_from_best(
    sizes: dict[str, int], tried: list[tuple[Index, float | None]], begun: list[Index], turn: int
) -> Index | None:
    """A point not yet begun, one step along one axis from the best of a good draft; None where there is none."""
    best: dict[int, Index] = {}
    for index, _ in sorted(tried, key=lambda t: -(t[1] or 0.0)):
        best.setdefault(index["draft"], index)
    good = list(best.values())[:3]
    seen = {tuple(index.get(name) for name in sizes) for index in begun}
    for i in range(len(good)):
        index = good[(turn + i) % len(good)]
        for distance in (1, -1):
            for name, n in sizes.items():
                step = {**index, name: index[name] + distance}
                if 0 <= step[name] < n and tuple(step[axis] for axis in sizes) not in seen:
                    return step
    return None


def lengths_once(ranked: Iterable[Choice]) -> Iterator[Choice]:
    """The best of each draft length, in the order given."""
    seen: set[int] = set()
    for choice in ranked:
        if choice.draft_length not in seen:
            seen.add(choice.draft_length)
            yield choice
