"""SMART on a causal language model: the divergence of every token's logits, computed in three ways.

    python examples/causal_lm.py                                   # a tiny model, seconds on a CPU
    python examples/causal_lm.py --preset qwen2.5-0.5b --device cuda --dtype bfloat16

The model has the shape of a Qwen2 and random weights: nothing is downloaded. Each line is one way to regularize it:

    linear   no logits: `eval_fn` gives hidden states, and the loss projects them chunk by chunk
    fused    the fused kernels on whole logits
    plain    smart-pytorch's operations on whole logits

All three compute the symmetric KL divergence, the regularizer of the SMART paper. (The cross-entropy of the task makes
one set of logits of its own each time.)
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from smart_fast import LinearDivergence, SMARTLoss, sym_kl_loss

PRESETS = {
    "tiny": Qwen2Config(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=128,
        vocab_size=8000, tie_word_embeddings=True,
    ),
    "qwen2.5-0.5b": Qwen2Config(
        hidden_size=896, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2, intermediate_size=4864,
        vocab_size=151936, tie_word_embeddings=True,
    ),
}  # fmt: skip


WAYS = ("linear", "fused", "plain")


class Regularized(nn.Module):
    """Cross-entropy of the next token plus the SMART regularizer, in one of the three ways."""

    def __init__(self, model: Qwen2ForCausalLM, way: str, weight: float, backend: str) -> None:
        super().__init__()
        self.model, self.way, self.weight = model, way, weight
        # Half the size of a word embedding (standard deviation 0.02).
        settings = {
            "update": "sift",
            "step_size": 1e-2,
            "noise_var": 1e-3,
            "backend": "torch" if way == "plain" else backend,
        }
        if way == "linear":
            loss_fn: Callable[..., Tensor] = LinearDivergence(
                model.lm_head.weight, kind="sym_kl", reduction="batchmean"
            )
            self.smart = SMARTLoss(self.hidden_states, loss_fn, **settings)
        else:
            self.smart = SMARTLoss(self.logits, lambda x, t: sym_kl_loss(x, t, "batchmean"), **settings)

    def hidden_states(self, embed: Tensor, attention_mask: Tensor) -> Tensor:
        states: Tensor = self.model.model(
            inputs_embeds=embed, attention_mask=attention_mask, use_cache=False
        ).last_hidden_state
        return states

    def logits(self, embed: Tensor, attention_mask: Tensor) -> Tensor:
        logits: Tensor = self.model.lm_head(self.hidden_states(embed, attention_mask))
        return logits

    def forward(self, tokens: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        embed = self.model.get_input_embeddings()(tokens)
        hidden = self.hidden_states(embed, attention_mask)
        logits = self.model.lm_head(hidden)
        task = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())
        state = hidden if self.way == "linear" else logits
        smoothness = self.smart(embed, state, attention_mask, mask=attention_mask.bool())
        return task + self.weight * smoothness / tokens.shape[1], smoothness


def peak_bytes(device: torch.device) -> int:
    """Of the GPU; on a CPU that of the process, which only grows: hence the ways are run in the order of appetite."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure(way: str, options: argparse.Namespace) -> None:
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(PRESETS[options.preset]).to(device, dtype)
    training = Regularized(model, way, options.weight, options.backend)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    tokens = torch.randint(model.config.vocab_size, (options.batch, options.length), device=device)
    attention_mask = torch.ones_like(tokens)
    attention_mask[0, options.length // 2 :] = 0  # a sequence that was padded

    before, seconds = peak_bytes(device), []
    for _ in range(options.steps + 1):  # the first is a warm-up
        start = time.perf_counter()
        loss, smoothness = training(tokens, attention_mask)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        result = f"loss {loss.item():.4f}, regularizer {smoothness.item():.3e}"  # waits for the device
        seconds.append(time.perf_counter() - start)
    peak = peak_bytes(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    print(
        f"{way:7} {min(seconds[1:]) * 1e3:9.1f} ms a step, peak {peak / 2**20:8.0f} MiB "
        f"(+{(peak - before) / 2**20:.0f}), {result}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="tiny")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--backend", default="auto", help="of smart-fast, for the ways fused and linear")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=128, help="tokens a sequence")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--weight", type=float, default=1.0, help="of the regularizer")
    options = parser.parse_args()
    print(
        f"{options.preset}, {options.batch} x {options.length} tokens, vocabulary "
        f"{PRESETS[options.preset].vocab_size}, {options.dtype} on {options.device}"
    )
    for way in options.ways:
        measure(way, options)


if __name__ == "__main__":
    main()
