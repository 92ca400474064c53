"""Two searches over one space: all of it, or Optuna's share of it. Both see the same objective."""

from collections.abc import Callable
from typing import Literal

from specmoeoff.errors import BadInput
from specmoeoff.tuner.space import Choice, Space

SearchName = Literal["exhaustive", "optuna"]
# Tokens per second of a choice, None where it does not fit.
Objective = Callable[[Choice], float | None]
Progress = Callable[[float], None]


def exhaustive(space: Space, objective: Objective, progress: Progress = lambda share: None) -> list[Choice]:
    """Feasible choices, best first.

    First every draft length with half of the other axes' points, then the whole neighbourhood of the best of each
    length: the axes other than the length act on it smoothly.
    """
    choices = list(space.choices())
    threads, micro = max(space.n_threads), space.micro_batches[0]
    coarse = [c for c in choices if c.n_threads == threads and c.micro_batches == micro]
    coarse = [c for c in coarse if c.prefetch_threshold in space.prefetch_thresholds[::2]]
    values: dict[Choice, float] = {}

    def evaluate(some: list[Choice], begin: float, end: float) -> None:
        for i, choice in enumerate(some):
            if choice not in values:
                value = objective(choice)
                values[choice] = -1.0 if value is None else value
            progress(begin + (end - begin) * (i + 1) / len(some))

    evaluate(coarse, 0.0, 0.6)
    best: dict[tuple[str, int], Choice] = {}
    for choice in sorted(coarse, key=lambda c: -values[c]):
        best.setdefault((choice.drafter, choice.draft_length), choice)
    evaluate([c for c in choices if _adjacent(c, best[c.drafter, c.draft_length], space)], 0.6, 1.0)
    return sorted((c for c in values if values[c] > 0), key=lambda c: -values[c])


def _adjacent(choice: Choice, other: Choice, space: Space) -> bool:
    """Equal but for at most one step on each of the other axes, and at most two axes changed."""
    steps = [
        abs(axis.index(a) - axis.index(b))
        for axis, a, b in (
            (space.stream_slots, choice.stream_slots, other.stream_slots),
            (space.prefetch_thresholds, choice.prefetch_threshold, other.prefetch_threshold),
            (space.micro_batches, choice.micro_batches, other.micro_batches),
            (space.n_threads, choice.n_threads, other.n_threads),
        )
        if choice.stream_slots or axis is not space.prefetch_thresholds
    ]
    return max(steps) <= 1 and sum(steps) <= 2


def optuna_search(
    space: Space,
    objective: Objective,
    n_trials: int,
    seed: int,
    storage: str | None = None,
    progress: Progress = lambda share: None,
) -> list[Choice]:
    """Optuna's TPE, one trial at a time; the sampler is seeded anew from (seed, trial), so a resumed study is identical."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    drafts = [(d, k) for d, lengths in space.draft_lengths.items() for k in lengths]
    values: dict[Choice, float] = {}

    def suggest(trial: optuna.Trial) -> Choice:
        drafter, length = drafts[trial.suggest_int("draft", 0, len(drafts) - 1)]
        return Choice(
            drafter,
            length,
            space.micro_batches[trial.suggest_int("micro_batches", 0, len(space.micro_batches) - 1)],
            space.stream_slots[trial.suggest_int("stream_slots", 0, len(space.stream_slots) - 1)],
            space.prefetch_thresholds[trial.suggest_int("prefetch", 0, len(space.prefetch_thresholds) - 1)],
            space.n_threads[trial.suggest_int("threads", 0, len(space.n_threads) - 1)],
        )

    try:
        study = optuna.create_study(
            direction="maximize", storage=_storage(storage), study_name=f"specmoeoff-{seed}", load_if_exists=True
        )
    except (OSError, ValueError) as error:
        raise BadInput(f"--storage {storage}: cannot be opened: {error}.") from None
    if not study.trials:
        middle = len(drafts) // 2
        for start in (0, middle):
            axes = {"micro_batches": 0, "stream_slots": len(space.stream_slots) // 2, "prefetch": 0, "threads": 0}
            study.enqueue_trial({"draft": start, **axes})
    for done in range(len(study.trials) - sum(t.state.name == "WAITING" for t in study.trials), n_trials):
        study.sampler = optuna.samplers.TPESampler(seed=seed * 100_003 + done)
        trial = study.ask()
        choice = suggest(trial)
        if choice not in values:
            value = objective(choice)
            values[choice] = -1.0 if value is None else value
        trial.set_constraint("fits", 0.0 if values[choice] > 0 else 1.0)
        study.tell(trial, values[choice])
        progress((done + 1) / n_trials)
    for trial in study.trials:  # trials of an earlier sitting count too
        if trial.params:
            choice = suggest(optuna.trial.FixedTrial(trial.params))  # type: ignore[arg-type]
            values.setdefault(choice, trial.value if trial.value is not None else -1.0)
    return sorted((c for c in values if values[c] > 0), key=lambda c: -values[c])


def _storage(url: str | None) -> object:
    if url is None or "://" in url:
        return url
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    return JournalStorage(JournalFileBackend(url))
