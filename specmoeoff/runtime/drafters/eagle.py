"""EAGLE: one decoder layer that extrapolates the target's own features (Li et al. 2024, arXiv 2401.15077, section 4.1).

At position i the layer gets [embedding of token i + 1; feature i], made one hidden state by a linear map, and its output
stands for feature i + 1, which names token i + 2 through the target's output matrix. A feature is the target's last state
after the final norm, and the layer has no norm before its attention: so were the published heads trained (SafeAILab/EAGLE,
eagle/ge_data/ge_data_all_vicuna.py, whose transformers' `hidden_states[-1]` is normed, and eagle/model/cnets1.py).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np

from specmoeoff.errors import BadInput
from specmoeoff.kernels.cpu import ACTIVATION, PAGE_TOKENS, Kernels, pack_expert, packed_expert_bytes
from specmoeoff.pipeline import RequestTokens
from specmoeoff.runtime.architectures import expected_shapes
from specmoeoff.runtime.checkpoint import Checkpoint, to_bf16
from specmoeoff.runtime.drafters import Proposal
from specmoeoff.runtime.kv_cache import PageTable
from specmoeoff.runtime.model import Model, array_of
from specmoeoff.runtime.pack import pack_weight
from specmoeoff.runtime.rows import make_rows
from specmoeoff.runtime.sequence import Sequence as TokenSequence
from specmoeoff.runtime.trace import Trace
from specmoeoff.specs.model import ModelSpec

LAYER = "layers.0."
INPUT_NORM = f"{LAYER}input_layernorm.weight"
CONVERT = (
    'python -c "from torch import load; from safetensors.torch import save_file; '
    "save_file(load('pytorch_model.bin', weights_only=True), 'model.safetensors')\""
)


class EagleCheckpoint(Checkpoint):
    """A published head's folder: EAGLE-1 and EAGLE-2 share this layout. Its copy of the target's embedding is not read."""

    def __init__(self, folder: Path | str):
        if [*Path(folder).glob("*.bin")] and not [*Path(folder).glob("*.safetensors")]:
            raise BadInput(
                f"{folder}: .bin files can hold programs and are not read; convert the head there: {CONVERT}"
            )
        super().__init__(folder)
        if self.spec.n_layers != 1:
            raise BadInput(f"{folder}: num_hidden_layers is {self.spec.n_layers}; an EAGLE head has one layer.")
        self.spec = _as_llama(self.spec).model_copy(update={"other_layer_params": 2 * self.spec.hidden**2})

    def _expected(self, spec: ModelSpec) -> dict[str, tuple[int, ...]]:
        if any(name.startswith("midlayer.") for name in self.places):
            raise BadInput(f"{self.folder}: this is an EAGLE-3 head; give an EAGLE or EAGLE-2 head.")
        shapes = {name.removeprefix("model."): shape for name, shape in expected_shapes(_as_llama(spec)).items()}
        needed = {name: shape for name, shape in shapes.items() if name.startswith(LAYER)}
        optional = {name: shapes[name] for name in ("embed_tokens.weight", INPUT_NORM)} | {"fc.bias": (spec.hidden,)}
        del needed[INPUT_NORM]
        found = {name: shape for name, shape in optional.items() if name in self.places}
        return {"fc.weight": (spec.hidden, 2 * spec.hidden), **needed, **found}

    def _read(self, name: str, index: int | None = None) -> np.ndarray:
        return super()._read(name.removeprefix("model."), index)  # a model's names, but for that


def _as_llama(spec: ModelSpec) -> ModelSpec:
    """A Mixtral's head keeps its target's config, but its layer is dense."""
    return spec.model_copy(update={"architecture": "llama", "n_experts": 1, "n_active": 1})


@dataclass(frozen=True)
class EagleHead:
    """Packed weights: `dense` named as in PackedModel, and fc; fc_bias (hidden,) float32."""

    spec: ModelSpec
    dense: dict[str, np.ndarray]
    expert: np.ndarray
    fc: np.ndarray
    fc_bias: np.ndarray

    def load_dense(self) -> dict[str, np.ndarray]:
        """See Weights."""
        return self.dense


def read_eagle_spec(folder: Path | str) -> ModelSpec:
    """The head's shape as one dense layer; `other_layer_params` are the linear map's."""
    with EagleCheckpoint(folder) as checkpoint:
        return checkpoint.spec


def check_head(folder: Path | str, head: ModelSpec, target: ModelSpec) -> None:
    """BadInput where the head is one of another target."""
    if (head.hidden, head.vocab) != (target.hidden, target.vocab):
        raise BadInput(
            f"{folder}: this head has hidden size {head.hidden} and {head.vocab} tokens, the target {target.hidden} "
            f"and {target.vocab}; give a head trained for {target.name}."
        )


def load_eagle_head(folder: Path | str, target: ModelSpec) -> EagleHead:
    """Read and pack a head. Raises BadInput where it is no EAGLE head, or one of another target."""
    with EagleCheckpoint(folder) as checkpoint:
        spec = checkpoint.spec.run_in(target.precision)
        read = partial(checkpoint.tensor, precision=target.precision)
        check_head(folder, spec, target)
        expert = np.empty(packed_expert_bytes(spec.hidden, spec.intermediate, spec.precision), np.uint8)
        pack_expert(*checkpoint.expert(0, 0, spec.precision), expert)
        attention = f"{LAYER}self_attn."
        dense = {
            f"{LAYER}qkv": pack_weight(np.concatenate([read(f"{attention}{part}_proj.weight") for part in "qkv"])),
            f"{LAYER}o": pack_weight(read(f"{attention}o_proj.weight")),
            f"{LAYER}post_norm": checkpoint.tensor_f32(f"{LAYER}post_attention_layernorm.weight"),
        }
        if INPUT_NORM in checkpoint.places:
            dense[f"{LAYER}input_norm"] = checkpoint.tensor_f32(INPUT_NORM)
        bias = checkpoint.tensor_f32("fc.bias") if "fc.bias" in checkpoint.places else np.zeros(spec.hidden, np.float32)
        return EagleHead(spec, dense, expert, pack_weight(read("fc.weight")), bias)


class EaglePasses(Protocol):
    """A head over live requests, with room for `max_rows` tokens a pass."""

    max_rows: int

    def run(
        self,
        slots: Sequence[int],
        tokens: Sequence[Sequence[int]],
        features: Sequence[np.ndarray],
        kv_tokens: Sequence[int],
    ) -> tuple[np.ndarray, np.ndarray]:
        """The most likely token (n,) after the last of each request's new `tokens`, which follow kv_tokens known ones, and its
        feature (n, hidden); features[i] (n_tokens, hidden) are of the positions before the tokens."""


class HostEagle:
    """On the CPU, over the target's pages."""

    def __init__(self, head: EagleHead, target: Model, kernels: Kernels, pages: PageTable, max_rows: int) -> None:
        # No norm before the output matrix: features are normed already.
        shared = replace(head, dense={"embedding": target.embedding, "lm_head": target.head, **head.dense})
        self._model = Model(shared, kernels, pages.n_pages, pages.pages_per_request * PAGE_TOKENS, max_rows)
        self._stack = self._model.stack([{0: head.expert}])
        self._head, self._kernels, self._pages, self.max_rows = head, kernels, pages, max_rows

    def run(
        self,
        slots: Sequence[int],
        tokens: Sequence[Sequence[int]],
        features: Sequence[np.ndarray],
        kv_tokens: Sequence[int],
    ) -> tuple[np.ndarray, np.ndarray]:
        """See EaglePasses."""
        counts, given = [len(t) for t in tokens], np.concatenate(features)
        model, x = self._model, self._model.work.x[: len(given)]
        joined = np.concatenate([model.embedding[np.concatenate(tokens)], given], axis=1)
        self._kernels.linear(joined, self._head.fc, self._head.spec.hidden, x)
        x += self._head.fc_bias
        model.layers(self._stack, [make_rows(0, counts, kv_tokens, self._pages.table[slots])])
        last = np.cumsum(counts) - 1
        return model.choose(last), to_bf16(x[last]) if given.dtype == np.uint16 else x[last]


