"""Tiny random checkpoints, written by transformers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECMOEOFF_CACHE", str(tmp_path / "cache"))


SHAPE: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


MOE: dict[str, Any] = {"num_experts": 6, "num_experts_per_tok": 2}
LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 48,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "head_dim": 16,
    "v_head_dim": 16,
    "first_k_dense_replace": 1,
}
# transformers' names, and what a tiny model of the kind has besides SHAPE.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {}),
    "mixtral": ("Mixtral", {"num_local_experts": 5, "num_experts_per_tok": 2}),
    "qwen2_moe": ("Qwen2Moe", MOE | {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 96}),
    "qwen3_moe": ("Qwen3Moe", MOE | {"moe_intermediate_size": 48, "norm_topk_prob": True}),
    "olmoe": ("Olmoe", MOE | {"clip_qkv": 0.5, "head_dim": 16}),
    "deepseek_v2": ("DeepseekV2", LATENT | {"q_lora_rank": None, "n_shared_experts": 2}),
    "deepseek_v3": (
        "DeepseekV3",
        LATENT
        | {"q_lora_rank": 48, "n_shared_experts": 1, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5},
    ),
    "gpt_oss": ("GptOss", {"num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": 24, "head_dim": 32}),
}


@pytest.fixture(scope="session")
def _saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    import torch
    import transformers
    from transformers.utils import logging

    logging.disable_progress_bar()

    def save(kind: str, dtype: str = "bfloat16", max_shard_size: str = "5GB", **changes: Any) -> Path:
        name, fields = KINDS[kind]
        torch.manual_seed(0)
        model = getattr(transformers, f"{name}ForCausalLM")(
            getattr(transformers, f"{name}Config")(**SHAPE | fields | changes)
        )
        for parameter_name, parameter in (*model.named_parameters(), *model.named_buffers()):
            if parameter_name.endswith(("bias", "norm.weight")):  # or they would be zeros and ones
                torch.nn.init.normal_(parameter, float(parameter_name.endswith("weight")), 0.2)
        folder = tmp_path_factory.mktemp(kind) / f"tiny-{kind}"
        model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=max_shard_size)
        return folder

    return save


@pytest.fixture
def save_model(_saved: Callable[..., Path]) -> Callable[..., Path]:
    """save(kind, dtype, max_shard_size, **config changes) -> a fresh checkpoint folder."""
    return _saved


@pytest.fixture
def mixtral(_saved: Callable[..., Path]) -> Path:
    """A sharded bf16 Mixtral of three layers and five experts."""
    return _saved("mixtral", max_shard_size="200KB")


@pytest.fixture
def llama(_saved: Callable[..., Path]) -> Path:
    """A bf16 llama of three layers in one file."""
    return _saved("llama")


@pytest.fixture
def edit_config() -> Callable[..., None]:
    """edit(folder, field=value, ...) changes config.json."""

    def edit(folder: Path, **changes: Any) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit
