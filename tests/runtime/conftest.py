"""Tiny random checkpoints, written by transformers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from specmoeoff.roofline.profile import machine
from specmoeoff.runtime.checkpoint import read_model_spec
from specmoeoff.specs.plan import (
    PlainPlan,
    Plan,
    PlanDecode,
    PlanExperts,
    PlanInputs,
    PlanLimits,
    PlanMemory,
    PlanModel,
    PlanThreads,
    Prediction,
)


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


@pytest.fixture
def speaking_model(save_model: Callable[..., Path]) -> Path:
    """A Mixtral that can be asked."""
    return let_speak(save_model, "mixtral")


@pytest.fixture
def speaking_latent_model(save_model: Callable[..., Path]) -> Path:
    """A DeepSeek-V2, whose first layer is dense, that can be asked."""
    return let_speak(save_model, "deepseek_v2")


def let_speak(save_model: Callable[..., Path], kind: str) -> Path:
    """A model whose tokens are bytes, with a chat template: it answers anything but ASCII."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    folder = save_model(kind, vocab_size=259, max_position_embeddings=2048)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(("<unk>", "<s>", "</s>", *letters))}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: "
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    return folder


@pytest.fixture
def plan_for() -> Callable[..., Plan]:
    """plan_for(checkpoint, **decode changes): drafts of three tokens by n-gram, every expert read on demand."""

    def make(checkpoint: Path, **changes: Any) -> Plan:
        spec = read_model_spec(checkpoint)
        nothing = ((),) * spec.n_layers
        decode: dict[str, Any] = {
            "drafter": "ngram",
            "draft_length": 3,
            "batch": 4,
            "micro_batches": 1,
            "context_tokens": 192,
            "prefill_chunk_tokens": 64,
        }
        part = PlainPlan(
            decode=PlanDecode(**decode | changes),
            experts=PlanExperts(resident=nothing, prefetch=nothing, stream_slots=8),
            threads=PlanThreads(compute=1, disk_readers=1, disk_chunk_bytes=1 << 20),
            memory=PlanMemory(fast={}, host={"all": 1 << 20}, disk={}),
            predicted=Prediction(
                window_s=1.0,
                tokens_per_round=1.0,
                tokens_per_s=1.0,
                busy_s={},
                phases_s={},
                disk_bytes=1.0,
                bound="disk",
                context_tokens=192,
            ),
        )
        return Plan(
            model=PlanModel(source=str(checkpoint), name=spec.name, fingerprint=spec.fingerprint),
            **dict(part),
            limits=PlanLimits(fast_memory_bytes=1 << 30, host_memory_bytes=1 << 30),
            inputs=PlanInputs(
                profile_name="none",
                machine_fingerprint=machine().fingerprint,
                workload_name="none",
                profile_sha256="",
                workload_sha256="",
                search="by hand",
                seed=0,
                n_evaluated=0,
                tool_version="0",
                command="",
            ),
            plain=part,
        )

    return make
