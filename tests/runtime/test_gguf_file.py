"""GGUF files as input: the same model from a GGUF file and from safetensors is the same packed model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import ExpertGatingFuncType, GGMLQuantizationType, GGUFWriter, RopeScalingType
from gguf.quants import dequantize, quantize

from specmoeoff.errors import BadInput
from specmoeoff.runtime.checkpoint import Checkpoint, open_checkpoint, read_model_spec, resolve_model
from specmoeoff.runtime.pack import pack_model
from specmoeoff.specs.model import ModelSpec

# As llama.cpp's convert_hf_to_gguf.py names them.
ARCHITECTURES = {
    "llama": "llama",
    "mixtral": "llama",
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
    "olmoe": "olmoe",
    "deepseek_v2": "deepseek2",
    "deepseek_v3": "deepseek2",
    "gpt_oss": "gpt-oss",
}
LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_a_layernorm": "attn_q_a_norm",
    "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "self_attn.kv_b_proj": "attn_kv_b",
    "mlp.gate": "ffn_gate_inp",
    "mlp.router": "ffn_gate_inp",
    "block_sparse_moe.gate": "ffn_gate_inp",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    **{f"mlp.{part}_proj": f"ffn_{part}" for part in ("gate", "up", "down")},
    **{f"mlp.shared_expert{s}.{part}_proj": f"ffn_{part}_shexp" for part in ("gate", "up", "down") for s in ("", "s")},
}


def gguf_tensors(folder: Path, kind: str, split_kv: bool) -> dict[str, np.ndarray]:
    """Of a checkpoint folder, float32, rearranged as llama.cpp's converter does."""
    tensors: dict[str, np.ndarray] = {}
    with Checkpoint(folder) as checkpoint:
        spec = checkpoint.spec
        for name in checkpoint.places:
            values, parts = checkpoint.tensor_f32(name), name.split(".")
            if parts[1] != "layers":
                top = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
                tensors[f"{top[name.removesuffix('.weight')]}.weight"] = values
                continue
            prefix, inner, suffix = f"blk.{parts[2]}.", ".".join(parts[3:-1]), parts[-1]
            if ".experts." in name:
                continue
            if suffix == "sinks":
                tensors[f"{prefix}attn_sinks.weight"] = values
            elif suffix == "e_score_correction_bias":
                tensors[f"{prefix}exp_probs_b.bias"] = values
            else:
                ours = LAYER_NAMES[inner]
                if kind == "gpt_oss" and ours == "ffn_norm":
                    ours = "post_attention_norm"
                if ARCHITECTURES[kind] == "llama" and ours in ("attn_q", "attn_k"):
                    halves = values.reshape(-1, 2, spec.head_dim // 2, values.shape[-1])
                    values = halves.swapaxes(1, 2).reshape(values.shape)
                if ours == "ffn_gate_inp_shexp":
                    values = values[0]
                if ours == "attn_kv_b" and split_kv:
                    heads = values.reshape(spec.n_heads, -1, spec.kv_latent)
                    tensors[f"{prefix}attn_k_b.weight"] = heads[:, : spec.head_dim].swapaxes(1, 2).copy()
                    tensors[f"{prefix}attn_v_b.weight"] = heads[:, spec.head_dim :].copy()
                else:
                    tensors[f"{prefix}{ours}.{suffix}"] = values
        for layer in range(spec.n_dense_layers, spec.n_layers if spec.n_experts > 1 else 0):
            experts = [checkpoint.expert(layer, e, "fp32") for e in range(spec.n_experts)]
            for i, part in enumerate(("gate", "up", "down")):
                tensors[f"blk.{layer}.ffn_{part}_exps.weight"] = np.stack([expert[i] for expert in experts])
            if spec.expert_bias:
                biases = np.split(checkpoint.expert_biases(layer), [spec.intermediate, 2 * spec.intermediate], axis=1)
                for part, bias in zip(("gate", "up", "down"), biases, strict=True):
                    tensors[f"blk.{layer}.ffn_{part}_exps.bias"] = bias
    return tensors


def write_gguf(
    folder: Path, path: Path, kind: str, quantised: GGMLQuantizationType | None = None, split_kv: bool = False
) -> ModelSpec:
    """A GGUF file of a checkpoint folder; weights of experts `quantised`, all else F32."""
    spec = read_model_spec(folder)
    writer = GGUFWriter(path, ARCHITECTURES[kind])
    writer.add_block_count(spec.n_layers)
    writer.add_context_length(spec.max_positions)
    writer.add_embedding_length(spec.hidden)
    writer.add_feed_forward_length(spec.dense_intermediate or spec.intermediate)
    writer.add_head_count(spec.n_heads)
    writer.add_head_count_kv(1 if split_kv else spec.n_kv_heads)
    writer.add_layer_norm_rms_eps(spec.rms_eps)
    writer.add_rope_freq_base(spec.rope_theta)
    writer.add_eos_token_id(spec.eos_token_ids[0] if spec.eos_token_ids else 0)
    if not spec.kv_latent:
        writer.add_key_length(spec.head_dim)
    if spec.n_experts > 1:
        writer.add_expert_count(spec.n_experts)
        writer.add_expert_used_count(spec.n_active)
        writer.add_expert_feed_forward_length(spec.intermediate)
    if kind == "qwen2_moe":
        writer.add_expert_shared_feed_forward_length(spec.n_shared_experts * spec.intermediate)
    if kind == "olmoe":
        writer.add_clamp_kqv(spec.clip_qkv)
    if kind == "gpt_oss":
        writer.add_sliding_window(spec.sliding_window)
    if spec.kv_latent:
        key, value = spec.head_dim + spec.rope_head_dim, spec.v_head_dim
        if split_kv:
            writer.add_key_length_mla(key)
            writer.add_value_length_mla(value)
            key, value = spec.kv_latent + spec.rope_head_dim, spec.kv_latent
        writer.add_key_length(key)
        writer.add_value_length(value)
        writer.add_rope_dimension_count(spec.rope_head_dim)
        writer.add_kv_lora_rank(spec.kv_latent)
        if spec.q_latent:
            writer.add_q_lora_rank(spec.q_latent)
        writer.add_expert_shared_count(spec.n_shared_experts)
        writer.add_leading_dense_block_count(spec.n_dense_layers)
        writer.add_expert_weights_scale(spec.routed_scale)
        writer.add_expert_weights_norm(spec.renormalise)
    if kind == "deepseek_v3":
        writer.add_expert_gating_func(ExpertGatingFuncType.SIGMOID)
        writer.add_expert_group_count(spec.n_groups)
        writer.add_expert_group_used_count(spec.n_active_groups)
    if spec.rope_scaling:
        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(spec.rope_scaling.factor)
        writer.add_rope_scaling_orig_ctx_len(spec.rope_scaling.original_positions)
        if spec.rope_scaling.mscale_all_dim:
            writer.add_rope_scaling_yarn_log_mul(0.1 * spec.rope_scaling.mscale_all_dim)
    for name, values in gguf_tensors(folder, kind, split_kv).items():
        if quantised is not None and name.endswith("exps.weight"):
            writer.add_tensor(name, quantize(values, quantised), raw_dtype=quantised)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return spec


def facts(spec: ModelSpec) -> dict[str, Any]:
    """What a spec says but for its name and what is known to 32 bits only."""
    return spec.model_dump(exclude={"name", "fingerprint", "rms_eps", "clip_qkv", "rope_scaling", "eos_token_ids"})


@pytest.mark.parametrize(
    ("kind", "split_kv", "changes"),
    [
        *((kind, False, {}) for kind in ARCHITECTURES),
        ("deepseek_v3", True, {}),
        (
            "deepseek_v2",
            False,
            {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "mscale": 0.7, "mscale_all_dim": 0.7, "rope_theta": 1e4,
                                 "original_max_position_embeddings": 64}},
        ),
    ],
)  # fmt: skip
def test_a_gguf_file_packs_to_the_bytes_of_its_safetensors(
    save_model: Callable[..., Path], tmp_path: Path, kind: str, split_kv: bool, changes: dict[str, Any]
) -> None:
    folder, path = save_model(kind, "float32", **changes), tmp_path / "model.gguf"
    spec = write_gguf(folder, path, kind, split_kv=split_kv)
    found = read_model_spec(path)
    assert facts(found) == facts(spec)
    if spec.rope_scaling:
        ours, theirs = found.rope_scaling, spec.rope_scaling
        assert ours is not None
        assert ours.table_scale == pytest.approx(theirs.table_scale)
        assert found.attention_scale == pytest.approx(spec.attention_scale)
    first, second = (pack_model(source, precision="fp32") for source in (folder, path))
    assert first.folder != second.folder
    for name in ("dense.bin", "experts.bin"):
        assert (first.folder / name).read_bytes() == (second.folder / name).read_bytes()


