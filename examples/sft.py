"""SMART in TRL's SFTTrainer: a language model that learns to answer.

    python examples/sft.py    # seconds on a CPU

Nothing is downloaded: a tiny Llama with random weights, a tokenizer of thirty words, and a made-up task (say the words
of the question in reverse). `SMARTMixin` goes in front of a trainer, here SFTTrainer, whose head is fused with its
loss: there are no whole logits, in SMART's passes neither. The regularizer is logged as ``smart_loss``.
"""

from __future__ import annotations

import random

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed
from trl import SFTConfig, SFTTrainer

from smart_fast.integrations.transformers import SMARTMixin

WORDS, LENGTH = 10, 2


class SMARTSFTTrainer(SMARTMixin, SFTTrainer):
    """All of SFTTrainer's arguments, and SMART's."""


def tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<unk>", "</s>", "->", *(f"w{i}" for i in range(WORDS))]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", unk_token="<unk>", eos_token="</s>")


def draw(rows: int) -> Dataset:
    """Questions and answers: only the words of the answer have a loss, SMART's as well."""
    words = [[f"w{random.randrange(WORDS)}" for _ in range(LENGTH)] for _ in range(rows)]
    return Dataset.from_dict(
        {
            "prompt": [f"{' '.join(each)} ->" for each in words],
            "completion": [f" {' '.join(each[::-1])}" for each in words],
        }
    )


def accuracy(model: LlamaForCausalLM, words: PreTrainedTokenizerFast, data: Dataset) -> float:
    """Of whole answers."""
    model.eval()
    given = words(list(data["prompt"]), return_tensors="pt")
    with torch.no_grad():
        found = model.generate(
            input_ids=given.input_ids, attention_mask=given.attention_mask, max_new_tokens=LENGTH, do_sample=False
        )
    answers = words.batch_decode(found[:, -LENGTH:])
    return sum(a == b.strip() for a, b in zip(answers, data["completion"], strict=True)) / len(answers)


def main() -> None:
    set_seed(0)
    random.seed(0)
    words = tokenizer()
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        intermediate_size=64, pad_token_id=words.pad_token_id, eos_token_id=words.eos_token_id, bos_token_id=None,
    )  # fmt: skip
    args = SFTConfig(
        "out", per_device_train_batch_size=32, max_steps=100, learning_rate=1e-2, logging_steps=20, bf16=False,
        gradient_checkpointing=False, save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    trainer = SMARTSFTTrainer(
        LlamaForCausalLM(config), args, train_dataset=draw(1600), processing_class=words,
        smart_recipe="recommended", smart_weight=1.0,
    )  # fmt: skip
    trainer.train()
    print(f"accuracy {accuracy(trainer.model, words, draw(100)):.3f}")


if __name__ == "__main__":
    main()
