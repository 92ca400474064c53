"""The shape of a model, as far as planning and running need it."""

from typing import ClassVar, Literal

from specmoeoff.specs.base import FileSpec, Spec

BF16_BYTES = 2
MXFP4_BLOCK_PARAMS, MXFP4_BLOCK_BYTES = 32, 17  # 4 bits each and a shared scale (OCP Microscaling Formats 1.0)


class ModelSpec(Spec):
    """Decoder with routed experts; a dense llama is one expert that is always chosen with weight 1.

    The runtime executes `mixtral` and `llama`; the others are for planning. The fields with defaults describe what only
    some have: shared experts of the routed ones' size beside them; first layers with one dense block in place of experts;
    latent attention (MLA), which caches `kv_latent` + `rope_head_dim` numbers a token for all heads; layers that see the
    last `sliding_window` tokens only; `other_layer_params` are norms of q and k, biases and sinks.
    """

    name: str
    architecture: Literal["mixtral", "llama", "qwen3_moe", "olmoe", "deepseek_v2", "gpt_oss"]
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
    expert_format: Literal["bf16", "mxfp4"] = "bf16"
    expert_bias: bool = False

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
        if self.expert_format == "mxfp4":
            weights = self.expert_params // MXFP4_BLOCK_PARAMS * MXFP4_BLOCK_BYTES
        else:
            weights = self.expert_params * BF16_BYTES
        return weights + self.expert_bias_params * BF16_BYTES

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
            return self.hidden * (q + self.kv_width) + self.kv_latent * self.n_heads * self.head_dim
        return self.hidden * (self.n_heads + 2 * self.n_kv_heads) * self.head_dim

    @property
    def output_params(self) -> int:
        """Of one layer's output projection, with MLA the up-projection of values too."""
        return (self.hidden + self.kv_latent) * self.n_heads * self.head_dim

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
        """What operator times depend on; models of equal key share operator tables."""
        return (
            f"h{self.hidden}-i{self.intermediate}-q{self.n_heads}-kv{self.n_kv_heads}-d{self.head_dim}"
            f"-v{self.vocab}-e{self.n_experts}a{self.n_active}"
        )


class ModelShape(FileSpec):
    """A model without its weights, for planning. `n_params`: as its publisher counts them."""

    what: ClassVar[str] = "model shape"
    source: str
    n_params: int
    model: ModelSpec
