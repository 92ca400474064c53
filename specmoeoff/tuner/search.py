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
    """Optuna's TPE, one trial at a time; the sampler is seeded anew from (seed, trial), so a resumed study is identical.

    `problem` names what is asked for: a study is resumed only for the same problem.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    drafts = [(d, k) for d, lengths in space.draft_lengths.items() for k in lengths]
    axes = {
        "batch": space.batches,
        "micro_batches": space.micro_batches,
        "stream_slots": space.stream_slots,
        "prefetch": space.prefetch_thresholds,
        "threads": space.n_threads,
    }
    priced: dict[Choice, Prediction | None] = {}

    def choice_of(index: dict[str, int]) -> Choice:
        return Choice(*drafts[index["draft"]], *(values[index[name]] for name, values in axes.items()))  # type: ignore[arg-type]

    study = _open_study(optuna, storage, f"specmoeoff-{problem}-{seed}")
    if not study.trials:
        for start in (0, len(drafts) // 2):
            middle = {"batch": len(space.batches) // 2, "stream_slots": len(space.stream_slots) // 2}
            study.enqueue_trial({"draft": start, **dict.fromkeys(axes, 0), **middle})
    for trial in study.trials:  # of an earlier sitting
        if trial.state == optuna.trial.TrialState.COMPLETE:
            choice = choice_of(trial.params)
            priced.setdefault(choice, price(choice))
        elif trial.state == optuna.trial.TrialState.RUNNING:  # killed there
            study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
    for done in range(sum(t.state.is_finished() for t in study.trials), n_trials):
        study.sampler = optuna.samplers.TPESampler(seed=seed * 100_003 + done)
        trial = study.ask()
        sizes = {"draft": len(drafts), **{name: len(values) for name, values in axes.items()}}
        choice = choice_of({name: trial.suggest_int(name, 0, n - 1) for name, n in sizes.items()})
        if choice not in priced:
            priced[choice] = price(choice)
        found = priced[choice]
        trial.set_constraint("fits", 0.0 if found else 1.0)
        study.tell(trial, found.tokens_per_s if found else 0.0)
        progress((done + 1) / n_trials)
    return rank(priced)


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