def test_quantised_experts_are_dequantised(save_model: Callable[..., Path], tmp_path: Path) -> None:
    folder, path = save_model("qwen3_moe", "float32", moe_intermediate_size=64), tmp_path / "model.gguf"
    write_gguf(folder, path, "qwen3_moe", GGMLQuantizationType.Q8_0)
    with Checkpoint(folder) as plain, open_checkpoint(path) as quantised:
        for ours, exact in zip(quantised.expert(1, 2, "fp32"), plain.expert(1, 2, "fp32"), strict=True):
            wanted = dequantize(quantize(exact, GGMLQuantizationType.Q8_0), GGMLQuantizationType.Q8_0)
            np.testing.assert_array_equal(ours, wanted)


@pytest.mark.parametrize(
    ("kind", "remedy"), [(24, "is in I8, .* use another quantisation"), (999, "pip install -U gguf")]
)
def test_an_unknown_quantisation_gets_a_sentence(
    save_model: Callable[..., Path], tmp_path: Path, kind: int, remedy: str
) -> None:
    folder, path = save_model("qwen3_moe", "float32", moe_intermediate_size=64), tmp_path / "model.gguf"
    write_gguf(folder, path, "qwen3_moe", GGMLQuantizationType.Q8_0)
    data, name = path.read_bytes(), b"blk.1.ffn_up_exps.weight"
    # After its name a tensor's entry has the number of dimensions, three here, the dimensions and the type.
    at = data.index(name) + len(name) + 4 + 3 * 8
    assert int.from_bytes(data[at : at + 4], "little") == GGMLQuantizationType.Q8_0
    path.write_bytes(data[:at] + kind.to_bytes(4, "little") + data[at + 4 :])
    with pytest.raises(BadInput, match=remedy):
        read_model_spec(path)


def test_a_gguf_file_is_a_model_by_itself_and_a_broken_one_gets_a_sentence(llama: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(llama, path, "llama")
    assert resolve_model(path).target == path
    data = path.read_bytes()
    for damaged in (data[:100], b"GGML" + data[4:], data[: len(data) - 100]):
        path.write_bytes(damaged)
        with pytest.raises(BadInput, match=r"model\.gguf: "):
            read_model_spec(path)
