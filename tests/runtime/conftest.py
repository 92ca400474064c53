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


@pytest.fixture(scope="session")
def _saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()

    def save(kind: str, dtype: str = "bfloat16", max_shard_size: str = "5GB", **changes: Any) -> Path:
        torch.manual_seed(0)
        if kind == "mixtral":
            config = MixtralConfig(**SHAPE | {"num_local_experts": 5, "num_experts_per_tok": 2} | changes)
            model = MixtralForCausalLM(config)
        else:
            model = LlamaForCausalLM(LlamaConfig(**SHAPE | changes))
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
