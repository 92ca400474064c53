"""Every architecture's operators are timed with its own layers, and the tables price its windows."""

from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import safe_open

from specmoeoff.estimate.costs import Prices
from specmoeoff.pipeline import ExpertUse, RequestTokens, WindowShape, window_graph
from specmoeoff.precision import Precision
from specmoeoff.roofline.probes import operators
from specmoeoff.runtime.checkpoint import read_model_spec
from specmoeoff.specs.profile import HardwareProfile, OperatorTable

KINDS = ["qwen2", "qwen3", "mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v2", "deepseek_v3", "gpt_oss"]


@pytest.fixture(autouse=True)
def _few_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"ROWS": (1, 16, 128), "TOKENS": (1, 5), "CONTEXTS": (64,)}.items():
        monkeypatch.setattr(operators, name, value)
    for name, size in {"COLD_BYTES": 1 << 18, "PASS_S": 0.0, "WAITS_S": (0.0005,)}.items():
        monkeypatch.setattr(operators, name, size)


def measured(folder: Path, precision: Precision = "bf16") -> dict[str, OperatorTable]:
    spec = read_model_spec(folder).model_copy(update={"precision": precision})
    return {t.operator: t for t in operators.measure_operators([spec], 1, 0.0, 1)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_windows_of_every_architecture_are_priced_by_tables_of_its_own(
    save_model: Callable[..., Path], made_up_profile: HardwareProfile, kind: str, precision: Precision
) -> None:
    folder = save_model(kind)
    spec = read_model_spec(folder).model_copy(update={"precision": precision})
    profile = made_up_profile.model_copy(update={"operators": tuple(measured(folder, precision).values())})
    uses = tuple(
        tuple(ExpertUse(e, "resident", 1.0) for e in range(spec.n_experts_of(layer))) for layer in range(spec.n_layers)
    )
    graph = window_graph(WindowShape((), ((RequestTokens(5.0, 64),),), uses, 5.0), 0)
    seconds = Prices(profile, spec, None, 1).seconds(graph)
    assert all(s > 0 for s, node in zip(seconds, graph.nodes, strict=True) if node.kind != "verify")


@pytest.mark.parametrize("kind", ["qwen2", "mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss"])
def test_a_block_multiplies_with_the_matrices_of_the_checkpoint(save_model: Callable[..., Path], kind: str) -> None:
    folder = save_model(kind)
    with safe_open(folder / "model.safetensors", "np") as tensors:
        shapes = {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
    own = [s for name, s in shapes.items() if ".layers.1." in name and len(s) == 2 and ".experts." not in name]
    if kind == "qwen2":  # its feed-forward is the only expert
        own = [s for name, s in shapes.items() if ".layers.1.self_attn" in name and len(s) == 2]
    assert measured(folder)["attention_block"].flops[0] == 2 * sum(n * m for n, m in own)


def test_dense_first_layers_and_windows_have_tables_of_their_own(save_model: Callable[..., Path]) -> None:
    latent, sliding = measured(save_model("deepseek_v2")), measured(save_model("gpt_oss"))
    dense, shared = 3 * 64 * 128, 2 * 3 * 64 * 48
    router = 8 * 64
    assert latent["dense_block"].flops[0] - latent["attention_block"].flops[0] == 2 * (dense - shared - router)
    assert sliding["window_attention"].flops[0] == sliding["attention"].flops[0] * 24 / 64
    assert "window_attention" not in latent
    assert "dense_block" not in sliding


def test_models_whose_layers_differ_share_no_tables(save_model: Callable[..., Path]) -> None:
    specs = [read_model_spec(save_model(kind)) for kind in KINDS if kind not in ("qwen2", "qwen3")]
    same_sizes = {"n_experts": 8, "n_active": 2, "intermediate": 128, "head_dim": 32, "n_kv_heads": 4}
    keys = [spec.model_copy(update=same_sizes).shape_key for spec in specs]
    keys += [spec.model_copy(update={**same_sizes, "precision": "fp32"}).shape_key for spec in specs]
    assert len(set(keys)) == len(keys)
