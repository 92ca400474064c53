"""The parts of tools/gpu_check.py. Each yields rows as it finds them, so that one that is cut short has told what it knew."""

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
from gpu_synthetic import RandomWeights, Synthetic, shape

from specmoeoff.kernels import cpu
from specmoeoff.kernels.cuda import launches
from specmoeoff.runtime.gpu.device import CupyDevice, Device

ROOT = Path(__file__).parents[1]
GIB = 1 << 30
EXPERT_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
GPU_MEMORY_BYTES = 24 * GIB
PACKAGES = ("torch", "cupy-cuda13x", "cupy-cuda12x", "numpy", "transformers", "accelerate", "pydantic", "pytest")


class Row(NamedTuple):
    """One number. `note`: what it is not, where a reader might think so."""

    name: str
    value: float | str | None
    unit: str = ""
    note: str = ""


class Setting(NamedTuple):
    """Where the check runs. Rehearsed: on a GPU played by a CPU, tiny, and no time means anything."""

    device: Device
    rehearsed: bool
    seconds: float  # the section's budget
    library: Path  # the kernels for a CPU

    @property
    def profile(self) -> Path:
        """Where section `profile` writes."""
        return self.library.with_name("measured-profile.json")

    @property
    def torch_device(self) -> str:
        return "cpu" if self.rehearsed else "cuda"


Rows = Iterator[Row]


def make_device(rehearse: bool, library: Path) -> Device:
    """The GPU, or a CPU that plays one by the kernels compiled into a library, now or before."""
    if not rehearse:
        return CupyDevice()
    from specmoeoff.kernels.cuda.on_cpu import Host, build
    from specmoeoff.runtime.gpu.rehearsal import RehearsalDevice

    return RehearsalDevice(Host(library) if library.exists() else build(library.parent))


def machine(setting: Setting) -> Rows:
    """What is measured on."""
    yield Row("processor", platform.processor() or platform.machine())
    yield Row("cores", os.cpu_count())
    yield Row("RAM", os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB, "GiB")
    for package in PACKAGES:
        try:
            yield Row(package, version(package))
        except PackageNotFoundError:
            yield Row(package, None, note="not installed")
    if not setting.rehearsed:
        fields = "name,driver_version,memory.total,pcie.link.gen.max,pcie.link.width.max,clocks.max.sm,power.limit"
        command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
        values = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0].split(", ")
        yield from (Row(f"GPU {field}", value) for field, value in zip(fields.split(","), values, strict=True))


def tests(setting: Setting) -> Rows:
    """Those that need a GPU."""
    missing = [name for name in ("pytest", "pydantic", "scipy", "pytest_timeout") if find_spec(name) is None]
    if missing or setting.rehearsed:
        yield Row(
            "pytest -m gpu",
            None,
            note=f"not run: {'rehearsal' if setting.rehearsed else ', '.join(missing) + ' missing'}",
        )
        return
    folders = ("tests/kernels/cuda", "tests/runtime/gpu", "tests/roofline/test_link.py")
    together = ["-n", "6"] if find_spec("xdist") else []  # most of the time Python plays the GPU that is compared with
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:benchmark", *together, "-m", "gpu", *folders]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=setting.seconds)
    yield Row("pytest -m gpu", done.stdout.strip().splitlines()[-1], note=f"exit status {done.returncode}")
    if done.returncode:
        raise AssertionError(done.stdout[-4000:])


def exactness(setting: Setting) -> Rows:
    """All kernels together, on a tiny model: against the same windows on a GPU played by a CPU, and against themselves."""
    played = make_device(True, setting.library)
    for near in (False, True):
        here, there, split = (
            Synthetic(device, shape("tiny", 3), 4, 5, 3, parts=parts, kv_share=float(near), prefill=True)
            for device, parts in ((setting.device, 2), (played, 2), (setting.device, 1))
        )
        where = f"attention on the {'GPU' if near else 'CPU'}"
        for k in (0, 3):
            tokens, n = here.window(k), 4 * (k + 1)
            there.window(k), split.window(k)
            mine, its, other = (s.runs.states(n) for s in (here, there, split))
            difference = float(np.abs(mine - its).max() / np.abs(its).max())
            yield Row(f"{where}, k = {k}: largest difference of states", difference, "of the largest state")
            if not difference < 0.02:
                raise AssertionError(f"{where}: the GPU computes something else ({difference})")
            if not (np.array_equal(mine, other) and np.array_equal(here.window(k), tokens)):
                raise AssertionError(f"{where}: a row's bits depend on its micro-batch, or on when it is computed")
        yield Row(f"{where}: bits in one and in two micro-batches", "equal")


