"""The shape of a model, as far as planning and running need it."""

import math
from typing import ClassVar, Literal, Self

from specmoeoff.errors import BadInput
from specmoeoff.precision import ExpertFormat, PackedFormat, Precision
from specmoeoff.specs.base import FileSpec, Spec

BF16_BYTES = 2
Architecture = Literal[
    "mixtral",
    "llama",
    "qwen2",
    "qwen3",
    "qwen2_moe",
    "qwen3_moe",
    "olmoe",
    "deepseek_v2",
    "deepseek_v3",
    "gpt_oss",
]
# Weights that share a scale, and their bytes with it; mxfp4: OCP Microscaling Formats 1.0.
BLOCKS: dict[PackedFormat, tuple[int, int]] = {
    "fp32": (1, 4),
    "bf16": (1, 2),
    "int8": (64, 66),
    "int4": (64, 34),
    "mxfp4": (32, 17),
}


class RopeScaling(Spec):
    """How rotary frequencies reach beyond the `original_positions` of pretraining: divided by `factor` (linear), or only the
    slow ones (llama3: Llama 3.1; yarn: Peng et al. 2023, arXiv 2309.00071)."""

    kind: Literal["linear", "llama3", "yarn"]
    factor: float
    original_positions: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None
    mscale: float = 0.0
    mscale_all_dim: float = 0.0

    def magnitude(self, mscale: float) -> float:
        """YaRN's 0.1 m ln(factor) + 1 (equation 22)."""
        return 0.1 * mscale * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0

    @property
    def table_scale(self) -> float:
        """Of cosines and sines."""
        if self.kind != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self.magnitude(self.mscale) / self.magnitude(self.mscale_all_dim)
        return self.magnitude(1.0)


