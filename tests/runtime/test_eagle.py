"""The EAGLE head against the published architecture in transformers' pieces, and its output against plain decoding."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from specmoeoff.errors import AnotherModel, BadInput
from specmoeoff.estimate.memory import eagle_bytes, kv_bytes
from specmoeoff.runtime import loading
from specmoeoff.runtime.checkpoint import read_model_spec
from specmoeoff.runtime.drafters.eagle import EagleHead, load_eagle_head, read_eagle_spec
from specmoeoff.runtime.engine import Engine
from specmoeoff.runtime.loading import find_draft, open_plan
from specmoeoff.runtime.pack import PackedModel, pack_model
from specmoeoff.runtime.sequence import Request
from specmoeoff.runtime.trace import Trace
from specmoeoff.specs.plan import DrafterName, Plan, PlanDecode, PlanExperts, PlanModel, PlanThreads
from specmoeoff.specs.workload import Acceptance, Workload

THREADS = PlanThreads(compute=2, disk_readers=1, disk_chunk_bytes=8192)
Tensors = dict[str, Any]


def head_tensors(target: Path, seed: int = 0) -> Tensors:
    """A random head under the published names, without bias and input norm as EAGLE-1 of Vicuna has one and not the other."""
    import torch

    config = json.loads((target / "config.json").read_text())
    hidden, wide, dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * dim, config["num_key_value_heads"] * dim
    shapes = {
        "fc.weight": (hidden, 2 * hidden),
        "fc.bias": (hidden,),
        "embed_tokens.weight": (config["vocab_size"], hidden),
        "layers.0.self_attn.q_proj.weight": (q, hidden),
        "layers.0.self_attn.k_proj.weight": (kv, hidden),
        "layers.0.self_attn.v_proj.weight": (kv, hidden),
        "layers.0.self_attn.o_proj.weight": (hidden, q),
        "layers.0.mlp.gate_proj.weight": (wide, hidden),
        "layers.0.mlp.up_proj.weight": (wide, hidden),
        "layers.0.mlp.down_proj.weight": (hidden, wide),
        "layers.0.post_attention_layernorm.weight": (hidden,),
    }
    torch.manual_seed(seed)
    return {name: (torch.randn(shape) * 0.15).bfloat16() for name, shape in shapes.items()}


def save_head(folder: Path, target: Path, tensors: Tensors, **changes: Any) -> Path:
    from safetensors.torch import save_file

    folder.mkdir()
    config = json.loads((target / "config.json").read_text()) | {"num_hidden_layers": 1} | changes
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder


def engine_of(
    target: PackedModel, head: EagleHead, k: int, batch: int = 3, chunk: int = 64, drafter: DrafterName = "eagle"
) -> Engine:
    decode = PlanDecode(
        drafter=drafter if k else "none",
        draft_length=k,
        batch=batch,
        micro_batches=min(2, batch),
        context_tokens=128,
        prefill_chunk_tokens=chunk,
    )
    n, layers = target.spec.n_experts, target.spec.n_layers
    experts = PlanExperts(resident=(tuple(range(n)),) * layers, prefetch=((),) * layers, stream_slots=0)
    return Engine(target, head, decode, experts, THREADS)


def some_requests(n: int, max_tokens: int = 0) -> list[Request]:
    rng = np.random.default_rng(1)
    return [
        Request(
            f"r{i}",
            tuple(int(t) for t in rng.integers(3, 96, int(rng.integers(1, 70)))),
            max_tokens or int(rng.integers(1, 30)),
        )
        for i in range(n)
    ]


def published(target: Path, tensors: Tensors) -> Callable[[list[int], int], tuple[list[int], list[float]]]:
    """Of tokens and k: the k drafted next as SafeAILab/EAGLE does, in float32 by transformers' layers, and each one's lead."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaModel

    full = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
    head = LlamaModel(LlamaConfig(**full.config.to_dict() | {"num_hidden_layers": 1})).eval()
    own = {name: t.float() for name, t in tensors.items() if name.startswith("layers.0.")}
    head.load_state_dict(own, strict=False)
    head.layers[0].input_layernorm = head.norm = torch.nn.Identity()

    def chain(tokens: list[int], k: int) -> tuple[list[int], list[float]]:
        drafted, leads = [], []
        with torch.no_grad():
            features = full.model(torch.tensor([tokens[:-1]])).last_hidden_state
            embedding = full.get_input_embeddings()
            for _ in range(k):
                joined = torch.cat([embedding(torch.tensor([(tokens + drafted)[1:]])), features], dim=-1)
                fused = torch.nn.functional.linear(joined, tensors["fc.weight"].float(), tensors["fc.bias"].float())
                state = head(inputs_embeds=fused).last_hidden_state[:, -1:]
                best = full.lm_head(state)[0, 0].topk(2)
                drafted.append(int(best.indices[0]))
                leads.append(float((best.values[0] - best.values[1]) / best.values[0].abs()))
                features = torch.cat([features, state], dim=1)
        return drafted, leads

    return chain


