"""Bytes of shipped shapes and of plans for machines with a GPU, against published numbers; no choice exceeds a tier."""

from pathlib import Path

import numpy as np
import pytest

from specmoeoff.errors import BadInput
from specmoeoff.estimate.gpu_choices import Problem, eagle_head, make_problem
from specmoeoff.estimate.gpu_memory import GIB, draft_params, largest_batch, split_kv, tiers, total
from specmoeoff.profiles import find, names
from specmoeoff.specs.model import ModelShape, ModelSpec
from specmoeoff.specs.workload import Workload
from specmoeoff.tuner.gpu_space import GpuSpace


def shape(name: str) -> ModelSpec:
    return ModelShape.load(find("models", name)).model


def problem(model: str, workload: str = "apps", output_tokens: int = 1024) -> Problem:
    behaviour = Workload.load(find("workloads", workload)).with_output_tokens(output_tokens)
    return make_problem(shape(model), behaviour, None, 16)


@pytest.mark.parametrize("name", names("models"))
def test_a_shape_has_as_many_parameters_as_its_publisher_counts(name: str) -> None:
    found = ModelShape.load(find("models", name))
    assert found.model.n_params == found.n_params
    assert (found.model.name, found.source[:24]) == (name, "https://huggingface.co/" + found.source[23])


def test_mixtrals_bytes_are_the_papers() -> None:
    spec = shape("mixtral-8x7b")
    assert spec.kv_bytes_per_token == 131_072
    assert spec.n_all_experts * spec.expert_bytes == 84 * GIB
    point = GpuSpace(problem("mixtral-8x7b"), {"fast": 24 * GIB, "host": 250 * GIB})
    one = point.choices(np.array([list(point.closed_form().values())]))
    assert tiers(point.problem, one)["fast"]["stream_buffers"][0] == 5.25 * GIB
    assert draft_params(eagle_head(spec)) == pytest.approx(0.28e9, rel=0.02)  # EAGLE's README


def test_latent_attention_caches_576_numbers_and_mxfp4_takes_17_bytes_for_32() -> None:
    assert shape("deepseek-v2-lite").kv_bytes_per_token == 27 * (512 + 64) * 2
    spec = shape("gpt-oss-20b")
    assert spec.expert_bytes == 3 * 2880 * 2880 * 17 // 32 + (2 * 2880 + 2880) * 2


@pytest.mark.parametrize(("host_gib", "batch"), [(250, 824), (190, 515)])
def test_the_papers_batches(host_gib: int, batch: int) -> None:
    spec = shape("mixtral-8x7b")
    assert largest_batch((host_gib - 90) * GIB, spec.kv_bytes_per_token, 566.17 + 1024) == batch
    space = GpuSpace(problem("mixtral-8x7b"), {"fast": 24 * GIB, "host": host_gib * GIB})
    plain = {**space.closed_form(), "draft": 0, "draft_kv_share": 0}
    assert space.choices(np.array([list(plain.values())])).batch[0] == batch


def test_the_papers_kv_of_target_and_draft() -> None:
    spec = shape("mixtral-8x7b")
    assert [round(b / GIB, 1) for b in split_kv(160 * GIB, spec, eagle_head(spec))] == [142.2, 17.8]


@pytest.mark.parametrize("seed", range(5))
def test_no_choice_exceeds_a_tier(seed: int) -> None:
    """Two hundred random choices each, a thousand in all, on machines of random size."""
    rng = np.random.default_rng(seed)
    some = problem(names("models")[rng.integers(8)], "mt-bench", int(rng.integers(32, 2048)))
    need = some.spec.n_all_experts * some.spec.expert_bytes
    for _ in range(10):
        limits = {
            "fast": int(rng.uniform(6, 90) * GIB),
            "host": int(need * rng.uniform(0.6, 2) + rng.uniform(0, 90) * GIB),
        }
        space = GpuSpace(some, limits, int(rng.integers(1, 64)) if rng.random() < 0.3 else None)
        points = np.stack([rng.integers(0, n, 20) for n in space.axes.values()], axis=1)
        for choices in (space.choices(points), space.filled(space.choices(points))):
            choices = choices.take(np.flatnonzero(choices.batch > 0))
            for tier, purposes in tiers(some, choices).items():
                assert (total(purposes) <= limits[tier]).all()
            assert (choices.resident + choices.on_host <= some.spec.n_experts).all()


def test_a_workload_says_what_it_leaves_open_and_what_it_is_not_of(made_up_workload: Workload, tmp_path: Path) -> None:
    apps = Workload.load(find("workloads", "apps"))
    with pytest.raises(BadInput, match="leaves the output's length open; give --output-tokens"):
        apps.with_output_tokens(None)
    with pytest.raises(BadInput, match="has its own output lengths"):
        made_up_workload.with_output_tokens(5)
    with pytest.raises(BadInput, match="measured on model target, not on mixtral"):
        make_problem(shape("mixtral-8x7b"), made_up_workload, None, 16)
