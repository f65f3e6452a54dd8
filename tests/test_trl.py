"""SMART in TRL's SFTTrainer, whose head is fused with the loss, and in other trainers by the mixin."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no telemetry of TRL
pytest.importorskip("trl", minversion="1")

import transformers
import trl
from datasets import Dataset, disable_progress_bars
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

from bench.measure import peak_memory
from smart_fast import SMARTLoss, kl_loss, sym_kl_loss
from smart_fast.integrations.transformers import SMARTMixin, SMARTTrainer
from tests.helpers import exhaustively
from tests.test_integrations import HEADS, Watch, arguments, assert_close, batch, logged, train

disable_progress_bars()

WORDS, SEED = 40, 7
CHAT = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}a {% generation %}{{ m['content'] }} </s>"
    "{% endgeneration %}{% else %}u {{ m['content'] }} {% endif %}{% endfor %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<unk>", "</s>", "a", "u", *(f"w{i}" for i in range(WORDS - 5))]
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>", eos_token="</s>")
    made.chat_template = CHAT
    return made


def llama(vocabulary: int = WORDS, width: int = 16, **settings: Any) -> nn.Module:
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 32}
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=vocabulary, hidden_size=width, pad_token_id=0, **{**sizes, **settings})
    )


TEXT = Dataset.from_dict({"text": [" ".join(f"w{(7 * i + j) % 30}" for j in range(4 + i % 5)) for i in range(8)]})
TALK = Dataset.from_dict(
    {"messages": [[{"role": "user", "content": f"w{i} w{i + 1}"}, {"role": "assistant", "content": f"w{i + 2} w{i}"}]
                  for i in range(8)]}
)  # fmt: skip
PAIRS = Dataset.from_dict({"chosen": [f"w{i} w1 w2" for i in range(8)], "rejected": [f"w{i} w3" for i in range(8)]})


class SMARTSFTTrainer(SMARTMixin, trl.SFTTrainer):
    pass


class Mine(SMARTTrainer, trl.SFTTrainer):
    """In the way that `SMARTTrainer` combines with others."""


def whole_logits(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    return F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


def sft(
    tmp_path: Path, model: nn.Module, trainer_class: Any = SMARTSFTTrainer, data: Dataset = TEXT, **settings: Any
) -> tuple[Any, dict[str, Tensor]]:
    smart = {name: settings.pop(name) for name in list(settings) if name.startswith("smart_")}
    given = {name: settings.pop(name) for name in ("compute_loss_func",) if name in settings}
    args = arguments(tmp_path, trl.SFTConfig, gradient_checkpointing=False, bf16=False, **settings)
    watch = Watch()
    trainer = trainer_class(
        model, args, train_dataset=data, processing_class=tokenizer(), callbacks=[watch], **smart, **given
    )
    trainer.train()
    return trainer, watch.gradients


SETTINGS = {"smart_weight": 3.0, "smart_step_size": 0.1, "smart_noise_var": 0.01, "smart_backend": "torch"}


def test_the_fused_head_gives_what_whole_logits_give(tmp_path: Path) -> None:
    """Loss, regularizer and gradients; and the regularizer is that of `SMARTLoss` by hand."""
    model, seen = llama(), []
    grab = model.get_input_embeddings().register_forward_hook(lambda _, args, output: seen.append(args[0]))
    fused, gradients = sft(tmp_path, copy.deepcopy(model), **SETTINGS)
    whole, expected = sft(tmp_path, model, compute_loss_func=whole_logits, **SETTINGS)
    grab.remove()
    assert logged(fused, "smart_loss") == pytest.approx(logged(whole, "smart_loss"), rel=1e-5)
    assert logged(fused, "loss") == pytest.approx(logged(whole, "loss"), rel=1e-5)
    assert_close(gradients, expected)

    again = llama()
    again.load_state_dict(_before(fused, gradients))
    ids = seen[0]
    mask = ids != 0
    known = mask[:, 1:]

    def logits_of(embed: Tensor) -> Tensor:
        return again(inputs_embeds=embed, attention_mask=mask.long()).logits[:, :-1][known]

    torch.manual_seed(SEED)
    embed = again.get_input_embeddings()(ids)
    smart = SMARTLoss(
        logits_of, lambda x, t: kl_loss(x, t, "sum"), lambda x, t: sym_kl_loss(x, t, "sum"), step_size=0.1,
        noise_var=0.01, update="sift", backend="torch",
    )  # fmt: skip
    smoothness = smart(embed, logits_of(embed), mask=mask) / known.sum()
    assert logged(fused, "smart_loss") == pytest.approx([smoothness.item()], rel=1e-3)


def _before(trainer: Any, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """The parameters before the one step of SGD at a rate of 0.1."""
    names = dict(trainer.model.named_parameters())
    found = {name: each.detach().clone() for name, each in trainer.model.state_dict().items()}
    return {name: each + 0.1 * gradients[name] if name in names else each for name, each in found.items()}


@pytest.mark.parametrize(
    ("data", "settings"),
    [
        (TEXT, {"packing": True, "max_length": 16}),
        (TALK, {"assistant_only_loss": True}),
        *exhaustively(
            (TEXT, {"smart_checkpointed": True}),
            (TEXT, {"padding_free": True, "max_length": None}),
            (TEXT, {"label_smoothing_factor": 0.1}),
            (TEXT, {"loss_type": "dft"}),
            (TEXT, {"smart_recipe": "recommended", "smart_diagnose_steps": 1}),
            (TEXT, {"smart_embeddings": "layers.0"}),
            (TEXT, {"gradient_accumulation_steps": 2}),
        ),
    ],
)
def test_ways_of_supervised_fine_tuning(data: Dataset, settings: dict[str, Any], tmp_path: Path) -> None:
    """Each is regularized as it would be with whole logits."""
    model, found = llama(), []
    smart = settings if "smart_recipe" in settings else {**SETTINGS, **settings}
    for loss in ({}, {"compute_loss_func": whole_logits}):
        if loss and {"label_smoothing_factor", "loss_type", "gradient_accumulation_steps"} & set(settings):
            continue  # this loss does not do what these say
        trainer, gradients = sft(tmp_path, copy.deepcopy(model), data=data, **smart, **loss)
        found.append(logged(trainer, "smart_loss"))
        assert found[-1][0] > 0
        assert all(each.isfinite().all() for each in gradients.values())
        if "smart_diagnose_steps" in settings:
            assert logged(trainer, "smart_ascent_ratio")[0] > 1
            assert logged(trainer, "smart_noise_to_embed")[0] == pytest.approx(0.3, rel=0.1)
    assert found[0] == pytest.approx(found[-1], rel=1e-4)


def test_bregman_with_the_fused_head(tmp_path: Path) -> None:
    """The teacher's passes are the teacher's, with the fused head and without; after one step it lags behind."""
    model, found = llama(), []
    for loss in ({}, {"compute_loss_func": whole_logits}):
        settings = {"smart_weight": 0.0, "smart_proximal_weight": 3.0, "smart_backend": "torch", "max_steps": 3}
        trainer, gradients = sft(tmp_path, copy.deepcopy(model), learning_rate=1.0, **settings, **loss)
        found.append((logged(trainer, "smart_proximal"), gradients))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-3, abs=1e-9)
    assert found[0][0][0] == pytest.approx(0.0, abs=1e-9)
    assert found[0][0][2] > found[0][0][1] > 1e-4
    assert_close(found[0][1], found[1][1])


SCALED = {
    "Gemma2": {"final_logit_softcapping": 0.5, "head_dim": 8, "num_key_value_heads": 1},
    "Cohere": {"logit_scale": 3.0, "num_key_value_heads": 1},
    "Granite": {"logits_scaling": 0.25, "num_key_value_heads": 1},
}


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", SCALED)
def test_heads_that_scale_their_logits(name: str, tmp_path: Path) -> None:
    sizes = {"vocab_size": WORDS, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = getattr(transformers, f"{name}Config")(**sizes, intermediate_size=32, pad_token_id=0, **SCALED[name])
    model, found = getattr(transformers, f"{name}ForCausalLM")(config), []
    for loss in ({}, {"compute_loss_func": whole_logits}):
        trainer, gradients = sft(tmp_path, copy.deepcopy(model), **SETTINGS, **loss)
        found.append((logged(trainer, "smart_loss"), gradients))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-4)
    assert_close(found[0][1], found[1][1])


@pytest.mark.exhaustive
def test_half_precision(tmp_path: Path) -> None:
    """The body runs in the autocast that Trainer puts around the model's forward pass."""
    model = llama()
    single, _ = sft(tmp_path, copy.deepcopy(model), **SETTINGS)
    args = arguments(tmp_path, trl.SFTConfig, gradient_checkpointing=False, bf16=True)
    half = SMARTSFTTrainer(
        model, args, train_dataset=TEXT, processing_class=tokenizer(), callbacks=[Watch()], **SETTINGS
    )
    kinds = []
    half.model.model.layers[0].register_forward_hook(lambda *call: kinds.append(torch.is_autocast_enabled("cpu")))
    half.train()
    assert len(kinds) == 3
    assert all(kinds)
    assert logged(half, "smart_loss") == pytest.approx(logged(single, "smart_loss"), rel=0.3)


