"""`SMARTCallback`: beside Lightning without it, and beside `SMARTLoss` called by hand on the same noise."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

pytest.importorskip("lightning")

from lightning.pytorch import Callback, LightningModule, Trainer

from smart_fast import SMARTLoss, kl_loss, sym_kl_loss
from smart_fast.integrations.lightning import SMARTArguments, SMARTCallback
from tests.helpers import same_bits

ROWS, LENGTH, WIDTH, WORDS, KINDS = 4, 6, 16, 30, 3
SEED = 7
SETTINGS: dict[str, Any] = {
    "smart_weight": 3.0,
    "smart_step_size": 0.3,
    "smart_noise_var": 0.01,
    "smart_backend": "torch",
}


class Tagger(nn.Module):
    """A kind for each word; returns logits, or with labels a dict with the loss, as models of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.body = nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.head = nn.Linear(WIDTH, KINDS)
        self.losses = 0

    def get_input_embeddings(self) -> nn.Module:
        return self.words

    def after_words(self, embed: Tensor) -> Tensor:
        return self.head(self.body(embed)[0])

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None) -> Any:
        logits = self.after_words(self.words(input_ids))
        if labels is None:
            return logits
        self.losses += 1
        return {"loss": F.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


def batches(number: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    mask = (torch.arange(LENGTH) < torch.tensor([6, 4, 2, 5])[:, None]).long()
    ids = [torch.randint(1, WORDS, (ROWS, LENGTH), generator=generator) * mask for _ in range(number)]
    return [
        {"input_ids": each, "attention_mask": mask, "labels": (each % KINDS).masked_fill(mask == 0, -100)}
        for each in ids
    ]


class Module(LightningModule):
    """``call`` runs the model; ``seen`` are gradients, ``validated`` losses."""

    def __init__(self, optimizer: str = "SGD") -> None:
        super().__init__()
        self.model, self.optimizer = Tagger(), optimizer
        self.seen: list[dict[str, Tensor]] = []
        self.validated: list[Tensor] = []

    def call(self, batch: dict[str, Tensor]) -> Any:
        return self.model(**batch)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Any:
        torch.manual_seed(SEED)
        return self.call(batch)["loss"]

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.validated.append(self.call(batch)["loss"])

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        found = self.model.named_parameters()
        self.seen.append({name: each.grad.clone() for name, each in found if each.grad is not None})

    def configure_optimizers(self) -> Any:
        return getattr(torch.optim, self.optimizer)(self.parameters(), lr=0.1)


class Logged(Callback):
    """What ``smart_loss`` was in each step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if "smart_loss" in trainer.callback_metrics:
            self.values.append(trainer.callback_metrics["smart_loss"].item())


def fit(
    module: LightningModule,
    tmp_path: Path,
    *callbacks: Callback,
    number: int = 1,
    epochs: int = 1,
    path: str | None = None,
    **kwargs: Any,
) -> list[float]:
    logged = Logged()
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=False,
        default_root_dir=tmp_path,
        enable_checkpointing=any("Checkpoint" in type(each).__name__ for each in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[*callbacks, logged],
        **kwargs,
    )
    data = DataLoader(batches(number), batch_size=None)
    trainer.fit(module, data, data, ckpt_path=path)
    return logged.values


def by_hand(model: Tagger, batch: dict[str, Tensor], labeled: bool = True) -> tuple[float, dict[str, Tensor]]:
    """The regularizer and the gradients, by `SMARTLoss` alone. Without labels all real words count."""
    model = copy.deepcopy(model)
    mask, labels = batch["attention_mask"].bool(), batch["labels"]
    known = labels != -100 if labeled else mask
    torch.manual_seed(SEED)
    embed = model.words(batch["input_ids"])
    smart = SMARTLoss(
        lambda embed: model.after_words(embed)[known],
        lambda x, t: kl_loss(x, t, "sum"),
        lambda x, t: sym_kl_loss(x, t, "sum"),
        update="sift",
        step_size=SETTINGS["smart_step_size"],
        noise_var=SETTINGS["smart_noise_var"],
        backend="torch",
    )
    logits = model.after_words(embed)
    smoothness = smart(embed, logits[known], mask=mask) / known.sum()
    task = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    (task + SETTINGS["smart_weight"] * smoothness).backward()
    return smoothness.item(), {name: each.grad for name, each in model.named_parameters()}


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-5, atol=1e-6)


class Positional(Module):
    def call(self, batch: dict[str, Tensor]) -> Any:
        return self.model(batch["input_ids"], batch["attention_mask"], batch["labels"])


class OwnLoss(Module):
    """Returns a dict, and keeps labels from the model."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Any:
        torch.manual_seed(SEED)
        logits = self.model(batch["input_ids"], attention_mask=batch["attention_mask"])
        return {"loss": F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten()), "logits": logits}


class ItsOwnModel(Module):
    """The LightningModule is the model that SMART is told of."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Any:
        torch.manual_seed(SEED)
        logits = self(batch["input_ids"], batch["attention_mask"])
        return F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())


@pytest.mark.parametrize(
    ("module_class", "paths"),
    [(Module, {}), (Positional, {}), (OwnLoss, {}), (ItsOwnModel, {"model": "", "embeddings": "model.words"})],
)
def test_gradients_are_those_of_the_task_and_of_smart_loss(
    module_class: type[Module], paths: dict[str, str], tmp_path: Path
) -> None:
    module = module_class()
    smoothness, expected = by_hand(module.model, batches(1)[0], labeled=module_class in (Module, Positional))
    logged = fit(module, tmp_path, SMARTCallback(**paths, **SETTINGS))
    assert_close(module.seen[0], expected)
    assert logged == pytest.approx([smoothness], rel=1e-4)
    assert smoothness > 1e-4
    if module_class in (Module, Positional):
        assert module.model.losses == 3  # in training and in two validations, not in perturbed passes


def test_accumulated_batches(tmp_path: Path) -> None:
    """The mean of the batches' gradients, as without SMART."""
    module = Module()
    parts = [by_hand(module.model, batch)[1] for batch in batches(2)]
    fit(module, tmp_path, SMARTCallback(SMARTArguments(**SETTINGS)), number=2, accumulate_grad_batches=2)
    assert_close(module.seen[0], {name: (parts[0][name] + parts[1][name]) / 2 for name in parts[0]})


def test_a_weight_of_zero_is_lightning(tmp_path: Path) -> None:
    module, found = Module("Adam"), []
    for callbacks in ((), (SMARTCallback(smart_weight=0.0),)):
        copied = copy.deepcopy(module)
        assert fit(copied, tmp_path, *callbacks, number=4) == []
        found.append([*copied.state_dict().values(), *copied.validated, torch.get_rng_state()])
    assert all(same_bits(a, b) for a, b in zip(*found, strict=True))


def test_validation_and_the_module_are_left_alone(tmp_path: Path) -> None:
    module = Module()
    names = list(module.state_dict())
    fit(module, tmp_path, SMARTCallback(**SETTINGS), number=3)
    assert "training_step" not in vars(module)
    assert not module.model.words._forward_hooks
    assert not module.model._forward_hooks
    assert list(module.state_dict()) == names
    module.eval()
    with torch.no_grad():
        expected = [module.model(**batch)["loss"] for batch in batches(3)]
    assert all(same_bits(a, b) for a, b in zip(module.validated[-3:], expected, strict=True))
    fit(module, tmp_path, SMARTCallback(**SETTINGS))  # again
    assert len(module.seen) == 4


def test_resumed_training_is_uninterrupted_training(tmp_path: Path) -> None:
    from lightning.pytorch.callbacks import ModelCheckpoint

    start, found = Module("Adam"), []
    for path in (None, str(tmp_path / "step=2.ckpt")):
        module = copy.deepcopy(start)
        saving = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1)
        callback = pickle.loads(pickle.dumps(SMARTCallback(**SETTINGS)))
        fit(module, tmp_path, callback, saving, number=2, epochs=2, path=path)
        found.append(module.state_dict())
        assert len(module.seen) == (4 if path is None else 2)
    assert all(same_bits(a, b) for a, b in zip(found[0].values(), found[1].values(), strict=True))