@pytest.fixture
def llama_head(tmp_path: Path, llama: Path) -> tuple[Path, Tensors]:
    tensors = head_tensors(llama)
    return save_head(tmp_path / "head", llama, tensors), tensors


@pytest.mark.parametrize(("batch", "chunk"), [(1, 64), (6, 9)])
def test_it_drafts_what_the_published_architecture_does(
    llama: Path, llama_head: tuple[Path, Tensors], batch: int, chunk: int
) -> None:
    packed = pack_model(llama)
    requests = some_requests(6, max_tokens=20)
    found, wanted, k, reference = [], [], 4, published(llama, llama_head[1])
    with engine_of(packed, load_eagle_head(llama_head[0], packed.spec), k, batch, chunk) as engine:
        engine.submit(requests)
        while engine.busy:
            engine.step()
            ready = [s for s in engine.live if not s.prefilling and s.n_output > 3]
            if len(ready) == min(batch, len(engine.live)) and ready and len(found) < 6 * k:
                proposals = engine.drafters["eagle"].propose(ready, [k] * len(ready), Trace())
                proposals = [p.tokens for p in proposals]
                for sequence, drafted in zip(ready, proposals, strict=True):
                    chain, leads = reference(sequence.tokens, k)
                    # After the first near-tie the two may go different ways.
                    sure = next((i for i, lead in enumerate(leads) if lead < 0.05), k)
                    found += drafted[:sure]
                    wanted += chain[:sure]
    assert len(wanted) >= 12
    assert found == wanted


@pytest.mark.parametrize("k", [1, 4, 8])
@pytest.mark.parametrize("batch", [1, 3, 5])
def test_the_output_is_the_plain_output(tmp_path: Path, mixtral: Path, k: int, batch: int) -> None:
    packed = pack_model(mixtral)
    head = load_eagle_head(save_head(tmp_path / "head", mixtral, head_tensors(mixtral)), packed.spec)
    outputs = []
    for length in (0, k):
        with engine_of(packed, head, length, batch, chunk=20) as engine:
            engine.submit(some_requests(8))
            list(engine.run())
            outputs.append({s.request.request_id: s.output for s in engine.finished})
    assert outputs[0] == outputs[1]
    assert len(outputs[0]) == 8


def silent(tensors: Tensors, name: str) -> None:
    tensors[name] = tensors[name] * 0


