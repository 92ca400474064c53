"""Plans for shipped machines with a GPU: what the paper found, nothing infeasible, and honest about what does not fit."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from specmoeoff.errors import AnswerIsNo, BadInput, TrialFailed
from specmoeoff.estimate.gpu_choices import Draft
from specmoeoff.estimate.gpu_memory import GIB, fitting_batch
from specmoeoff.estimate.speculation import expected_tokens
from specmoeoff.profiles import find
from specmoeoff.specs.model import ModelShape
from specmoeoff.specs.plan import Plan
from specmoeoff.specs.profile import HardwareProfile
from specmoeoff.specs.workload import Acceptance, Workload
from specmoeoff.tuner.gpu_tune import GpuTuner, price_points
from specmoeoff.tuner.tune import TuneRequest, tune


def request(machine: str, model: str, fast: int, host: int, output_tokens: int = 1024, **rest: object) -> TuneRequest:
    return TuneRequest(
        profile=HardwareProfile.load(find("machines", machine)),
        model=ModelShape.load(find("models", model)).model,
        workload=Workload.load(find("workloads", "apps")).with_output_tokens(output_tokens),
        model_source=model,
        fast_memory_bytes=fast * GIB,
        host_memory_bytes=host * GIB,
        **rest,  # type: ignore[arg-type]
    )


@pytest.fixture(scope="module")
def a30() -> TuneRequest:
    return request("a30", "mixtral-8x7b", 24, 250)


@pytest.fixture(scope="module")
def plan(a30: TuneRequest) -> Plan:
    return tune(a30)


def test_speculation_pays_on_the_papers_machine(plan: Plan) -> None:
    assert plan.decode.drafter == "eagle"
    assert plan.plain.decode.draft_length == 0
    assert 1.2 < plan.predicted.tokens_per_s / plan.plain.predicted.tokens_per_s < 2.6
    assert plan.predicted.bound in ("cpu", "h2d")


def test_the_plan_fits_survives_its_file_and_tells_where_its_numbers_are_from(plan: Plan, tmp_path: Path) -> None:
    assert sum(plan.memory.fast.values()) <= plan.limits.fast_memory_bytes
    assert sum(plan.memory.host.values()) <= plan.limits.host_memory_bytes
    plan.save(tmp_path / "plan.toml")
    assert Plan.load(tmp_path / "plan.toml") == plan
    assert plan.outlook is not None
    told = " ".join(plan.outlook.assumptions)
    assert "EAGLE (arXiv 2401.15077" in told
    assert "SpecMoEOff Table 3" in told


def test_the_same_request_gives_the_same_plan(plan: Plan, a30: TuneRequest) -> None:
    assert tune(a30) == plan


def test_every_expert_of_a_layer_has_one_place(plan: Plan) -> None:
    e = plan.experts
    for places in zip(e.resident, e.prefetch, e.on_host, strict=True):
        assert sorted(expert for place in places for expert in place) == list(range(8))


def throughputs(r: TuneRequest, context: float, longest: int = 12, rate: float = 0.7) -> np.ndarray:
    """By draft length, all else as in the closed form; every draft token accepted at the same rate (made up)."""
    tuner = GpuTuner(r)
    drafts = tuple(Draft("eagle", k, k, expected_tokens([rate] * k, k)) for k in range(longest + 1))
    space = replace(tuner.space, problem=replace(tuner.problem, drafts=drafts))
    start = list(space.closed_form().values())
    points = np.array([[k, *start[1:]] for k in range(longest + 1)])
    estimator = replace(tuner.estimator, problem=space.problem)
    return estimator.tokens_per_s(space.choices(points), np.full(longest + 1, context))


def test_over_the_draft_length_throughput_rises_then_falls_and_sooner_for_longer_contexts(a30: TuneRequest) -> None:
    best = []
    for context in (300.0, 600.0, 1000.0, 1600.0, 3000.0):
        found = throughputs(a30, context)
        top = int(np.argmax(found))
        assert (np.diff(found[: top + 1]) > 0).all()
        assert (np.diff(found[top:]) < 0).all()
        best.append(top)
    assert best == sorted(best, reverse=True)
    assert best[0] > best[-1] > 0


def test_host_memory_helps_more_than_gpu_memory_and_with_no_resident_experts_that_hardly_does(
    a30: TuneRequest, plan: Plan
) -> None:
    def gain(**limits: int) -> float:
        found = tune(replace(a30, **limits))  # type: ignore[arg-type]
        return found.predicted.tokens_per_s / plan.predicted.tokens_per_s

    assert gain(host_memory_bytes=500 * GIB) > gain(fast_memory_bytes=48 * GIB) >= 1.0

    def best(**limits: int) -> float:
        tuner = GpuTuner(replace(a30, **limits))  # type: ignore[arg-type]
        points = tuner.space.points()
        names = list(tuner.space.axes)
        paper = (points[:, names.index("resident")] == 0) & (points[:, names.index("kv_share")] == 0)
        paper &= (points[:, names.index("on_host")] == 0) & (points[:, names.index("on_demand")] == 0)
        return float(price_points(tuner.space, tuner.estimator, points[paper]).tokens_per_s.max())

    base = best()
    assert best(fast_memory_bytes=48 * GIB) / base < 1.15
    assert best(host_memory_bytes=500 * GIB) / base > 1.3


def test_longest_drafts_are_planned_for_few_requests_and_short_contexts(plan: Plan) -> None:
    assert plan.outlook is not None
    table = {(at.live, at.context_tokens): at.draft_length for at in plan.outlook.draft_lengths}
    for live in {live for live, _ in table}:
        lengths = [k for (n, _), k in sorted(table.items()) if n == live]
        assert lengths == sorted(lengths, reverse=True)


def test_the_front_is_what_brute_force_says_nothing_dominates(a30: TuneRequest) -> None:
    tuner = GpuTuner(replace(a30, batch=64))
    priced = tuner.everything
    latency = priced.choices.batch / priced.tokens_per_s
    for point in tuner._pareto(priced):
        better = (priced.tokens_per_s > point.tokens_per_s) & (latency < point.s_per_token)
        assert not better.any()


def test_useless_drafts_give_plain_decoding(a30: TuneRequest) -> None:
    eagle = a30.workload.acceptance["eagle"].model_copy(update={"conditional": (0.01,) * 5})
    found = tune(replace(a30, workload=a30.workload.model_copy(update={"acceptance": {"eagle": eagle}})))
    assert (found.decode.drafter, found.decode.draft_length) == ("none", 0)


@pytest.mark.parametrize("step", [8, pytest.param(1, marks=pytest.mark.long)])
def test_resident_streamed_and_computed_in_place_together_beat_any_two_of_them(step: int) -> None:
    """The two-way plans try every number of experts, or every eighth; the three-way ones only the space's."""
    tuner = GpuTuner(request("4090", "qwen3-30b-a3b", 24, 64, batch=8))
    c, found = tuner.everything.choices, tuner.everything.tokens_per_s
    streamed, n_experts = tuner.problem.streamed(c), tuner.problem.spec.n_experts
    mixed = found[(c.resident > 0) & (c.on_host > 0) & (streamed > 0)].max()
    every = c.take(np.flatnonzero((c.resident == 0) & (c.on_host == 0)))
    two_way = 0.0
    for n in range(0, n_experts + 1, step):
        for resident, on_host in ((n, 0), (0, n), (n, n_experts - n)):
            one = replace(every, resident=np.full(len(every), resident), on_host=np.full(len(every), on_host))
            one = one.take(np.flatnonzero(fitting_batch(tuner.problem, one, tuner.limits) >= 8))
            two_way = max(two_way, float(tuner.estimator.tokens_per_s(one).max())) if len(one) else two_way
    print(f"4090, Qwen3-30B-A3B, 8 live requests: three ways over the best two {mixed / two_way:.3f}x")
    assert mixed > 1.02 * two_way