EVERYTHING: dict[str, Any] = {
    "smart_recipe": "recommended", "smart_ascent": "fisher", "smart_proximal_weight": 1.0, "smart_proximal_beta": 0.5,
    "smart_diagnose_steps": 2, "smart_embeddings": "words", "smart_checkpointed": True, "smart_backend": "torch",
}  # fmt: skip


def test_everything_on_resumes_bit_for_bit(tmp_path: Path) -> None:
    """The names are Trainer's; the teacher is in the checkpoint."""
    from lightning.pytorch.callbacks import ModelCheckpoint

    class Figures(Logged):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            names = ("smart_loss", "smart_proximal", "smart_ascent_ratio", "smart_noise_to_embed")
            self.values.append([float(trainer.callback_metrics[each]) for each in names])

    start, found = Module("Adam"), []
    for path in (None, str(tmp_path / "step=2.ckpt")):
        module, figures = copy.deepcopy(start), Figures()
        saving = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1)
        fit(module, tmp_path, SMARTCallback(**EVERYTHING), figures, saving, number=2, epochs=2, path=path)
        found.append((module.model.state_dict(), figures.values))
    assert all(same_bits(a, b) for a, b in zip(found[0][0].values(), found[1][0].values(), strict=True))
    assert found[0][1][2:] == found[1][1]
    assert found[0][1][3][1] > 1e-4  # the teacher lags behind
    assert found[0][1][2][2] > 1  # the ascent climbs


