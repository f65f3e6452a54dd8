"""`SMARTTrainer`: beside Trainer, and beside `SMARTLoss` called by hand on the same noise."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

pytest.importorskip("transformers", minversion="5")
pytest.importorskip("accelerate")

import transformers
from transformers import HfArgumentParser, Trainer, TrainerCallback, TrainingArguments

from smart_fast import SMARTLoss, inf_norm, js_loss, kl_loss, sentence_norm, sym_kl_loss
from smart_fast.integrations.transformers import SMARTArguments, SMARTTrainer
from tests.helpers import exhaustively, run_python, same_bits

transformers.logging.set_verbosity_error()

ROWS, LENGTH, WIDTH, WORDS, KINDS, PAD = 4, 8, 16, 40, 3, 1
SEED = 7


def bert(name: str, **settings: Any) -> nn.Module:
    config = {"Bert": transformers.BertConfig, "Roberta": transformers.RobertaConfig}[name.partition("For")[0]]
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return getattr(transformers, name)(config(vocab_size=WORDS, pad_token_id=PAD, **sizes, **none, **settings))


def decoder(name: str, **settings: Any) -> nn.Module:
    config = {"Llama": transformers.LlamaConfig, "Qwen2": transformers.Qwen2Config}[name.partition("For")[0]]
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    sizes["intermediate_size"] = 32
    return getattr(transformers, name)(config(vocab_size=WORDS, pad_token_id=PAD, **sizes, **settings))


@dataclass
class Head:
    """A model, its labels for a batch, and which logits and labels are compared: what its loss does."""

    model: Callable[[], nn.Module]
    labels: Callable[[Tensor, Tensor], Tensor]
    task: Callable[[Tensor, Tensor], Tensor]
    rows: str = "sequences"  # or "tokens", or "next" tokens


def few(ids: Tensor, mask: Tensor) -> Tensor:
    return (ids % KINDS).masked_fill((mask == 0) | (ids % 4 == 0), -100)


def words(ids: Tensor, mask: Tensor) -> Tensor:
    return ids.masked_fill(mask == 0, -100)


HEADS = {
    "classes": Head(
        lambda: bert("BertForSequenceClassification", num_labels=KINDS),
        lambda ids, mask: ids[:, 0] % KINDS,
        F.cross_entropy,
    ),
    "classes of the last token": Head(
        lambda: decoder("LlamaForSequenceClassification", num_labels=KINDS),
        lambda ids, mask: ids[:, 0] % KINDS,
        F.cross_entropy,
    ),
    "numbers": Head(
        lambda: bert("RobertaForSequenceClassification", num_labels=1),
        lambda ids, mask: ids[:, 0] / WORDS,
        lambda logits, labels: F.mse_loss(logits.squeeze(-1), labels),
    ),
    "flags": Head(
        lambda: bert("BertForSequenceClassification", num_labels=KINDS, problem_type="multi_label_classification"),
        lambda ids, mask: (ids[:, :KINDS] % 2).float(),
        F.binary_cross_entropy_with_logits,
    ),
    "tokens": Head(
        lambda: bert("RobertaForTokenClassification", num_labels=KINDS), few, F.cross_entropy, rows="tokens"
    ),
    "next tokens": Head(lambda: decoder("Qwen2ForCausalLM"), words, F.cross_entropy, rows="next"),
    "masked tokens": Head(
        lambda: bert("BertForMaskedLM"), lambda ids, mask: words(ids, mask * (ids % 3 == 0)), F.cross_entropy, "tokens"
    ),
}
ALL_HEADS = pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)


def batch(head: Head, rows: int = ROWS) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, WORDS, (rows, LENGTH), generator=generator)
    mask = (torch.arange(LENGTH) < torch.tensor([LENGTH, 5, 3, 6] * (rows // 4))[:, None]).long()
    ids = ids.masked_fill(mask == 0, PAD)
    return {"input_ids": ids, "attention_mask": mask, "labels": head.labels(ids, mask)}


def rows_of(inputs: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    return [dict(zip(inputs, row, strict=True)) for row in zip(*inputs.values(), strict=True)]


class Watch(TrainerCallback):
    """Seeds each optimizer step, and keeps its gradients."""

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        torch.manual_seed(SEED)

    def on_pre_optimizer_step(self, *args: Any, model: nn.Module, **kwargs: Any) -> None:
        self.gradients = {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}


def in_order(trainer_class: type[Trainer]) -> type[Trainer]:
    class InOrder(trainer_class):
        def _get_train_sampler(self, *args: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    return InOrder


def arguments(tmp_path: Path, kind: Any = TrainingArguments, **settings: Any) -> TrainingArguments:
    usual = {
        "per_device_train_batch_size": ROWS,
        "max_steps": 1,
        "learning_rate": 0.1,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return kind(str(tmp_path), **{**usual, **settings})


def train(
    model: nn.Module,
    args: TrainingArguments,
    inputs: dict[str, Tensor],
    trainer_class: type[Trainer] = SMARTTrainer,
    **settings: Any,
) -> tuple[Trainer, dict[str, Tensor]]:
    watch = Watch()
    trainer = in_order(trainer_class)(model, args, train_dataset=rows_of(inputs), callbacks=[watch], **settings)
    trainer.train()
    return trainer, watch.gradients


def logged(trainer: Trainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def logits_by_hand(model: nn.Module, embed: Tensor, mask: Tensor) -> Tensor:
    """Logits of embeddings, with what models find in input ids: positions, and the last token."""
    name = type(model).__name__
    if name.startswith("Roberta"):
        return model(inputs_embeds=embed, attention_mask=mask, position_ids=mask.cumsum(1) * mask + PAD).logits
    if name == "LlamaForSequenceClassification":
        hidden = model.model(inputs_embeds=embed, attention_mask=mask).last_hidden_state
        return model.score(hidden)[torch.arange(len(mask)), mask.sum(1) - 1]
    return model(inputs_embeds=embed, attention_mask=mask).logits


def by_hand(
    head: Head, model: nn.Module, inputs: dict[str, Tensor], weight: float, last: Any = sym_kl_loss, **settings: Any
) -> tuple[float, float, dict[str, Tensor]]:
    """The whole loss, the regularizer and the gradients of one step, by `SMARTLoss` alone."""
    mask, labels = inputs["attention_mask"], inputs["labels"]
    if head.rows == "next":
        labels = labels[:, 1:]
    known = labels != -100 if head.rows != "sequences" else ...

    def evaluate(embed: Tensor) -> Tensor:
        logits = logits_by_hand(model, embed, mask)
        return (logits[:, :-1] if head.rows == "next" else logits)[known]

    def compare(divergence: Any) -> Any:
        if head is HEADS["numbers"]:
            return lambda x, t: F.mse_loss(x, t, reduction="sum")
        if head is HEADS["flags"]:  # Bernoulli distributions: a flag and its opposite
            return lambda x, t: divergence(*(torch.stack([y, 0 * y], -1).flatten(0, 1) for y in (x, t)), "sum")
        return lambda x, t: divergence(x, t, "sum")

    model.train()
    torch.manual_seed(SEED)
    embed = model.get_input_embeddings()(inputs["input_ids"])
    logits = evaluate(embed)
    smart = SMARTLoss(evaluate, compare(kl_loss), compare(last), backend="torch", **settings)
    items = logits.numel() if head in (HEADS["numbers"], HEADS["flags"]) else len(logits)
    smoothness = smart(embed, logits, mask=mask.bool()) / items
    loss = head.task(logits, labels[known]) + weight * smoothness
    model.zero_grad()
    loss.backward()
    gradients = {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}
    return loss.item(), smoothness.item(), gradients


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(
            actual[name], gradient, rtol=1e-5, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}"
        )


@ALL_HEADS
def test_gradients_are_those_of_the_task_and_of_smart_loss(head: Head, tmp_path: Path) -> None:
    model, inputs = head.model(), batch(head)
    sizes = {"step_size": 0.1, "noise_var": 0.01}
    loss, smoothness, expected = by_hand(head, model, inputs, 3.0, update="sift", **sizes)
    mine = {f"smart_{name}": value for name, value in sizes.items()}
    trainer, gradients = train(model, arguments(tmp_path), inputs, smart_weight=3.0, smart_backend="torch", **mine)
    assert_close(gradients, expected)
    *_, task = by_hand(head, model, inputs, 0.0, update="sift", **sizes)
    assert max((gradients[name] - task[name]).abs().max() for name in task) > 1e-4  # the comparison sees SMART
    assert logged(trainer, "smart_loss") == pytest.approx([smoothness], rel=1e-4)
    assert logged(trainer, "loss") == pytest.approx([loss], rel=1e-5)


@pytest.mark.parametrize("steps", [0, 2])
def test_other_settings(steps: int, tmp_path: Path) -> None:
    head = HEADS["classes"]
    model, inputs = head.model(), batch(head)
    settings = SMARTArguments(
        smart_weight=0.5,
        smart_steps=steps,
        smart_noise_var=0.3,
        smart_step_size=0.1,
        smart_epsilon=1e-3,
        smart_update="smart-pytorch",
        smart_norm="sentence",
        smart_divergence="js",
        smart_backend="torch",
    )
    same = {"num_steps": steps, "noise_var": 0.3, "step_size": 0.1, "epsilon": 1e-3, "norm_fn": sentence_norm(inf_norm)}
    _, smoothness, expected = by_hand(head, model, inputs, 0.5, last=js_loss, update="smart-pytorch", **same)
    trainer, gradients = train(model, arguments(tmp_path), inputs, smart=settings)
    assert_close(gradients, expected)
    assert logged(trainer, "smart_loss") == pytest.approx([smoothness], rel=1e-4)


def test_a_norm_of_ones_own(tmp_path: Path) -> None:
    head = HEADS["classes"]
    model, inputs = head.model(), batch(head)

    def twice(x: Tensor) -> Tensor:
        return 2 * x.norm(dim=-1, keepdim=True)

    _, smoothness, _ = by_hand(head, model, inputs, 1.0, update="sift", norm_fn=twice, step_size=0.01, noise_var=1e-3)
    trainer, _ = train(model, arguments(tmp_path), inputs, smart_norm=twice, smart_backend="torch")
    assert logged(trainer, "smart_loss") == pytest.approx([smoothness], rel=1e-3)


@pytest.mark.exhaustive
@ALL_HEADS
def test_evaluation_is_that_of_trainer(head: Head, tmp_path: Path) -> None:
    model, inputs = head.model(), batch(head)

    def metrics(prediction: Any) -> dict[str, float]:
        return {"mean": float(prediction.predictions.mean()), "right": float((prediction.label_ids > 0).mean())}

    found = []
    ours, _ = train(copy.deepcopy(model), arguments(tmp_path), inputs, compute_metrics=metrics)
    model.load_state_dict(ours.model.state_dict())
    plain = Trainer(model, arguments(tmp_path), compute_metrics=metrics)
    for trainer in (plain, ours):
        torch.manual_seed(0)
        prediction = trainer.predict(rows_of(inputs))
        told = {name: value for name, value in prediction.metrics.items() if name[5:] in ("loss", "mean", "right")}
        found.append((prediction.predictions, told, torch.get_rng_state()))
    assert (found[0][0] == found[1][0]).all()
    assert found[0][1] == found[1][1]
    assert found[0][1].keys() == {"test_loss", "test_mean", "test_right"}
    assert torch.equal(found[0][2], found[1][2])


@pytest.mark.parametrize("name", ["classes", *exhaustively("tokens", "next tokens")])
def test_a_weight_of_zero_is_trainer(name: str, tmp_path: Path) -> None:
    head, found = HEADS[name], []
    model, inputs = head.model(), batch(head, 8)
    for trainer_class, settings in ((Trainer, {}), (SMARTTrainer, {"smart_weight": 0.0})):
        args = arguments(tmp_path, max_steps=4, gradient_accumulation_steps=2, optim="adamw_torch", learning_rate=1e-2)
        trainer, _ = train(copy.deepcopy(model), args, inputs, trainer_class, **settings)
        found.append((trainer.model.state_dict(), logged(trainer, "loss"), torch.get_rng_state()))
        assert not logged(trainer, "smart_loss")
    assert all(same_bits(a, b) for a, b in zip(found[0][0].values(), found[1][0].values(), strict=True))
    assert found[0][1] == found[1][1]
    assert torch.equal(found[0][2], found[1][2])


@pytest.mark.exhaustive
def test_padding_and_ignored_labels_do_not_count(tmp_path: Path) -> None:
    """What stands in padding, and how much there is of it, changes nothing; nor do tokens that are not labeled."""
    model = bert("BertForTokenClassification", num_labels=KINDS)
    inputs = batch(HEADS["tokens"])
    padding = inputs["attention_mask"] == 0
    other = {**inputs, "input_ids": inputs["input_ids"].masked_fill(padding, 9)}
    runs = [train(copy.deepcopy(model), arguments(tmp_path), each) for each in (inputs, other)]
    assert logged(runs[0][0], "smart_loss") == logged(runs[1][0], "smart_loss")
    for name, gradient in runs[0][1].items():
        assert same_bits(gradient, runs[1][1][name]), name

    nothing = {**inputs, "labels": torch.full_like(inputs["labels"], -100)}
    nothing["labels"][0, 0] = 1  # the loss of no label at all is NaN
    one = {**nothing, "labels": nothing["labels"][:1], "input_ids": inputs["input_ids"][:1]}
    one["attention_mask"] = inputs["attention_mask"][:1]
    both = [train(copy.deepcopy(model), arguments(tmp_path), each, smart_backend="torch") for each in (nothing, one)]
    first, second = (logged(trainer, "smart_loss")[0] for trainer, _ in both)
    assert first == pytest.approx(second, rel=1e-4)  # rows without labels do not dilute the mean


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["classes", "next tokens"])
def test_accumulated_batches_are_one_batch(name: str, tmp_path: Path) -> None:
    """Of causal language models, whose loss counts tokens; of others if Trainer is told that theirs does not."""
    head, found = HEADS[name], []
    model, inputs = head.model(), batch(head, 8)
    if name == "classes":
        model.accepts_loss_kwargs = False
    for size, number in ((8, 1), (4, 2)):
        args = arguments(tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=number)
        # Noise of two halves is that of the whole: torch draws normal numbers in blocks of 16.
        trainer, gradients = train(
            copy.deepcopy(model), args, inputs, smart_weight=3.0, smart_noise_var=0.01, smart_backend="torch"
        )
        found.append((gradients, logged(trainer, "smart_loss"), logged(trainer, "loss")))
    assert_close(found[1][0], found[0][0])
    assert found[1][1:] == (pytest.approx(found[0][1], rel=1e-4), pytest.approx(found[0][2], rel=1e-5))


@pytest.mark.exhaustive
def test_the_log_holds_a_mean_since_the_last(tmp_path: Path) -> None:
    head = HEADS["tokens"]
    model, inputs = head.model(), batch(head, 8)
    every, second = (
        train(copy.deepcopy(model), arguments(tmp_path, max_steps=3, logging_steps=steps), inputs)[0]
        for steps in (1, 2)
    )
    counts = [(inputs["labels"][rows] != -100).sum().item() for rows in (slice(0, 4), slice(4, 8))]
    assert counts[0] > 0
    each = logged(every, "smart_loss")
    mean = sum(value * count for value, count in zip(each, counts, strict=False)) / sum(counts)
    assert all(math.isfinite(value) and value > 0 for value in each)
    assert logged(second, "smart_loss") == pytest.approx([mean], rel=1e-5)  # and none in the summary of the run


def test_losses_of_ones_own(tmp_path: Path) -> None:
    """``compute_loss_func`` and label smoothing replace the loss of the task, not the regularizer."""
    head = HEADS["classes"]
    model, inputs = head.model(), batch(head)

    def twice(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        return 2 * F.cross_entropy(outputs.logits, labels)

    settings = {"smart_weight": 3.0, "smart_backend": "torch", "smart_step_size": 0.1}
    plain, _ = train(copy.deepcopy(model), arguments(tmp_path), inputs, **settings)
    doubled, _ = train(copy.deepcopy(model), arguments(tmp_path), inputs, compute_loss_func=twice, **settings)
    smoothed, _ = train(copy.deepcopy(model), arguments(tmp_path, label_smoothing_factor=0.2), inputs, **settings)
    smoothness = logged(plain, "smart_loss")[0]
    assert logged(doubled, "smart_loss") == logged(smoothed, "smart_loss") == [smoothness]
    with torch.no_grad():
        logits = model.eval()(inputs["input_ids"], inputs["attention_mask"]).logits
        task, smooth = (F.cross_entropy(logits, inputs["labels"], label_smoothing=each).item() for each in (0.0, 0.2))
    for trainer, expected in ((plain, task), (doubled, 2 * task), (smoothed, smooth)):
        assert logged(trainer, "loss") == pytest.approx([expected + 3 * smoothness], rel=1e-5)


@pytest.mark.exhaustive
def test_checkpointing_and_autocast(tmp_path: Path) -> None:
    head = HEADS["next tokens"]
    model, inputs = head.model(), batch(head)
    trainer, gradients = train(copy.deepcopy(model), arguments(tmp_path), inputs, smart_weight=3.0)
    half, _ = train(copy.deepcopy(model), arguments(tmp_path, bf16=True), inputs, smart_weight=3.0)
    assert logged(half, "smart_loss") == pytest.approx(logged(trainer, "smart_loss"), rel=0.3)
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()
    _, checkpointed = train(model, arguments(tmp_path), inputs, smart_weight=3.0)
    assert_close(checkpointed, gradients)


def test_resumed_training_is_uninterrupted_training(tmp_path: Path) -> None:
    head = HEADS["classes"]
    model, inputs = bert("BertForSequenceClassification", num_labels=KINDS), batch(head, 8)
    model.dropout.p = 0.1  # random numbers are restored too
    args = arguments(
        tmp_path, max_steps=4, optim="adamw_torch", save_strategy="steps", save_steps=2, learning_rate=1e-2
    )
    trainers = []
    for checkpoint in (None, str(tmp_path / "checkpoint-2")):
        trainers.append(SMARTTrainer(copy.deepcopy(model), args, train_dataset=rows_of(inputs), smart_weight=2.0))
        trainers[-1].train(resume_from_checkpoint=checkpoint)
    whole, resumed = (trainer.model.state_dict() for trainer in trainers)
    assert all(same_bits(a, b) for a, b in zip(whole.values(), resumed.values(), strict=True))
    assert logged(trainers[1], "smart_loss") == logged(trainers[0], "smart_loss")


def test_the_model_stays_what_it_was(tmp_path: Path) -> None:
    head = HEADS["classes"]
    model, inputs = head.model(), batch(head)
    names = list(model.state_dict())
    trainer, _ = train(model, arguments(tmp_path), inputs)
    assert list(model.state_dict()) == names
    model.eval()
    ids = inputs["input_ids"]
    for copied in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert torch.equal(copied(ids).logits, model(ids).logits)
    model.resize_token_embeddings(WORDS + 8)  # other embeddings, found again
    trainer.train()
    assert logged(trainer, "smart_loss")[0] > 0


def test_settings_may_change_between_steps(tmp_path: Path) -> None:
    head = HEADS["classes"]

    class WarmUp(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            settings.smart_weight = float(state.global_step)
            settings.smart_step_size = 0.001 * 10**state.global_step

    settings = SMARTArguments(smart_weight=0.0)
    trainer = SMARTTrainer(
        head.model(),
        arguments(tmp_path, max_steps=3),
        train_dataset=rows_of(batch(head)),
        callbacks=[WarmUp()],
        smart=settings,
    )
    trainer.train()
    first, second = logged(trainer, "smart_loss")  # none in the first step
    assert second > 5 * first > 0


@pytest.mark.exhaustive
def test_new_models_of_model_init(tmp_path: Path) -> None:
    head = HEADS["classes"]
    trainer = SMARTTrainer(args=arguments(tmp_path), model_init=head.model, train_dataset=rows_of(batch(head)))
    for _ in range(2):
        trainer.train()
        assert logged(trainer, "smart_loss")[0] > 0


@pytest.mark.exhaustive
def test_compiled_models(tmp_path: Path) -> None:
    head = HEADS["classes"]
    model, inputs = head.model(), batch(head)
    settings = {"smart_weight": 3.0, "smart_backend": "torch", "smart_step_size": 0.1}
    _, expected = train(copy.deepcopy(model), arguments(tmp_path), inputs, **settings)
    args = arguments(tmp_path, torch_compile=True, torch_compile_backend="eager")
    _, gradients = train(copy.deepcopy(model), args, inputs, **settings)
    assert_close({name.removeprefix("_orig_mod."): each for name, each in gradients.items()}, expected)


def test_hf_argument_parser() -> None:
    command = [
        "--smart_weight",
        "0.5",
        "--smart_steps",
        "2",
        "--smart_update",
        "smart-pytorch",
        "--smart_norm",
        "sentence",
    ]
    (parsed,) = HfArgumentParser(SMARTArguments).parse_args_into_dataclasses(command)
    assert parsed == SMARTArguments(
        smart_weight=0.5, smart_steps=2, smart_update="smart-pytorch", smart_norm="sentence"
    )
    assert HfArgumentParser(SMARTArguments).parse_args_into_dataclasses([]) == (SMARTArguments(),)
    assert HfArgumentParser(SMARTArguments).parse_dict({"smart_divergence": "js"})[0].smart_divergence == "js"
    assert pickle.loads(pickle.dumps(parsed)) == parsed


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"smart": {"smart_weight": 1.0}}, TypeError, "smart must be a SMARTArguments, got dict"),
        ({"smart": SMARTArguments(), "smart_steps": 1}, TypeError, "not both: got smart and smart_steps"),
        ({"smart_wait": 1.0}, TypeError, "smart_wait"),
        ({"smart_weight": "1"}, TypeError, "smart_weight must be a real number, got str"),
        ({"smart_weight": -1.0}, ValueError, "smart_weight must not be negative, got -1.0"),
        ({"smart_step_size": math.inf}, ValueError, "smart_step_size must be finite, got inf"),
        ({"smart_steps": -1}, ValueError, "smart_steps must not be negative, got -1"),
        ({"smart_steps": 1.5}, TypeError, "smart_steps must be an integer, got float"),
        ({"smart_scale": "metric"}, ValueError, "smart_scale must be one of .*'relative'.*, got 'metric'"),
        ({"smart_update": "shift"}, ValueError, "smart_update must be one of .*'sift'.*, got 'shift'"),
        ({"smart_norm": "word"}, ValueError, "smart_norm must be one of .*'sentence'.*, got 'word'"),
        ({"smart_divergence": "mse"}, ValueError, "smart_divergence must be one of .*'sym_kl'.*, got 'mse'"),
        ({"smart_backend": "cuda"}, ValueError, "smart_backend 'cuda' does not exist"),
    ],
)
def test_settings_that_do_not_fit(
    settings: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        SMARTTrainer(HEADS["classes"].model(), arguments(tmp_path), **settings)


def test_models_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Linear has no input embeddings"):
        SMARTTrainer(nn.Linear(2, 2), arguments(tmp_path))
    model = HEADS["classes"].model()
    model.get_input_embeddings = lambda: None
    with pytest.raises(ValueError, match=r"no input embeddings \(get_input_embeddings\(\) gives None"):
        SMARTTrainer(model, arguments(tmp_path))
    model = HEADS["classes"].model()
    trainer = SMARTTrainer(model, arguments(tmp_path))
    with pytest.raises(ValueError, match="DataParallel"):
        trainer.compute_loss(nn.DataParallel(model), batch(HEADS["classes"]))


def test_inputs_that_do_not_fit(tmp_path: Path) -> None:
    head = HEADS["classes"]
    model, inputs = head.model(), batch(head)
    inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids")).detach()
    with pytest.raises(ValueError, match=r"did not call what is to be perturbed .*inputs_embeds="):
        train(model, arguments(tmp_path), inputs)


def test_tasks_without_labels_that_fit_the_logits(tmp_path: Path) -> None:
    """Question answering: the distributions of the start and of the end."""
    model = bert("BertForQuestionAnswering")
    inputs = batch(HEADS["classes"])
    del inputs["labels"]
    inputs |= {"start_positions": torch.tensor([0, 1, 2, 0]), "end_positions": torch.tensor([3, 2, 2, 1])}
    settings = {"smart_weight": 3.0, "smart_backend": "torch"}
    trainer, _ = train(copy.deepcopy(model), arguments(tmp_path), inputs, **settings)

    def evaluate(embed: Tensor) -> Tensor:
        outputs = model(inputs_embeds=embed, attention_mask=inputs["attention_mask"])
        return torch.cat([outputs.start_logits, outputs.end_logits])

    torch.manual_seed(SEED)
    embed = model.train().get_input_embeddings()(inputs["input_ids"])
    smart = SMARTLoss(
        evaluate,
        lambda x, t: kl_loss(x, t, "sum"),
        lambda x, t: sym_kl_loss(x, t, "sum"),
        update="sift",
        step_size=1e-2,
        noise_var=1e-3,
        backend="torch",
    )
    smoothness = smart(embed, evaluate(embed), mask=inputs["attention_mask"].bool()) / (2 * ROWS)
    assert logged(trainer, "smart_loss") == pytest.approx([smoothness.item()], rel=1e-3)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["transformers", "lightning"])
def test_a_missing_package_is_named(name: str, tmp_path: Path) -> None:
    code = f"""
import sys
sys.modules |= dict.fromkeys(("transformers", "lightning", "lightning.pytorch", "pytorch_lightning"))
try:
    import smart_fast.integrations.{name}
except ImportError as error:
    print(error)
"""
    assert f"pip install 'smart-fast[{name}]'" in run_python(code, cwd=tmp_path).stdout
