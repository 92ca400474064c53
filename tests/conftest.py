"""A made-up machine shaped like the demo's, for tests that plan without measuring."""

import os

import numpy as np
import pytest

from specmoeoff.specs.model import ModelSpec
from specmoeoff.specs.plan import Plan
from specmoeoff.specs.profile import DiskLink, HardwareProfile, Machine, Measurement, OperatorTable, Roof
from specmoeoff.specs.record import RunRecord
from specmoeoff.specs.workload import Acceptance, Lengths, UnionPoint, Workload
from specmoeoff.tuner.tune import TuneRequest, tune

LONG_RUNS = "SPECMOEOFF_LONG_RUNS"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes minutes, and what others show at less length, is for `make soak`."""
    if not os.environ.get(LONG_RUNS):
        for item in items:
            if item.get_closest_marker("long"):
                item.add_marker(pytest.mark.skip(reason=f"long: set {LONG_RUNS}"))


def _measured(value: float, unit: str = "GB/s") -> Measurement:
    return Measurement(value=value, unit=unit, statistic="median", samples=(value,))


def _spec(name: str, n_experts: int) -> ModelSpec:
    return ModelSpec(
        name=name,
        architecture="mixtral" if n_experts > 1 else "llama",
        n_layers=10,
        hidden=576,
        intermediate=1536,
        n_heads=9,
        n_kv_heads=3,
        head_dim=64,
        vocab=49152,
        n_experts=n_experts,
        n_active=min(2, n_experts),
        max_positions=8192,
        rms_eps=1e-5,
        rope_theta=1e5,
        tie_embeddings=True,
        eos_token_ids=(2,),
        fingerprint=f"{name}-fingerprint",
    )


def _tables(spec: ModelSpec, gflop_per_s: float = 300.0, gb_per_s: float = 35.0) -> list[OperatorTable]:
    """Roof-shaped times: the larger of FLOPs over peak and bytes over bandwidth, and ten microseconds."""
    rows = (1.0, 16.0, 64.0, 256.0, 512.0)
    experts, blocks = ("expert", "experts", "layers.experts"), ("attention_block", "layers.attention_block")
    params = {
        **dict.fromkeys(experts, spec.expert_params),
        **dict.fromkeys(blocks, spec.attention_params),
        "dense_layer": spec.attention_params + spec.expert_params,
        "head": spec.vocab * spec.hidden,
        "combine": spec.hidden,
    }

    def table(
        operator: str, axes: tuple[str, ...], grid: tuple[tuple[float, ...], ...], seconds: list[float]
    ) -> OperatorTable:
        same = tuple(seconds)
        return OperatorTable(
            operator=operator,
            shape=spec.shape_key,
            n_threads=2,
            isa="scalar",
            axes=axes,
            grid=grid,
            seconds=same,
            p10_s=same,
            p95_s=same,
            flops=same,
            bytes=same,
            n_samples=1,
        )

    tables = [
        table(
            name, ("rows",), (rows,), [1e-5 + max(2 * n * p / gflop_per_s / 1e9, 2 * p / gb_per_s / 1e9) for n in rows]
        )
        for name, p in params.items()
    ]
    tokens, contexts = (1.0, 5.0, 17.0), (64.0, 1024.0)
    per_key = 4 * spec.n_heads * spec.head_dim / gflop_per_s / 1e9
    grid = (tokens, contexts)
    return [
        *tables,
        table("attention", ("tokens", "context"), grid, [n * c * per_key for n in tokens for c in contexts]),
    ]


@pytest.fixture(scope="session")
def target_spec() -> ModelSpec:
    return _spec("target", 8)


@pytest.fixture(scope="session")
def draft_spec() -> ModelSpec:
    return _spec("draft", 1)


@pytest.fixture(scope="session")
def made_up_profile(target_spec: ModelSpec, draft_spec: ModelSpec) -> HardwareProfile:
    machine = Machine(
        cpu="made-up CPU",
        n_cores=2,
        isa="scalar",
        isas=("scalar",),
        l3_bytes=32 << 20,
        ram_bytes=24 << 30,
        gpu=None,
        system="none",
        fingerprint="made-up",
    )
    roofs = [("l1_read", 800.0), ("l2_read", 400.0), ("l3_read", 200.0), ("dram_read", 35.0)]
    return HardwareProfile(
        name="made-up",
        machine=machine,
        created="2026-01-01T00:00:00+00:00",
        tool_version="0",
        duration_s=0.0,
        peaks=(Roof(name="bf16_dot", n_threads=2, rate=_measured(470.0, "GFLOP/s")),),
        memory=tuple(Roof(name=n, n_threads=2, rate=_measured(r)) for n, r in roofs),
        disk=DiskLink(
            read_gb_per_s=_measured(1.0),
            latency_s=_measured(1e-4, "s"),
            chunk_bytes=1 << 20,
            n_readers=2,
            modes_gb_per_s=(1.0,),
            fit_error=0.0,
        ),
        operators=(*_tables(target_spec), *_tables(draft_spec)),
        process_bytes=60 << 20,
        waived={"gpu": "made up"},
    )


@pytest.fixture(scope="session")
def made_up_workload(target_spec: ModelSpec, draft_spec: ModelSpec) -> Workload:
    rng = np.random.default_rng(0)
    popularity = np.clip(rng.dirichlet(np.full(8, 2.0), target_spec.n_layers) * 2, 0, 1)
    return Workload(
        name="made-up",
        created="2026-01-01T00:00:00+00:00",
        model_name=target_spec.name,
        model_fingerprint=target_spec.fingerprint,
        draft_fingerprint=draft_spec.fingerprint,
        n_requests=32,
        prompt_tokens=Lengths(mean=100.0, p50=90, p95=200, max=240),
        output_tokens=Lengths(mean=64.0, p50=64, p95=64, max=64),
        acceptance={
            "model": Acceptance(conditional=(0.88,) * 12, n_rounds=1000, provenance="made up"),
            "ngram": Acceptance(conditional=(0.2, 0.5), n_rounds=1000, provenance="made up"),
        },
        popularity=tuple(tuple(float(p) for p in layer) for layer in popularity),
        union_exponent=0.8,
        union=(UnionPoint(requests=1, tokens=1, distinct=2.0),),
        n_tokens_measured=1000,
    )


@pytest.fixture(scope="session")
def made_up_request(
    made_up_profile: HardwareProfile, made_up_workload: Workload, target_spec: ModelSpec, draft_spec: ModelSpec
) -> TuneRequest:
    return TuneRequest(
        profile=made_up_profile,
        model=target_spec,
        workload=made_up_workload,
        model_source="nowhere",
        host_memory_bytes=8 << 30,
        draft=draft_spec,
        draft_source="nowhere-draft",
        batch=16,
    )


@pytest.fixture(scope="session")
def plan(made_up_request: TuneRequest) -> Plan:
    return tune(made_up_request)


@pytest.fixture(scope="session")
def run_record(made_up_profile: HardwareProfile) -> RunRecord:
    """Of a validation that measured nothing yet."""
    return RunRecord(
        kind="validate",
        created="2026-01-01T00:00:00+00:00",
        tool_version="0",
        plan_sha256="0",
        model_name="target",
        machine_fingerprint=made_up_profile.machine.fingerprint,
        n_requests=0,
        n_tokens=0,
        duration_s=0.0,
        disk_bytes_planned=0,
        disk_bytes_read=0,
        rss_planned_bytes=0,
        rss_peak_bytes=0,
        windows=(),
    )
