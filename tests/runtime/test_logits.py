"""The engine's arithmetic against transformers', and the demo against its dense original."""

import json
import shutil
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest

from specmoeoff.errors import MissingCapability
from specmoeoff.kernels.cpu import Kernels, supported_isas
from specmoeoff.kernels.reference import E2M1, unpack_expert
from specmoeoff.precision import ExpertFormat, Precision
from specmoeoff.runtime.architectures import expert_tensor_names
from specmoeoff.runtime.checkpoint import read_model_spec
from specmoeoff.runtime.engine import Engine
from specmoeoff.runtime.kv_cache import PageTable
from specmoeoff.runtime.model import Model
from specmoeoff.runtime.pack import PackedModel, pack_model
from specmoeoff.runtime.rows import make_rows
from specmoeoff.runtime.sequence import Request
from specmoeoff.specs.plan import PlanDecode, PlanExperts, PlanThreads


def engine_logits(
    packed: PackedModel, tokens: np.ndarray, cuts: Sequence[int] = (), isa: str | None = None, threads: int = 2
) -> np.ndarray:
    """Logits after every token, (n, vocab), by the pieces the engine runs, in chunks that end at `cuts`."""
    n, spec = len(tokens), packed.spec
    pages = PageTable(1, n)
    pages.reserve(0, n)
    model = Model(packed, Kernels(threads, isa, spec.precision), pages.n_pages, n, n)
    experts, numbers = packed.load_experts(), range(spec.n_experts)
    stack = model.stack(
        [
            {e: experts[packed.expert_number(layer, e)] for e in numbers if spec.n_experts_of(layer)}
            for layer in range(spec.n_layers)
        ]
    )
    logits = np.empty((n, spec.vocab), np.float32)
    for first, last in zip([0, *cuts], [*cuts, n], strict=True):
        count = last - first
        model.begin(tokens[first:last])
        model.layers(stack, [make_rows(0, [count], [first], pages.table)])
        model.choose(np.arange(count), logits[first:last])
    return logits


def transformers_logits(folder: Path, tokens: np.ndarray, dtype: str) -> np.ndarray:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    with torch.no_grad():
        return model(torch.from_numpy(tokens.astype(np.int64))[None]).logits[0].float().numpy()


def engine_continuations(packed: PackedModel, prompts: Sequence[np.ndarray], n_tokens: int) -> list[list[int]]:
    """n_tokens after every prompt, greedy, by the whole engine with all experts in memory."""
    spec = packed.spec
    context = max(map(len, prompts)) + n_tokens
    decode = PlanDecode(
        drafter="ngram", draft_length=3, batch=16, micro_batches=2, context_tokens=context, prefill_chunk_tokens=96
    )
    experts = PlanExperts.all_resident(spec)
    threads = PlanThreads(compute=2, disk_readers=2, disk_chunk_bytes=1 << 20)
    with Engine(packed, None, decode, experts, threads) as engine:
        engine.submit(Request(str(i), tuple(map(int, prompt)), n_tokens) for i, prompt in enumerate(prompts))
        for _ in engine.run():
            pass
        found = {int(s.request.request_id): s.output for s in engine.finished}
    return [found[i] for i in range(len(prompts))]


