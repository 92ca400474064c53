"""Reading checkpoints: what transformers wrote is what we read, and everything else gets its sentence."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from specmoeoff.errors import BadInput
from specmoeoff.runtime.checkpoint import Checkpoint, read_model_spec, resolve_model, to_bf16

SaveModel = Callable[..., Path]
EditConfig = Callable[..., None]


def n_open_files(folder: Path) -> int:
    links = (Path("/proc/self/fd") / name for name in os.listdir("/proc/self/fd"))
    return sum(link.is_symlink() and str(folder) in os.readlink(link) for link in links)


def test_spec_of_a_mixtral_is_what_its_config_says(mixtral: Path) -> None:
    spec = read_model_spec(mixtral)
    assert (spec.name, spec.architecture) == ("tiny-mixtral", "mixtral")
    assert (spec.n_layers, spec.hidden, spec.intermediate, spec.vocab) == (3, 64, 128, 96)
    assert (spec.n_heads, spec.n_kv_heads, spec.head_dim) == (4, 2, 32)
    assert (spec.n_experts, spec.n_active, spec.max_positions) == (5, 2, 256)
    assert (spec.rms_eps, spec.tie_embeddings, spec.eos_token_ids) == (1e-5, False, (2,))


def test_a_llama_is_one_expert_that_is_always_active(llama: Path) -> None:
    spec = read_model_spec(llama)
    assert (spec.architecture, spec.n_experts, spec.n_active) == ("llama", 1, 1)


@pytest.mark.parametrize("field", ["rope_theta", "rope_parameters"])
def test_rope_theta_is_read_in_its_old_and_its_new_place(llama: Path, field: str) -> None:
    path = llama / "config.json"
    config = json.loads(path.read_text())
    config.pop("rope_parameters")
    config[field] = 12345.0 if field == "rope_theta" else {"rope_theta": 12345.0, "rope_type": "default"}
    path.write_text(json.dumps(config))
    assert read_model_spec(llama).rope_theta == 12345.0


def test_end_tokens_of_the_generation_config_win(llama: Path) -> None:
    path = llama / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": [2, 7]}))
    assert read_model_spec(llama).eos_token_ids == (2, 7)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_every_tensor_equals_what_torch_reads_as_bf16(save_model: SaveModel, dtype: str) -> None:
    import torch
    from safetensors.torch import load_file

    folder = save_model("mixtral", dtype=dtype, max_shard_size="200KB")
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 2
    with Checkpoint(folder) as checkpoint:
        for shard in shards:
            for name, tensor in load_file(shard).items():
                wanted = tensor.to(torch.bfloat16).view(torch.uint16).numpy()
                np.testing.assert_array_equal(checkpoint.tensor_bf16(name), wanted)
                np.testing.assert_array_equal(checkpoint.tensor_f32(name), tensor.float().numpy())


def test_rounding_to_bf16_is_to_nearest_even_as_in_torch() -> None:
    import torch

    bits = np.random.default_rng(0).integers(0, 1 << 32, 100_000, dtype=np.uint32)
    ties = (np.arange(0x3F80, 0x4080, dtype=np.uint32) << 16) | 0x8000
    values = np.concatenate([bits, ties]).view(np.float32)
    values = values[~np.isnan(values)]
    wanted = torch.from_numpy(values.copy()).to(torch.bfloat16).view(torch.uint16).numpy()
    np.testing.assert_array_equal(to_bf16(values), wanted)


def test_a_closed_checkpoint_holds_no_file_and_no_memory_map(mixtral: Path) -> None:
    with Checkpoint(mixtral) as checkpoint:
        checkpoint.tensor_bf16("model.embed_tokens.weight")
        assert n_open_files(mixtral) == 1
        assert str(mixtral) not in Path("/proc/self/maps").read_text()
    assert n_open_files(mixtral) == 0


# --- fingerprint


def test_the_fingerprint_depends_on_content_and_not_on_place(mixtral: Path, save_model: SaveModel) -> None:
    same = save_model("mixtral", max_shard_size="200KB")
    other = save_model("mixtral", max_shard_size="200KB", rope_theta=5e5)
    assert read_model_spec(mixtral).fingerprint == read_model_spec(same).fingerprint
    assert read_model_spec(mixtral).fingerprint != read_model_spec(other).fingerprint


def test_a_changed_weight_changes_the_fingerprint_although_one_was_cached(llama: Path) -> None:
    before = read_model_spec(llama).fingerprint
    path = llama / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, (1, 1))
    assert read_model_spec(llama).fingerprint != before


def test_a_cached_fingerprint_is_taken_while_nothing_changed(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = read_model_spec(llama).fingerprint
    monkeypatch.setattr(Checkpoint, "_samples", lambda self: pytest.fail("weights were read again"))
    assert read_model_spec(llama).fingerprint == first


# --- what is refused


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, r"GPT2LMHeadModel .*MixtralForCausalLM or LlamaForCausalLM or Qwen2"),
        ({"quantization_config": {"quant_method": "gptq"}}, r"quantization_config \(gptq\)"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 4}}, r"rope_scaling of type 'longrope'"),
        ({"rope_scaling": {"rope_type": "yarn"}}, r"rope_scaling\.factor"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 0}}, "factor and original_max_position_embeddings"),
        ({"rope_scaling": {"rope_type": "linear", "factor": {}}}, r"rope_scaling\.factor"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4}}, r"rope_scaling of type 'dynamic'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"sliding_window": 128}, "sliding_window 128"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"attention_bias": True}, r"q_proj\.bias is missing"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_size": "64"}, "hidden_size is '64'"),
        ({"num_hidden_layers": None}, "num_hidden_layers is None"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        ({"head_dim": 40}, "head_dim 40 is not a multiple of 16"),
        ({"head_dim": 592}, "head_dim 592 exceeds"),
        ({"rms_norm_eps": "small"}, "rms_eps"),
        ({"rope_parameters": 3}, "wrong type"),
        ({"rope_scaling": {"rope_type": "default"}, "rope_parameters": 3}, "wrong type"),
        ({"rope_scaling": "linear"}, "wrong type"),
        ({"quantization_config": 5}, "wrong type"),
        ({"sliding_window": "long"}, "wrong type"),
        ({"architectures": 5}, "architecture 5 is not supported"),
        ({"architectures": {}}, "architecture none is not supported"),
        ({"architectures": {"a": 1}}, "is not supported"),
        ({"architectures": [["LlamaForCausalLM"]]}, "is not supported"),
        ({"architectures": [None]}, "architecture None is not supported"),
        ({"hidden_act": ["silu"]}, "hidden_act"),
        ({"vocab_size": [96]}, r"vocab_size is \[96\]"),
        ({"vocab_size": True}, "vocab_size is True"),
        ({"num_attention_heads": 1000, "head_dim": None}, "head_dim is 0"),
        ({"rope_parameters": None, "rope_theta": {}}, "rope_theta"),
        ({"rope_parameters": None, "rope_theta": -1.0}, "rope_theta is negative"),
        ({"tie_word_embeddings": "perhaps"}, "tie_embeddings"),
        ({"num_hidden_layers": 10**9}, "1,000,000,000 experts are more than a model has"),
        ({"intermediate_size": 192}, r"mlp.* has shape \(128, 64\), config.json asks for \(192, 64\)"),
        ({"num_hidden_layers": 4}, r"model\.layers\.3\..* is missing"),
        ({"num_hidden_layers": 2}, r"model\.layers\.2\..* is no part of a plain llama model"),
    ],
)
def test_a_config_that_cannot_be_run_gets_a_sentence(
    llama: Path, edit_config: EditConfig, changes: dict[str, Any], sentence: str
) -> None:
    edit_config(llama, **changes)
    with pytest.raises(BadInput, match=sentence) as failure:
        read_model_spec(llama)
    assert str(llama) in str(failure.value)


@pytest.mark.parametrize(
    ("kind", "changes", "sentence"),
    [
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step 2 is not supported"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, r"mlp_only_layers \[0\] is not supported"),
        ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 64}, "sliding_window 64"),
        ("qwen2_moe", {"shared_expert_intermediate_size": 80}, "no multiple of moe_intermediate_size"),
        ("qwen2_moe", {"num_experts_per_tok": None}, "num_experts_per_tok is None"),
        ("deepseek_v2", {"topk_method": "best"}, "topk_method 'best'"),
        ("deepseek_v2", {"topk_method": "group_limited_greedy"}, "n_group is None"),
        ("deepseek_v3", {"rope_interleave": False}, "rope_interleave False"),
        ("deepseek_v3", {"first_k_dense_replace": 3}, "leaves no layer with experts"),
        ("deepseek_v3", {"kv_lora_rank": 40}, "kv_lora_rank 40 is not a multiple of 16"),
        ("deepseek_v3", {"quantization_config": {"quant_method": "fp8"}}, r"quantization_config \(fp8\)"),
        ("gpt_oss", {"swiglu_limit": 5.0}, "swiglu_limit 5.0"),
        ("gpt_oss", {"layer_types": ["full_attention"] * 3}, "layer_types"),
    ],
)
def test_what_a_mixture_of_experts_asks_for_and_is_not_computed_gets_a_sentence(
    save_model: SaveModel, edit_config: EditConfig, kind: str, changes: dict[str, Any], sentence: str
) -> None:
    folder = save_model(kind)
    edit_config(folder, **changes)
    with pytest.raises(BadInput, match=sentence):
        read_model_spec(folder)


@pytest.mark.parametrize(
    "kind", ["qwen2", "qwen3", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v2", "deepseek_v3", "gpt_oss"]
)
def test_parameters_are_counted_as_transformers_counts_them(save_model: SaveModel, kind: str) -> None:
    from transformers import AutoModelForCausalLM

    folder = save_model(kind)
    theirs = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(folder).parameters())
    assert read_model_spec(folder).n_params == theirs


def test_more_active_experts_than_experts_are_refused(mixtral: Path, edit_config: EditConfig) -> None:
    edit_config(mixtral, num_experts_per_tok=6)
    with pytest.raises(BadInput, match="num_experts_per_tok 6 exceeds num_local_experts 5"):
        read_model_spec(mixtral)


def test_a_window_as_long_as_the_context_is_full_attention(mixtral: Path, edit_config: EditConfig) -> None:
    edit_config(mixtral, sliding_window=256)
    assert read_model_spec(mixtral).max_positions == 256


def test_a_shard_cut_short_is_named_with_its_missing_bytes(mixtral: Path) -> None:
    shard = sorted(mixtral.glob("*.safetensors"))[1]
    size = shard.stat().st_size
    os.truncate(shard, size - 1000)
    with pytest.raises(BadInput, match=rf"{shard.name}: the shard is cut short, 1,000 of {size:,} bytes"):
        read_model_spec(mixtral)


@pytest.mark.parametrize("n_left", [0, 5, 100])
def test_a_shard_that_ends_within_its_header_is_named(llama: Path, n_left: int) -> None:
    shard = llama / "model.safetensors"
    os.truncate(shard, n_left)
    with pytest.raises(BadInput, match=r"model\.safetensors: the shard ends within its header, [\d,]+ bytes"):
        read_model_spec(llama)


def test_a_file_that_is_no_shard_is_named(llama: Path) -> None:
    (llama / "model.safetensors").write_bytes((20).to_bytes(8, "little") + b"x" * 1000)
    with pytest.raises(BadInput, match="not a safetensors file"):
        read_model_spec(llama)


def test_a_missing_shard_is_named(mixtral: Path) -> None:
    shard = sorted(mixtral.glob("*.safetensors"))[0]
    shard.unlink()
    with pytest.raises(BadInput, match=f"{shard.name}: this shard is missing"):
        read_model_spec(mixtral)


def test_a_tensor_the_index_misplaces_is_named(mixtral: Path) -> None:
    path = mixtral / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    shards = sorted(set(index["weight_map"].values()))
    index["weight_map"]["model.norm.weight"] = next(s for s in shards if s != index["weight_map"]["model.norm.weight"])
    path.write_text(json.dumps(index))
    with pytest.raises(BadInput, match=r"model\.norm\.weight, which .* puts here, is not in the shard"):
        read_model_spec(mixtral)


def test_an_index_that_leaves_its_folder_is_refused(mixtral: Path) -> None:
    path = mixtral / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"model.norm.weight": "../elsewhere.safetensors"}}))
    with pytest.raises(BadInput, match="not a file of the folder"):
        read_model_spec(mixtral)


def test_weights_that_are_not_safetensors_are_refused(llama: Path) -> None:
    (llama / "model.safetensors").rename(llama / "pytorch_model.bin")
    with pytest.raises(BadInput, match="only safetensors weights are read"):
        read_model_spec(llama)


@pytest.mark.parametrize("eos", ["x", {}, [[2]], [{}], 2.5])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_end_tokens_of_another_type_get_a_sentence(llama: Path, name: str, eos: object) -> None:
    path = llama / name
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": eos}))
    if name == "config.json":
        (llama / "generation_config.json").unlink()
    with pytest.raises(BadInput, match="eos_token_ids"):
        read_model_spec(llama)


@pytest.mark.parametrize(
    "entry", [{"shape": [float("inf")]}, {"shape": 5}, {"data_offsets": [0, 1.5]}, {"data_offsets": ["0", "2"]}]
)
def test_a_header_of_wrong_types_gets_a_sentence(llama: Path, entry: dict[str, Any]) -> None:
    good = {"dtype": "BF16", "shape": [1], "data_offsets": [0, 2]}
    header = json.dumps({"x": good | entry}).encode()
    (llama / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(100))
    with pytest.raises(BadInput, match="its header is unreadable"):
        read_model_spec(llama)


@pytest.mark.parametrize("text", ["{", "[]", "[" * 200_000, '{"vocab_size": ' + "9" * 5000 + "}"])
def test_a_config_that_is_no_object_is_refused(llama: Path, text: str) -> None:
    (llama / "config.json").write_text(text)
    with pytest.raises(BadInput, match=r"config\.json: "):
        read_model_spec(llama)


# --- names


def test_a_folder_resolves_to_itself(tmp_path: Path) -> None:
    paths = resolve_model(tmp_path)
    assert (paths.target, paths.draft) == (tmp_path, None)


def test_a_hub_name_gets_the_command_that_downloads_it() -> None:
    with pytest.raises(BadInput, match=re.escape("hf download mistralai/Mixtral-8x7B-v0.1 --local-dir")):
        resolve_model("mistralai/Mixtral-8x7B-v0.1")


def test_a_file_or_an_unknown_name_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    path.touch()
    with pytest.raises(BadInput, match="is a file"):
        resolve_model(path)
    with pytest.raises(BadInput, match="no such folder"):
        resolve_model("nothing")
    for name in ("~nouser-of-this-name/model", "x" * 300):
        with pytest.raises(BadInput, match=f"model {name}: .*give a checkpoint folder"):
            resolve_model(name)
