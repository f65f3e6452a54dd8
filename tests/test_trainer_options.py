"""What `SMARTArguments` can ask for: layers, recipes, every option of `SMARTLoss`, the Bregman term, diagnostics."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

pytest.importorskip("transformers", minversion="5")
pytest.importorskip("accelerate")

import transformers
from transformers import HfArgumentParser, Trainer

from smart_fast import SMARTLoss, kl_loss, options, recipes, sym_kl_loss
from smart_fast.integrations.model import ModelRegularizer
from smart_fast.integrations.transformers import SMARTArguments, SMARTTrainer
from tests.helpers import exhaustively, same_bits
from tests.test_integrations import (
    HEADS,
    PAD,
    SEED,
    WIDTH,
    WORDS,
    arguments,
    assert_close,
    batch,
    bert,
    decoder,
    logged,
    rows_of,
    train,
)  # fmt: skip

SETTINGS = {"smart_weight": 3.0, "smart_step_size": 0.1, "smart_noise_var": 0.01, "smart_backend": "torch"}
#: Options of SMARTLoss that go by another name, or that a training loop answers by itself.
OTHERS = {"norm_fn": "smart_norm", "num_steps": "smart_steps", "diagnose": "smart_diagnose_steps", "skip_in_eval": None}


def test_every_option_of_smart_loss_is_there() -> None:
    names = {each.name for each in dataclasses.fields(SMARTArguments)}
    assert {OTHERS.get(name, f"smart_{name}") for name in options.NAMES} - {None} <= names


def test_a_command_line_of_all_of_them() -> None:
    line = (
        "--smart_recipe recommended --smart_epsilon 0.2 --smart_ascent fisher --smart_ascent_dtype bfloat16"
        " --smart_embeddings model.layers.4 --smart_shared_dropout --no_smart_ascent_dropout --smart_every_n_steps 2"
        " --smart_start_step 3 --smart_freeze_parameters true --smart_freeze_batch_norm --smart_norm token-l2"
        " --smart_loss_scale 8 --smart_proximal_weight 2 --smart_proximal_beta 0.9 --smart_checkpointed"
        " --smart_diagnose_steps 5"
    )
    (parsed,) = HfArgumentParser(SMARTArguments).parse_args_into_dataclasses(line.split())
    smart = parsed.loss(nn.Linear(2, 2), lambda divergence: divergence)
    found = {name: getattr(smart, name) for name in options.NAMES}
    expected = {
        **recipes.RECOMMENDED, "norm_fn": smart.norm_fn, "epsilon": 0.2, "ascent": "fisher",
        "ascent_dtype": torch.bfloat16, "ascent_dropout": False, "freeze_parameters": True, "freeze_batch_norm": True,
        "loss_scale": 8.0,
    }  # fmt: skip
    assert {name: found[name] for name in expected} == expected
    assert torch.equal(smart.norm_fn(torch.tensor([3.0, 4.0])), torch.tensor([5.0]))
    assert (parsed.smart_every_n_steps, parsed.smart_start_step, parsed.smart_embeddings) == (2, 3, "model.layers.4")
    assert [step for step in range(9) if parsed.runs(step)] == [3, 5, 7]
    assert (parsed.smart_shared_dropout, parsed.smart_checkpointed, parsed.smart_diagnose_steps) == (True, True, 5)


@pytest.mark.parametrize("name", ["smart-paper", "sift", "r3f", "r3f-uniform", "alum", "vat", "recommended", "r-drop"])
def test_recipes(name: str) -> None:
    smart = SMARTArguments(smart_recipe=name).loss(lambda x: x, lambda divergence: divergence)
    for option, value in getattr(recipes, name.upper().replace("-", "_")).items():
        assert getattr(smart, option) == value


@pytest.mark.parametrize("name", ["lat", "neftune", "half-sym-kl"])
def test_what_is_no_recipe_of_smart_loss_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="smart_recipe must be one of"):
        SMARTArguments(smart_recipe=name)


def test_the_first_settings_are_still_the_defaults() -> None:
    made = SMARTArguments()
    assert (made.smart_steps, made.smart_step_size, made.smart_noise_var, made.smart_update) == (1, 1e-2, 1e-3, "sift")
    assert (made.smart_epsilon, made.smart_scale, made.smart_norm) == (1e-6, "absolute", "token")


@pytest.mark.parametrize("named", ["model.layers.0", *exhaustively("model.embed_tokens", "layers.0")])
def test_layers(named: str, tmp_path: Path) -> None:
    """What is perturbed, by hand: a hook of the test's own that replaces what the module returns."""
    model, inputs = decoder("Qwen2ForCausalLM").train(), batch(HEADS["next tokens"])
    ids, mask, labels = inputs["input_ids"], inputs["attention_mask"], inputs["labels"]
    module, known = model.get_submodule(named if "model" in named else f"model.{named}"), labels[:, 1:] != -100

    def run(embed: Tensor | None = None) -> Tensor:
        handle = module.register_forward_hook(lambda module, args, output: seen.append(output) or embed)
        logits = model(ids, mask).logits[:, :-1][known]
        handle.remove()
        return logits

    seen: list[Tensor] = []
    torch.manual_seed(SEED)
    logits = run()
    smart = SMARTLoss(
        run, lambda x, t: kl_loss(x, t, "sum"), lambda x, t: sym_kl_loss(x, t, "sum"), step_size=0.1, noise_var=0.01,
        update="sift", backend="torch",
    )  # fmt: skip
    smoothness = smart(seen[0], logits, mask=mask.bool()) / known.sum()
    (F.cross_entropy(logits, labels[:, 1:][known]) + 3.0 * smoothness).backward()
    expected = {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}
    model.zero_grad()
    trainer, gradients = train(model, arguments(tmp_path), inputs, smart_embeddings=named, **SETTINGS)
    assert logged(trainer, "smart_loss") == pytest.approx([smoothness.item()], rel=1e-4)
    assert_close(gradients, expected)


