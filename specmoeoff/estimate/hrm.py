"""The hierarchical roofline model of MoE-Lightning (arXiv 2411.11217), as its artifact's optimizer prices a policy.

Replays `fastmoe/backend/optimizer.py` of github.com/caoshiyi/artifacts, branch asplos25, at a given policy: there a linear
program whose only free variable is the share of expert weights resident on the GPU, so its optimum is a closed form.
"""

from dataclasses import dataclass
from typing import NamedTuple

from specmoeoff.specs.model import ModelSpec

GPU_SHARE, CPU_SHARE = 0.86, 0.8  # of memory that may be used, hard-coded there
WORKING_MARGIN = 1.2


@dataclass(frozen=True)
class HrmMachine:
    """Bytes, bytes per second and FLOP per second."""

    gpu_bytes: int
    cpu_bytes: int
    h2d_per_s: float
    hbm_per_s: float
    dram_per_s: float
    gpu_flops_per_s: float
    cpu_flops_per_s: float


class HrmForecast(NamedTuple):
    """Seconds are of one layer's pass over the whole batch but for decode_s, which is that of all tokens after the first."""

    resident_share: float
    transfer_s: float
    gpu_s: float
    cpu_s: float
    decode_s: float
    tokens_per_s: float
    cpu_home_bytes: float
    cpu_pinned_bytes: float
    fits: bool


def hrm(machine: HrmMachine, model: ModelSpec, prompt: int, output: int, micro_batch: int, n_micro: int) -> HrmForecast:
    """Decode only, attention on the CPU, fp16. tokens_per_s counts all `output` tokens over the time of output - 1 steps."""
    batch, context, h, layers = micro_batch * n_micro, prompt + output, model.hidden, model.n_layers
    kv_width = h * model.n_kv_heads // model.n_heads
    dense_bytes = layers * (4 * h * h + 4 * h * kv_width)
    layer_bytes = 6 * h * model.intermediate * model.n_experts
    prefill_bytes = 8 * prompt * kv_width * micro_batch + 2 * h * prompt * (2 * micro_batch + batch)
    working_bytes = 2 * micro_batch * model.n_active * prompt * (h + 3 * model.intermediate) * WORKING_MARGIN
    home_bytes = dense_bytes + max(prefill_bytes, 4 * h * batch)
    left = GPU_SHARE * machine.gpu_bytes - home_bytes - working_bytes - 2 * layer_bytes  # after the double buffer
    resident = min(1.0, left / (layer_bytes * (layers - 2)))
    streamed_bytes = layer_bytes * (1.0 - resident)

    transfer_s = streamed_bytes / machine.h2d_per_s
    expert_flops = 6 * micro_batch * h * model.intermediate * model.n_active
    expert_bytes = 2 * micro_batch * (h + model.intermediate) + layer_bytes
    gpu_s = n_micro * max(expert_flops / machine.gpu_flops_per_s, expert_bytes / machine.hbm_per_s)
    attention_flops = 2 * context * (h + model.n_heads)
    attention_bytes = 4 * h + 4 * context * kv_width
    cpu_s = batch * max(attention_flops / machine.cpu_flops_per_s, attention_bytes / machine.dram_per_s)

    decode_s = max(transfer_s, gpu_s, cpu_s) * layers * (output - 1)
    cpu_home_bytes = layers * (streamed_bytes + 4 * context * kv_width * batch) + 2 * h * batch * prompt
    pinned_bytes = 2 * streamed_bytes
    fits = resident >= 0 and cpu_home_bytes + pinned_bytes <= CPU_SHARE * machine.cpu_bytes
    rate = batch * output / decode_s
    return HrmForecast(resident, transfer_s, gpu_s, cpu_s, decode_s, rate, cpu_home_bytes, pinned_bytes, fits)