def test_smart_trainer_in_front_of_another(tmp_path: Path) -> None:
    trainer, _ = sft(tmp_path, llama(), Mine)
    assert logged(trainer, "smart_loss")[0] > 0
    assert "mean_token_accuracy" in trainer.state.log_history[0]


def test_reward_models(tmp_path: Path) -> None:
    class SMARTRewardTrainer(SMARTMixin, trl.RewardTrainer):
        pass

    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 32}
    model = LlamaForSequenceClassification(
        LlamaConfig(vocab_size=WORDS, hidden_size=16, pad_token_id=0, num_labels=1, **sizes)
    )
    args = arguments(tmp_path, trl.RewardConfig, gradient_checkpointing=False, bf16=False)
    trainer = SMARTRewardTrainer(model, args, train_dataset=PAIRS, processing_class=tokenizer())
    trainer.train()
    assert logged(trainer, "smart_loss")[0] > 0


@pytest.mark.parametrize("name", ["DPOTrainer", "GRPOTrainer", "KTOTrainer", "RLOOTrainer"])
def test_trainers_that_compare_several_passes(name: str) -> None:
    with pytest.raises(ValueError, match=rf"SFTTrainer and RewardTrainer of trl, not {name}"):
        type("Mine", (SMARTMixin, getattr(trl, name)), {})()