def test_a_head_that_knows_the_target_is_always_accepted(tmp_path: Path, save_model: Callable[..., Path]) -> None:
    """A target of one layer that looks at nothing but the last token, and the head that computes the same from it."""
    import torch
    from safetensors.torch import load_file, save_file

    target = tmp_path / "target"
    made = save_model("llama", num_hidden_layers=1, initializer_range=0.15)
    target.mkdir()
    (target / "config.json").write_text((made / "config.json").read_text())
    tensors = load_file(made / "model.safetensors")
    silent(tensors, "model.layers.0.self_attn.o_proj.weight")
    tensors["model.norm.weight"] = torch.ones_like(
        tensors["model.norm.weight"]
    )  # else it changes which token is likeliest
    save_file(tensors, target / "model.safetensors")
    layer = {n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.layers.0.")}
    hidden = len(layer["layers.0.input_layernorm.weight"])
    eye = torch.eye(hidden)
    fc = {"fc.weight": torch.cat([eye, 0 * eye], dim=1).bfloat16()}
    packed = pack_model(target)
    head = load_eagle_head(save_head(tmp_path / "head", target, layer | fc), packed.spec)
    with engine_of(packed, head, 4, batch=2) as engine:
        engine.submit([Request("a", (5, 6, 7), 21), Request("b", (9,) * 30, 21)])
        windows = list(engine.run())
    # the prompts give one token each, then four windows of five each
    assert [w.tokens for w in windows] == [2, 10, 10, 10, 10]


def test_rewound_requests_go_the_same_way_again(mixtral: Path, tmp_path: Path) -> None:
    packed = pack_model(mixtral)
    head = load_eagle_head(save_head(tmp_path / "head", mixtral, head_tensors(mixtral)), packed.spec)
    with engine_of(packed, head, 3) as engine:
        engine.submit(replace(r, max_tokens=50) for r in some_requests(3))
        while not engine.live or any(s.prefilling for s in engine.live):
            engine.step()
        ways = []
        for _ in range(2):
            engine.rewind()
            drafted = [p.tokens for p in engine.drafters["eagle"].propose(engine.live, [3] * 3, Trace())]
            for _ in range(4):
                engine.step()
            ways.append((drafted, [list(s.tokens) for s in engine.live]))
        assert ways[0] == ways[1]


def test_what_is_no_head_of_this_target_is_refused(tmp_path: Path, llama: Path) -> None:
    spec, tensors = pack_model(llama).spec, head_tensors(llama)
    extra = tensors["fc.bias"].clone()
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(BadInput, match=r"convert the head there: python -c .*safetensors"):
        load_eagle_head(tmp_path / "pickled", spec)
    with pytest.raises(BadInput, match="EAGLE-3"):
        load_eagle_head(save_head(tmp_path / "three", llama, tensors | {"midlayer.x": extra}), spec)
    with pytest.raises(BadInput, match=r"fc\.weight is missing"):
        load_eagle_head(
            save_head(tmp_path / "no-fc", llama, {n: t for n, t in tensors.items() if n != "fc.weight"}), spec
        )
    with pytest.raises(BadInput, match=r"layers\.1\.x is no part"):
        load_eagle_head(save_head(tmp_path / "two", llama, tensors | {"layers.1.x": extra}), spec)
    head = save_head(tmp_path / "head", llama, tensors, architectures=["LlamaForCausalLMEagle"])
    assert read_eagle_spec(head).n_layers == 1
    with pytest.raises(BadInput, match="give a head trained for another"):
        load_eagle_head(head, spec.model_copy(update={"vocab": 97, "name": "another"}))


def test_a_mixtral_head_is_dense_and_its_fingerprint_its_own(tmp_path: Path, mixtral: Path) -> None:
    heads = [save_head(tmp_path / str(seed), mixtral, head_tensors(mixtral, seed)) for seed in (0, 1)]
    first, second = map(read_eagle_spec, heads)
    assert (first.architecture, first.n_experts, first.other_layer_params) == ("llama", 1, 2 * first.hidden**2)
    assert first.fingerprint != second.fingerprint


def test_a_plan_opens_the_head_it_was_made_for(
    plan: Plan, mixtral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "Tokenizer", lambda folder: None)
    head, other = (save_head(tmp_path / str(seed), mixtral, head_tensors(mixtral, seed)) for seed in (0, 1))
    target, spec = read_model_spec(mixtral), read_eagle_spec(head)
    experts = PlanExperts(resident=(tuple(range(5)),) * 3, prefetch=((),) * 3, stream_slots=0)
    decode = plan.decode.model_copy(update={"drafter": "eagle", "context_tokens": 128})
    plain = plan.plain.decode.model_copy(update={"context_tokens": 128})
    made = plan.model_copy(
        update={
            "model": PlanModel(source=str(mixtral), name="target", fingerprint=target.fingerprint),
            "draft": PlanModel(source=str(head), name="head", fingerprint=spec.fingerprint),
            "experts": experts,
            "decode": decode,
            "plain": plan.plain.model_copy(update={"experts": experts, "decode": plain}),
        }
    )
    assert isinstance(open_plan(made).draft, EagleHead)
    swapped = PlanModel(source=str(other), name="head", fingerprint=spec.fingerprint)
    with pytest.raises(AnotherModel, match="made for another model"):
        open_plan(made.model_copy(update={"draft": swapped}))
    with pytest.raises(BadInput, match="names no draft model"):
        open_plan(made.model_copy(update={"draft": None}))


ASKED = [{"custom_id": f"r{i}", "body": {"prompt": "once upon a", "max_tokens": 12 + i}} for i in range(4)]


def specmoeoff(folder: Path, *words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "specmoeoff", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder, timeout=300)


def done(*arguments: object) -> str:
    found = specmoeoff(*arguments)  # type: ignore[arg-type]
    assert found.returncode == 0, found.stderr
    return found.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "precision"), [("eagle", "fp32"), pytest.param("model", "bf16", marks=pytest.mark.long)]
)
def test_a_named_draft_is_profiled_measured_tuned_and_run(
    speaking_model: Path, save_model: Callable[..., Path], tmp_path: Path, kind: str, precision: str
) -> None:
    config = json.loads((speaking_model / "config.json").read_text())
    if kind == "eagle":
        draft = f"eagle:{save_head(tmp_path / 'head', speaking_model, head_tensors(speaking_model))}"
    else:
        draft = str(save_model("llama", vocab_size=config["vocab_size"], max_position_embeddings=2048))
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, ASKED)))
    what = ("--model", speaking_model, "--draft", draft, "--precision", precision)
    done(tmp_path, "profile", *what, "--budget", 5)
    drafter = draft if kind == "eagle" else f"model:{draft}"
    observe = ("workload", "--model", speaking_model, "--prompts", "in.jsonl", "--ignore-eos")
    done(tmp_path, *observe, "--drafter", drafter)
    workload = Workload.load(tmp_path / "workload.json")
    tune = ("tune", "--profile", "profile.json", "--workload", "workload.json", *what, "--kv-tokens", 256, "--batch", 4)
    tune = (*tune, "--context", 64, "--disk-limit-gb-per-s", 0.05)
    sure = Acceptance(conditional=(0.99,) * 4, n_rounds=100, provenance="made up")
    workload.model_copy(update={"acceptance": {}}).save(tmp_path / "workload.json")
    refused = specmoeoff(tmp_path, *tune)
    assert refused.returncode == 2
    assert f"--drafter {drafter}" in refused.stderr
    workload.model_copy(update={"acceptance": {kind: sure}}).save(tmp_path / "workload.json")
    done(tmp_path, *tune)

    plan = Plan.load(tmp_path / "plan.toml")
    assert plan.draft
    assert (plan.decode.drafter, plan.decode.kv_tokens, plan.model.precision) == (kind, 256, precision)
    opened = open_plan(plan)
    assert plan.memory.host["kv"] == kv_bytes(opened.target.spec, plan.decode)
    assert opened.target.spec.precision == precision
    assert opened.draft
    assert opened.draft.spec.precision == precision
    done(tmp_path, "run", "plan.toml", "--input", "in.jsonl", "--output", "out.jsonl", "--ignore-eos")
    plainly = {"drafter": "none", "draft_length": 0, "kv_tokens": None}
    decode = plan.decode.model_copy(update=plainly)
    plan.model_copy(update={"decode": decode, "draft": None, "outlook": None}).save(tmp_path / "plain.toml")
    done(tmp_path, "run", "plain.toml", "--input", "in.jsonl", "--output", "plain.jsonl", "--ignore-eos")
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "plain.jsonl").read_bytes()


