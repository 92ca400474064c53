"""Trains an EAGLE head for a target from the target's own generations: `python tools/train_eagle.py demo -o HEAD`.

The runtime generates and its last states are the features; torch on the CPU trains one layer as Li et al. 2024
(arXiv 2401.15077, section 4.2) do: smooth L1 between features, and cross entropy between the distributions they stand for.
The head is written as the published ones are. Needs the `dev` extra.
"""

import argparse
import ast
import json
import math
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import save_file
from torch.nn import functional

from specmoeoff.runtime.batch_files import read_batch, to_request
from specmoeoff.runtime.checkpoint import Checkpoint, from_bf16
from specmoeoff.runtime.drafters.none import NoDrafter
from specmoeoff.runtime.engine import Engine
from specmoeoff.runtime.loading import model_folder
from specmoeoff.runtime.model import Model, rope_tables
from specmoeoff.runtime.observe import observing_residents
from specmoeoff.runtime.pack import PackedModel, pack_model
from specmoeoff.runtime.sequence import Request
from specmoeoff.runtime.sequence import Sequence as TokenSequence
from specmoeoff.runtime.tokenizer import Tokenizer
from specmoeoff.specs.model import ModelSpec
from specmoeoff.specs.plan import PlanDecode, PlanExperts, PlanThreads

QUESTIONS = (
    "What is {}?",
    "Explain {} in simple words.",
    "Write a short story about {}.",
    "How does {} work?",
    "List five facts about {}.",
    "Write a short email about {}.",
    "What are the advantages and disadvantages of {}?",
    "Give me some advice on {}.",
)


class Text(NamedTuple):
    """tokens, of which the first n_prompt were given; features (len(tokens) - 1, hidden) bf16 of all but the last."""

    tokens: list[int]
    n_prompt: int
    features: np.ndarray


# --- generations ---------------------------------------------------------------------------------------------------------


def own_prompts(tokenizer: Tokenizer, spec: ModelSpec, n: int, seed: int) -> list[list[int]]:
    """Where no prompts are given: functions of Python's library to complete, and questions about the tokenizer's words."""
    draw = random.Random(seed)
    functions = []
    for path in sorted(Path(json.__file__).parents[1].glob("*.py")):
        source = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) and node.col_offset == 0:
                head = source.splitlines()[node.lineno - 1 : node.body[0].end_lineno]
                functions.append("\n".join(["Complete this Python function:\n", *head]))
    questions = []
    while len(questions) < n // 2:
        word = tokenizer.decode([draw.randrange(spec.vocab)])
        if word.startswith(" ") and word[1:].isalpha() and len(word) > 5:
            questions.append(draw.choice(QUESTIONS).format(word[1:]))
    chosen = [*questions, *draw.sample(functions, min(n - len(questions), len(functions)))]
    draw.shuffle(chosen)
    return [tokenizer.encode_chat([{"role": "user", "content": text}])[:256] for text in chosen]


class Recorder(NoDrafter):
    """Drafts nothing and keeps every request's features."""

    def __init__(self, target: Model) -> None:
        self._target = target
        self.features: dict[str, list[np.ndarray]] = {}

    def see(self, sequences: Sequence[TokenSequence], counts: Sequence[int]) -> None:
        """See Drafter."""
        features, first = self._target.features(sum(counts)), 0
        for sequence, n in zip(sequences, counts, strict=True):
            self.features.setdefault(sequence.request.request_id, []).append(features[first : first + n].copy())
            first += n


def generate(target: PackedModel, requests: Sequence[Request], n_threads: int, seconds: float) -> list[Text]:
    """Plain greedy decoding of as many requests as the time allows."""
    spec, n = target.spec, observing_residents(target)
    held = [(layer, e) for e in range(spec.n_experts) for layer in range(spec.n_layers)][:n]
    experts = PlanExperts(
        resident=tuple(tuple(e for layer, e in held if layer == at) for at in range(spec.n_layers)),
        prefetch=((),) * spec.n_layers,
        stream_slots=0 if n == spec.n_all_experts else max(2 * spec.n_active, 8),
    )
    decode = PlanDecode(
        drafter="none",
        draft_length=0,
        batch=32,
        micro_batches=1,
        context_tokens=max(len(r.prompt) + r.max_tokens for r in requests),
        prefill_chunk_tokens=256,
    )
    threads = PlanThreads(compute=n_threads, disk_readers=2, disk_chunk_bytes=1 << 20)
    end = time.monotonic() + seconds
    with Engine(target, None, decode, experts, threads) as engine:
        engine.drafters["none"] = recorder = Recorder(engine.model)
        engine.configure(decode, experts)
        engine.submit(requests)
        while engine.busy and time.monotonic() < end:
            engine.step()
        texts = []
        for s in (*engine.finished, *(s for s in engine.live if s.n_output > 1)):
            features = np.concatenate(recorder.features[s.request.request_id])[: len(s.tokens) - 1]
            texts.append(Text(s.tokens[: len(features) + 1], len(s.request.prompt), features))
    return texts


