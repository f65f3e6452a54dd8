"""``backend="torch"`` is bit for bit smart-pytorch 0.0.4: values, gradients and the random generator afterwards."""

import copy
import functools
import pickle
import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import smart_fast
from tests.helpers import exhaustively, same_bits

reference = pytest.importorskip("smart_pytorch", reason="the oracle of the drop-in promise is not installed")

# torch's, about the meaning of reduction="mean".
pytestmark = [
    pytest.mark.filterwarnings("ignore:reduction. 'mean' divides:UserWarning"),
    pytest.mark.usefixtures("pytorch_by_default"),
]

DTYPES = (torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16)
NORMS = ("default", "l2", "l1", "inf of everything", "mean square")
MODELS = ("linear", "dropout", "inplace", "attention", "identity")
LOSSES = ("kl_loss", "sym_kl_loss", "js_loss", "mse")


def both(name, **options):
    """The reference's function and ours."""
    if name == "mse":
        return F.mse_loss, F.mse_loss
    ours = getattr(smart_fast, name)
    return tuple(functools.partial(f, **o) for f, o in (
        (getattr(reference, name), options), (ours, {**options, "backend": "torch"})
    ))  # fmt: skip


def norms(name):
    return {
        "default": {},
        "l2": {"norm_fn": lambda x: torch.norm(x, p=2, dim=-1, keepdim=True)},
        "l1": {"norm_fn": lambda x: x.abs().sum(-1, keepdim=True)},
        "inf of everything": {"norm_fn": lambda x: x.abs().amax()},
        "mean square": {"norm_fn": lambda x: x.square().mean(-1, keepdim=True).sqrt()},
    }[name]


class Attention(nn.Module):
    """Positions look at each other."""

    def __init__(self, width, classes):
        super().__init__()
        self.head = nn.Linear(width, classes)

    def forward(self, x):
        scores = x @ x.transpose(-1, -2) if x.dim() > 1 else x.outer(x)
        return self.head(scores.softmax(-1) @ x)


def model(name, width, classes):
    return {
        "linear": lambda: nn.Linear(width, classes),
        "dropout": lambda: nn.Sequential(nn.Linear(width, 6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, classes)),
        "inplace": lambda: nn.Sequential(nn.ReLU(inplace=True), nn.Linear(width, classes)),
        "attention": lambda: Attention(width, classes),
        "identity": nn.Identity,
    }[name]()


class Case:
    """A random configuration, the same for the reference and for smart_fast."""

    def __init__(self, seed):
        pick = random.Random(seed)
        self.seed = seed
        self.dtype = pick.choice(DTYPES)
        self.shape = [pick.choice((1, 2, 3, 5)) for _ in range(pick.randint(0, 3))] + [pick.choice((1, 3, 7, 8, 33))]
        self.layout = pick.choice(("dense", "dense", "transposed", "strided", "expanded"))
        self.embed_kind = pick.choice(("leaf", "inner", "frozen"))
        self.keep_graph = pick.random() < 0.5
        self.model = pick.choice(MODELS)
        self.norm = pick.choice(NORMS)
        self.loss, self.last = self.pick_loss(pick, scalar=True), self.pick_loss(pick, scalar=False)
        half = self.dtype in (torch.float16, torch.bfloat16)
        self.numbers = {
            "num_steps": pick.choice((0, 1, 1, 2, 3)),
            "step_size": pick.choice((0, 1e-3, 1e-3, 1, 100.0 if half else 1e6, -1e-3)),
            "epsilon": pick.choice((1e-6, 1e-6, 0, 1e-2, 1e3)),
            "noise_var": pick.choice((1e-5, 1e-5, 0, 1e-2, 1, 10.0 if half else 1e4)),
        }

    @staticmethod
    def pick_loss(pick, scalar):
        name = pick.choice(LOSSES)
        options = {}
        if name != "mse":
            options["reduction"] = pick.choice(("sum", "mean", "batchmean") if scalar else
                                               ("sum", "mean", "batchmean", "none"))  # fmt: skip
            if name != "kl_loss" and pick.random() < 0.5:
                options["alpha"] = pick.choice((0.0, 0.5, 2.5))
        return both(name, **options) if scalar or pick.random() < 0.7 else (None, None)

    def embed(self):
        shape = list(self.shape)
        if self.layout == "transposed" and len(shape) > 1:
            embed = torch.randn(shape[:-2] + shape[:-3:-1]).transpose(-1, -2)
        elif self.layout == "strided":
            embed = torch.randn([*shape[:-1], 2 * shape[-1]])[..., ::2]
        elif self.layout == "expanded":
            embed = torch.randn([1] * (len(shape) - 1) + shape[-1:]).expand(shape)
        else:
            embed = torch.randn(shape)
        return embed.to(self.dtype)

    def run(self, side, smart_loss, **options):
        torch.manual_seed(self.seed)
        net = model(self.model, self.shape[-1], 4).to(self.dtype)
        leaf = self.embed().requires_grad_(self.embed_kind != "frozen")
        embed = leaf * 1.5 if self.embed_kind == "inner" else leaf
        state = net(embed.clone())
        state = state if self.keep_graph else state.detach()
        if state.requires_grad:
            state.retain_grad()
        smart = smart_loss(net, self.loss[side], self.last[side], **norms(self.norm), **self.numbers, **options)
        loss = smart(embed, state)
        loss.backward(torch.linspace(1, 2, loss.numel(), dtype=loss.dtype).view_as(loss))
        found = {"loss": loss.detach(), "embed": leaf.grad, "state": state.grad if state.requires_grad else None}
        found |= {name: parameter.grad for name, parameter in net.named_parameters()}
        return found, torch.get_rng_state()


