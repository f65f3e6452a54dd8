"""Models of two embedded sequences, through `SMARTSeq2SeqTrainer` and by hand on the same noise."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers", minversion="5")
pytest.importorskip("accelerate")

import transformers
from transformers import DataCollatorForSeq2Seq, Seq2SeqTrainingArguments

from smart_fast import SMARTLoss, kl_loss, sym_kl_loss
from smart_fast.integrations.arguments import NORMS
from smart_fast.integrations.transformers import SMARTSeq2SeqTrainer, SMARTTrainer
from tests.helpers import exhaustively
from tests.test_integrations import SEED, arguments, assert_close, logged, train

ROWS, LENGTH, WORDS, WIDTH, PAD, END = 4, 8, 40, 16, 1, 2
IDS = {"vocab_size": WORDS, "pad_token_id": PAD, "eos_token_id": END, "decoder_start_token_id": END}


def bart(name: str, **settings: Any) -> nn.Module:
    sizes = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 1), ("ffn_dim", 16))}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "dropout": 0.0}
    config = transformers.BartConfig(**IDS, **sizes, **heads, d_model=WIDTH, max_position_embeddings=32, **settings)
    return getattr(transformers, name)(config)


def t5(name: str, **settings: Any) -> nn.Module:
    sizes = {"d_model": WIDTH, "d_ff": 16, "d_kv": 8, "num_layers": 1, "num_heads": 2, "dropout_rate": 0.0}
    return getattr(transformers, name)(transformers.T5Config(**IDS, **sizes, **settings))


def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, WORDS, (ROWS, LENGTH), generator=generator)
    mask = (torch.arange(LENGTH) < torch.tensor([LENGTH, 5, 3, 6])[:, None]).long()
    ids = ids.masked_fill(mask == 0, PAD)
    labels = torch.randint(3, WORDS, (ROWS, 6), generator=generator)
    labels = labels.masked_fill(torch.arange(6) >= torch.tensor([6, 2, 4, 5])[:, None], -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


MODELS = {"bart": bart, "t5": t5}


def by_hand(
    model: nn.Module, inputs: dict[str, Tensor], which: str, norm: str = "token"
) -> tuple[float, dict[str, Tensor]]:
    """The regularizer and the gradients of one step, from embeddings that are passed to the model."""
    labels, mask = inputs["labels"], inputs["attention_mask"]
    shifted = torch.cat([torch.full((ROWS, 1), END), labels[:, :-1].masked_fill(labels[:, :-1] == -100, PAD)], 1)
    known, real = labels != -100, torch.cat([torch.ones(ROWS, 1, dtype=torch.bool), labels[:, :-1] != -100], 1)
    words = model.get_input_embeddings()
    clean = {"encoder": words(inputs["input_ids"]), "decoder": words(shifted)}
    masks = {"encoder": mask.bool(), "decoder": real}
    chosen = [side for side in clean if which in (side, "both")]

    def logits_of(*embeds: Tensor) -> Tensor:
        now = {**clean, **dict(zip(chosen, embeds, strict=True))}
        encoder, decoder = now["encoder"], now["decoder"]
        return model(inputs_embeds=encoder, attention_mask=mask, decoder_inputs_embeds=decoder).logits[known]

    torch.manual_seed(SEED)
    smart = SMARTLoss(
        logits_of, lambda x, t: kl_loss(x, t, "sum"), lambda x, t: sym_kl_loss(x, t, "sum"), step_size=0.1,
        noise_var=0.01, update="paper", epsilon=0.05, norm_fn=NORMS[norm], backend="torch",
    )  # fmt: skip
    embeds = tuple(clean[side] for side in chosen)
    state = logits_of(*embeds)
    smoothness = smart(embeds, state, mask=tuple(masks[side] for side in chosen)) / known.sum()
    (nn.functional.cross_entropy(state, labels[known]) + 3.0 * smoothness).backward()
    gradients = {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}
    model.zero_grad()
    return smoothness.item(), gradients


SETTINGS = {"smart_weight": 3.0, "smart_step_size": 0.1, "smart_noise_var": 0.01, "smart_backend": "torch"}


@pytest.mark.parametrize(
    ("kind", "which", "norm"),  # a ball of the sentence holds the noise at padding, which causal models do not see
    [("bart", "both", "sentence-l2"), ("t5", "both", "token"), ("t5", "decoder", "sentence-l2"),
     *exhaustively(("bart", "encoder", "token"), ("t5", "encoder", "token"))],
)  # fmt: skip
def test_both_embeddings_are_perturbed(kind: str, which: str, norm: str, tmp_path: Path) -> None:
    name = {"bart": "BartForConditionalGeneration", "t5": "T5ForConditionalGeneration"}[kind]
    model, inputs = MODELS[kind](name).train(), batch()
    smoothness, expected = by_hand(model, inputs, which, norm)
    args = arguments(tmp_path, Seq2SeqTrainingArguments)
    settings = {
        **SETTINGS,
        "smart_norm": norm,
        "smart_update": "paper",
        "smart_epsilon": 0.05,
        **({} if which == "both" else {"smart_embeddings": which}),
    }
    trainer, gradients = train(model, args, inputs, SMARTSeq2SeqTrainer, **settings)
    assert logged(trainer, "smart_loss") == pytest.approx([smoothness], rel=1e-4)
    assert_close(gradients, expected)


def test_a_collator_that_shifts_and_label_smoothing(tmp_path: Path) -> None:
    """Both take other ways to the decoder's inputs: among the inputs of the batch, or without labels in the call."""

    class Padding:  # what the collator asks of a tokenizer
        padding_side, pad_token_id, deprecation_warnings = "right", PAD, {}

        def pad(self, features: Any, **kwargs: Any) -> dict[str, Tensor]:
            return {name: torch.stack([each[name] for each in features]) for name in features[0] if name != "labels"}

    model, inputs = bart("BartForConditionalGeneration"), batch()
    args = arguments(tmp_path, Seq2SeqTrainingArguments)
    plain, _ = train(copy.deepcopy(model), args, inputs, SMARTSeq2SeqTrainer, **SETTINGS)
    collator = DataCollatorForSeq2Seq(Padding(), model, padding=False)
    args = arguments(tmp_path, Seq2SeqTrainingArguments, label_smoothing_factor=0.1)
    smoothed, _ = train(copy.deepcopy(model), args, inputs, SMARTSeq2SeqTrainer, **SETTINGS, data_collator=collator)
    assert logged(smoothed, "smart_loss") == pytest.approx(logged(plain, "smart_loss"), rel=1e-5)


