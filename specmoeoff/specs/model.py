"""The shape of a model, as far as planning and running need it."""

from typing import Literal

from specmoeoff.specs.base import Spec

BF16_BYTES = 2


class ModelSpec(Spec):
    """Mixtral-style decoder; a dense llama is one expert that is always chosen with weight 1."""

    name: str
    architecture: Literal["mixtral", "llama"]
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

    @property
    def n_all_experts(self) -> int:
        return self.n_layers * self.n_experts

    @property
    def expert_params(self) -> int:
        return 3 * self.hidden * self.intermediate

    @property
    def expert_bytes(self) -> int:
        """Of one expert in bf16 without padding."""
        return self.expert_params * BF16_BYTES

    @property
    def kv_bytes_per_token(self) -> int:
        return 2 * self.n_kv_heads * self.head_dim * BF16_BYTES * self.n_layers

    @property
    def attention_params(self) -> int:
        """Of one layer: q, k, v and output projections and the router."""
        q, kv = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        router = self.n_experts * self.hidden if self.n_experts > 1 else 0
        return self.hidden * (2 * q + 2 * kv) + router

    @property
    def shape_key(self) -> str:
        """What operator times depend on; models of equal key share operator tables."""
        return (
            f"h{self.hidden}-i{self.intermediate}-q{self.n_heads}-kv{self.n_kv_heads}-d{self.head_dim}"
            f"-v{self.vocab}-e{self.n_experts}a{self.n_active}"
        )