def seconds_each(device: Device, stream: Any, call: Callable[[], None], budget_s: float = 0.2) -> float:
    """Median of five runs of many calls, by the GPU's clock."""

    def run(n: int) -> float:
        start = device.record(stream)
        for _ in range(n):
            call()
        end = device.record(stream)
        device.synchronize(end)
        return device.seconds(start, end) / n

    run(1)
    n = min(200, max(1, int(budget_s / 5 / max(run(1), 1e-6))))
    return median(run(n if budget_s > 0 else 1) for _ in range(5 if budget_s > 0 else 1))


def link(setting: Setting) -> Rows:
    """Pinned copies by size, each way, alone and while the other way is busy."""
    device, streams = setting.device, [setting.device.stream() for _ in range(2)]
    sizes = [1 << 12, 1 << 16] if setting.rehearsed else [1 << p for p in range(12, 31, 2)]
    host, here = (make((2, sizes[-1]), np.uint8) for make in (device.pinned, device.empty))
    for size in sizes:
        ways = {"h2d": (here[0, :size], host[0, :size]), "d2h": (host[1, :size], here[1, :size])}
        for (way, pair), other in product(ways.items(), (False, True)):
            against = ways["d2h" if way == "h2d" else "h2d"]

            def call(pair: Any = pair, other: bool = other, against: Any = against) -> None:
                if other:
                    device.copy(streams[1], *against)
                device.copy(streams[0], *pair)

            rate = size / seconds_each(device, streams[0], call, 0 if setting.rehearsed else 0.1) / 1e9
            device.synchronize(device.record(streams[1]))
            what = f"{way} {size} bytes{', other way busy' if other else ''}"
            yield Row(
                what, rate, "GB/s", note="small copies: bound by how fast they are enqueued" if size < 1 << 20 else ""
            )


