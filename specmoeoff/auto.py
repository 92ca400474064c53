"""`auto`: every stage as its own process, each with a command that can be repeated by hand."""

import json
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from specmoeoff.errors import AnswerIsNo, BadInput, MissingCapability
from specmoeoff.files import explain_os_errors, read_text, sha256_text, write_atomic
from specmoeoff.roofline.profile import machine
from specmoeoff.runtime.batch_files import read_batch, to_request
from specmoeoff.runtime.checkpoint import read_model_spec
from specmoeoff.runtime.loading import model_folder
from specmoeoff.runtime.tokenizer import Tokenizer
from specmoeoff.specs.model import ModelSpec
from specmoeoff.specs.plan import Plan
from specmoeoff.specs.profile import HardwareProfile
from specmoeoff.specs.record import RunRecord
from specmoeoff.specs.workload import Workload

N_REQUESTS = 16
DEMO_BATCH = 16
KINDS = {1: AnswerIsNo, 3: MissingCapability}


def _stage(*arguments: str | Path, fails: bool = False) -> int:
    """Run one command of ours, shown as a person would type it. A stage that may answer no returns its code."""
    words = [str(a) for a in arguments]
    print(f"$ specmoeoff {shlex.join(words)}", flush=True)
    code = subprocess.run([sys.executable, "-m", "specmoeoff", *words], check=False).returncode
    if code and not (fails and code == 1):
        raise KINDS.get(code, BadInput)(f"`specmoeoff {words[0]}` ended with exit code {code}; its message is above.")
    return code


def _still_true(spec: ModelSpec, prompts_sha256: str, profile: Path, workload: Path) -> tuple[bool, bool]:
    """Whether an earlier profile is of this machine and model, and an earlier workload of this model and these prompts."""
    try:
        known = HardwareProfile.load(profile)
        same_machine = known.machine.fingerprint == machine().fingerprint
        profiled = same_machine and any(t.shape == spec.shape_key for t in known.operators)
    except BadInput:
        profiled = False
    try:
        seen = Workload.load(workload)
        observed = (seen.model_fingerprint, seen.prompts_sha256) == (spec.fingerprint, prompts_sha256)
    except BadInput:
        observed = False
    return profiled, observed


def _longest(prompts: Path, checkpoint: Path, spec: ModelSpec) -> int:
    """Tokens of the longest request that will run, its answer included; BadInput where the model has fewer positions."""
    tokenizer, longest = Tokenizer(checkpoint), 0
    for line in read_batch(prompts)[:N_REQUESTS]:
        request = to_request(line, tokenizer, spec)
        n_prompt, needed = len(request.prompt), len(request.prompt) + request.max_tokens
        if needed > spec.max_positions:
            raise BadInput(
                f"{prompts}: request {request.request_id!r}: {n_prompt} prompt and {request.max_tokens} output tokens "
                f"exceed the {spec.max_positions} positions of {spec.name}; shorten it."
            )
        longest = max(longest, needed)
    return longest


def _remove(files: Sequence[Path]) -> None:
    for path in files:
        with explain_os_errors(path):
            path.unlink(missing_ok=True)


def run_all(model: str, prompts: Path, folder: Path, disk_limit_gb_per_s: float | None, fresh: bool) -> None:
    """All stages into `folder`; raises AnswerIsNo where validation says no, after the report is written."""
    begun = time.monotonic()
    text = read_text(prompts, "batch file")
    checkpoint = model_folder(model)
    spec = read_model_spec(checkpoint)
    longest = _longest(prompts, checkpoint, spec)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"{folder}: cannot make this folder: {error.strerror}.") from None
    profile, workload, plan = folder / "profile.json", folder / "workload.json", folder / "plan.toml"
    requests, answers, html = folder / "requests.jsonl", folder / "answers.jsonl", folder / "report.html"
    run_record, trace, record = folder / "run.json", folder / "trace.json", folder / "validation.json"
    if prompts.resolve() in {p.resolve() for p in (profile, workload, requests, answers, run_record, trace, record)}:
        raise BadInput(f"{prompts}: `auto` writes a file of this name itself; give the prompts another name.")
    profiled, observed = (False, False) if fresh else _still_true(spec, sha256_text(text), profile, workload)
    if profiled:
        print(f"{profile} is of this machine and model: kept (--fresh measures again)")
    else:
        _stage("profile", "--model", model, "-o", profile)
    if observed:
        print(f"{workload} is of this model and these prompts: kept (--fresh measures again)")
    else:
        _stage("workload", "--model", model, "--prompts", prompts, "--ignore-eos", "-o", workload)
    known = Workload.load(workload)
    observed_longest = min(known.longest_request_tokens, spec.max_positions)
    context = ["--context", str(max(longest, observed_longest))]
    cap = ["--disk-limit-gb-per-s", str(disk_limit_gb_per_s)] if disk_limit_gb_per_s else []
    batch = ["--batch", str(DEMO_BATCH)] if model == "demo" else []
    settings = [*batch, *context, *cap]
    _stage("tune", "--profile", profile, "--model", model, "--workload", workload, "-o", plan, *settings)
    # What an earlier plan led to is no longer true, and would be taken for this one's if a stage below failed.
    _remove([answers, answers.with_name(answers.name + ".partial"), run_record, trace, record, html])
    lines = [line for line in text.split("\n") if line.strip()]
    write_atomic(requests, "\n".join(lines[:N_REQUESTS]) + "\n")
    _stage("run", plan, "--input", requests, "--output", answers, "--record", run_record, "--trace", trace)
    failed = _stage("validate", plan, "--prompts", prompts, "-o", record, fails=True)
    _stage(
        "report",
        "--profile",
        profile,
        "--plan",
        plan,
        "--record",
        record,
        "--record",
        run_record,
        "--workload",
        workload,
        "-o",
        html,
    )
    _summary(Plan.load(plan), RunRecord.load(record), html, time.monotonic() - begun)
    if failed:
        raise AnswerIsNo("the plan did not hold; see the causes above and in the report.")


def _summary(plan: Plan, record: RunRecord, html: Path, seconds: float) -> None:
    print()
    for s in record.speed_ups:
        plain = median(p.plain_tokens_per_s for p in s.pairs)
        tuned = median(p.tuned_tokens_per_s for p in s.pairs)
        print(f"{s.label}: plain {plain:.1f} tokens/s, tuned (k = {plan.decode.draft_length}) {tuned:.1f} tokens/s")
        print(
            f"  speed-up {s.median:.2f}x, {s.confidence:.1%} interval {s.low:.2f} to {s.high:.2f} over {len(s.pairs)} pairs"
            f" (limit {s.limit:.2f}x: {s.limit_reason})"
        )
    print(f"lossless: {'yes' if record.lossless else 'NO'}")
    stored = {c.name: c.error for c in record.comparisons if c.provenance == "predicted, stored profile"}
    for c in record.comparisons:
        if c.limit is not None:
            print(
                f"{c.name}: predicted {c.predicted * 1e3:.1f} ms, measured {c.measured * 1e3:.1f} ms ({c.error:+.1%}; "
                f"from the stored profile {stored.get(c.name, float('nan')):+.1%})"
            )
    for check in record.checks:
        if not check.passed:
            print(f"NO: {check.cause}")
    print(f"report: {html} ({json.dumps(str(html.resolve()))})")
    print(f"all stages took {seconds:.0f} s")
