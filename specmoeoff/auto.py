"""`auto`: every stage as its own process, each with a command that can be repeated by hand."""

import json
import shlex
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

from specmoeoff.errors import AnswerIsNo, BadInput
from specmoeoff.roofline.profile import machine
from specmoeoff.runtime.checkpoint import read_model_spec
from specmoeoff.runtime.loading import model_folder
from specmoeoff.specs.plan import Plan
from specmoeoff.specs.profile import HardwareProfile
from specmoeoff.specs.record import RunRecord
from specmoeoff.specs.workload import Workload

N_REQUESTS = 32


def _stage(*arguments: str | Path, fails: bool = False) -> int:
    """Run one command of ours, shown as a person would type it. A stage that may answer no returns its code."""
    words = [str(a) for a in arguments]
    print(f"$ specmoeoff {shlex.join(words)}", flush=True)
    code = subprocess.run([sys.executable, "-m", "specmoeoff", *words], check=False).returncode
    if code and not (fails and code == 1):
        kind = AnswerIsNo if code == 1 else BadInput
        raise kind(f"`specmoeoff {words[0]}` ended with exit code {code}; its message is above.")
    return code


def _still_true(model: str, profile: Path, workload: Path) -> tuple[bool, bool]:
    """Whether an earlier profile is of this machine and model, and an earlier workload of this model."""
    spec = read_model_spec(model_folder(model))
    try:
        known = HardwareProfile.load(profile)
        same_machine = known.machine.fingerprint == machine().fingerprint
        profiled = same_machine and any(t.shape == spec.shape_key for t in known.operators)
    except BadInput:
        profiled = False
    try:
        observed = Workload.load(workload).model_fingerprint == spec.fingerprint
    except BadInput:
        observed = False
    return profiled, observed


def _first_lines(prompts: Path, n: int, target: Path) -> Path:
    lines = [line for line in prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
    target.write_text("\n".join(lines[:n]) + "\n", encoding="utf-8")
    return target


def run_all(model: str, prompts: Path, folder: Path, disk_limit_gb_per_s: float | None, fresh: bool) -> None:
    """All stages into `folder`; raises AnswerIsNo where validation says no, after the report is written."""
    begun = time.monotonic()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"{folder}: cannot make this folder: {error.strerror}.") from None
    profile, workload, plan = folder / "profile.json", folder / "workload.json", folder / "plan.toml"
    profiled, observed = (False, False) if fresh else _still_true(model, profile, workload)
    if profiled:
        print(f"{profile} is of this machine and model: kept (--fresh measures again)")
    else:
        _stage("profile", "--model", model, "-o", profile)
    if observed:
        print(f"{workload} is of this model: kept (--fresh measures again)")
    else:
        _stage("workload", "--model", model, "--prompts", prompts, "--ignore-eos", "-o", workload)
    cap = ["--disk-limit-gb-per-s", str(disk_limit_gb_per_s)] if disk_limit_gb_per_s else []
    _stage("tune", "--profile", profile, "--model", model, "--workload", workload, "-o", plan, *cap)
    lines = _first_lines(prompts, N_REQUESTS, folder / "requests.jsonl")
    answers = folder / "answers.jsonl"
    answers.unlink(missing_ok=True)
    answers.with_name(answers.name + ".partial").unlink(missing_ok=True)
    run_record, record = folder / "run.json", folder / "validation.json"
    _stage("run", plan, "--input", lines, "--output", answers, "--record", run_record, "--trace", folder / "trace.json")
    failed = _stage("validate", plan, "--prompts", prompts, "-o", record, fails=True)
    html = folder / "report.html"
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
    for c in record.comparisons:
        if c.limit is not None:
            print(
                f"{c.name}: predicted {c.predicted * 1e3:.1f} ms, measured {c.measured * 1e3:.1f} ms ({c.error:+.1%})"
            )
    for check in record.checks:
        if not check.passed:
            print(f"NO: {check.cause}")
    print(f"report: {html} ({json.dumps(str(html.resolve()))})")
    print(f"all stages took {seconds:.0f} s")
