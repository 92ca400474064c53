"""The command line: each command parses, calls one function, prints. Everything heavy is imported inside commands."""

import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from specmoeoff import __version__
from specmoeoff.errors import AnotherModel, AnswerIsNo, BadInput, SpecMoEOffError

if TYPE_CHECKING:
    from specmoeoff.runtime.perplexity import Perplexities
    from specmoeoff.specs.plan import MeasuredTrial, Outlook, Plan
    from specmoeoff.specs.profile import HardwareProfile
    from specmoeoff.specs.workload import Workload
    from specmoeoff.tuner.tune import TuneRequest

app = typer.Typer(
    name="specmoeoff",
    help="Measure a machine, tune speculative decoding of offloaded Mixture-of-Experts models for it, run it, prove it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

COMPARED_ROWS = 40

Model = Annotated[str, typer.Option("--model", help="Checkpoint folder, GGUF file, or `demo`.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
Output = Annotated[Path, typer.Option("-o", "--output", help="File to write.")]
Draft = Annotated[
    str | None,
    typer.Option("--draft", help="Dense model, or eagle:HEAD, a head's folder; default: what comes with the model."),
]
PrecisionOption = Annotated[
    str, typer.Option("--precision", help="bf16 or fp32: of weights, activations and KV cache.")
]
Experts = Annotated[
    str | None,
    typer.Option(
        "--experts", help="bf16, int8, int4 or mxfp4: of the experts' weights; default: as the checkpoint has them."
    ),
]
DiskLimit = Annotated[float | None, typer.Option("--disk-limit-gb-per-s", help="Cap the disk lane.")]


def main() -> NoReturn:
    """Run the program; errors become one sentence and an exit code."""
    # Read when libgomp loads. Its default spins for milliseconds at a barrier: beside any other busy process that makes
    # each kernel up to a hundred times slower, while a short spin costs nothing that can be measured on a quiet machine.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    try:
        code = app(standalone_mode=False)
        if code == 130:  # newer typer returns this where older ones raise Abort
            raise KeyboardInterrupt
    except SpecMoEOffError as error:
        typer.echo(f"specmoeoff: {error}", err=True)
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        typer.echo("specmoeoff: interrupted; nothing finished is lost.", err=True)
        sys.exit(130)
    except Exception as error:
        # click's own usage errors: typer vendors click, so they are known by what they carry
        code = getattr(error, "exit_code", None)
        if code is None:
            raise
        error.show()  # type: ignore[attr-defined]
        sys.exit(2)
    sys.exit(code or 0)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"specmoeoff {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


class Bar:
    """A progress bar on standard error, silent where that is not a terminal or --json was given."""

    def __init__(self, bar: Any, task: Any) -> None:
        self._bar, self._task = bar, task

    def __call__(self, what: str, share: float) -> None:
        self._bar.update(self._task, description=what, completed=share)

    def count(self, what: str, done: int, total: int) -> None:
        """The same for things counted."""
        self(what, done / max(total, 1))

    def stop(self) -> None:
        """Take the bar away before the block ends."""
        self._bar.stop()


@contextmanager
def progress(what: str, quiet: bool) -> Iterator[Bar]:
    """Show a bar while the block runs."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=quiet) as bar:
        yield Bar(bar, bar.add_task(what, total=1.0))


def parse_bytes(text: str, option: str) -> int:
    """`24GiB`, `512MiB`, `1.5GB`, or plain bytes."""
    units = {"": 1, "B": 1, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "KB": 10**3, "MB": 10**6, "GB": 10**9}
    number = text.strip().rstrip("BKMGIbkmgi")
    unit = text.strip()[len(number) :].upper()
    try:
        value = float(number.replace(",", ""))
    except ValueError:
        value = -1.0
    if unit not in units or not 0 <= value < 1e9 * (1 << 30):
        raise BadInput(f"{option} {text!r}: give bytes with a unit, for example 24GiB or 512MiB.")
    return int(value * units[unit])


def _table(title: str, rows: Sequence[Sequence[str]], header: tuple[str, ...]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for name in header:
        table.add_column(name)
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def _check_files(outputs: dict[str, Path | None], inputs: dict[str, Path | None]) -> None:
    """Before any work: every output can be written, and none is an input or another output. Keys are option names."""
    from specmoeoff.files import explain_os_errors

    seen = {os.path.realpath(path): name for name, path in inputs.items() if path}
    for name, path in outputs.items():
        if path is None:
            continue
        with explain_os_errors(path):
            if path.is_dir():
                raise BadInput(f"{name} {path}: is a folder; give the name of a file to write.")
            with tempfile.TemporaryFile(dir=path.parent):
                pass
        other = seen.setdefault(os.path.realpath(path), name)
        if other != name:
            raise BadInput(f"{name} {path}: is also {other}; give a file of its own.")


def _check_range(option: str, value: float | None, low: float, high: float) -> None:
    """typer's own limits let nan through."""
    if value is not None and not low <= value <= high:
        raise BadInput(f"{option} {value:g}: give a number from {low:g} to {high:g}.")


def _check_disk_limit(value: float | None) -> None:
    _check_range("--disk-limit-gb-per-s", value, 0.01, 1000.0)


def _check_formats(precision: str, experts: str | None) -> None:
    if precision not in ("bf16", "fp32"):
        raise BadInput(f"--precision {precision}: choose bf16 or fp32.")
    if experts not in (None, "bf16", "int8", "int4", "mxfp4"):
        raise BadInput(f"--experts {experts}: choose bf16, int8, int4 or mxfp4.")


def _open_target(model: str, bar: Bar, precision: Any = "bf16", experts: Any = None) -> tuple[Any, Any]:
    """Packed target and the tokenizer. What experts in fewer bits than the checkpoint's cost is told, and measured once."""
    from specmoeoff.runtime.checkpoint import read_model_spec
    from specmoeoff.runtime.loading import model_folder
    from specmoeoff.runtime.pack import pack_model
    from specmoeoff.runtime.tokenizer import Tokenizer

    folder = model_folder(model)
    own = read_model_spec(folder).expert_format
    tokenizer = Tokenizer(folder)  # before packing, which may take minutes
    packed = pack_model(folder, bar.count, precision, experts)
    if packed.spec.expert_format not in ("bf16", own):
        try:
            typer.echo(f"note: {_perplexities(packed, folder, tokenizer, bar).sentence}", err=True)
        except SpecMoEOffError as error:
            _warn(f"perplexity with experts in {experts} was not measured: {error}")
    return packed, tokenizer


def _perplexities(packed: Any, folder: Path, tokenizer: Any, bar: Bar, text: Path | None = None) -> "Perplexities":
    """Kept beside the packed experts for the text they were measured on."""
    from specmoeoff.files import sha256_text
    from specmoeoff.runtime.perplexity import Perplexities, compare, text_of

    words, path = text_of(text), packed.folder / "perplexities.json"
    if path.exists() and (known := Perplexities.load(path)).text_sha256 == sha256_text(words):
        return known
    found = compare(packed, folder, tokenizer, words, _n_cores(), bar.count)
    found.save(path)
    return found


@app.command()
def doctor(as_json: Json = False) -> None:
    """What this machine can do, what is missing, and the remedy."""
    from dataclasses import asdict

    from specmoeoff.roofline.doctor import examine

    findings = examine()
    if as_json:
        typer.echo(json.dumps([asdict(f) for f in findings], indent=1))
    else:
        rows = [(f.name, f.status, f.detail, f.remedy or "") for f in findings]
        _table("This machine", rows, ("what", "status", "found", "remedy"))


@app.command()
def profile(
    output: Output = Path("profile.json"),
    model: Annotated[list[str] | None, typer.Option("--model", help="Also measure this model's operators.")] = None,
    draft: Draft = None,
    precision: PrecisionOption = "bf16",
    experts: Experts = None,
    budget: Annotated[float, typer.Option("--budget", help="Seconds to spend, about.")] = 60.0,
    strict: Annotated[
        bool, typer.Option("--strict", help="Fail where the machine was too busy to be measured.")
    ] = False,
    csv: Annotated[Path | None, typer.Option("--csv", help="Folder for every sample and result as CSV.")] = None,
    as_json: Json = False,
) -> None:
    """Measure the machine: peaks, memory, disk, and a model's operators."""
    from specmoeoff.roofline.profile import measure_profile
    from specmoeoff.runtime.loading import find_draft, model_folder

    _check_files({"--output": output}, {})
    _check_range("--budget", budget, 5.0, 86400.0)
    _check_formats(precision, experts)
    if draft and not model:
        raise BadInput("--draft: drafts for a model; add --model.")
    with progress("opening the model", as_json) as bar:
        specs, disk_file = [], None
        for name in model or []:
            target, _ = _open_target(name, bar, precision, experts)
            disk_file = disk_file or target.expert_path
            found = find_draft(name, draft, target.spec)
            specs += [target.spec, *([found.spec] if found else [])]
        checkpoint = model_folder(model[0]) if model else None
        result = measure_profile(specs, budget, disk_file, progress=bar, strict=strict, checkpoint=checkpoint)
    result.save(output)
    if as_json:
        typer.echo(json.dumps({"profile": str(output), "duration_s": result.duration_s}))
        return
    _show_profile(result)
    if csv:
        from specmoeoff.roofline.tables import write_csv

        typer.echo(f"wrote {' and '.join(map(str, write_csv(result, csv)))}")
    typer.echo(f"wrote {output} in {result.duration_s:.0f} s")


def _show_profile(profile: "HardwareProfile") -> None:
    """Roofs by name with a column for every number of threads, then what was noticed and what is missing."""
    by_name: dict[tuple[str, str], dict[int, str]] = {}
    for r in (*profile.peaks, *profile.memory):
        name = r.name if r.device == "cpu" else f"GPU {r.name}"
        by_name.setdefault((name, r.rate.unit), {})[r.n_threads] = f"{r.rate.value:,.1f}"
    counts = sorted({n for rates in by_name.values() for n in rates})
    rows = [(name, unit, *(rates.get(n, "") for n in counts)) for (name, unit), rates in by_name.items()]
    headers = ("what", "unit", *(f"{n} thread{'s' if n > 1 else ''}" if n else "GPU" for n in counts))
    _table(f"{profile.machine.cpu}, {profile.machine.isa}", rows, headers)
    for level, latency in profile.latency_s.items():
        typer.echo(f"{level} latency: {latency.value * 1e9:.1f} ns")
    if profile.disk:
        disk = profile.disk
        typer.echo(
            f"disk: {disk.read_gb_per_s.value:.2f} GB/s by {disk.n_readers} readers of {disk.chunk_bytes:,} bytes, "
            f"latency {disk.latency_s.value * 1e6:.0f} us"
        )
    for name, speeds in profile.quality.modes.items():
        typer.echo(f"note: {name} flips between {' and '.join(f'{s:.1f}' for s in speeds)} GB/s")
    for note in profile.quality.notes:
        typer.echo(f"note: {note}")
    reasons: dict[str, list[str]] = {}
    for name, reason in profile.waived.items():
        reasons.setdefault(reason, []).append(name)
    for reason, names in reasons.items():
        typer.echo(f"not measured: {', '.join(names)}: {reason}")


@app.command()
def workload(
    model: Model,
    output: Output = Path("workload.json"),
    prompts: Annotated[Path | None, typer.Option("--prompts", help="Batch-file lines; default: the demo's.")] = None,
    drafter: Annotated[
        list[str] | None,
        typer.Option(
            "--drafter",
            help="ngram, model:FOLDER, model, which comes with the model, or eagle:HEAD; default: all that come with it.",
        ),
    ] = None,
    experts: Experts = None,
    requests: Annotated[int, typer.Option("--requests", help="Use at most this many.", min=1)] = 32,
    output_tokens: Annotated[int, typer.Option("--output-tokens", help="Tokens of each answer.", min=2)] = 64,
    batch: Annotated[int, typer.Option("--batch", help="Live requests.", min=1)] = 16,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on after the end of the answer.")] = False,
    as_json: Json = False,
) -> None:
    """Measure lengths, acceptance by draft position, and how experts are used."""
    from specmoeoff.files import read_text, sha256_text
    from specmoeoff.runtime.batch_files import read_batch, to_request
    from specmoeoff.runtime.loading import default_draft, find_draft
    from specmoeoff.runtime.observe import observe, observing_residents
    from specmoeoff.specs.plan import PlanThreads

    _check_files({"--output": output}, {"--prompts": prompts})
    _check_formats("bf16", experts)
    with progress("opening the model", as_json) as bar:
        path = prompts or _demo_prompts(model)
        given = read_batch(path)[:requests]
        target, tokenizer = _open_target(model, bar, experts=experts)
        todo = [to_request(line, tokenizer, target.spec, ignore_eos, output_tokens) for line in given]
        drafts: dict[str, Any] = {}
        for choice in drafter or (["model", "ngram"] if default_draft(model) else ["ngram"]):
            name, _, folder = choice.partition(":")
            if choice not in ("model", "ngram") and not (name in ("model", "eagle") and folder):
                raise BadInput(f"--drafter {choice}: choose ngram, model, model:FOLDER or eagle:HEAD.")
            found = (
                None
                if name == "ngram"
                else find_draft(model, choice.removeprefix("model:" if folder else "model"), target.spec)
            )
            if name == "model" and found is None:
                raise BadInput(f"--drafter model: {model} has no draft model; name one with model:FOLDER.")
            drafts[name] = found.open(target.spec, bar.count) if found else None
        threads = PlanThreads(compute=_n_cores(), disk_readers=2, disk_chunk_bytes=1 << 20)
        held = observing_residents(target)
        result = observe(target, drafts, todo, threads, batch, held, path.stem, lambda s: bar("decoding", s))  # type: ignore[arg-type]
        result = result.model_copy(update={"prompts_sha256": sha256_text(read_text(path, "batch file"))})
    result.save(output)
    if as_json:
        typer.echo(json.dumps({"workload": str(output), "union_exponent": result.union_exponent}))
        return
    rows = [
        (name, " ".join(f"{a:.2f}" for a in acc.conditional), str(acc.n_rounds))
        for name, acc in result.acceptance.items()
    ]
    _table("Acceptance by draft position, given that all before stood", rows, ("drafter", "acceptance", "rounds"))
    typer.echo(f"wrote {output}")


def _n_cores() -> int:
    return len(os.sched_getaffinity(0))


def _demo_prompts(model: str) -> Path:
    from specmoeoff.demo import prompts_path

    if model != "demo":
        raise BadInput("--prompts is needed: a file of batch-file lines that look like your requests.")
    return prompts_path()


@app.command()
def perplexity(
    model: Model,
    experts: Experts = None,
    text: Annotated[Path | None, typer.Option("--text", help="Text file; default: the demo's prompts.")] = None,
    as_json: Json = False,
) -> None:
    """What experts in fewer bits cost: the perplexity of a text with them and with bf16."""
    from specmoeoff.runtime.loading import model_folder
    from specmoeoff.runtime.pack import pack_model
    from specmoeoff.runtime.tokenizer import Tokenizer

    _check_formats("bf16", experts)
    with progress("opening the model", as_json) as bar:
        folder = model_folder(model)
        tokenizer = Tokenizer(folder)
        packed = pack_model(folder, bar.count, experts=experts)  # type: ignore[arg-type]
        found = _perplexities(packed, folder, tokenizer, bar, text)
    typer.echo(found.text() if as_json else found.sentence)


@app.command()
def tune(
    profile: Annotated[str, typer.Option("--profile", help="Hardware profile: a file, or a shipped name.")],
    model: Annotated[
        str, typer.Option("--model", help="Checkpoint folder, GGUF file, `demo`, or the name of a shipped shape.")
    ],
    workload: Annotated[str, typer.Option("--workload", help="Workload of this model: a file, or a shipped name.")],
    output: Output = Path("plan.toml"),
    fast_memory: Annotated[
        str | None,
        typer.Option(
            "--fast-memory", help="Of the GPU; without one for experts and stream buffers, default: a quarter of them."
        ),
    ] = None,
    host_memory: Annotated[
        str | None,
        typer.Option("--host-memory", help="For all else; default: what is free, with a GPU the profile's RAM."),
    ] = None,
    batch: Annotated[
        int | None, typer.Option("--batch", help="Live requests; default: the best number.", min=1, max=8192)
    ] = None,
    context: Annotated[
        int | None, typer.Option("--context", help="Tokens a request may have; default: the workload's.", min=1)
    ] = None,
    draft: Draft = None,
    precision: PrecisionOption = "bf16",
    experts: Experts = None,
    kv_tokens: Annotated[
        int | None,
        typer.Option("--kv-tokens", help="Tokens the KV cache holds; default: every live request's context.", min=1),
    ] = None,
    disk_limit_gb_per_s: DiskLimit = None,
    search: Annotated[str, typer.Option("--search", help="exhaustive or optuna.")] = "exhaustive",
    trials: Annotated[int | None, typer.Option("--trials", help="Of optuna; default: 200.", min=1)] = None,
    measure: Annotated[
        int,
        typer.Option(
            "--measure",
            help="Choose by measuring: the best N, or with --search optuna N trials that begin there.",
            min=0,
        ),
    ] = 0,
    storage: Annotated[str | None, typer.Option("--storage", help="Of optuna: a URL or a journal file.")] = None,
    seed: Annotated[int, typer.Option("--seed")] = 0,
    output_tokens: Annotated[
        int | None,
        typer.Option("--output-tokens", help="Tokens of each answer, where the workload leaves it open.", min=1),
    ] = None,
    what_if: Annotated[
        bool, typer.Option("--what-if", help="Also tune for twice the disk, memory, arithmetic, and better drafts.")
    ] = False,
    calibrate: Annotated[
        Path | None, typer.Option("--calibrate", help="Refit the profile's prices to this record of `validate`.")
    ] = None,
    trace: Annotated[
        Path | None, typer.Option("--trace", help="Write the predicted window in Chrome trace format.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Choose draft length, batch, placement, prefetch, micro-batches and threads."""
    from functools import partial

    from specmoeoff.profiles import find, names
    from specmoeoff.runtime.checkpoint import read_model_spec
    from specmoeoff.runtime.loading import find_draft, model_folder
    from specmoeoff.runtime.process import available_bytes
    from specmoeoff.runtime.trial import rate_in_own_process
    from specmoeoff.specs.model import ModelShape
    from specmoeoff.specs.profile import HardwareProfile
    from specmoeoff.specs.workload import Workload
    from specmoeoff.tuner.tune import TuneRequest, plans_for_gpu
    from specmoeoff.tuner.tune import tune as find_plan

    profile_file, workload_file = find("machines", profile), find("workloads", workload)
    inputs = {"--profile": profile_file, "--workload": workload_file, "--calibrate": calibrate}
    _check_files({"--output": output, "--trace": trace}, inputs)
    _check_disk_limit(disk_limit_gb_per_s)
    _check_formats(precision, experts)
    if search not in ("exhaustive", "optuna"):
        raise BadInput(f"--search {search}: choose exhaustive or optuna.")
    for option, value in (("--trials", trials), ("--storage", storage)):
        if value is not None and search == "exhaustive":
            raise BadInput(f"{option}: the exhaustive search has none; add --search optuna, or leave {option} out.")
    machine_profile = HardwareProfile.load(profile_file)
    behaviour = Workload.load(workload_file).with_output_tokens(output_tokens)
    here = machine_profile.machine.gpu is None
    is_shape = model in names("models") and not Path(model).exists()
    folder = None if is_shape else model_folder(model)
    spec = read_model_spec(folder) if folder else ModelShape.load(find("models", model)).model
    spec = spec.run_in(precision, experts)  # type: ignore[arg-type]
    found = find_draft(model, draft, spec)
    if draft and found and found.drafter not in behaviour.acceptance:
        raise BadInput(
            f"--draft {draft}: workload {behaviour.name} does not tell how much of it is accepted; measure that with "
            f"`specmoeoff workload --drafter {'' if found.drafter == 'eagle' else 'model:'}{draft}`."
        )
    with progress("tuning", as_json) as bar:
        request = TuneRequest(
            profile=machine_profile,
            model=spec,
            workload=behaviour,
            model_source=str(folder.resolve()) if folder and model != "demo" else model,
            host_memory_bytes=parse_bytes(host_memory, "--host-memory")
            if host_memory
            else (int(0.9 * available_bytes()) if here else machine_profile.machine.ram_bytes),
            draft=found.spec if found else None,
            draft_source=found.source if found else None,
            drafter=found.drafter if found else "model",
            fast_memory_bytes=parse_bytes(fast_memory, "--fast-memory") if fast_memory else None,
            batch=batch,
            context_tokens=context,
            kv_tokens=kv_tokens,
            disk_limit_gb_per_s=disk_limit_gb_per_s,
            search=search,  # type: ignore[arg-type]
            **({"trials": trials} if trials else {}),  # type: ignore[arg-type]
            seed=seed,
            storage=storage,
            command=" ".join(["specmoeoff", *sys.argv[1:]]),
            measure_top=measure,
            measure=partial(rate_in_own_process, acceptance=behaviour.acceptance) if measure else None,
            progress=lambda share: bar("tuning", share),
        )
        only_without_gpu = {
            "--trace": trace,
            "--kv-tokens": kv_tokens,
            "--precision fp32": precision == "fp32",
            "--experts": experts,
        }
        for option in [name for name, value in only_without_gpu.items() if value and plans_for_gpu(request)]:
            raise BadInput(f"{option}: is not for plans of a machine with a GPU yet; leave it out.")
        calibration: dict[str, Any] = {}
        if calibrate:
            request, calibration = _refit(request, calibrate)
        plan = find_plan(request)
        changes = _what_if(request, plan) if what_if else []
    plan.save(output)
    if trace:
        _save_predicted_trace(request, plan, trace)
    _keep_inputs(request.profile, behaviour)
    _warn_other_machine(plan)
    p, base = plan.predicted, plan.plain.predicted
    if as_json:
        told = {"plan": str(output), "predicted": p.model_dump(), "plain": base.model_dump()}
        typer.echo(json.dumps({**told, "calibration": calibration, "what_if": changes}))
        return
    if calibration:
        _print_calibration(calibration)
    d, e = plan.decode, plan.experts
    on_host = f", {sum(map(len, e.on_host))} computed on the host" if plan.gpu else ""
    rows = [
        ("draft", f"{d.draft_length} tokens by {d.drafter}" if d.draft_length else "none: plain decoding is best here"),
        ("live requests", f"{d.batch} in {d.micro_batches} micro-batches"),
        (
            "experts",
            f"in {spec.packed_format}, {e.n_resident} resident, {e.stream_slots} stream slots, {sum(map(len, e.prefetch))} read ahead{on_host}",
        ),
        (
            "predicted",
            f"{p.tokens_per_s:.1f} tokens/s, {p.tokens_per_round:.2f} tokens a round, {p.window_s * 1e3:.0f} ms, {p.bound}-bound",
        ),
        ("plain", f"{base.tokens_per_s:.1f} tokens/s: {p.tokens_per_s / base.tokens_per_s:.2f}x predicted"),
        ("memory", f"fast {sum(plan.memory.fast.values()):,} bytes, host {sum(plan.memory.host.values()):,} bytes"),
    ]
    _table(f"Plan for {plan.model.name}, {plan.inputs.n_evaluated} choices priced", rows, ("what", "chosen"))
    if plan.measured:
        _print_measured(plan.measured)
    if plan.outlook:
        _print_outlook(plan.outlook)
    if changes:
        header = ("change", "tokens/s", "times this plan's", "draft", "live requests", "bound by")
        _table("What if", [tuple(map(_cell, list(c.values())[:6])) for c in changes], header)
    typer.echo(f"wrote {output}")


def _print_measured(trials: "Sequence[MeasuredTrial]") -> None:
    from statistics import median

    rows = [
        (
            f"{t.draft_length} by {t.drafter}",
            str(t.batch),
            f"{t.predicted_tokens_per_s:.1f}",
            f"{median(t.tokens_per_s):.1f} ({len(t.tokens_per_s)})" if t.tokens_per_s else "",
            t.failure,
        )
        for t in trials
    ]
    header = ("draft", "live requests", "predicted tokens/s", "measured (runs)", "failed")
    _table("Measured", rows, header)


def _print_outlook(outlook: "Outlook") -> None:
    contexts = list(dict.fromkeys(at.context_tokens for at in outlook.draft_lengths))
    by_live: dict[int, list[str]] = {}
    for at in outlook.draft_lengths:
        by_live.setdefault(at.live, []).append(str(at.draft_length))
    header = ("live requests", *(f"context {c}" for c in contexts))
    _table("Best draft length", [(str(live), *ks) for live, ks in by_live.items()], header)
    for axis, why in outlook.flat_axes.items():
        typer.echo(f"{axis}: {why}")
    for assumption in outlook.assumptions:
        typer.echo(f"assumed: {assumption}")


def _refit(request: "TuneRequest", path: Path) -> "tuple[TuneRequest, dict[str, Any]]":
    """The request with prices refitted, by which factors, and how right the record's predictions were."""
    from dataclasses import replace

    from specmoeoff.estimate.accuracy import report
    from specmoeoff.estimate.calibrate import refit
    from specmoeoff.estimate.gpu_refit import recorded_scales
    from specmoeoff.specs.record import RunRecord
    from specmoeoff.tuner.tune import plans_for_gpu

    record = RunRecord.load(path)
    if plans_for_gpu(request):
        scales = recorded_scales(request.profile, record)
        fitted = replace(request, scales=scales)
        factors = {f"{kind}, {n - 1:g} drafted": f for kind, s in scales.items() for n, f in zip(*s, strict=True)}
    else:
        profile, factors = refit(request.profile, record, request.model, request.draft)
        fitted = replace(request, profile=profile)
    found = report(record)
    accuracy = [{**row._asdict(), "verdict": row.verdict} for row in found.rows]
    told = {"record": str(path), "factors": factors, "accuracy": accuracy, "limitations": found.limitations}
    return fitted, told


def _print_calibration(told: dict[str, Any]) -> None:
    names = ("name", "n", "bias", "scatter", "mape", "pearson_r", "rank_r", "verdict")
    header = ("predicted", "pairs", "bias", "scatter", "MAPE", "Pearson r", "rank r", "mostly")
    _table("How right the record's predictions were", [[_cell(a[n]) for n in names] for a in told["accuracy"]], header)
    for sentence in told["limitations"]:
        typer.echo(f"note: {sentence}")
    factors = [(name, f"{factor:.3f}") for name, factor in told["factors"].items()]
    _table(f"Refitted from {told['record']}", factors, ("what", "times the profile's"))


def _cell(value: object) -> str:
    """A number or word of a table."""
    return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def _what_if(request: "TuneRequest", plan: "Plan") -> list[dict[str, Any]]:
    from specmoeoff.tuner.what_if import what_if

    return [row.row for row in what_if(request, plan)]


def _save_predicted_trace(request: "TuneRequest", plan: "Plan", path: Path) -> None:
    from specmoeoff.estimate.planned import planned_schedule
    from specmoeoff.estimate.trace import chrome_trace, predicted_spans
    from specmoeoff.files import write_atomic

    schedule = planned_schedule(plan, request.profile, request.workload, request.model, request.draft)
    write_atomic(path, chrome_trace(predicted_spans(schedule)))


def _inputs_folder() -> Path:
    from specmoeoff.files import cache_dir

    return cache_dir() / "inputs"


def _keep_inputs(machine_profile: "HardwareProfile", behaviour: "Workload") -> None:
    """Copies by hash, so that `validate` can re-price a plan from the plan alone."""
    from specmoeoff.files import explain_os_errors, sha256_text, write_atomic

    folder = _inputs_folder()
    try:
        with explain_os_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        for text in (machine_profile.text(), behaviour.text()):
            write_atomic(folder / f"{sha256_text(text)}.json", text)
    except BadInput as error:
        typer.echo(f"warning: {error} `validate` will need --profile and --workload.", err=True)


def _load_inputs(
    plan: "Plan", profile_path: Path | None, workload_path: Path | None
) -> "tuple[HardwareProfile, Workload]":
    from specmoeoff.specs.profile import HardwareProfile
    from specmoeoff.specs.workload import Workload

    found = []
    for given, kind, sha in (
        (profile_path, HardwareProfile, plan.inputs.profile_sha256),
        (workload_path, Workload, plan.inputs.workload_sha256),
    ):
        path = given or _inputs_folder() / f"{sha}.json"
        if given is None and not path.exists():
            raise BadInput(
                f"the {kind.what} this plan was made from is not on this machine; give it with "
                f"--{'profile' if kind is HardwareProfile else 'workload'}."
            )
        found.append(kind.load(path))
    return found[0], found[1]  # type: ignore[return-value]


def _warn_other_machine(plan: "Plan") -> None:
    from specmoeoff.roofline.profile import machine

    if machine().fingerprint != plan.inputs.machine_fingerprint:
        typer.echo(
            f"warning: the plan was made from a profile of another machine ({plan.inputs.profile_name}); "
            "its predictions may not hold here.",
            err=True,
        )


@app.command()
def run(
    plan_file: Annotated[Path, typer.Argument(metavar="PLAN", help="Plan to run.")],
    input_file: Annotated[Path | None, typer.Option("--input", help="OpenAI batch-file lines.")] = None,
    output: Annotated[Path | None, typer.Option("--output", help="Answers, one JSON object a line.")] = None,
    record: Annotated[Path | None, typer.Option("--record", help="Write what happened.")] = None,
    trace: Annotated[
        Path | None, typer.Option("--trace", help="Write the last windows in Chrome trace format.")
    ] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", help="With --stream, instead of a batch file.")] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", help="Of the answer to --prompt.", min=1)] = 256,
    stream: Annotated[
        bool, typer.Option("--stream", help="Print answers as they finish, the one to --prompt as it comes.")
    ] = False,
    ray: Annotated[
        str | None, typer.Option("--ray", help="Spread over the Ray cluster at this address; `auto`: the running one.")
    ] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Always produce max_tokens.")] = False,
    disk_limit_gb_per_s: DiskLimit = None,
    as_json: Json = False,
) -> None:
    """Run a batch file under a plan, resuming where it stopped, or answer one prompt."""
    from specmoeoff.runtime.batch_run import BatchRun
    from specmoeoff.runtime.loading import load_runnable

    _check_disk_limit(disk_limit_gb_per_s)
    if prompt is not None:
        if not stream or input_file or output or record or trace or ray:
            raise BadInput("--prompt: goes with --stream, without --input, --output, --record, --trace and --ray.")
        _stream_prompt(load_runnable(plan_file), prompt, max_tokens, ignore_eos, disk_limit_gb_per_s)
        return
    if input_file is None or output is None:
        raise BadInput("--input and --output: are needed, or --stream and --prompt.")
    outputs = {"--output": output, "--record": record, "--trace": trace}
    _check_files(outputs, {"PLAN": plan_file, "--input": input_file})
    plan = load_runnable(plan_file)
    if ray:
        if record or trace or stream:
            raise BadInput(
                "--ray: many engines write no --record and no --trace, and do not --stream; leave those out."
            )
        from specmoeoff.runtime.ray_run import RayRun

        with progress("reaching the cluster", as_json) as bar:
            spread = RayRun(plan, _inputs_folder(), input_file, output, ray, disk_limit_gb_per_s, ignore_eos)
            summary = spread.run(lambda done, total: bar.count("decoding", done, total), _warn)
    else:
        _warn_other_machine(plan)
        with progress("opening the model", as_json or stream) as bar:
            job = BatchRun(plan, input_file, output, disk_limit_gb_per_s, ignore_eos, bar.count)
            result = job.run(lambda done, total: bar.count("decoding", done, total), typer.echo if stream else None)
        if record:
            result.save(record)
        if trace:
            job.save_trace(trace)
        summary = {
            "requests": result.n_requests,
            "failed": job.n_failed,
            "tokens": result.n_tokens,
            "seconds": round(result.duration_s, 3),
        }
    if as_json:
        typer.echo(json.dumps({**summary, "output": str(output)}))
        return
    n_requests, n_tokens, seconds = summary["requests"], summary["tokens"], summary["seconds"]
    rate = f", {n_tokens / seconds:.1f} tokens/s" if seconds and n_tokens else ""
    failed = f"; {summary['failed']} could not be answered, their lines say why" if summary.get("failed") else ""
    typer.echo(f"{n_requests} requests, {n_tokens} tokens in {seconds:.1f} s{rate}; wrote {output}{failed}")


def _stream_prompt(
    plan: "Plan", prompt: str, max_tokens: int, ignore_eos: bool, disk_limit_gb_per_s: float | None
) -> None:
    """As a chat where the model has a template for one."""
    from specmoeoff.api import Engine, Prompt, generate

    _warn_other_machine(plan)
    with progress("opening the model", False) as bar:
        engine = Engine(plan, disk_limit_gb_per_s, bar.count)
    with engine:
        asked: Prompt = [{"role": "user", "content": prompt}] if engine.tokenizer.has_chat_template else prompt
        generate(engine, [asked], max_tokens, lambda _, text: typer.echo(text, nl=False), ignore_eos=ignore_eos)
    typer.echo()


def _warn(what: str) -> None:
    typer.echo(f"warning: {what}", err=True)


@app.command()
def serve(
    plan_file: Annotated[Path, typer.Argument(metavar="PLAN", help="Plan to serve.")],
    host: Annotated[str, typer.Option("--host", help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", help="0: any that is free.", min=0, max=65535)] = 8000,
    api_key_file: Annotated[
        Path | None, typer.Option("--api-key-file", help="Ask for this key; default: $SPECMOEOFF_API_KEY, if set.")
    ] = None,
    max_queue: Annotated[
        int, typer.Option("--max-queue", help="Requests that may wait; more are told to come back (429).", min=1)
    ] = 256,
    disk_limit_gb_per_s: DiskLimit = None,
) -> None:
    """OpenAI-compatible HTTP over the same engine: chat/completions, completions, models, health, metrics."""
    from specmoeoff.runtime.loading import load_runnable
    from specmoeoff.runtime.serving.server import is_loopback, read_api_key
    from specmoeoff.runtime.serving.server import serve as serve_plan

    _check_disk_limit(disk_limit_gb_per_s)
    plan = load_runnable(plan_file)
    api_key = read_api_key(api_key_file) if api_key_file else os.environ.get("SPECMOEOFF_API_KEY") or None
    if not is_loopback(host):
        _warn(f"--host {host}: others can reach this server{'' if api_key else ', and no API key is asked for'}.")
    _warn_other_machine(plan)
    with progress("opening the model", False) as bar:

        def ready(what: str) -> None:
            bar.stop()
            typer.echo(what, err=True)

        serve_plan(plan, host, port, api_key, max_queue, disk_limit_gb_per_s, bar.count, ready)


@app.command()
def validate(
    plan_file: Annotated[Path, typer.Argument(metavar="PLAN", help="Plan to validate.")],
    prompts: Annotated[Path | None, typer.Option("--prompts", help="Batch-file lines; default: the demo's.")] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Run record to write.")] = None,
    profile: Annotated[Path | None, typer.Option("--profile", help="Default: the one the plan was made from.")] = None,
    workload: Annotated[
        Path | None, typer.Option("--workload", help="Default: the one the plan was made from.")
    ] = None,
    pairs: Annotated[int, typer.Option("--pairs", help="Pairs of plain and tuned blocks.", min=2)] = 6,
    windows: Annotated[
        int, typer.Option("--windows", help="Windows of a block, after the first, which fills the pipeline.", min=2)
    ] = 9,
    requests: Annotated[int, typer.Option("--requests", help="Requests compared with plain decoding.", min=1)] = 32,
    as_json: Json = False,
) -> None:
    """Is the output unchanged, the prediction right, the memory within plan? Exit 1 with the cause if not."""
    from specmoeoff.runtime.batch_files import read_batch, to_request
    from specmoeoff.runtime.loading import load_runnable, open_plan
    from specmoeoff.runtime.validate import Options, validate_plan

    inputs = {"PLAN": plan_file, "--prompts": prompts, "--profile": profile, "--workload": workload}
    _check_files({"--output": output}, inputs)
    plan = load_runnable(plan_file)
    machine_profile, behaviour = _load_inputs(plan, profile, workload)
    lines = read_batch(prompts or _demo_prompts(plan.model.source))[:requests]
    _warn_other_machine(plan)
    with progress("opening the model", as_json) as bar:
        try:
            opened = open_plan(plan, bar.count)
        except AnotherModel as error:
            raise AnswerIsNo(f"plan of another model: {error}") from None
        todo = [to_request(line, opened.tokenizer, opened.target.spec, ignore_eos=True) for line in lines]
        options = Options(
            n_pairs=pairs, block_windows=windows, uncapped_block_windows=max(2, windows // 2), progress=bar
        )
        result = validate_plan(plan, opened, machine_profile, behaviour, todo, options)
    if output:
        result.save(output)
    if as_json:
        typer.echo(result.text())
    else:
        _print_validation(result)
    causes = [check.cause for check in result.checks if not check.passed]
    if causes:
        raise AnswerIsNo("validation failed: " + "; ".join(causes) + ".")


def _print_validation(result: Any) -> None:
    rows = [(c.name, "yes" if c.passed else "NO", c.detail) for c in result.checks]
    _table("Does the plan hold?", rows, ("question", "answer", "found"))
    for s in result.speed_ups:
        from statistics import median

        plain, tuned = (median(getattr(p, f"{n}_tokens_per_s") for p in s.pairs) for n in ("plain", "tuned"))
        typer.echo(
            f"{s.label}: plain {plain:.1f} tokens/s, tuned {tuned:.1f} tokens/s: {s.median:.2f}x "
            f"({s.low:.2f} to {s.high:.2f}, {s.confidence:.1%} interval of {len(s.pairs)} pairs; limit {s.limit:.2f}x from {s.limit_reason})"
        )
        disks = "  ".join(f"{p.plain_disk_gb_per_s:.2f}/{p.tuned_disk_gb_per_s:.2f}" for p in s.pairs)
        typer.echo(f"  disk GB/s of each pair's blocks, plain/tuned: {disks}")


@app.command()
def report(
    profile: Annotated[str, typer.Option("--profile", help="Hardware profile, or the name of a shipped one.")],
    output: Output = Path("report.html"),
    plan_file: Annotated[Path | None, typer.Option("--plan", help="Plan.")] = None,
    record: Annotated[list[Path] | None, typer.Option("--record", help="Run records.")] = None,
    workload: Annotated[Path | None, typer.Option("--workload", help="Workload.")] = None,
    points: Annotated[Path | None, typer.Option("--points", help="CSV of more roofline points.")] = None,
    terminal: Annotated[bool, typer.Option("--terminal", help="Also print a small roofline.")] = False,
    as_json: Json = False,
) -> None:
    """One offline HTML file, with every figure as SVG and PNG and every number as CSV beside it."""
    from specmoeoff.profiles import find
    from specmoeoff.report import write_report
    from specmoeoff.specs.plan import Plan
    from specmoeoff.specs.profile import HardwareProfile
    from specmoeoff.specs.record import RunRecord
    from specmoeoff.specs.workload import Workload

    profile_file = find("machines", profile)
    inputs = {"--profile": profile_file, "--plan": plan_file, "--workload": workload, "--points": points}
    _check_files({"--output": output}, {**inputs, **{f"--record {path}": path for path in record or []}})
    plan = Plan.load(plan_file) if plan_file else None
    machine_profile, model = HardwareProfile.load(profile_file), _model_of(plan) if plan else None
    files = write_report(
        output,
        machine_profile,
        plan,
        [RunRecord.load(path) for path in record or []],
        model=model,
        workload=Workload.load(workload) if workload else None,
        points_csv=points,
    )
    if as_json:
        typer.echo(json.dumps([str(f) for f in files]))
        return
    if terminal:
        from specmoeoff.report.terminal import terminal_roofline

        typer.echo(terminal_roofline(machine_profile, plan, model))
    typer.echo(f"wrote {output} and {len(files) - 1} files beside it")


def _model_of(plan: "Plan") -> Any:
    """The plan's model where it is at hand; a report does without."""
    from specmoeoff.runtime.checkpoint import read_model_spec
    from specmoeoff.runtime.loading import model_folder

    try:
        spec = read_model_spec(model_folder(plan.model.source))
        return spec.run_in(plan.model.precision, plan.model.expert_format)
    except SpecMoEOffError:
        return None


@app.command()
def compare(
    a: Annotated[Path, typer.Argument(metavar="A.json", help="Hardware profile or run record.")],
    b: Annotated[Path, typer.Argument(metavar="B.json", help="Another of the same kind.")],
    fail_under: Annotated[
        float | None, typer.Option("--fail-under", help="Exit 1 where a rate of B is below this share of A's.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Every number two profiles or two run records share, the worst first; above 1, B is better."""
    from dataclasses import asdict
    from math import isfinite

    from specmoeoff.compare import compare as compare_files

    _check_range("--fail-under", fail_under, 0.0, 1000.0)
    rows = compare_files(a, b)
    if as_json:
        found = [{**asdict(r), "ratio": r.ratio if isfinite(r.ratio) else None} for r in rows]
        typer.echo(json.dumps(found, indent=1))
    else:
        shown = [(r.name, f"{r.a:,.4g}", f"{r.b:,.4g}", r.unit, f"{r.ratio:.3f}") for r in rows[:COMPARED_ROWS]]
        _table(f"{b} against {a}", shown, ("what", "A", "B", "unit", "B is better by"))
        if len(rows) > COMPARED_ROWS:
            typer.echo(f"and {len(rows) - COMPARED_ROWS} better ones; --json lists all")
    worse = [f"{r.name} {r.ratio:.3f}" for r in rows if r.is_rate and fail_under and r.ratio < fail_under]
    if worse:
        raise AnswerIsNo(f"{b} is below {fail_under:g} of {a}: {'; '.join(worse)}.")


@app.command()
def export(
    plan_file: Annotated[Path, typer.Argument(metavar="PLAN", help="Plan to export.")],
    to: Annotated[str, typer.Option("--to", help="llama.cpp, vllm, sglang or ktransformers.")],
    as_json: Json = False,
) -> None:
    """The nearest settings for an engine people already run, and what they cannot express."""
    from specmoeoff.specs.plan import Plan
    from specmoeoff.tuner.export import export as export_plan

    found = export_plan(Plan.load(plan_file), to)
    if as_json:
        typer.echo(
            json.dumps({"engine": found.engine, "command": found.command, "not_expressed": found.lost}, indent=1)
        )
    else:
        typer.echo(found.text, nl=False)


@app.command()
def auto(
    model: Model,
    prompts: Annotated[Path | None, typer.Option("--prompts", help="Batch-file lines; default: the demo's.")] = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for everything.")] = Path("out"),
    disk_limit_gb_per_s: Annotated[
        float | None, typer.Option(help="Cap the disk lane; default for the demo: 1.0; 0: no cap.")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure again what was measured before.")] = False,
) -> None:
    """Profile, workload, tune, run, validate and report in one go."""
    from specmoeoff.auto import run_all

    limit = 1.0 if disk_limit_gb_per_s is None and model == "demo" else disk_limit_gb_per_s or None
    _check_disk_limit(limit)
    run_all(model, prompts or _demo_prompts(model), output, limit, fresh)