class ModelSpec(Spec):
    """Decoder with routed experts; a dense model is one expert that is always chosen with weight 1.

    The fields with defaults describe what only some have: shared experts of the routed ones' size beside them; first layers
    with one dense block in place of experts; latent attention (MLA), which caches `kv_latent` + `rope_head_dim` numbers a token
    for all heads (this runtime: the heads' keys and values) and may have a latent of queries too; layers that see the last
    `sliding_window` tokens only, every other one from the first where not all do; `other_layer_params` are norms of q and k,
    biases and sinks. `precision` is that of weights, activations and KV cache as they are run; `expert_format` that of the routed
    experts' weights, where they are kept in fewer bits.
    """

    name: str
    architecture: Architecture
    n_layers: int
    hidden: int
    intermediate: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    vocab: int
    n_experts: int
    n_active: int
    max_positions: int
    rms_eps: float
    rope_theta: float
    tie_embeddings: bool
    eos_token_ids: tuple[int, ...]
    fingerprint: str
    n_shared_experts: int = 0
    n_dense_layers: int = 0
    dense_intermediate: int = 0
    kv_latent: int = 0
    rope_head_dim: int = 0
    n_sliding_layers: int = 0
    sliding_window: int = 0
    other_layer_params: int = 0
    expert_format: ExpertFormat = "bf16"
    expert_bias: bool = False
    v_head_dim: int = 0
    q_latent: int = 0
    rope_scaling: RopeScaling | None = None
    renormalise: bool = True
    n_groups: int = 0
    n_active_groups: int = 0
    routed_scale: float = 1.0
    clip_qkv: float = 0.0
    qkv_bias: bool = False
    o_bias: bool = False
    precision: Precision = "bf16"

    def run_in(self, precision: Precision, experts: ExpertFormat | None = None) -> Self:
        """This model as it is to be run; `experts`: None, as the checkpoint has them. BadInput where the kernels cannot."""
        experts = experts or (self.expert_format if precision == "bf16" else "bf16")
        if experts != "bf16" and precision != "bf16":
            raise BadInput(f"experts in {experts}: are multiplied with bf16, not {precision}; leave one of them out.")
        if experts != "bf16" and self.n_experts == 1:
            raise BadInput(f"experts in {experts}: {self.name} is dense and has none; leave it out.")
        return self.model_copy(update={"precision": precision, "expert_format": experts})

    @property
    def packed_format(self) -> PackedFormat:
        """Of the routed experts' weights as the kernels take them."""
        return self.precision if self.expert_format == "bf16" else self.expert_format

    @property
    def has_sinks(self) -> bool:
        return self.architecture == "gpt_oss"

    @property
    def qk_norm(self) -> Literal["head", "all", "none"]:
        """Whether queries and keys are normalised head by head, all heads together, or not."""
        if self.architecture in ("qwen3", "qwen3_moe"):
            return "head"
        return "all" if self.architecture == "olmoe" else "none"

    @property
    def attention_scale(self) -> float:
        """Of queries: 1 / sqrt(head size), with MLA and YaRN times the square of its magnitude (DeepSeek-V2, section 3.1.4)."""
        scale = (self.head_dim + self.rope_head_dim) ** -0.5
        rope = self.rope_scaling
        return (
            scale * rope.magnitude(rope.mscale_all_dim) ** 2
            if rope and self.kv_latent and rope.mscale_all_dim
            else scale
        )

    def n_experts_of(self, layer: int) -> int:
        """Routed experts of a layer."""
        return 0 if layer < self.n_dense_layers else self.n_experts

    def window_of(self, layer: int) -> int:
        """Tokens a layer sees; 0: all."""
        slides = self.n_sliding_layers == self.n_layers or (self.n_sliding_layers and layer % 2 == 0)
        return self.sliding_window if slides else 0

    @property
    def n_expert_layers(self) -> int:
        return self.n_layers - self.n_dense_layers

    @property
    def n_all_experts(self) -> int:
        return self.n_expert_layers * self.n_experts

    @property
    def expert_params(self) -> int:
        return 3 * self.hidden * self.intermediate

    @property
    def expert_bytes(self) -> int:
        """Of one expert in its format without padding; biases stay in bf16."""
        n_params, n_bytes = BLOCKS[self.packed_format]
        return self.expert_params // n_params * n_bytes + self.expert_bias_params * BF16_BYTES

    @property
    def expert_bias_params(self) -> int:
        return 2 * self.intermediate + self.hidden if self.expert_bias else 0

    @property
    def kv_width(self) -> int:
        """Numbers cached for one token and layer."""
        return self.kv_latent + self.rope_head_dim if self.kv_latent else 2 * self.n_kv_heads * self.head_dim

    @property
    def kv_bytes_per_token(self) -> int:
        """In all layers. Sliding layers count in full: an engine that frees their old pages needs less."""
        return self.kv_width * BF16_BYTES * self.n_layers

    @property
    def attention_widths(self) -> tuple[int, int]:
        """Numbers of one token's queries and of its attention's output, as the kernel beside the KV cache sees them: with
        MLA both are in the latent space (DeepSeek-V2, section 2.1.2, with the up-projections absorbed)."""
        if self.kv_latent:
            return self.n_heads * (self.kv_latent + self.rope_head_dim), self.n_heads * self.kv_latent
        return (self.n_heads * self.head_dim,) * 2

    @property
    def qkv_params(self) -> int:
        """Of one layer, with MLA the up-projection of keys too."""
        if self.kv_latent:
            q = self.n_heads * (self.head_dim + self.rope_head_dim)
            q_params = self.q_latent * (self.hidden + q) if self.q_latent else self.hidden * q
            return q_params + self.hidden * self.kv_width + self.kv_latent * self.n_heads * self.head_dim
        return self.hidden * (self.n_heads + 2 * self.n_kv_heads) * self.head_dim

    @property
    def output_params(self) -> int:
        """Of one layer's output projection, with MLA the up-projection of values too."""
        return (self.hidden + self.kv_latent) * self.n_heads * (self.v_head_dim or self.head_dim)

    @property
    def router_params(self) -> int:
        return self.n_experts * self.hidden if self.n_experts > 1 else 0

    @property
    def attention_params(self) -> int:
        """Of one layer: q, k, v and output projections and the router."""
        return self.qkv_params + self.output_params + self.router_params

    @property
    def ffn_params(self) -> int:
        """Of everything beside attention that is always computed, in all layers: shared experts and dense blocks."""
        shared = self.n_expert_layers * self.n_shared_experts * self.expert_params
        return shared + self.n_dense_layers * 3 * self.hidden * self.dense_intermediate

    @property
    def dense_params(self) -> int:
        """All but the routed experts."""
        layers = self.n_layers * (self.qkv_params + self.output_params + 2 * self.hidden + self.other_layer_params)
        embeddings = (1 if self.tie_embeddings else 2) * self.vocab * self.hidden + self.hidden
        return layers + self.n_expert_layers * self.router_params + self.ffn_params + embeddings

    @property
    def n_params(self) -> int:
        return self.dense_params + self.n_all_experts * (self.expert_params + self.expert_bias_params)

    @property
    def shape_key(self) -> str:
        """What operator times depend on; models of equal key share operator tables. What only some models have comes last."""
        others = {
            "latent": self.kv_latent,
            "q_latent": self.q_latent,
            "rope": self.rope_head_dim,
            "vd": self.v_head_dim,
            "shared": self.n_shared_experts,
            "dense": self.dense_intermediate if self.n_dense_layers else 0,
            "window": self.sliding_window if self.n_sliding_layers else 0,
            "groups": self.n_groups,
        }
        flags = {"qkv_bias": self.qkv_bias, f"{self.qk_norm}_norm": self.qk_norm != "none", "sinks": self.has_sinks}
        flags |= {"expert_bias": self.expert_bias, self.packed_format: self.packed_format != "bf16"}
        return (
            f"h{self.hidden}-i{self.intermediate}-q{self.n_heads}-kv{self.n_kv_heads}-d{self.head_dim}"
            f"-v{self.vocab}-e{self.n_experts}a{self.n_active}"
            + "".join(f"-{name}{size}" for name, size in others.items() if size)
            + "".join(f"-{name}" for name, has in flags.items() if has)
        )


class ModelShape(FileSpec):
    """A model without its weights, for planning. `n_params`: as its publisher counts them."""

    what: ClassVar[str] = "model shape"
    source: str
    n_params: int
    model: ModelSpec