@pytest.mark.parametrize("kind", ["bart", *exhaustively("t5")])
def test_sequence_classification(kind: str, tmp_path: Path) -> None:
    name = {"bart": "BartForSequenceClassification", "t5": "T5ForSequenceClassification"}[kind]
    model, inputs = MODELS[kind](name, num_labels=3), batch()
    ends = inputs["attention_mask"].sum(1) - 1
    inputs["input_ids"][torch.arange(ROWS), ends] = END
    inputs["labels"] = torch.tensor([0, 1, 2, 0])
    found = {
        which: logged(train(copy.deepcopy(model), arguments(tmp_path), inputs, **settings)[0], "smart_loss")[0]
        for which in ("encoder", "decoder", "both")
        for settings in [{**SETTINGS, "smart_embeddings": which}]
    }
    assert all(value > 0 for value in found.values())
    assert len(set(found.values())) == 3


def test_a_model_that_does_not_call_its_input_embeddings(tmp_path: Path) -> None:
    """T5ForTokenClassification has `shared`, and calls the encoder's own module of the same weight."""
    model, inputs = t5("T5ForTokenClassification", num_labels=3), batch()
    inputs["labels"] = (inputs["input_ids"] % 3).masked_fill(inputs["attention_mask"] == 0, -100)
    assert model.get_input_embeddings() is not model.transformer.encoder.embed_tokens
    trainer, _ = train(model, arguments(tmp_path), inputs)
    assert logged(trainer, "smart_loss")[0] > 0


def test_sides_that_a_model_does_not_have(tmp_path: Path) -> None:
    model = t5("T5EncoderModel")
    with pytest.raises(ValueError, match="smart_embeddings='decoder' is for encoder-decoder models, which T5EncoderM"):
        SMARTTrainer(model, arguments(tmp_path), smart_embeddings="decoder")
