"""The examples of smart-pytorch's README, as they stand there, with only the import changed."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import smart_fast
from tests.helpers import same_bits

smart_pytorch = pytest.importorskip("smart_pytorch", reason="the oracle of the drop-in promise is not installed")

transformers = pytest.importorskip("transformers")

TINY = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 24,
}


def on_torch(monkeypatch):
    """smart_fast as ``set_default_backend("torch")`` leaves it."""
    monkeypatch.setattr("smart_fast.backends.registry.state.environment", None)
    monkeypatch.setattr("smart_fast.backends.registry.state.default", "torch")
    return smart_fast


def both(example, monkeypatch):
    """Run an example with the reference and with smart_fast; returns what each found."""
    found = []
    for package in (smart_pytorch, on_torch(monkeypatch)):
        torch.manual_seed(0)
        loss, module = example(package)
        loss.backward()
        found.append([loss, *(parameter.grad for parameter in module.parameters()), torch.get_rng_state()])
    theirs, ours = found
    assert all(map(same_bits, theirs, ours))
    assert theirs[0] > 0
    assert any(grad is not None and grad.any() for grad in ours[1:-1])


@pytest.mark.parametrize("options", [{}, {"num_steps": 3, "step_size": 1.0, "epsilon": 1e-2, "noise_var": 1e-1}])
def test_basic(options, monkeypatch):
    def example(package):
        eval_fn = torch.nn.Linear(in_features=10, out_features=20)
        loss_fn = nn.MSELoss()
        inf_norm = lambda x: torch.norm(x, p=float("inf"), dim=-1, keepdim=True)  # noqa: E731
        regularizer = package.SMARTLoss(eval_fn=eval_fn, loss_fn=loss_fn, norm_fn=inf_norm, **options)
        embed = torch.rand(1, 10)
        state = eval_fn(embed)
        return regularizer(embed, state), eval_fn

    both(example, monkeypatch)


@pytest.mark.parametrize("training", [False, True])
def test_bert_classification(training, monkeypatch):
    def example(package):
        class SMARTBertClassificationLoss(nn.Module):
            def __init__(self, model, **kwargs):
                super().__init__()
                self.model = model
                self.smart = package.SMARTLoss(eval_fn=self.eval, loss_fn=self.loss, **kwargs)

            def loss(self, x, y):
                return F.kl_div(x, y, reduction="batchmean", log_target=True)

            def eval(self, embed):
                outputs = self.model.bert(inputs_embeds=embed)
                pooled = outputs[1]
                logits = self.model.classifier(pooled)
                return F.log_softmax(logits, dim=1)

            def forward(self, embed, state):
                return self.smart(embed, state)

        model = transformers.BertForSequenceClassification(transformers.BertConfig(**TINY, num_labels=3))
        model.train(training)
        regularizer = SMARTBertClassificationLoss(model)
        inputs = {"input_ids": torch.randint(50, (2, 7)), "token_type_ids": torch.zeros(2, 7, dtype=torch.long)}
        outputs = model(**inputs)
        embed = model.bert.embeddings(inputs["input_ids"], inputs["token_type_ids"])
        state = F.log_softmax(outputs["logits"], dim=1)
        return regularizer(embed, state), model

    both(example, monkeypatch)


@pytest.mark.parametrize("training", [False, True])
def test_roberta_classification(training, monkeypatch):
    def example(package):
        class SMARTRobertaClassificationModel(nn.Module):
            def __init__(self, model, weight=0.02):
                super().__init__()
                self.model = model
                self.weight = weight

            def forward(self, input_ids, attention_mask, labels):
                embed = self.model.roberta.embeddings(input_ids)

                def eval(embed):
                    outputs = self.model.roberta(inputs_embeds=embed, attention_mask=attention_mask)
                    return self.model.classifier(outputs[0])

                smart_loss_fn = package.SMARTLoss(
                    eval_fn=eval, loss_fn=package.kl_loss, loss_last_fn=package.sym_kl_loss
                )
                state = eval(embed)
                loss = F.cross_entropy(state.view(-1, 2), labels.view(-1))
                return state, loss + self.weight * smart_loss_fn(embed, state)

        config = transformers.RobertaConfig(**TINY, num_labels=2, pad_token_id=1)
        model = transformers.RobertaForSequenceClassification(config).train(training)
        input_ids, attention_mask = torch.randint(2, 50, (3, 6)), torch.ones(3, 6, dtype=torch.long)
        attention_mask[0, 4:] = 0
        _, loss = SMARTRobertaClassificationModel(model)(input_ids, attention_mask, torch.tensor([0, 1, 1]))
        return loss, model

    both(example, monkeypatch)