def test_the_memory_of_a_head_is_that_of_its_arrays(mixtral: Path, tmp_path: Path) -> None:
    folder, target = save_head(tmp_path / "head", mixtral, head_tensors(mixtral)), read_model_spec(mixtral)
    for precision in ("bf16", "fp32"):
        head = load_eagle_head(folder, target.model_copy(update={"precision": precision}))
        found = sum(a.nbytes for a in (*head.dense.values(), head.expert, head.fc, head.fc_bias))
        assert eagle_bytes(head.spec) == pytest.approx(found, abs=1024)


def test_a_draft_of_another_target_is_refused_when_named(mixtral: Path, llama: Path, tmp_path: Path) -> None:
    target = read_model_spec(mixtral)
    assert find_draft(str(mixtral), None, target) is None
    found = find_draft(str(mixtral), str(llama), target)
    assert found
    assert (found.drafter, found.source, found.spec) == ("model", str(llama.resolve()), read_model_spec(llama))
    with pytest.raises(BadInput, match="must be dense"):
        find_draft(str(mixtral), str(mixtral), target)
    head = save_head(tmp_path / "head", mixtral, head_tensors(mixtral))
    eagle = find_draft(str(mixtral), f"eagle:{head}", target)
    assert eagle
    assert (eagle.drafter, eagle.spec) == ("eagle", read_eagle_spec(head))
    with pytest.raises(BadInput, match="give a head trained for"):
        find_draft(str(mixtral), f"eagle:{head}", target.model_copy(update={"vocab": 97}))