def roofs(setting: Setting) -> Rows:
    """Matrix products and memory, by torch (cuBLAS on a GPU)."""
    import torch

    n, n_bytes = (64, 1 << 12) if setting.rehearsed else (8192, 1 << 30)
    types = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    for name, dtype in types.items():
        a, b = (torch.randn(n, n, device=setting.torch_device).to(dtype) for _ in range(2))
        seconds = torch_seconds(lambda a=a, b=b: torch.mm(a, b), setting)
        yield Row(f"{name} product of {n}", 2 * n**3 / seconds / 1e12, "TFLOP/s")
    a, b = (torch.ones(n_bytes // 4, device=setting.torch_device) for _ in range(2))
    yield Row("memory copy, both ways counted", 2 * n_bytes / torch_seconds(lambda: b.copy_(a), setting) / 1e9, "GB/s")


def torch_seconds(call: Callable[[], Any], setting: Setting) -> float:
    """Median of nine runs of several calls."""
    import torch

    wait = torch.cuda.synchronize if not setting.rehearsed else lambda: None
    n, times = (1 if setting.rehearsed else 10), []
    for _ in range(10):
        wait()
        begin = time.perf_counter()
        for _ in range(n):
            call()
        wait()
        times.append((time.perf_counter() - begin) / n)
    return median(times[1:])


def kernels(setting: Setting) -> Rows:
    """The expert feed-forward by tokens per expert: its rate, and the time of the same products by torch over its own."""
    import torch

    device, stream = setting.device, setting.device.stream()
    names = ["tiny"] if setting.rehearsed else ["mixtral-8x7b", "qwen3-30b-a3b"]
    for name in names:
        spec = shape(name, 2)
        hidden, intermediate, weights = spec.hidden, spec.intermediate, RandomWeights(spec)
        # enough of them that no cache holds all
        n_experts = 2 if setting.rehearsed else max(4, -(-(1 << 29) // (6 * hidden * intermediate)))
        packed = device.empty((n_experts, 3 * hidden * intermediate), np.uint16)
        one = np.empty(3 * hidden * intermediate, np.uint16)
        for expert in range(n_experts):
            weights.expert(0, expert, one)
            device.put(packed[expert], one)
        table = device.empty((n_experts,), np.uint64)
        device.put(table, np.array([device.address(packed[e]) for e in range(n_experts)], np.uint64))
        matrices = [
            torch.randn(n_experts, *size, device=setting.torch_device).to(torch.bfloat16)
            for size in ((hidden, 2 * intermediate), (intermediate, hidden))
        ]
        for tokens in (1, 4) if setting.rehearsed else EXPERT_TOKENS:
            m = tokens * n_experts
            x, out = device.empty((m, hidden), np.uint16), device.empty((m, hidden), np.float32)
            between = device.empty((m, intermediate), np.uint16)
            device.put(x, np.resize(one, (m, hidden)))
            start, slots = device.empty((n_experts + 1,), np.int32), device.empty((m,), np.int32)
            device.put(start, np.arange(n_experts + 1, dtype=np.int32) * tokens)
            device.put(slots, np.arange(m, dtype=np.int32))
            made = launches.experts(x, table, start, slots, tokens, between, out)

            def call(made: Any = made) -> None:
                for launch in made:
                    device.launch(stream, launch)

            ours = seconds_each(device, stream, call, 0 if setting.rehearsed else 0.1)
            rows = torch.randn(n_experts, tokens, hidden, device=setting.torch_device).to(torch.bfloat16)

            def peers(rows: Any = rows, matrices: Any = matrices) -> Any:
                gate, up = torch.bmm(rows, matrices[0]).chunk(2, dim=-1)
                return torch.bmm(torch.nn.functional.silu(gate) * up, matrices[1])

            theirs = torch_seconds(peers, setting)
            what = f"{name} experts, {tokens} tokens each"
            yield Row(f"{what}: weights", packed.nbytes / ours / 1e9, "GB/s")
            yield Row(f"{what}: products", 6 * m * hidden * intermediate / ours / 1e12, "TFLOP/s")
            yield Row(f"{what}: torch's time over ours", theirs / ours, "x")
        del packed, matrices


def profile(setting: Setting) -> Rows:
    """The machine's own profile, which the plans of later sections are made with."""
    if setting.rehearsed:
        yield Row("profile", None, note="not run: rehearsal; plans are made with the shipped h100")
        return
    command = [sys.executable, "-m", "specmoeoff", "profile", "--budget", "45", "-o", str(setting.profile)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=setting.seconds)
    if done.returncode:
        raise AssertionError(done.stderr[-4000:])
    found = json.loads(setting.profile.read_text())
    for roof in (*found["peaks"], *found["memory"]):
        yield Row(
            f"{roof['device']} {roof['name']}, {roof['n_threads']} threads", roof["rate"]["value"], roof["rate"]["unit"]
        )
    for curve in found["links"]:
        what = f"{curve['direction']} {curve['host_memory']}, beside {curve['beside']}"
        yield Row(f"link {what}", curve["gb_per_s"], "GB/s")


def cpu_attention(setting: Setting) -> Rows:
    """The CPU's attention as a window has it, by instruction set and tokens a request."""
    n_requests, context, tokens = (4, 20, (1, 4)) if setting.rehearsed else (256, 1024, (1, 2, 4, 6, 9))
    kv, n_threads = cpu.KVShape(32, 8, 128, 128), len(os.sched_getaffinity(0))
    per_request = -(-(context + max(tokens)) // cpu.PAGE_TOKENS)
    weights = RandomWeights(shape("tiny", 2))
    pages = cpu.aligned_empty((n_requests * per_request + 1) * kv.page_bytes).reshape(-1, kv.page_bytes)
    weights.fill(pages.view(np.uint16).reshape(-1))
    order = np.random.default_rng(1).permutation(n_requests * per_request).astype(np.int32)
    table = 1 + order.reshape(n_requests, per_request)
    for isa, n in product((i for i in cpu.supported_isas() if i in ("amxbf16", "avx512bf16")), tokens):
        kernels = cpu.Kernels(n_threads, isa=isa)
        batch = cpu.Batch(np.arange(n_requests + 1, dtype=np.int32) * n, np.full(n_requests, context, np.int32), table)
        query = np.empty((n_requests * n, kv.n_heads * kv.key_dim), np.uint16)
        weights.fill(query.reshape(-1))
        out, times = np.empty_like(query), []
        for _ in range(8):
            begin = time.perf_counter()
            kernels.verify_attention(kv, batch, pages, query, out)
            times.append(time.perf_counter() - begin)
        note = f"{n_requests} requests of {context} tokens, 32 heads on 8, of 128; {n_threads} threads"
        yield Row(f"{isa}, {n} tokens a request", median(times[1:]), "s", note)


def mixtral(setting: Setting) -> Rows:
    """Four of Mixtral-8x7B's layers."""
    yield from windows(setting, "mixtral-8x7b", 4)


def qwen3(setting: Setting) -> Rows:
    """Six of Qwen3-30B-A3B's layers."""
    yield from windows(setting, "qwen3-30b-a3b", 6)


def windows(setting: Setting, name: str, n_layers: int) -> Rows:
    """Of plans tuned to this machine for the whole model, on a few layers; k = 0 to 8 at one of them."""
    from gpu_tuned import LONGEST, Tuned, rows_of

    begin = time.perf_counter()
    limits = {"fast": GPU_MEMORY_BYTES, "host": int(0.9 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))}
    context, batch, n_windows, turns, lengths = 1024, None, 3, 9, tuple(range(LONGEST + 1))
    if setting.rehearsed:
        name, n_layers, context, batch, n_windows, turns, lengths = "tiny", 2, 20, 4, 1, 1, (0, 3)
    limit_memory(setting)
    machine = setting.profile if setting.profile.exists() else ROOT / "specmoeoff/profiles/machines/h100.json"
    yield Row(
        "profile",
        machine.stem,
        note="" if setting.profile.exists() else "by datasheet: this machine's was not measured",
    )
    tuned = Tuned(name, n_layers, context, machine, limits, batch)
    found = rows_of(
        setting.device,
        tuned,
        n_windows,
        turns,
        lengths,
        lambda: setting.device.memory_bytes / GIB,
        begin,
        0.85 * setting.seconds,
    )
    yield from (Row(*row) for row in found)


def draft_split(setting: Setting) -> Rows:
    """Windows of four Mixtral layers with five tokens drafted by a dense 1.1 B model, whose KV lies here, there or on both sides."""
    from specmoeoff.runtime.gpu.draft import GpuPasses

    begin, k, caught_up = time.perf_counter(), 5, 3
    limit_memory(setting)
    name, n_layers, batch, context, n_windows = "mixtral-8x7b", 4, 256, 1024, 6
    dense = {"architecture": "llama", "n_experts": 1, "n_active": 1, "vocab": 32000, "head_dim": 64}
    sizes = {"n_layers": 22, "hidden": 2048, "intermediate": 5632, "n_heads": 32, "n_kv_heads": 4}
    if setting.rehearsed:
        name, n_layers, batch, context, n_windows, k, caught_up = "tiny", 2, 2, 20, 1, 2, 1
        sizes = {"n_layers": 2, "hidden": 64, "intermediate": 64, "n_heads": 2, "n_kv_heads": 1, "vocab": 40}
    n_threads = max(1, len(os.sched_getaffinity(0)) - 1)
    spec = shape(name, n_layers)
    draft = SimpleNamespace(**vars(shape("tiny", 2)) | dense | sizes | {"max_positions": 4096})
    synthetic = Synthetic(setting.device, spec, batch, context, k, n_threads=n_threads)
    decode = SimpleNamespace(batch=batch, context_tokens=context + k + 1)
    note = f"{batch} requests with {context} tokens, k = {k}; {n_layers} target layers, draft of {draft.n_layers}; random weights"
    for share in (0.0, 1.0, 0.5, 0.75, 0.25):
        what = f"draft KV {share:.0%} in GPU memory"
        if time.perf_counter() - begin > 0.8 * setting.seconds:
            yield Row(what, None, note="not measured: the section's time was up")
            continue
        passes = GpuPasses(
            RandomWeights(draft), setting.device, decode, round(share * batch), batch * (k + 1), n_threads
        )
        slots, drafting, whole = list(range(batch)), [], []
        for _ in range(n_windows + 1):
            start = time.perf_counter()
            for step in range(k):
                n_new, known = (caught_up, context - caught_up) if step == 0 else (1, context + step - 1)
                passes.run(slots, [[1] * n_new] * batch, [known] * batch, None)
            drafting.append(time.perf_counter() - start)
            synthetic.window(k)
            whole.append(time.perf_counter() - start)
        yield Row(f"{what}: window with drafting", median(whole[1:]), "s", note)
        yield Row(f"{what}: drafting", median(drafting[1:]), "s", note)
        del passes


def limit_memory(setting: Setting) -> None:
    """As if the GPU had no more."""
    if not setting.rehearsed:
        import cupy

        cupy.get_default_memory_pool().set_limit(size=GPU_MEMORY_BYTES)


def accelerate(setting: Setting) -> Rows:
    """The same shape, two layers, under Hugging Face accelerate's offload, at ever larger batches as far as 24 GiB hold."""
    import torch
    from accelerate import cpu_offload
    from transformers import DynamicCache, MixtralConfig, MixtralForCausalLM

    spec = shape("tiny" if setting.rehearsed else "mixtral-8x7b", 2)
    context, begin = (20 if setting.rehearsed else 1024), time.perf_counter()
    config = MixtralConfig(
        vocab_size=spec.vocab,
        hidden_size=spec.hidden,
        intermediate_size=spec.intermediate,
        num_hidden_layers=spec.n_layers,
        num_attention_heads=spec.n_heads,
        num_key_value_heads=spec.n_kv_heads,
        head_dim=spec.head_dim,
        num_local_experts=spec.n_experts,
        num_experts_per_tok=spec.n_active,
    )
    with torch.device("meta"):
        model = MixtralForCausalLM(config).to(torch.bfloat16)
    model.to_empty(device="cpu")
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    block = torch.randn(1 << 20).to(torch.bfloat16) * 0.02
    with torch.no_grad():
        for parameter in model.parameters():
            for piece in parameter.view(-1).split(len(block)):
                piece.copy_(block[: len(piece)])
    if not setting.rehearsed:
        torch.cuda.set_per_process_memory_fraction(
            min(1.0, GPU_MEMORY_BYTES / torch.cuda.get_device_properties(0).total_memory)
        )
    model = cpu_offload(model.eval(), execution_device=torch.device(setting.torch_device))
    # As many as have room for the KV of all 32 layers beside dense weights and the layer at hand.
    kv_bytes = 4 * spec.n_kv_heads * spec.head_dim * (context + 1)
    room = GPU_MEMORY_BYTES - 6 * GIB
    most = 4 if setting.rehearsed else room // (32 * kv_bytes)
    batch = 4
    while batch <= most and time.perf_counter() - begin < 0.7 * setting.seconds:
        cache = DynamicCache(config=config)
        shape_of = (batch, spec.n_kv_heads, context, spec.head_dim)
        for layer in range(spec.n_layers):
            some = torch.randn(shape_of, device=setting.torch_device, dtype=torch.bfloat16)
            cache.update(some, some, layer)
        tokens, times = torch.ones(batch, 1, dtype=torch.long, device=setting.torch_device), []
        with torch.no_grad():
            for _ in range(3):
                start = time.perf_counter()
                model(tokens, past_key_values=cache, use_cache=True).logits.float().cpu()
                times.append(time.perf_counter() - start)
        note = f"decoding after {context} tokens; 2 of 32 layers, KV in GPU memory, where {most} requests of all 32 layers fit"
        yield Row(f"batch {batch}: tokens per second", batch / min(times), "tokens/s", note)
        batch = most if batch < most < 2 * batch else 2 * batch


SECTIONS: dict[str, tuple[Callable[[Setting], Rows], float]] = {  # and its seconds of 9 minutes
    "machine": (machine, 10),
    "exactness": (exactness, 25),
    "tests": (tests, 50),
    "link": (link, 15),
    "profile": (profile, 65),
    "roofs": (roofs, 20),
    "kernels": (kernels, 45),
    "cpu_attention": (cpu_attention, 15),
    "mixtral": (mixtral, 100),
    "qwen3": (qwen3, 85),
    "draft_split": (draft_split, 50),
    "accelerate": (accelerate, 50),
}