@pytest.mark.parametrize("seed", [*range(60), *exhaustively(*range(60, 600))])
def test_random_configuration(seed):
    case = Case(seed)
    theirs, their_generator = case.run(0, reference.SMARTLoss)
    ours, our_generator = case.run(1, smart_fast.SMARTLoss, backend="torch")
    different = [name for name in theirs if not same_bits(theirs[name], ours[name])]
    assert not different, vars(case)
    assert torch.equal(their_generator, our_generator)


def test_random_configurations_are_worth_comparing():
    """Most of them have a finite loss, and an ascent that moves the noise."""
    losses = [Case(seed).run(0, reference.SMARTLoss)[0]["loss"] for seed in range(0, 600, 10)]
    assert sum(bool(loss.isfinite().all() and loss.abs().max() > 0) for loss in losses) > 0.8 * len(losses)


LOGITS = {
    "1-D": lambda: (torch.randn(7), torch.randn(7)),
    "4-D": lambda: (torch.randn(2, 3, 1, 5), torch.randn(2, 3, 1, 5)),
    "one class": lambda: (torch.randn(4, 1), torch.randn(4, 1)),
    "transposed": lambda: (torch.randn(9, 4).t(), torch.randn(9, 4).t()),
    "strided": lambda: (torch.randn(4, 18)[:, ::2], torch.randn(4, 9)),
    "expanded": lambda: (torch.randn(4, 9), torch.randn(1, 9).expand(4, 9)),
    "broadcast target": lambda: (torch.randn(4, 9), torch.randn(9)),
    "broadcast input": lambda: (torch.randn(1, 9), torch.randn(4, 9)),
    "far apart": lambda: (torch.randn(4, 9) * 50, torch.randn(4, 9) * 50),
    "equal": lambda: (torch.ones(4, 9),) * 2,
    "minus infinity": lambda: (torch.tensor([[0.0, -torch.inf, 1.0]]), torch.tensor([[1.0, -torch.inf, 0.0]])),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["sum", "mean", "batchmean", "none"])
@pytest.mark.parametrize(
    ("name", "options"),
    [("kl_loss", {}), ("sym_kl_loss", {}), ("sym_kl_loss", {"alpha": 0.3}), ("js_loss", {}), ("js_loss", {"alpha": 3})],
)
def test_losses_alone(name, options, reduction, dtype):
    for kind, make in LOGITS.items():
        found = []
        for function in both(name, reduction=reduction, **options):
            torch.manual_seed(0)
            input, target = (each.to(dtype).detach().requires_grad_() for each in make())
            loss = function(input, target)
            loss.backward(torch.linspace(-1, 2, loss.numel(), dtype=dtype).view_as(loss))
            found.append((loss, input.grad, target.grad))
        assert all(map(same_bits, *found)), kind


@pytest.mark.parametrize("name", ["kl_loss", "sym_kl_loss", "js_loss"])
def test_losses_take_positional_arguments_and_have_the_same_defaults(name):
    input, target = torch.randn(3, 5), torch.randn(3, 5)
    theirs, ours = getattr(reference, name), getattr(smart_fast, name)
    assert same_bits(theirs(input, target), ours(input, target, backend="torch"))
    more = ("sum",) if name == "kl_loss" else ("mean", 0.5)
    assert same_bits(theirs(input, target, *more), ours(input, target, *more, backend="torch"))
    assert smart_fast.loss.__dict__[name] is ours


