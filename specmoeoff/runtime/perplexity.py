"""What experts in fewer bits cost: the perplexity of a text with them, beside that with the checkpoint's rounded to bf16."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np

from specmoeoff.demo import prompts_path
from specmoeoff.errors import BadInput
from specmoeoff.files import read_text, sha256_text
from specmoeoff.precision import ExpertFormat
from specmoeoff.runtime.batch_files import read_batch
from specmoeoff.runtime.engine import Engine
from specmoeoff.runtime.observe import observing_experts, observing_residents
from specmoeoff.runtime.pack import PackedModel, Progress, pack_model
from specmoeoff.runtime.tokenizer import Tokenizer
from specmoeoff.specs.base import FileSpec
from specmoeoff.specs.plan import PlanDecode, PlanThreads

MOST_TOKENS, CONTEXT_TOKENS, CHUNK_TOKENS = 4096, 1024, 128


class Perplexities(FileSpec):
    """By format of the experts, of the same tokens, the first of every context left out."""

    what: ClassVar[str] = "perplexities"
    text_sha256: str
    n_tokens: int
    by_format: dict[ExpertFormat, float]

    @property
    def sentence(self) -> str:
        """For people."""
        bf16 = self.by_format["bf16"]
        found = [f"perplexity {bf16:.3f} with experts in bf16"]
        found += [f"{p:.3f} in {f} ({p / bf16 - 1:+.2%})" for f, p in self.by_format.items() if f != "bf16"]
        return f"{', '.join(found)}, over {self.n_tokens:,} tokens"


def text_of(path: Path | None) -> str:
    """A file's text; None: the demo's prompts."""
    if path:
        return read_text(path, "text")
    bodies = [line.body for line in read_batch(prompts_path())]
    return "\n\n".join(body.prompt or "\n".join(str(m.content) for m in body.messages or ()) for body in bodies)


def perplexity(
    packed: PackedModel, tokens: Sequence[int], n_threads: int, progress: Callable[[int, int], None] = lambda *_: None
) -> tuple[float, int]:
    """exp of the mean negative log-likelihood, natural, in contexts of at most CONTEXT_TOKENS that begin anew, and of how many
    tokens that is the mean."""
    context = min(CONTEXT_TOKENS, packed.spec.max_positions)
    parts = [tokens[first : first + context] for first in range(0, len(tokens) - 1, context)]
    decode = PlanDecode(
        drafter="none",
        draft_length=0,
        batch=1,
        micro_batches=1,
        context_tokens=context,
        prefill_chunk_tokens=CHUNK_TOKENS,
    )
    experts = observing_experts(packed.spec, observing_residents(packed))
    threads = PlanThreads(compute=n_threads, disk_readers=2, disk_chunk_bytes=1 << 20)
    scores = []
    with Engine(packed, None, decode, experts, threads) as engine:
        for i, part in enumerate(parts):
            progress(i, len(parts))
            scores.append(engine.score(part))
    found = np.concatenate(scores)
    return float(np.exp(-found.mean())), len(found)


def compare(
    packed: PackedModel, folder: Path, tokenizer: Tokenizer, text: str, n_threads: int, progress: Progress
) -> Perplexities:
    """Of a packed model and of the same with experts in bf16, which is packed too if need be."""
    spec, tokens = packed.spec, tokenizer.encode(text)[:MOST_TOKENS]
    if len(tokens) < 2:
        raise BadInput("the text has fewer than two tokens, which have no perplexity; give a longer one.")
    if max(tokens) >= spec.vocab:
        raise BadInput(
            f"{folder}: tokenizer.json knows token {max(tokens)}, the model has {spec.vocab}; download it again."
        )
    of_format = {"bf16": pack_model(folder, progress, experts="bf16"), spec.expert_format: packed}
    found = {
        name: perplexity(one, tokens, n_threads, partial(progress, f"perplexity in {name}"))
        for name, one in of_format.items()
    }
    return Perplexities(
        text_sha256=sha256_text(text),
        n_tokens=found["bf16"][1],
        by_format={name: value for name, (value, _) in found.items()},
    )
