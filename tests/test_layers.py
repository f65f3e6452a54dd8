"""`smart_fast.at_layer`: the rest of a model from any of its modules on, and what is not computed again."""

from __future__ import annotations

import copy
import pickle
from collections import Counter

import pytest
import torch
from torch import Tensor, nn

from smart_fast import SMARTLoss, at_layer, kl_loss, perturbation, sym_kl_loss


class Block(nn.Module):
    """A residual block that gives a tuple, as those of transformers did."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear, self.dropout = nn.LayerNorm(8), nn.Linear(8, 8), nn.Dropout(0.1)

    def forward(self, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        return x + self.dropout(self.linear(self.norm(x)).tanh()) * scale, scale


class Model(nn.Module):
    """Positions made once reach every block; a residual goes around all of them; one module is called before and
    after."""

    def __init__(self, tuples: bool = True) -> None:
        super().__init__()
        self.words, self.positions, self.shared = nn.Embedding(11, 8), nn.Linear(1, 8), nn.Linear(8, 8)
        self.layers = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(8, 5)

    def forward(self, ids: Tensor, flip: Tensor | None = None) -> Tensor:
        scale = self.positions(torch.arange(ids.shape[1], dtype=torch.float32)[:, None])
        first = hidden = self.shared(self.words(ids))
        for layer in self.layers:
            hidden, _ = layer(hidden, scale)
        hidden = self.shared(hidden + first)
        return self.head(hidden if flip is None else hidden * flip)


@pytest.fixture
def model() -> Model:
    return Model().eval()


def calls_of(model: nn.Module) -> Counter[str]:
    """How often each module's own forward runs from now on."""
    counter: Counter[str] = Counter()
    for name, module in model.named_modules():
        forward = type(module).forward

        def counted(self: nn.Module, *args: object, _n: str = name, _f: object = forward, **kwargs: object) -> object:
            counter[_n] += 1
            return _f(self, *args, **kwargs)

        module.__class__ = type(type(module).__name__, (type(module),), {"forward": counted})
    return counter


IDS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])


@pytest.mark.parametrize("name", ["words", "layers.0", "layers.1", "layers.1.linear", "layers.2", "shared_not", "head"])
def test_the_rest_of_the_model(name: str, model: Model) -> None:
    """Another output of the layer gives what a hook that replaces it would; what lies before does not run again."""
    if name == "shared_not":
        embed, _ = at_layer(model, "shared")
        with pytest.raises(ValueError, match="'shared' must be called once in a pass of the model, it was 2 times"):
            embed(IDS)
        return
    embed, eval_fn = at_layer(model, name)
    hidden, state = embed(IDS)
    torch.testing.assert_close(state, model(IDS))
    torch.testing.assert_close(eval_fn(hidden, IDS), state)
    moved = hidden + torch.randn_like(hidden)

    def replace(module: nn.Module, args: object, output: object) -> object:
        return (moved, *output[1:]) if isinstance(output, tuple) else moved

    handle = model.get_submodule(name).register_forward_hook(replace)
    want = model(IDS)
    handle.remove()
    counter = calls_of(model)
    got = eval_fn(moved, IDS)
    torch.testing.assert_close(got, want)
    weight = model.words.weight
    torch.testing.assert_close(
        *(torch.autograd.grad(each.square().sum(), weight, retain_graph=True)[0] for each in (got, want))
    )
    if name == "layers.1":
        assert counter == {
            "": 1, "shared": 1, "layers.2": 1, "layers.2.norm": 1, "layers.2.linear": 1, "layers.2.dropout": 1,
            "head": 1,
        }  # fmt: skip
    other = IDS.clone()  # of other arguments nothing is known
    torch.testing.assert_close(eval_fn(moved, other), want)
    assert counter["positions"] == 1


def test_regularizes_and_perturbs(model: Model) -> None:
    embed, eval_fn = at_layer(model, "layers.1")
    hidden, state = embed(IDS, flip=None)
    smart = SMARTLoss(eval_fn, kl_loss, sym_kl_loss, update="paper", scale="relative", step_size=1.0, epsilon=0.1)
    assert len(list(smart.parameters())) == len(list(model.parameters()))
    loss = smart(hidden, state, IDS, flip=None)
    loss.backward()
    assert loss > 0
    assert all(each.grad is not None for each in (model.words.weight, model.head.weight, model.layers[1].linear.weight))
    found = perturbation(
        lambda x: kl_loss(eval_fn(x, IDS), state.detach()), hidden.detach(), step_size=1.0, epsilon=0.1, noise_var=0.01
    )
    assert found.noise.shape == hidden.shape
    for duplicate in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # nothing is left on it
        torch.testing.assert_close(duplicate(IDS), state)


@pytest.mark.exhaustive
def test_transformers() -> None:
    """A decoder's hidden states, whose rotary positions and masks are made once."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=2, use_cache=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    batch = {"input_ids": torch.randint(50, (2, 6)), "attention_mask": torch.ones(2, 6, dtype=torch.long)}
    embed, eval_fn = at_layer(model, "model.layers.1")
    hidden, logits = embed(**batch)
    assert hidden.shape == (2, 6, 16)
    torch.testing.assert_close(logits, model(**batch).logits)
    torch.testing.assert_close(eval_fn(hidden, **batch), logits)
    (gradient,) = torch.autograd.grad(eval_fn(hidden, **batch).square().sum(), hidden)
    assert gradient.isfinite().all()
    assert gradient.any()


def test_errors(model: Model) -> None:
    with pytest.raises(TypeError, match="model must be a Module, got function"):
        at_layer(lambda x: x, "layers.1")
    with pytest.raises(TypeError, match="output must be callable, got int"):
        at_layer(model, "layers.1", output=3)
    with pytest.raises(ValueError, match=r"name must be that of a module of model, such as \['words', .*got 'layer.1'"):
        at_layer(model, "layer.1")
    embed, eval_fn = at_layer(model, "layers.1.dropout")
    model.layers[1].forward = lambda x, scale: (x, scale)
    with pytest.raises(ValueError, match="must be called once in a pass of the model, it was 0 times"):
        embed(IDS)
    with pytest.raises(ValueError, match="must be called once in a pass of the model, it was 0 times"):
        eval_fn(torch.zeros(2, 4, 8), IDS)
