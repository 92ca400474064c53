"""Two searches over one space: all of it, or Optuna's share of it. Both see the same prices."""

from collections.abc import Callable, Iterable, Iterator
from typing import Literal

from specmoeoff.errors import BadInput
from specmoeoff.specs.plan import Prediction
from specmoeoff.tuner.space import Choice, Space

SearchName = Literal["exhaustive", "optuna"]
# What is predicted of a choice, None where it does not fit or was not measured.
Price = Callable[[Choice], Prediction | None]
# Tokens per second that a choice cannot exceed, much cheaper than its price.
Bound = Callable[[Choice], float]
Progress = Callable[[float], None]
Index = dict[str, int]  # a point: a position on every axis

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
    drafts = [(d, k) for d, lengths in space.draft_lengths.items() for k in lengths]
    axes = {
        "batch": space.batches,
        "micro_batches": space.micro_batches,
        "stream_slots": space.stream_slots,
        "prefetch": space.prefetch_thresholds,
        "threads": space.n_threads,
    }
    sizes = {"draft": len(drafts), **{name: len(values) for name, values in axes.items()}}
    priced: dict[Choice, Prediction | None] = {}

    def evaluate(index: Index) -> float | None:
        choice = Choice(*drafts[index["draft"]], *(values[index[name]] for name, values in axes.items()))  # type: ignore[arg-type]
        if choice not in priced:
            priced[choice] = price(choice)
        found = priced[choice]
        return found.tokens_per_s if found else None

    middle = {"batch": len(space.batches) // 2, "stream_slots": len(space.stream_slots) // 2}
    starts = [{**dict.fromkeys(sizes, 0), "draft": draft, **middle} for draft in (0, len(drafts) // 2)]
    optuna_trials(sizes, evaluate, starts, n_trials, seed, problem, storage, progress)
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
    """Every trial's point of a grid of `sizes` and its value (None: does not fit), in their order.

    One trial at a time; TPE is seeded anew from (seed, trial), so a resumed study is identical. Nine trials of ten are a step
    along one axis from the best so far, in turn for each of the three best drafts, while there are steps not yet tried: TPE
    finds a region within a hundred trials but not its top, and the best of one draft length is far from another's.
    `sizes` has the axis `draft`. `problem` names what is asked for: a study is resumed only for the same problem.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = _open_study(optuna, storage, f"specmoeoff-{problem}-{seed}")
    if not study.trials:
        for start in starts:
            study.enqueue_trial(start)
    tried: list[tuple[Index, float | None]] = []
    for trial in study.trials:  # of an earlier sitting
        if trial.state == optuna.trial.TrialState.COMPLETE:
            tried.append((trial.params, evaluate(trial.params)))
        elif trial.state == optuna.trial.TrialState.RUNNING:  # killed there
            study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
    waiting = sum(t.state == optuna.trial.TrialState.WAITING for t in study.trials)
    for done in range(sum(t.state.is_finished() for t in study.trials), n_trials):
        study.sampler = optuna.samplers.TPESampler(seed=seed * 100_003 + done)
        if done >= waiting and done % 10 and (step := _step_from_best(sizes, tried, done)):
            study.enqueue_trial(step)
        trial = study.ask()
        index = {name: trial.suggest_int(name, 0, n - 1) for name, n in sizes.items()}
        value = evaluate(index)
        tried.append((index, value))
        trial.set_constraint("fits", 0.0 if value else 1.0)
        study.tell(trial, value or 0.0)
        progress((done + 1) / n_trials)
    return tried


def _step_from_best(sizes: dict[str, int], tried: list[tuple[Index, float | None]], turn: int) -> Index | None:
    """A point not yet tried, one step along one axis from the best of a good draft; None where there is none."""
    best: dict[int, Index] = {}
    for index, _ in sorted(tried, key=lambda t: -(t[1] or 0.0)):
        best.setdefault(index["draft"], index)
    good = list(best.values())[:3]
    seen = {tuple(index[name] for name in sizes) for index, _ in tried}
    for i in range(len(good)):
        index = good[(turn + i) % len(good)]
        for distance in (1, -1):
            for name, n in sizes.items():
                step = {**index, name: index[name] + distance}
                if 0 <= step[name] < n and tuple(step[axis] for axis in sizes) not in seen:
                    return step
    return None


def _open_study(optuna, storage: str | None, name: str):  # type: ignore[no-untyped-def]
    try:
        return optuna.create_study(
            direction="maximize", storage=_storage(storage), study_name=name, load_if_exists=True
        )
    except Exception as error:  # of whichever database library
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BadInput(
            f"--storage {storage}: cannot be opened ({reason}); give a journal file or a database URL."
        ) from None


def _storage(url: str | None) -> object:
    if url is None or "://" in url:
        return url
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    return JournalStorage(JournalFileBackend(url))


def lengths_once(ranked: Iterable[Choice]) -> Iterator[Choice]:
    """The best of each draft length, in the order given."""
    seen: set[int] = set()
    for choice in ranked:
        if choice.draft_length not in seen:
            seen.add(choice.draft_length)
            yield choice