CASES = [
    ("mixtral", {}),
    (
        "mixtral",
        {"num_local_experts": 8, "num_attention_heads": 6, "num_key_value_heads": 3, "tie_word_embeddings": True},
    ),
    ("mixtral", {"num_experts_per_tok": 1, "vocab_size": 131, "intermediate_size": 200, "head_dim": 48}),
    ("llama", {"num_hidden_layers": 2}),
    ("llama", {"tie_word_embeddings": True, "rope_theta": 500.0, "num_key_value_heads": 4}),
]


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1e4}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 1e4}
FP32_CASES = [
    *CASES,
    ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 1e4}}),
    ("llama", {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 32}}),
    ("llama", {"attention_bias": True}),
    ("qwen2", {"rope_parameters": YARN}),
    ("qwen3", {"tie_word_embeddings": True}),
    ("qwen2_moe", {}),
    ("qwen2_moe", {"norm_topk_prob": True, "qkv_bias": False}),
    ("qwen3_moe", {}),
    ("qwen3_moe", {"norm_topk_prob": False, "num_attention_heads": 8, "num_experts": 70, "num_experts_per_tok": 8}),
    ("olmoe", {}),
    ("olmoe", {"norm_topk_prob": True, "clip_qkv": None}),
    ("deepseek_v2", {"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 0.7}}),
    (
        "deepseek_v2",
        {"q_lora_rank": 32, "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "v_head_dim": 48},
    ),
    ("deepseek_v3", {}),
    ("deepseek_v3", {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}, "norm_topk_prob": False}),
    ("gpt_oss", {}),
]


@pytest.mark.parametrize(("kind", "changes"), FP32_CASES)
def test_logits_in_fp32_are_those_of_transformers(
    save_model: Callable[..., Path], kind: str, changes: dict[str, object]
) -> None:
    folder = save_model(kind, "float32", **{"initializer_range": 0.15} | changes)
    packed = pack_model(folder, precision="fp32")
    tokens = np.random.default_rng(5).integers(0, packed.spec.vocab, 90).astype(np.int32)
    exact = transformers_logits(folder, tokens, "float32")
    assert np.abs(engine_logits(packed, tokens) - exact).max() <= 1e-5 * np.abs(exact).max()


@pytest.mark.parametrize(("kind", "changes"), [case for case in FP32_CASES[5:] if "rope_parameters" not in case[1]])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_token_has_the_same_logits_in_any_chunk(
    save_model: Callable[..., Path], kind: str, changes: dict[str, object], precision: Precision
) -> None:
    packed = pack_model(save_model(kind, **{"initializer_range": 0.15} | changes), precision=precision)
    tokens = np.random.default_rng(6).integers(0, packed.spec.vocab, 90).astype(np.int32)
    for isa in supported_isas():
        whole = engine_logits(packed, tokens, isa=isa)
        assert np.array_equal(engine_logits(packed, tokens, cuts=(1, 2, 9, 64, 65, 80), isa=isa, threads=3), whole)


FORMATS: list[ExpertFormat] = ["int8", "int4", "mxfp4"]


def dequantised(packed: PackedModel, folder: Path, target: Path) -> Path:
    """A copy of a checkpoint, in fp32, with the experts that packed codes and scales stand for."""
    from safetensors.numpy import save_file
    from safetensors.torch import load_file

    spec, experts = packed.spec, packed.load_experts()
    tensors = {name: tensor.float().numpy() for name, tensor in load_file(folder / "model.safetensors").items()}
    for layer in range(spec.n_layers):
        for expert in range(spec.n_experts):
            raw = experts[packed.expert_number(layer, expert)]
            parts = unpack_expert(raw, packed.spec.expert_format, spec.hidden, spec.intermediate)
            for name, part in zip(expert_tensor_names(spec, layer, expert), parts, strict=True):
                tensors[name] = part.astype(np.float32)  # exact: codes and scales have at most 8 bits each
    shutil.copytree(folder, target)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("experts", FORMATS)
def test_logits_are_those_of_transformers_with_the_weights_that_the_codes_stand_for(
    save_model: Callable[..., Path], tmp_path: Path, kind: str, experts: ExpertFormat
) -> None:
    """What is left is rounding of activations, to bf16, and beside the experts to int8: typically less than 1 % of the largest
    logit. From those of the checkpoint's own weights 4 bits are several times as far."""
    folder = save_model(kind, initializer_range=0.15)
    packed = pack_model(folder, experts=experts)
    tokens = np.random.default_rng(5).integers(0, packed.spec.vocab, 90).astype(np.int32)
    ours = engine_logits(packed, tokens)
    exact = transformers_logits(dequantised(packed, folder, tmp_path / "dequantised"), tokens, "float32")
    error = np.median(np.abs(ours - exact))
    assert error < 0.01 * np.abs(exact).max()
    own = np.median(np.abs(ours - transformers_logits(folder, tokens, "float32")))
    assert own > 5 * error or experts == "int8"


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("experts", FORMATS)
def test_a_token_has_the_same_logits_in_any_chunk_with_quantised_experts(
    save_model: Callable[..., Path], kind: str, experts: ExpertFormat
) -> None:
    packed = pack_model(save_model(kind, initializer_range=0.15), experts=experts)
    tokens = np.random.default_rng(6).integers(0, packed.spec.vocab, 90).astype(np.int32)
    for isa in supported_isas():
        whole = engine_logits(packed, tokens, isa=isa)
        assert np.array_equal(engine_logits(packed, tokens, cuts=(1, 2, 9, 64, 65, 80), isa=isa, threads=3), whole)


def test_experts_of_an_mxfp4_checkpoint_are_kept_as_they_are(save_model: Callable[..., Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder, rng = save_model("gpt_oss"), np.random.default_rng(8)
    import torch

    tensors = load_file(folder / "model.safetensors")
    plain = {}
    for name in [
        name for name in tensors if name.endswith("experts.gate_up_proj") or name.endswith("experts.down_proj")
    ]:
        n, n_in, n_out = tensors.pop(name).shape
        blocks = rng.integers(0, 256, (n, n_out, n_in // 32, 16), np.uint8)
        scales = rng.integers(119, 124, (n, n_out, n_in // 32), np.uint8)
        tensors |= {f"{name}_blocks": torch.from_numpy(blocks), f"{name}_scales": torch.from_numpy(scales)}
        codes = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(n, n_out, n_in // 32, 32)
        values = E2M1[codes & 7] * np.where(codes > 7, -1, 1) * 2.0 ** (scales[..., None].astype(int) - 127)
        plain[name] = values.reshape(n, n_out, n_in)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    packed = pack_model(folder)
    assert packed.spec.expert_format == "mxfp4"
    assert packed.spec.fingerprint == pack_model(folder, experts="bf16").spec.fingerprint
    for layer in range(packed.spec.n_layers):
        gate_up, down = (plain[f"model.layers.{layer}.mlp.experts.{part}_proj"] for part in ("gate_up", "down"))
        for expert in range(packed.spec.n_experts):
            raw = packed.load_experts()[packed.expert_number(layer, expert)]
            found = unpack_expert(raw, "mxfp4", packed.spec.hidden, packed.spec.intermediate)
            for ours, theirs in zip(found, (gate_up[expert, ::2], gate_up[expert, 1::2], down[expert]), strict=True):
                assert np.array_equal(ours, theirs)


GREEDY = ["mixtral", "qwen3", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v2", "deepseek_v3", "gpt_oss"]


@pytest.mark.parametrize("kind", GREEDY)
def test_greedy_generations_of_100_prompts_in_fp32_are_those_of_transformers(
    save_model: Callable[..., Path], kind: str
) -> None:
    """Ours sixteen at a time with n-gram drafts, theirs all prompts of one length together."""
    import torch
    from transformers import AutoModelForCausalLM

    folder = save_model(kind, "float32", initializer_range=0.15)
    packed, rng = pack_model(folder, precision="fp32"), np.random.default_rng(7)
    prompts = [rng.integers(3, 96, (20, length)) for length in (1, 9, 23, 38, 64)]
    ours = engine_continuations(packed, [prompt for same in prompts for prompt in same], 12)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    for i, same in enumerate(prompts):
        theirs = model.generate(torch.from_numpy(same), max_new_tokens=12, do_sample=False, pad_token_id=0)
        assert ours[20 * i : 20 * i + 20] == theirs[:, same.shape[1] :].tolist()


@pytest.mark.slow
@pytest.mark.long
def test_the_real_dense_model_continues_prompts_as_transformers_does() -> None:
    """SmolLM2-135M-Instruct from its GGUF file, in fp32; transformers dequantises the same file by itself."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from specmoeoff.demo.builder import find_gguf

    try:
        path = find_gguf()
    except MissingCapability as error:
        pytest.skip(str(error))
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    model.generation_config.eos_token_id = None
    lines = (files("specmoeoff.demo") / "prompts.jsonl").read_text().splitlines()[:20]
    prompts = [
        np.asarray(tokenizer(json.loads(line)["body"]["messages"][0]["content"])["input_ids"][:64]) for line in lines
    ]
    ours = engine_continuations(pack_model(path, precision="fp32"), prompts, 16)
    for prompt, found in zip(prompts, ours, strict=True):
        theirs = model.generate(torch.from_numpy(prompt)[None], max_new_tokens=16, do_sample=False, pad_token_id=0)
        assert found == theirs[0, len(prompt) :].tolist()


@pytest.mark.parametrize(("kind", "changes"), CASES)
def test_logits_are_as_close_to_fp32_as_transformers_bf16_is(
    save_model: Callable[..., Path], kind: str, changes: dict[str, object]
) -> None:
    """Both round activations to bf16 between operators. Where a router's near-tie falls the other way an expert is another
    one, in theirs at other places than in ours: so the typical errors are compared, with half as much again to spare."""
    folder = save_model(kind, initializer_range=0.15, **changes)
    packed = pack_model(folder)
    tokens = np.random.default_rng(5).integers(0, packed.spec.vocab, 90).astype(np.int32)
    exact = transformers_logits(folder, tokens, "float32")
    ours = np.abs(engine_logits(packed, tokens) - exact)
    theirs = np.abs(transformers_logits(folder, tokens, "bfloat16") - exact)
    assert np.median(ours) <= 1.5 * np.median(theirs)
    assert np.mean(ours) <= 1.5 * np.mean(theirs)
    assert np.median(ours) < 0.02 * np.abs(exact).max()


def assert_argmax_differs_only_in_near_ties(found: np.ndarray, exact: np.ndarray, gap: float) -> None:
    rows = np.flatnonzero(found.argmax(axis=1) != exact.argmax(axis=1))
    lost = exact[rows].max(axis=1) - exact[rows, found[rows].argmax(axis=1)]
    assert (lost <= gap).all(), (rows, lost, gap)


@pytest.mark.long
def test_the_demo_without_noise_is_its_dense_original(tmp_path: Path) -> None:
    from specmoeoff.demo.builder import build_demo, find_gguf

    try:
        find_gguf()
    except MissingCapability as error:
        pytest.skip(str(error))

    pair = build_demo(noise=0.0, folder=tmp_path / "demo")
    text = Path(__file__).read_text()
    from specmoeoff.runtime.tokenizer import Tokenizer

    tokens = np.asarray(Tokenizer(pair.draft).encode(text)[:220], np.int32)
    target, draft = pack_model(pair.target), pack_model(pair.draft)
    moe, dense = engine_logits(target, tokens), engine_logits(draft, tokens)
    # Equal experts with weights that sum to one: only the rounding of the combination differs, so argmax may differ only
    # where the two best logits are closer than twice the largest difference.
    rounding = np.abs(moe - dense).max()
    assert rounding < 0.02 * np.abs(dense).max()
    assert_argmax_differs_only_in_near_ties(moe, dense, 2 * rounding)
    # The dense original in fp32, computed by transformers: our bf16 activations are the only difference.
    theirs = transformers_logits(pair.draft, tokens, "float32")
    typical = np.abs(dense - theirs).mean()
    assert typical < 0.01 * np.abs(theirs).max()
    assert_argmax_differs_only_in_near_ties(dense, theirs, 8 * typical)
    assert (dense.argmax(axis=1) == theirs.argmax(axis=1)).mean() >= 0.97
    assert read_model_spec(pair.target).fingerprint != read_model_spec(pair.draft).fingerprint