class EagleDrafter:
    """Drafts greedily, one pass a token. `target_features` tells those of the target's last pass, so many rows; they are kept in
    pages beside the head's keys and values."""

    def __init__(
        self,
        passes: EaglePasses,
        target_features: Callable[[int], np.ndarray],
        pages: PageTable,
        spec: ModelSpec,
    ) -> None:
        self._passes, self._target_features, self._pages = passes, target_features, pages
        self._features = array_of((pages.n_pages, PAGE_TOKENS, spec.hidden), ACTIVATION[spec.precision])
        # Positions whose keys and values come from the target's features, not from extrapolated ones.
        self._kv_tokens = np.zeros(len(pages.table), np.int64)

    def see(self, sequences: Sequence[TokenSequence], counts: Sequence[int]) -> None:
        """See Drafter."""
        features, first = self._target_features(sum(counts)), 0
        for sequence, n in zip(sequences, counts, strict=True):
            self._features[self._place(sequence, sequence.kv_tokens, n)] = features[first : first + n]
            first += n

    def propose(self, sequences: Sequence[TokenSequence], lengths: Sequence[int], trace: Trace) -> list[Proposal]:
        """See Drafter."""
        drafts: list[list[int]] = [[] for _ in sequences]
        guesses: dict[int, np.ndarray] = {}
        live = [i for i, length in enumerate(lengths) if length]
        # The last true feature is always given again: its output is the first guess.
        position = {i: min(int(self._kv_tokens[sequences[i].slot]), sequences[i].kv_tokens - 1) for i in live}
        self._kv_tokens[[sequences[i].slot for i in live]] = [sequences[i].kv_tokens for i in live]
        step = 0
        while live:
            counts, room = {}, self._passes.max_rows
            for i in live:
                counts[i] = min(max(1, sequences[i].kv_tokens - position[i]), room)
                room -= counts[i]
            members = [i for i in live if counts[i]]
            tokens, features = [], []
            for i in members:
                s, first, n = sequences[i], position[i], counts[i]
                tokens.append([*s.tokens, *drafts[i]][first + 1 : first + 1 + n])
                features.append(guesses[i] if i in guesses else self._features[self._place(s, first, n)])
            requests = tuple(RequestTokens(counts[i], position[i]) for i in members)
            with trace.run(trace.builder.draft(step, requests)):
                slots = [sequences[i].slot for i in members]
                chosen, states = self._passes.run(slots, tokens, features, [position[i] for i in members])
            for i, token, state in zip(members, chosen, states, strict=True):
                position[i] += counts[i]
                if position[i] >= sequences[i].kv_tokens:
                    drafts[i].append(int(token))
                    guesses[i] = state[None]
            live = [i for i in live if len(drafts[i]) < lengths[i]]
            step += 1
        return [Proposal(tokens) for tokens in drafts]

    def _place(self, sequence: TokenSequence, first: int, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Page and offset of positions first .. first + n."""
        position = np.arange(first, first + n)
        return self._pages.table[sequence.slot, position // PAGE_TOKENS], position % PAGE_TOKENS

    def roll_back(self, sequence: TokenSequence) -> None:
        """See Drafter."""
        self._kv_tokens[sequence.slot] = min(self._kv_tokens[sequence.slot], sequence.kv_tokens)

    def forget(self, sequence: TokenSequence) -> None:
        """See Drafter."""
        self._kv_tokens[sequence.slot] = 0