def test_weights_may_change_and_batches_may_be_skipped(tmp_path: Path) -> None:
    class Skipping(Module):
        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            settings.smart_weight = float(batch_idx + 1)
            return None if batch_idx == 1 else loss

    settings = SMARTArguments(smart_weight=0.0)
    module = Skipping()
    logged = fit(module, tmp_path, SMARTCallback(settings), number=3)
    assert [len(each) > 0 for each in module.seen] == [True, False, True]
    assert len(logged) == 1  # the first step had no weight, the second no loss
    assert logged[0] > 0


class Manual(Module):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class Twice(Module):
    def call(self, batch: dict[str, Tensor]) -> Any:
        self.model(**batch)
        return self.model(**batch)


class NoEmbeddings(Module):
    def __init__(self) -> None:
        super().__init__()
        self.model.get_input_embeddings = lambda: None


@pytest.mark.parametrize(
    ("module_class", "settings", "error", "message"),
    [
        (Manual, {}, ValueError, "automatic optimization"),
        (NoEmbeddings, {}, ValueError, "Tagger has no input embeddings"),
        (Module, {"model": "network"}, AttributeError, "network"),
        (Twice, {}, RuntimeError, "one call of model in training_step, got 2"),
    ],
)
def test_modules_that_do_not_fit(
    module_class: type[Module], settings: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    module = module_class()
    with pytest.raises(error, match=message):
        fit(module, tmp_path, SMARTCallback(**settings))
    assert "training_step" not in vars(module)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"smart": 1.0}, TypeError, "smart must be a SMARTArguments, got float"),
        ({"smart": SMARTArguments(), "smart_weight": 1.0}, TypeError, "not both: got smart and smart_weight"),
        ({"smart_wait": 1.0}, TypeError, "smart_wait"),
        ({"smart_steps": -1}, ValueError, "smart_steps must not be negative, got -1"),
    ],
)
def test_settings_that_do_not_fit(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SMARTCallback(**settings)
