"""A plan as the nearest settings of engines people already run, and what they cannot express.

Options as documented by llama.cpp (tools/server/README.md), vLLM (`vllm serve --help`, docs on speculative decoding),
SGLang (server arguments) and KTransformers (kt-kernel tutorials).
"""

import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from math import ceil
from typing import Literal, get_args

from specmoeoff.errors import AnswerIsNo, BadInput
from specmoeoff.specs.plan import Plan

Engine = Literal["llama.cpp", "vllm", "sglang", "ktransformers"]
GIB = 1 << 30
BY_LAYER = "Placement by expert, and computing experts on the CPU: weights are offloaded in the order of layers."


@dataclass(frozen=True)
class Option:
    """A flag, its value ("" for a switch) and which part of the plan it stands for."""

    flag: str
    value: str
    why: str


@dataclass(frozen=True)
class Export:
    """`launcher` and options make the command; `lost` has one sentence for each thing it cannot say."""

    engine: Engine
    launcher: tuple[str, ...]
    options: tuple[Option, ...]
    lost: tuple[str, ...]

    @property
    def command(self) -> list[str]:
        """For subprocess.run."""
        return [*self.launcher, *(word for o in self.options for word in (o.flag, o.value) if word)]

    @property
    def text(self) -> str:
        """A shell script with its reasons."""
        lines = [shlex.join(self.launcher), *(shlex.join(w for w in (o.flag, o.value) if w) for o in self.options)]
        notes = [f"# {o.flag}: {o.why}" for o in self.options]
        losses = [f"#   {sentence}" for sentence in self.lost]
        return "\n".join(
            [f"# Nearest settings for {self.engine}", *notes, " \\\n  ".join(lines), "# Not expressed:", *losses, ""]
        )


def export(plan: Plan, engine: str) -> Export:
    """Raises BadInput for an engine it does not know, AnswerIsNo where the engine cannot run on the plan's machine."""
    if engine not in ENGINES:
        raise BadInput(f"--to {engine}: choose {', '.join(get_args(Engine))}.")
    return ENGINES[engine](plan)


def _draft_source(plan: Plan) -> str:
    return plan.draft.source if plan.draft else f"{plan.model.name}-{plan.decode.drafter}"


def _lost(plan: Plan, kv_on_gpu: float = 1.0) -> list[str]:
    """What none of the engines has. kv_on_gpu: the share of requests whose KV cache the engine has there."""
    d, experts = plan.decode, plan.experts
    lost = [
        f"The predicted {plan.predicted.tokens_per_s:,.1f} tokens/s hold for this plan run by specmoeoff, not for this."
    ]
    if d.draft_length:
        lost.append(f"The draft length stays {d.draft_length} whatever the context and the number of live requests.")
    if d.micro_batches > 1:
        lost.append(f"{d.micro_batches} micro-batches that overlap one's attention with another's experts.")
    if any(experts.prefetch):
        lost.append("The order in which experts are read ahead.")
    if plan.gpu and plan.gpu.kv_share != kv_on_gpu:
        lost.append(f"KV cache and attention of {1 - plan.gpu.kv_share:.0%} of the requests on the CPU.")
    if plan.gpu and plan.draft and plan.gpu.draft_kv_share < 1:
        lost.append(f"The draft's KV cache of {1 - plan.gpu.draft_kv_share:.0%} of the requests on the CPU.")
    if plan.limits.disk_limit_gb_per_s:
        lost.append(f"The disk cap of {plan.limits.disk_limit_gb_per_s:g} GB/s.")
    if plan.model.expert_format != "bf16":
        lost.append(f"Experts in {plan.model.expert_format}: give that engine weights quantised by its own tools.")
    return lost


def _llama_cpp(plan: Plan) -> Export:
    d, n_layers = plan.decode, len(plan.experts.resident)
    options = [
        Option("--model", f"{plan.model.name}-bf16.gguf", "made by convert_hf_to_gguf.py --outtype bf16"),
        Option("--parallel", str(d.batch), "live requests"),
        Option("--ctx-size", str(d.batch * d.context_tokens), f"{d.context_tokens} tokens for each of them"),
        Option("--ubatch-size", str(d.prefill_chunk_tokens), "tokens of a prefill chunk"),
        Option("--threads", str(plan.threads.compute), "threads of the CPU kernels"),
        Option("--cache-type-k", "bf16", "as planned"),
        Option("--cache-type-v", "bf16", "as planned"),
    ]
    kv_on_gpu = round(plan.gpu.kv_share) if plan.gpu else 0
    lost = _lost(plan, kv_on_gpu)
    if plan.gpu is not None:
        resident, elsewhere = plan.memory.fast["resident_experts"], plan.memory.host["experts"]
        n_whole = n_layers * resident // (resident + elsewhere)
        options += [
            Option("--n-gpu-layers", "all", "all but experts on the GPU"),
            Option("--n-cpu-moe", str(n_layers - n_whole), "layers whose experts are not resident, in whole layers"),
            Option("--kv-offload" if kv_on_gpu else "--no-kv-offload", "", "where KV cache and attention are"),
        ]
        lost.append(
            "Residency by expert: only whole layers are placed; the others are computed on the CPU or copied when used."
        )
    else:
        options += [
            Option("--device", "none", "no GPU"),
            Option("--load-mode", "mmap", "experts come from disk through the page cache"),
        ]
        lost.append(
            f"{plan.experts.n_resident} resident experts and the limit of {plan.limits.fast_memory_bytes:,} bytes: the "
            "page cache decides what stays, and takes all memory there is."
        )
    if d.draft_length:
        kinds = {"model": "draft-simple", "ngram": "ngram-simple", "eagle": "draft-eagle3"}
        options.append(Option("--spec-type", kinds[d.drafter], "the drafter"))
        if d.drafter == "eagle":
            lost.append("The planned EAGLE head: llama.cpp runs EAGLE-3 heads, whose acceptance is another.")
        if d.drafter == "ngram":
            options.append(Option("--spec-ngram-simple-size-m", str(d.draft_length), "tokens drafted"))
        else:
            options += [
                Option(
                    "--spec-draft-model", f"{plan.draft.name if plan.draft else d.drafter}-bf16.gguf", "its weights"
                ),
                Option("--spec-draft-n-max", str(d.draft_length), "tokens drafted"),
            ]
    return Export("llama.cpp", ("llama-server",), tuple(options), tuple(lost))