class RDrop(transformers.Trainer):
    """Compares two passes of its own."""

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        one, other = model(**inputs), model(**inputs)
        return one.loss + (one.logits - other.logits).square().mean()


def test_trainers_that_call_the_model_twice(tmp_path: Path) -> None:
    class Mine(SMARTMixin, RDrop):
        pass

    with pytest.raises(RuntimeError, match=r"one call of BertForSequenceClassification in .*compute_loss, got 2"):
        train(HEADS["classes"].model(), arguments(tmp_path), batch(HEADS["classes"]), Mine)


@pytest.mark.exhaustive
def test_peak_memory(tmp_path: Path) -> None:
    """V = 32000: a step of SMART takes at most 1.25 times the memory of a plain step with the fused head."""
    words = 32000
    ids = torch.randint(words, (4, 128))
    rows = Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids.tolist()})
    args = arguments(tmp_path, trl.SFTConfig, gradient_checkpointing=False, bf16=False)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    model, peaks = llama(words, 64, intermediate_size=128), []
    for trainer_class, smart in ((trl.SFTTrainer, {}), (SMARTSFTTrainer, {"smart_recipe": "recommended"})):
        trainer = trainer_class(copy.deepcopy(model), args, train_dataset=rows, processing_class=tokenizer(), **smart)

        def step(ids: Tensor, trainer: Any = trainer) -> None:
            trainer.model.train()
            trainer.compute_loss(trainer.model, inputs).backward()
            trainer.model.zero_grad()

        step(ids)
        peaks.append(peak_memory(step, (ids,), torch.device("cpu")))
    assert peaks[0] > 4 * words * 64  # a gradient of the head at the least
    assert peaks[1] <= 1.25 * peaks[0], f"{peaks[1] / 2**20:.1f} MiB beside {peaks[0] / 2**20:.1f} MiB"
    print(f"peak memory: SMART {peaks[1] / 2**20:.1f} MiB, plain {peaks[0] / 2**20:.1f} MiB")