def regularized(smart_loss, net, *args, **options):
    torch.manual_seed(3)
    embed = torch.randn(4, 5)
    return smart_loss(net, *args, **options)(embed, net(embed))


def test_positional_arguments_and_defaults():
    net = nn.Linear(5, 3)
    norm = functools.partial(torch.norm, p=2, dim=-1, keepdim=True)
    args = (reference.kl_loss, F.mse_loss, norm, 2, 0.5, 1e-3, 1e-2)
    assert same_bits(regularized(reference.SMARTLoss, net, *args), regularized(smart_fast.SMARTLoss, net, *args))
    assert same_bits(
        regularized(reference.SMARTLoss, net, F.mse_loss), regularized(smart_fast.SMARTLoss, net, F.mse_loss)
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_steps", 3),
        ("step_size", 10.0),
        ("epsilon", 0.5),
        ("noise_var", 1.0),
        ("noise_var", torch.tensor(0.3)),
        ("norm_fn", smart_fast.l1_norm),
        ("loss_fn", reference.js_loss),
        ("loss_last_fn", F.l1_loss),
        ("eval_fn", nn.Linear(5, 2)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_attributes_may_change_between_calls(name, value):
    net, embed = nn.Linear(5, 3), torch.randn(4, 5)
    found = []
    for smart_loss in (reference.SMARTLoss, smart_fast.SMARTLoss):
        torch.manual_seed(5)
        smart = smart_loss(net, F.mse_loss, step_size=1.0)
        before = smart(embed, smart.eval_fn(embed))
        setattr(smart, name, value)
        found.append((before, smart(embed, smart.eval_fn(embed))))
    assert all(map(same_bits, *found))
    assert not same_bits(*found[0])


def test_attributes_and_modules_are_the_reference_s():
    net, loss, last = nn.Linear(5, 3), nn.MSELoss(), nn.PReLU()
    theirs, ours = reference.SMARTLoss(net, loss, last), smart_fast.SMARTLoss(net, loss, last)
    assert list(theirs.state_dict()) == list(ours.state_dict())
    assert [name for name, _ in theirs.named_parameters()] == [name for name, _ in ours.named_parameters()]
    assert dict(theirs.named_modules()).keys() == dict(ours.named_modules()).keys()
    for name in ("eval_fn", "loss_fn", "loss_last_fn", "num_steps", "step_size", "epsilon", "noise_var"):
        assert getattr(theirs, name) == getattr(ours, name)
    ours.load_state_dict(theirs.state_dict())


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda smart: pickle.loads(pickle.dumps(smart))])
@pytest.mark.parametrize("norm", [smart_fast.inf_norm, smart_fast.sentence_norm(smart_fast.l2_norm)])
def test_copies_and_pickles(duplicate, norm):
    smart = smart_fast.SMARTLoss(nn.Linear(5, 3), smart_fast.kl_loss, norm_fn=norm, num_steps=2, backend="torch")
    twin = duplicate(smart)
    assert twin.eval_fn.weight is not smart.eval_fn.weight
    assert twin.norm_fn == smart.norm_fn
    embed = torch.randn(4, 2, 5)
    found = []
    for each in (smart, twin):
        torch.manual_seed(0)
        found.append(each(embed, each.eval_fn(embed)))
    assert same_bits(*found)


def test_under_autocast():
    net, embed = nn.Linear(5, 3), torch.randn(4, 5, requires_grad=True)
    found = []
    for smart_loss in (reference.SMARTLoss, smart_fast.SMARTLoss):
        torch.manual_seed(0)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = smart_loss(net, reference.kl_loss, step_size=10.0, num_steps=2)(embed, net(embed))
        found.append((loss, *torch.autograd.grad(loss, (embed, net.weight))))
    assert all(map(same_bits, *found))


def test_second_order_gradients():
    net, embed = nn.Sequential(nn.Linear(5, 3), nn.Tanh()), torch.randn(4, 5, requires_grad=True)
    found = []
    for smart_loss, loss_fn in ((reference.SMARTLoss, reference.kl_loss), (smart_fast.SMARTLoss, smart_fast.kl_loss)):
        torch.manual_seed(0)
        options = {"backend": "torch"} if smart_loss is smart_fast.SMARTLoss else {}
        loss = smart_loss(net, loss_fn, **options)(embed, net(embed))
        (first,) = torch.autograd.grad(loss, embed, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), (embed, net[0].weight)))
    assert all(map(same_bits, *found))