@pytest.mark.parametrize("kind", ["tuple", "dict", "integers first"])
def test_modules_that_return_more_than_a_tensor(kind: str) -> None:
    class Layer(nn.Linear):
        def forward(self, x: Tensor) -> Any:
            found = super().forward(x)
            return {"tuple": (found, None), "dict": {"states": found, "n": 1}, "integers first": [len(x), found]}[kind]

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = Layer(WIDTH, WIDTH), nn.Linear(WIDTH, 3)

        def forward(self, x: Tensor) -> Tensor:
            found = self.layer(x)
            found = found["states"] if kind == "dict" else found[kind == "integers first"]
            return self.head(found.tanh())

    model, x = Model(), torch.randn(4, 5, WIDTH)
    settings = SMARTArguments(smart_steps=0, smart_noise_var=0.1, smart_embeddings="layer", smart_backend="torch")
    regularizer = ModelRegularizer(model, settings)
    with regularizer.clean_pass():
        logits = model(x)
    torch.manual_seed(SEED)
    found = regularizer(lambda: model(x), logits)
    torch.manual_seed(SEED)
    hidden = nn.functional.linear(x, model.layer.weight, model.layer.bias)
    moved = model.head((hidden + 0.1 * torch.randn_like(hidden)).tanh())
    torch.testing.assert_close(found.total, sym_kl_loss(moved, logits), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("name", "message"), [("model.layers.9", "is the name of no module"), ("0", "is the end of several names")]
)
def test_names_of_no_layer(name: str, message: str, tmp_path: Path) -> None:
    model = decoder("Qwen2ForCausalLM")
    model.more = nn.ModuleList([nn.Linear(2, 2)])
    with pytest.raises(ValueError, match=rf"smart_embeddings='{name}' {message}"):
        SMARTTrainer(model, arguments(tmp_path), smart_embeddings=name)


def test_early_advice() -> None:
    """One warning, with the number and the setting; none where the noise is of a usual size."""
    model, inputs = bert("BertForSequenceClassification", num_labels=3), batch(HEADS["classes"])

    def regularize(**settings: Any) -> None:
        regularizer = ModelRegularizer(model, SMARTArguments(smart_backend="torch", **settings))
        for _ in range(2):
            with regularizer.clean_pass():
                outputs = model(inputs["input_ids"])
            regularizer(lambda: model(inputs["input_ids"]), outputs)
        regularizer.close()

    for settings, words in (
        ({"smart_step_size": 1.0}, r"e\+0[01] times what it is added to, because of smart_step_size=1\.0"),
        ({"smart_step_size": 1e-8, "smart_noise_var": 1e-7}, "because of smart_noise_var=1e-07"),
        ({"smart_update": "smart-pytorch"}, "because of smart_update='smart-pytorch'"),
        ({"smart_update": "paper", "smart_epsilon": 1e-8}, "because of smart_epsilon=1e-08"),
    ):
        with pytest.warns(UserWarning, match=words) as found:
            regularize(**settings)
        assert len([each for each in found if "times what it is added to" in str(each.message)]) == 1
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="SMART's noise")
        regularize(smart_recipe="recommended")