# --- the head ------------------------------------------------------------------------------------------------------------


class Head(torch.nn.Module):
    """EAGLE-1's layer under its published names, in float32."""

    def __init__(self, spec: ModelSpec, embedding: torch.Tensor, n_positions: int) -> None:
        super().__init__()
        self.spec, hidden, q, kv = spec, spec.hidden, spec.n_heads * spec.head_dim, spec.n_kv_heads * spec.head_dim
        linear = {
            "fc": (hidden, 2 * hidden),
            "layers.0.self_attn.q_proj": (q, hidden),
            "layers.0.self_attn.k_proj": (kv, hidden),
            "layers.0.self_attn.v_proj": (kv, hidden),
            "layers.0.self_attn.o_proj": (hidden, q),
            "layers.0.mlp.gate_proj": (spec.intermediate, hidden),
            "layers.0.mlp.up_proj": (spec.intermediate, hidden),
            "layers.0.mlp.down_proj": (hidden, spec.intermediate),
        }
        self.weights = {n: torch.nn.Parameter(torch.randn(s) / math.sqrt(s[1])) for n, s in linear.items()}
        self.weights["layers.0.post_attention_layernorm"] = torch.nn.Parameter(torch.ones(hidden))
        # Begins as the identity on features, corrected by the embedding: learns in minutes what takes hours from noise.
        with torch.no_grad():
            self.weights["fc"][:, hidden:] = torch.eye(hidden)
            self.weights["fc"][:, :hidden] *= 3
            self.weights["layers.0.self_attn.o_proj"].zero_()
            self.weights["layers.0.mlp.down_proj"].zero_()
        for name, weight in self.weights.items():
            self.register_parameter(name.replace(".", "/"), weight)
        self.embedding = embedding
        self.rope = [torch.from_numpy(t).repeat(1, 2) for t in rope_tables(spec, n_positions)]

    def forward(self, tokens: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """tokens (B, T), each the one after its feature (B, T, hidden) -> the features that follow."""
        spec, n = self.spec, tokens.shape[1]

        def linear(name: str, x: torch.Tensor) -> torch.Tensor:
            return functional.linear(x, self.weights[f"layers.0.{name}_proj"])

        def heads(name: str, rotate: bool) -> torch.Tensor:
            y = linear(f"self_attn.{name}", x).unflatten(-1, (-1, spec.head_dim)).transpose(1, 2)
            low, high = y.chunk(2, dim=-1)
            return y * self.rope[0][:n] + torch.cat([-high, low], dim=-1) * self.rope[1][:n] if rotate else y

        x = functional.linear(torch.cat([self.embedding[tokens], features], dim=-1), self.weights["fc"])
        seen = functional.scaled_dot_product_attention(
            heads("q", True), heads("k", True), heads("v", False), is_causal=True, enable_gqa=True
        )
        x = x + linear("self_attn.o", seen.transpose(1, 2).flatten(2))
        norm = self.weights["layers.0.post_attention_layernorm"]
        y = functional.rms_norm(x.float(), (spec.hidden,), norm, spec.rms_eps)
        return x + linear("mlp.down", functional.silu(linear("mlp.gate", y)) * linear("mlp.up", y))


def tensors(checkpoint: Checkpoint) -> tuple[torch.Tensor, torch.Tensor]:
    """Embedding and output matrix, (vocab, hidden) float32 each."""
    embedding = torch.from_numpy(checkpoint.tensor_f32("model.embed_tokens.weight"))
    tied = checkpoint.spec.tie_embeddings
    return embedding, embedding if tied else torch.from_numpy(checkpoint.tensor_f32("lm_head.weight"))


def train(
    spec: ModelSpec,
    embedding: torch.Tensor,
    output: torch.Tensor,
    texts: list[Text],
    seconds: float,
    args: argparse.Namespace,
) -> Head:
    """AdamW on groups of texts of similar length until the time is over; tells loss and agreement of the named tokens."""
    head = Head(spec, embedding, max(len(t.tokens) for t in texts))
    # Over the tokens that occur: the whole output matrix would take most of the time.
    vocabulary = torch.tensor(sorted({token for text in texts for token in text.tokens}))
    output = output[vocabulary]
    noise = args.noise * float(np.std(from_bf16(np.concatenate([t.features for t in texts[:50]]))))
    texts = sorted(texts, key=lambda t: len(t.tokens))
    groups = [texts[i : i + args.group] for i in range(0, len(texts), args.group)]
    draw = random.Random(args.seed)
    optimizer = torch.optim.AdamW(head.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=args.decay)
    begun, epoch = time.monotonic(), 0
    while (done := (time.monotonic() - begun) / seconds) < 1:
        draw.shuffle(groups)
        told = np.zeros(3)
        for group in groups:
            done = min(1.0, (time.monotonic() - begun) / seconds)
            optimizer.param_groups[0]["lr"] = args.lr * min(1.0, 50 * done + 0.02) * (0.02 + 0.98 * (1 - done))
            with torch.autocast("cpu", dtype=torch.bfloat16):
                losses = step(head, output, group, noise, args.ce)
            optimizer.zero_grad()
            losses[0].backward()
            torch.nn.utils.clip_grad_norm_(head.parameters(), 0.5)
            optimizer.step()
            told += [x.item() for x in losses]
        epoch += 1
        loss, l1, agreed = told / len(groups)
        print(f"epoch {epoch}: loss {loss:.4f}, smooth L1 {l1:.4f}, same token {agreed:.3f}", flush=True)
    return head


def step(
    head: Head, output: torch.Tensor, group: list[Text], noise: float, ce: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss, its smooth L1 part, and the share of equal tokens, over what the target generated."""
    n = max(len(t.tokens) for t in group) - 2
    tokens, features = torch.zeros(len(group), n, dtype=torch.long), torch.zeros(len(group), n + 1, head.spec.hidden)
    mask = torch.zeros(len(group), n, dtype=torch.bool)
    for i, text in enumerate(group):
        length = len(text.tokens) - 2
        tokens[i, :length] = torch.tensor(text.tokens[1:-1])
        features[i, : length + 1] = torch.from_numpy(from_bf16(text.features))
        mask[i, max(0, text.n_prompt - 2) : length] = True
    noisy = features[:, :-1] + noise * (torch.rand_like(features[:, :-1]) - 0.5)
    found, wanted = head(tokens, noisy)[mask], features[:, 1:][mask]
    l1 = functional.smooth_l1_loss(found, wanted)
    logits, right = found @ output.T, wanted @ output.T
    cross = functional.cross_entropy(logits, right.softmax(dim=-1))
    agreed = (logits.argmax(dim=-1) == right.argmax(dim=-1)).float().mean()
    return l1 + ce * cross, l1, agreed


def save(head: Head, target: Path, folder: Path) -> None:
    """config.json and model.safetensors (bf16), the target's embedding included as EAGLE-1's heads have it."""
    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads((target / "config.json").read_text())
    dropped = ("num_local_experts", "num_experts_per_tok", "output_router_logits", "router_aux_loss_coef")
    config = {name: value for name, value in config.items() if name not in dropped}
    config |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 1}
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    weights = {f"{name}.weight": w.detach().bfloat16() for name, w in head.weights.items()}
    save_file({**weights, "embed_tokens.weight": head.embedding.bfloat16()}, folder / "model.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a checkpoint folder or `demo`")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the head's folder")
    parser.add_argument(
        "--prompts", type=Path, help="batch-file lines; default: made from Python's library and the tokenizer"
    )
    parser.add_argument("--n-prompts", type=int, default=2000)
    parser.add_argument("--output-tokens", type=int, default=96)
    parser.add_argument("--minutes", type=float, nargs=2, default=(7.0, 5.0), metavar=("GENERATE", "TRAIN"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--group", type=int, default=8, help="texts a step")
    parser.add_argument(
        "--noise", type=float, default=1.0, help="uniform, its width in standard deviations of a feature"
    )
    parser.add_argument("--ce", type=float, default=0.1, help="weight of the cross entropy")
    parser.add_argument("--decay", type=float, default=0.05, help="AdamW's weight decay")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    folder = model_folder(args.model)
    target, tokenizer = pack_model(folder), Tokenizer(folder)
    if args.prompts:
        lines = read_batch(args.prompts)
        requests = [to_request(line, tokenizer, target.spec, max_tokens=args.output_tokens) for line in lines]
    else:
        prompts = own_prompts(tokenizer, target.spec, args.n_prompts, args.seed)
        stops = target.spec.eos_token_ids
        requests = [Request(str(i), tuple(p), args.output_tokens, stops) for i, p in enumerate(prompts)]
    texts = generate(target, requests, args.threads, 60 * args.minutes[0])
    print(f"{len(texts)} texts, {sum(len(t.tokens) - t.n_prompt for t in texts):,} tokens generated", flush=True)
    with Checkpoint(folder) as checkpoint:
        embedding, output = tensors(checkpoint)
    save(train(target.spec, embedding, output, texts, 60 * args.minutes[1], args), folder, args.output)


if __name__ == "__main__":
    main()