def test_optuna_comes_within_a_percent_of_all_choices(plan: Plan, a30: TuneRequest) -> None:
    found = tune(replace(a30, search="optuna", trials=100))
    assert found.inputs.search == "optuna"
    assert found.predicted.tokens_per_s >= 0.99 * plan.predicted.tokens_per_s


@pytest.mark.parametrize(("fast", "host", "tier"), [(24, 60, "host"), (3, 250, "fast")])
def test_what_does_not_fit_names_the_tier_the_bytes_and_the_smallest_change(fast: int, host: int, tier: str) -> None:
    r = request("a30", "mixtral-8x7b", fast, host)
    with pytest.raises(AnswerIsNo, match=rf"{tier} memory: .* more than the limit .* --{tier}-memory [\d,]+MiB") as no:
        tune(r)
    need = int(str(no.value).split(f"--{tier}-memory ")[1].split("MiB")[0].replace(",", "")) << 20
    assert len(GpuTuner(replace(r, **{f"{tier}_memory_bytes": need})).everything.choices)  # type: ignore[arg-type]


def test_a_gpus_memory_is_asked_for(a30: TuneRequest) -> None:
    with pytest.raises(BadInput, match="--fast-memory is needed"):
        tune(replace(a30, fast_memory_bytes=None))


def test_a_plan_from_the_command_line_runs_nowhere_here_and_says_why(tmp_path: Path) -> None:
    def specmoeoff(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "specmoeoff", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)

    choose = (
        "--profile",
        "l4",
        "--model",
        "olmoe-1b-7b",
        "--workload",
        "mt-bench",
        "--output-tokens",
        "64",
        "--batch",
        "8",
    )
    done = specmoeoff("tune", *choose, "--fast-memory", "8GiB", "--host-memory", "64GiB", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["predicted"]["tokens_per_s"] > 0
    for command in (("run", "plan.toml", "--input", "in.jsonl", "--output", "o"), ("validate", "plan.toml")):
        refused = specmoeoff(*command)
        assert refused.returncode == 3
        assert "no CUDA GPU answers here" in " ".join(refused.stderr.split())
        assert "Traceback" not in refused.stderr


def test_the_measured_best_is_planned_whatever_was_predicted(a30: TuneRequest) -> None:
    """Runs say that two drafted tokens are fastest, that plain decoding comes next, and that three crash."""

    def measure(plan: Plan) -> float:
        k = plan.decode.draft_length
        if k == 3:
            raise TrialFailed("crash", "of this length")
        return {0: 50.0, 2: 90.0}.get(k, 10.0)

    found = tune(replace(a30, measure_top=4, measure=measure))
    assert found.decode.draft_length == 2
    by_length = {t.draft_length: t for t in found.measured}
    assert {0, 2, 3} <= set(by_length)
    assert len(by_length) <= 5
    assert "of this length" in by_length[3].failure
    assert by_length[2].predicted_tokens_per_s == pytest.approx(found.predicted.tokens_per_s)
    assert found.plain.decode.draft_length == 0


def test_plain_decoding_is_planned_where_runs_say_so(a30: TuneRequest) -> None:
    found = tune(replace(a30, measure_top=2, measure=lambda plan: 1.0 / (1 + plan.decode.draft_length)))
    assert found.decode.draft_length == 0
    assert found.draft is None


def test_a_dense_draft_is_planned_with_its_kv_split_and_its_memory(tmp_path: Path) -> None:
    """A draft of a billion parameters that is accepted often, on a card where not all of its KV fits."""
    dense = {"architecture": "llama", "n_experts": 1, "n_active": 1, "fingerprint": "draft", "name": "draft"}
    sizes = {"n_layers": 22, "hidden": 2048, "intermediate": 5632, "n_heads": 32, "n_kv_heads": 4, "head_dim": 64}
    target = ModelShape.load(find("models", "mixtral-8x7b")).model
    draft = target.model_copy(update=dense | sizes)
    often = Acceptance(conditional=(0.85,) * 6, n_rounds=0, provenance="said")
    asked = request("a30", "mixtral-8x7b", 24, 250)
    behaviour = asked.workload.model_copy(update={"acceptance": {"model": often}})
    plan = tune(replace(asked, workload=behaviour, draft=draft, draft_source="draft"))
    assert plan.decode.drafter == "model"
    assert plan.draft is not None
    assert (plan.draft.source, plan.draft.fingerprint) == ("draft", "draft")
    assert plan.gpu is not None
    assert plan.memory.fast["draft_weights"] == 2 * draft.n_params
    assert plan.memory.fast["draft_activations"] > 0
    kv = {tier: getattr(plan.memory, tier).get("draft_kv", 0) for tier in ("fast", "host")}
    assert kv["fast"] / sum(kv.values()) == pytest.approx(plan.gpu.draft_kv_share, abs=1e-6)
    assert plan.predicted.tokens_per_s > plan.plain.predicted.tokens_per_s
    plan.save(tmp_path / "plan.toml")
    assert Plan.load(tmp_path / "plan.toml") == plan