def _offloaded_gib(plan: Plan) -> int:
    """GiB of experts in host memory, rounded up."""
    return ceil(plan.memory.host["experts"] / GIB)


def _vllm(plan: Plan) -> Export:
    d = plan.decode
    options = [
        Option("--dtype", "bfloat16", "as planned"),
        Option("--max-num-seqs", str(d.batch), "live requests"),
        Option("--max-model-len", str(d.context_tokens), "tokens a request may have"),
        Option("--max-num-batched-tokens", str(_window_tokens(plan)), "tokens of a window: verified and prefilled"),
    ]
    lost = _lost(plan)
    launcher: tuple[str, ...] = ("vllm", "serve", plan.model.source)
    if plan.gpu is not None:
        options.append(
            Option(
                "--cpu-offload-gb", str(_offloaded_gib(plan)), "GiB of weights kept in host memory and read when used"
            )
        )
        lost.append(BY_LAYER)
    else:
        kv_gib = max(1, ceil(plan.memory.host["kv"] / GIB))
        launcher = ("env", f"VLLM_CPU_KVCACHE_SPACE={kv_gib}", *launcher)  # read by vLLM's CPU build, in GiB
        lost.append("Experts on disk: all weights must fit in memory.")
    if d.draft_length:
        speculation: dict[str, object] = {"num_speculative_tokens": d.draft_length}
        speculation |= {"method": {"model": "draft_model"}.get(d.drafter, d.drafter)}
        speculation |= {} if d.drafter == "ngram" else {"model": _draft_source(plan)}
        options.append(Option("--speculative-config", json.dumps(speculation), "drafter and tokens drafted"))
    return Export("vllm", launcher, tuple(options), tuple(lost))


def _window_tokens(plan: Plan) -> int:
    return plan.decode.batch * (plan.decode.draft_length + 1) + plan.decode.prefill_chunk_tokens


def _sglang_options(plan: Plan) -> list[Option]:
    d = plan.decode
    options = [
        Option("--model-path", plan.model.source, "the checkpoint"),
        Option("--dtype", "bfloat16", "as planned"),
        Option("--max-running-requests", str(d.batch), "live requests"),
        Option("--context-length", str(d.context_tokens), "tokens a request may have"),
        Option("--chunked-prefill-size", str(d.prefill_chunk_tokens), "tokens of a prefill chunk"),
    ]
    if d.draft_length:
        kinds = {"model": "STANDALONE", "ngram": "NGRAM", "eagle": "EAGLE"}
        options.append(Option("--speculative-algorithm", kinds[d.drafter], "the drafter"))
        if d.drafter != "ngram":
            options += [
                Option("--speculative-draft-model-path", _draft_source(plan), "its weights"),
                Option("--speculative-num-steps", str(d.draft_length), "tokens drafted"),
                Option("--speculative-eagle-topk", "1", "a chain, no tree"),
            ]
        options.append(Option("--speculative-num-draft-tokens", str(d.draft_length + 1), "tokens verified"))
    return options


def _sglang(plan: Plan) -> Export:
    options, lost = _sglang_options(plan), _lost(plan)
    if plan.gpu is not None:
        gib = str(_offloaded_gib(plan))
        options.append(Option("--cpu-offload-gb", gib, "GiB of weights kept in host memory and read when used"))
        lost.append(BY_LAYER)
    else:
        options.append(Option("--device", "cpu", "no GPU"))
        lost.append("Experts on disk: all weights must fit in memory.")
    return Export("sglang", ("python", "-m", "sglang.launch_server"), tuple(options), tuple(lost))


def _ktransformers(plan: Plan) -> Export:
    if plan.gpu is None:
        raise AnswerIsNo(
            "ktransformers needs a GPU for attention, and this plan is for a machine without one; "
            "export to llama.cpp, or tune with a profile that has a GPU."
        )
    per_layer = plan.experts.n_resident // len(plan.experts.resident)
    options = [
        *_sglang_options(plan),
        Option("--kt-weight-path", plan.model.source, "experts for the CPU"),
        Option("--kt-method", "BF16", "weights as they are; needs AVX-512"),
        Option("--kt-cpuinfer", str(plan.threads.compute), "threads of the CPU experts"),
        Option("--kt-threadpool-count", "1", "one per NUMA node: set yours"),
        Option("--kt-num-gpu-experts", str(per_layer), "resident experts of a layer"),
    ]
    lost = [
        *_lost(plan),
        "Streaming: what is not resident is computed on the CPU.",
        "Which experts are resident: record their use (--kt-expert-placement-strategy frequency) to choose them.",
    ]
    return Export("ktransformers", ("python", "-m", "sglang.launch_server"), tuple(options), tuple(lost))


ENGINES: dict[str, Callable[[Plan], Export]] = {
    "llama.cpp": _llama_cpp,
    "vllm": _vllm,
    "sglang": _sglang,
    "ktransformers": _ktransformers,
}
