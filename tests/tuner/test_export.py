"""Plans as other engines' command lines: every number arrives, and what does not is said."""

import json
import shlex
from dataclasses import replace

import pytest

from specmoeoff.errors import AnswerIsNo, BadInput
from specmoeoff.specs.plan import Plan, PlanGpu
from specmoeoff.tuner.export import ENGINES, Export, export
from specmoeoff.tuner.tune import TuneRequest, tune

GIB = 1 << 30


@pytest.fixture(scope="module")
def on_cpu(made_up_request: TuneRequest) -> Plan:
    sources = {"model_source": "/models/target", "draft_source": "/models/draft"}
    return tune(replace(made_up_request, **sources, disk_limit_gb_per_s=0.5))


@pytest.fixture(scope="module")
def on_gpu(on_cpu: Plan) -> Plan:
    """The same with a quarter of all experts in GPU memory, and all KV on the host."""
    experts = on_cpu.experts.model_copy(update={"resident": ((0, 1),) * 10, "prefetch": ((),) * 10})
    memory = on_cpu.memory.model_copy(update={"fast": {"resident_experts": 20 * GIB}, "host": {"experts": 60 * GIB}})
    gpu = PlanGpu(kv_share=0.0, draft_kv_share=0.5)
    return on_cpu.model_copy(update={"experts": experts, "memory": memory, "gpu": gpu})


def parsed(found: Export) -> dict[str, str]:
    """Flags of the command in the script, read as a shell reads it."""
    words = shlex.split(found.text, comments=True)
    assert [word for word in words if word != "\n"] == found.command
    options = words[len(found.launcher) :]
    pairs = zip(options, [*options[1:], "--"], strict=True)
    return {flag: "" if value.startswith("--") else value for flag, value in pairs if flag.startswith("--")}


def test_llama_cpp_gets_slots_context_and_draft_and_leaves_residency_to_the_page_cache(on_cpu: Plan) -> None:
    found, d = export(on_cpu, "llama.cpp"), on_cpu.decode
    flags = parsed(found)
    assert found.command[0] == "llama-server"
    assert (flags["--parallel"], flags["--ctx-size"]) == ("16", str(16 * d.context_tokens))
    assert (flags["--spec-type"], flags["--spec-draft-n-max"]) == ("draft-simple", str(d.draft_length))
    assert flags["--device"] == "none"
    assert any("page cache" in sentence for sentence in found.lost)
    assert any("disk cap of 0.5 GB/s" in sentence for sentence in found.lost)


def test_llama_cpp_places_whole_layers(on_gpu: Plan) -> None:
    flags = parsed(export(on_gpu, "llama.cpp"))
    assert flags["--n-cpu-moe"] == "8"  # a quarter of 10 layers is 2 whole ones
    assert "--no-kv-offload" in flags
    everything = on_gpu.memory.model_copy(update={"host": {"experts": 0}})
    assert parsed(export(on_gpu.model_copy(update={"memory": everything}), "llama.cpp"))["--n-cpu-moe"] == "0"


def test_vllm_gets_its_speculation_as_json_and_what_does_not_fit_in_gib(on_cpu: Plan, on_gpu: Plan) -> None:
    flags = parsed(export(on_gpu, "vllm"))
    told = json.loads(flags["--speculative-config"])
    assert told == {
        "method": "draft_model",
        "model": "/models/draft",
        "num_speculative_tokens": on_gpu.decode.draft_length,
    }
    assert (flags["--cpu-offload-gb"], flags["--max-num-seqs"]) == ("60", "16")
    assert any("100% of the requests on the CPU" in sentence for sentence in export(on_gpu, "vllm").lost)
    cpu = export(on_cpu, "vllm")
    assert cpu.command[:2] == ["env", "VLLM_CPU_KVCACHE_SPACE=1"]
    assert any("must fit in memory" in sentence for sentence in cpu.lost)


def test_sglang_verifies_one_token_more_than_it_drafts(on_cpu: Plan) -> None:
    flags, k = parsed(export(on_cpu, "sglang")), on_cpu.decode.draft_length
    assert flags["--speculative-algorithm"] == "STANDALONE"
    assert (flags["--speculative-num-steps"], flags["--speculative-num-draft-tokens"]) == (str(k), str(k + 1))
    assert flags["--speculative-eagle-topk"] == "1"


def test_ktransformers_gets_residents_by_layer_and_wants_a_gpu(on_cpu: Plan, on_gpu: Plan) -> None:
    flags = parsed(export(on_gpu, "ktransformers"))
    assert (flags["--kt-num-gpu-experts"], flags["--kt-cpuinfer"], flags["--kt-method"]) == ("2", "2", "BF16")
    with pytest.raises(AnswerIsNo, match="needs a GPU"):
        export(on_cpu, "ktransformers")


@pytest.mark.parametrize("engine", ENGINES)
def test_plain_decoding_asks_no_engine_to_draft(on_gpu: Plan, engine: str) -> None:
    decode = on_gpu.decode.model_copy(update={"drafter": "none", "draft_length": 0})
    found = export(on_gpu.model_copy(update={"decode": decode}), engine)
    assert not any("spec" in word for word in found.command)


@pytest.mark.parametrize("drafter", ["ngram", "model", "eagle"])
@pytest.mark.parametrize("engine", ENGINES)
def test_every_drafter_has_a_name_in_every_engine_and_every_script_its_losses(
    on_gpu: Plan, engine: str, drafter: str
) -> None:
    found = export(on_gpu.model_copy(update={"decode": on_gpu.decode.model_copy(update={"drafter": drafter})}), engine)
    assert any("spec" in flag for flag in parsed(found))
    assert all(sentence in found.text for sentence in found.lost)
    assert all(f"# {option.flag}: " in found.text for option in found.options)


def test_an_unknown_engine_is_refused_with_those_there_are(on_cpu: Plan) -> None:
    with pytest.raises(BadInput, match=r"choose llama\.cpp, vllm, sglang, ktransformers"):
        export(on_cpu, "exllama")
