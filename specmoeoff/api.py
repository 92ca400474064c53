"""What a Python program needs: `load` a `Plan` into an `Engine`, `generate` with it, `validate` it."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from specmoeoff.errors import BadInput
from specmoeoff.runtime import engine as runtime
from specmoeoff.runtime.batch_files import (
    DEFAULT_MAX_TOKENS,
    BatchLine,
    Body,
    find_problem,
    read_batch,
    text_of,
    to_request,
    to_response,
)
from specmoeoff.runtime.loading import Progress, load_runnable, open_plan
from specmoeoff.runtime.text_stream import TextStream
from specmoeoff.runtime.validate import Options, validate_plan
from specmoeoff.specs.plan import Plan
from specmoeoff.specs.profile import HardwareProfile
from specmoeoff.specs.record import RunRecord
from specmoeoff.specs.workload import Workload

Prompt = str | list[Mapping[str, str]]


class Engine(runtime.Engine):
    """The engine of a plan, with its tokenizer. Use as a context manager, from one thread at a time."""

    def __init__(
        self, plan: Plan, disk_limit_gb_per_s: float | None = None, progress: Progress = lambda *_: None
    ) -> None:
        opened = open_plan(plan, progress)
        super().__init__(**runtime.engine_settings(plan, opened, disk_limit_gb_per_s))
        self.model_name, self.tokenizer = plan.model.name, opened.tokenizer


def load(plan: Path | str, disk_limit_gb_per_s: float | None = None) -> Engine:
    """The engine of a plan file, its resident experts read. BadInput or MissingCapability where it cannot run here."""
    return Engine(load_runnable(plan), disk_limit_gb_per_s)


def generate(
    engine: Engine,
    prompts: list[Prompt],
    max_tokens: int = DEFAULT_MAX_TOKENS,
    on_text: Callable[[int, str], None] = lambda *_: None,
    **fields: Any,
) -> list[str]:
    """The answers, in order, all prompts in one batch. A prompt is a text to continue, or the messages of a chat.

    `fields` are those of a batch line's body: temperature (0, greedy, if left out), top_p, top_k, min_p, seed, stop,
    ignore_eos. Without a seed the prompt's index is one. `on_text(index of the prompt, new text)` is called as text comes.
    BadInput where a field is wrong or a prompt does not fit the context.
    """
    lines = [_line(index, prompt, {"max_tokens": max_tokens, **fields}) for index, prompt in enumerate(prompts)]
    requests = [to_request(line, engine.tokenizer, engine.spec) for line in lines]
    index_of = {request.request_id: index for index, request in enumerate(requests)}
    streams = [TextStream(engine.tokenizer, line.body.stops) for line in lines]
    answers, n_seen = [""] * len(lines), [0] * len(lines)
    try:
        engine.submit(requests)
        for _ in engine.run("generate"):
            for sequence in [*engine.live, *engine.finished]:
                i = index_of[sequence.request.request_id]
                if sequence.error:
                    raise sequence.error
                if sequence.finish_reason:
                    response = to_response(sequence, lines[i], engine.model_name, engine.tokenizer)
                    answers[i] = text_of(response["response"]["body"])
                    piece = streams[i].finish(answers[i])
                else:
                    piece = streams[i].push(sequence.output[n_seen[i] :])
                    n_seen[i] = sequence.n_output
                if piece:
                    on_text(i, piece)
            engine.finished.clear()
    finally:
        engine.cancel_all()
    return answers


def validate(
    plan: Plan | Path | str,
    prompts: Path | str,
    profile: HardwareProfile | Path | str,
    workload: Workload | Path | str,
    options: Options | None = None,
) -> RunRecord:
    """What `specmoeoff validate` finds about a plan with the prompts of a batch file: `checks` says what held.

    `profile` and `workload` are those the plan was made from.
    """
    plan = plan if isinstance(plan, Plan) else load_runnable(plan)
    profile = profile if isinstance(profile, HardwareProfile) else HardwareProfile.load(profile)
    workload = workload if isinstance(workload, Workload) else Workload.load(workload)
    lines, opened = read_batch(prompts), open_plan(plan)
    requests = [to_request(line, opened.tokenizer, opened.target.spec, ignore_eos=True) for line in lines]
    return validate_plan(plan, opened, profile, workload, requests, options or Options())


def _line(index: int, prompt: Prompt, fields: dict[str, Any]) -> BatchLine:
    wanted, kind = ("prompt", "") if isinstance(prompt, str) else ("messages", "chat/")
    try:
        body = Body.model_validate({wanted: prompt, **fields})
    except ValidationError as error:
        first = error.errors()[0]
        raise BadInput(f"prompt {index}: {'.'.join(map(str, first['loc']))}: {first['msg']}.") from None
    url = f"/v1/{kind}completions"
    return BatchLine(custom_id=f"prompt {index}", url=url, body=body, problem=find_problem(url, body))