def test_diagnostics_are_logged_and_change_nothing(tmp_path: Path) -> None:
    model, inputs = bert("BertForSequenceClassification", num_labels=3), batch(HEADS["classes"], 8)
    model.dropout.p = 0.5
    settings = {"smart_recipe": "recommended", "smart_backend": "torch"}
    args = arguments(tmp_path, max_steps=4)
    plain, _ = train(copy.deepcopy(model), args, inputs, **settings)
    told, _ = train(copy.deepcopy(model), args, inputs, smart_diagnose_steps=2, **settings)
    assert len(logged(told, "smart_ascent_ratio")) == len(logged(told, "smart_noise_to_embed")) == 2
    assert all(ratio > 1 for ratio in logged(told, "smart_ascent_ratio"))
    assert logged(told, "smart_noise_to_embed") == pytest.approx([0.3, 0.3], rel=0.05)
    assert logged(told, "smart_loss") == logged(plain, "smart_loss")
    for a, b in zip(plain.model.state_dict().values(), told.model.state_dict().values(), strict=True):
        assert same_bits(a, b)


@pytest.mark.exhaustive
def test_some_steps_only(tmp_path: Path) -> None:
    args = arguments(tmp_path, max_steps=6, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    trainer, _ = train(
        HEADS["classes"].model(), args, batch(HEADS["classes"]), smart_start_step=1, smart_every_n_steps=2
    )
    assert [each["step"] for each in trainer.state.log_history if "smart_loss" in each] == [2, 4, 6]


@pytest.mark.exhaustive
def test_shared_dropout(tmp_path: Path) -> None:
    """Without noise and with the same dropout the perturbed pass is the clean one."""
    model = bert("BertForSequenceClassification", num_labels=3)
    for each in model.modules():
        if isinstance(each, nn.Dropout):
            each.p = 0.5
    none = {"smart_steps": 0, "smart_noise_var": 0.0, "smart_backend": "torch"}
    found = [
        logged(
            train(copy.deepcopy(model), arguments(tmp_path), batch(HEADS["classes"]), **none, **more)[0], "smart_loss"
        )
        for more in ({}, {"smart_shared_dropout": True})
    ]
    assert found[0][0] > 1e-5
    assert found[1] == [pytest.approx(0.0, abs=1e-6)]


def test_bregman_is_that_of_its_formula(tmp_path: Path) -> None:
    """Two steps of SGD by hand: an average of the weights, and both divergences from its outputs."""
    head = HEADS["tokens"]
    model, inputs = head.model(), batch(head)
    args = arguments(tmp_path, max_steps=3)
    settings = {"smart_weight": 0.0, "smart_proximal_weight": 2.0, "smart_proximal_beta": 0.7, "smart_backend": "torch"}
    expected, student = [], copy.deepcopy(model).train()
    known, labels = inputs["labels"] != -100, inputs["labels"]
    teacher = copy.deepcopy(student).eval()
    for _ in range(3):
        logits = student(inputs["input_ids"], inputs["attention_mask"]).logits[known]
        with torch.no_grad():
            target = teacher(inputs["input_ids"], inputs["attention_mask"]).logits[known].log_softmax(-1)
        own = logits.log_softmax(-1)
        term = ((own.exp() - target.exp()) * (own - target)).sum() / known.sum()
        expected.append(term.item())
        loss = F.cross_entropy(logits, labels[known]) + 2.0 * term
        student.zero_grad()
        loss.backward()
        with torch.no_grad():
            for each, average in zip(student.parameters(), teacher.parameters(), strict=True):
                each -= 0.1 * each.grad
                average.mul_(0.7).add_(each, alpha=0.3)
    trainer, _ = train(model, args, inputs, **settings)
    assert logged(trainer, "smart_proximal") == pytest.approx(expected, rel=1e-3, abs=1e-9)
    assert not logged(trainer, "smart_loss")
    for a, b in zip(trainer.model.parameters(), student.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


EVERYTHING = {
    "smart_recipe": "recommended", "smart_proximal_weight": 1.0, "smart_proximal_beta": 0.9, "smart_checkpointed": True,
    "smart_diagnose_steps": 2, "smart_shared_dropout": True, "smart_every_n_steps": 2,
}  # fmt: skip


@pytest.mark.parametrize("more", [{"smart_ascent": "fisher"}, *exhaustively({}, {"smart_generator": 3})])
def test_everything_on_resumes_bit_for_bit(more: dict[str, Any], tmp_path: Path) -> None:
    model, inputs = bert("BertForSequenceClassification", num_labels=3), batch(HEADS["classes"], 8)
    model.dropout.p = 0.1
    args = arguments(
        tmp_path, max_steps=5, optim="adamw_torch", save_strategy="steps", save_steps=3, learning_rate=1e-2
    )
    trainers: list[Trainer] = []
    for checkpoint in (None, str(tmp_path / "checkpoint-3")):
        given = dict(more)
        if "smart_generator" in more:
            given["smart_generator"] = torch.Generator().manual_seed(more["smart_generator"])
        settings = {**EVERYTHING, **given}
        trainers.append(SMARTTrainer(copy.deepcopy(model), args, train_dataset=rows_of(inputs), **settings))
        trainers[-1].train(resume_from_checkpoint=checkpoint)
    assert (tmp_path / "checkpoint-3" / "smart.pt").is_file()
    whole, resumed = (trainer.model.state_dict() for trainer in trainers)
    assert all(same_bits(a, b) for a, b in zip(whole.values(), resumed.values(), strict=True))
    for name in ("smart_loss", "smart_proximal", "smart_ascent_ratio", "smart_noise_to_embed"):
        assert logged(trainers[0], name) == logged(trainers[1], name)
    assert max(logged(trainers[0], "smart_proximal")) > 1e-3


@pytest.mark.exhaustive
def test_frozen_embeddings_and_fisher(tmp_path: Path) -> None:
    """The direction goes backward to embeddings that nobody trains."""
    model = HEADS["classes"].model()
    model.get_input_embeddings().requires_grad_(False)
    trainer, _ = train(model, arguments(tmp_path), batch(HEADS["classes"]), smart_ascent="fisher")
    assert logged(trainer, "smart_loss")[0] > 0


def test_parameters_that_are_not_there(tmp_path: Path) -> None:
    """What DeepSpeed's ZeRO-3 leaves of parameters outside of their module's forward pass."""
    model = HEADS["classes"].model()
    model.classifier.weight.data = torch.empty(0)
    with pytest.raises(ValueError, match=r"parameter classifier\.weight is empty: .*ZeRO-3"):
        SMARTTrainer(model, arguments(tmp_path))


def test_the_recipe_beats_the_default_and_settings_beat_the_recipe() -> None:
    made = SMARTArguments(smart_recipe="vat", smart_step_size=2.0)
    assert (made.smart_step_size, made.smart_epsilon, made.smart_update) == (2.0, 5.0, "paper")
    with pytest.raises(ValueError, match=r"smart_recipe must be one of .*'recommended'.*, got 'best'"):
        SMARTArguments(smart_recipe="best")
    with pytest.raises(ValueError, match=r"smart_proximal_beta must be in \[0, 1\], got 2"):
        SMARTArguments(smart_proximal_beta=2.0)
    with pytest.raises(TypeError, match="smart_embeddings must be a string, got int"):
        SMARTArguments(smart_embeddings=4)
    with pytest.raises(ValueError, match="smart_embeddings must not hold an empty name, got ''"):
        SMARTArguments(smart_embeddings="")
    with pytest.raises(ValueError, match="ascent='fisher' takes one step"):
        SMARTArguments(smart_ascent="fisher", smart_steps=2)


def test_character_models_and_embeddings_of_tuples(tmp_path: Path) -> None:
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    canine = transformers.CanineConfig(
        **sizes, pad_token_id=PAD, num_hash_buckets=64, max_position_embeddings=64, local_transformer_stride=8,
        downsampling_rate=4, upsampling_kernel_size=4, num_labels=3,
    )  # fmt: skip
    ibert = transformers.IBertConfig(**sizes, vocab_size=WORDS, pad_token_id=PAD, num_labels=3)
    inputs = batch(HEADS["classes"])
    long = {name: each.repeat(1, 4) if each.dim() == 2 else each for name, each in inputs.items()}
    for model, given in (
        (transformers.CanineForSequenceClassification(canine), long),
        (transformers.IBertForSequenceClassification(ibert), inputs),
    ):
        trainer, _ = train(model, arguments(tmp_path), given)
        assert logged(trainer, "smart_loss")[0] > 0
