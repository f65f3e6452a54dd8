"""`checkpointed`: the same step with one graph at a time, in counted bytes and FLOPs."""

import copy
import functools
import pickle
import weakref

import pytest
import smart_pytorch
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from bench.measure import peak_memory
from smart_fast import SMARTLoss, checkpointed, kl_loss, sym_kl_loss
from tests.helpers import same_bits

EMBED = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(4) % 3


class Network(nn.Module):
    """Dropout of both kinds and BatchNorm; counts its passes."""

    def __init__(self):
        super().__init__()
        self.body, self.norm, self.head = nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)
        self.dropout, self.passes, self.config = nn.Dropout(), 0, {"width": 6}

    def forward(self, x, scale=1.0):
        self.passes += 1
        return self.head(F.dropout(self.dropout(self.norm(self.body(x)).tanh()), 0.5, self.training)) * scale


@pytest.fixture
def net():
    return Network()


def as_module(net):
    return net


def as_function(net):
    return lambda *args, **kwargs: net(*args, **kwargs)


def as_partial(net):
    return functools.partial(net, scale=1.0)


def step(net, clean, eval_fn, **options):
    """Loss, gradients, buffers and generator after a step from a fixed seed."""
    net = copy.deepcopy(net)
    torch.manual_seed(7)
    embed = EMBED.clone().requires_grad_()
    state = clean(net)(embed)
    smart = SMARTLoss(eval_fn(net), kl_loss, sym_kl_loss, noise_var=0.1, **options)(embed, state)
    loss = F.cross_entropy(state, LABELS) + smart
    loss.backward()
    gradients = [embed.grad, *(each.grad for each in net.parameters())]
    return [loss.detach(), *gradients, *net.buffers(), torch.get_rng_state()], net.passes


# What a step computes


@pytest.mark.parametrize("kind", [as_module, as_function, as_partial])
@pytest.mark.parametrize("training", [True, False])
def test_a_step_is_the_same_bit_for_bit(net, kind, training):
    net.train(training)
    plain, passes = step(net, kind, kind)
    ours, more = step(net, lambda net: checkpointed(kind(net)), kind)
    assert all(map(same_bits, plain, ours))
    assert (passes, more) == (3, 4)


@pytest.mark.parametrize(
    "options",
    [{}, {"num_steps": 3}, {"ascent_dropout": False}, {"freeze_batch_norm": True}, {"freeze_parameters": True}],
)
def test_it_may_be_the_eval_fn(net, options):
    plain, passes = step(net, as_module, as_module, **options)
    ours, more = step(net, checkpointed, checkpointed, **options)
    assert all(map(same_bits, plain, ours))
    assert more == 2 * passes


def test_autocast(net):
    found = []
    for clean in (as_module, checkpointed):
        with torch.autocast("cpu", torch.bfloat16):
            torch.manual_seed(7)
            state = clean(net)(EMBED)
        assert state.dtype == torch.bfloat16
        net.zero_grad()
        state.float().square().sum().backward()  # outside
        found.append([each.grad.clone() for each in net.parameters()])
    assert all(map(same_bits, *found))


def test_arguments_and_structures(net):
    def several(x, y=None, *, debug):
        return {"sum": net(x) + y, "pair": (net(y * 0 + x[:, :3] @ torch.ones(3, 8)), None, debug)}

    embed = EMBED.clone().requires_grad_()
    other = torch.ones(4, 1, requires_grad=True)
    found = []
    for eval_fn in (several, checkpointed(several)):
        torch.manual_seed(7)
        state = eval_fn(embed, y=other, debug="use_reentrant")  # names of checkpoint's own mean nothing to it
        loss = state["sum"].square().sum() + state["pair"][0].sum()
        assert state["pair"][1:] == (None, "use_reentrant")
        found.append(torch.autograd.grad(loss, [embed, other, *net.parameters()]))
    assert all(map(same_bits, *found))


def test_a_backward_pass_for_each_term_recomputes_for_each(net):
    torch.manual_seed(7)
    state = checkpointed(net)(EMBED)
    assert net.passes == 1
    first = torch.autograd.grad(state.square().sum(), net.head.weight, retain_graph=True)
    again = torch.autograd.grad(state.square().sum(), net.head.weight)
    assert net.passes == 3
    assert same_bits(*first, *again)
    assert net.norm.num_batches_tracked == 1


def test_without_gradients_nothing_is_repeated(net):
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            assert not checkpointed(net)(EMBED).requires_grad
    assert net.passes == 2


def test_errors_of_eval_fn_are_its_own(net):
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        checkpointed(net)(EMBED[:, :3])
    with pytest.raises(TypeError, match="unexpected keyword argument 'size'"):
        checkpointed(net)(EMBED, size=3)


@pytest.mark.parametrize("value", [None, 3, "net"])
def test_not_callable(value):
    with pytest.raises(TypeError, match=f"eval_fn must be callable, got {type(value).__name__}"):
        checkpointed(value)


def test_compiled():
    net = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))
    smart = SMARTLoss(net, kl_loss, sym_kl_loss)
    clean, found = checkpointed(net), []

    def loss_of(embed):
        state = clean(embed)
        return state.square().sum() + smart(embed, state)

    for function in (loss_of, torch.compile(loss_of, backend="aot_eager", fullgraph=True)):
        torch.manual_seed(7)
        net.zero_grad()
        function(EMBED).backward()
        found.append([each.grad.clone() for each in net.parameters()])
        found[-1].append(net[1].num_batches_tracked.clone())
    assert found[1].pop() == 2 * found[0].pop() == 6
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(eager, compiled)


# A module of it is the module


def test_names_are_the_modules_own(net):
    ours = checkpointed(net)
    assert list(map(id, ours.parameters())) == list(map(id, net.parameters()))
    assert list(ours.state_dict()) == list(net.state_dict())
    assert list(SMARTLoss(ours, kl_loss).state_dict()) == list(SMARTLoss(net, kl_loss).state_dict())
    assert list(nn.Sequential(ours).state_dict()) == list(nn.Sequential(net).state_dict())
    assert ours.config is net.config
    with pytest.raises(AttributeError, match="no attribute 'missing'"):
        _ = ours.missing


@pytest.mark.parametrize("wrap", [lambda net: net, nn.Sequential, lambda net: SMARTLoss(net, kl_loss)])
def test_states_are_exchanged_with_the_module(wrap):
    net, other = Network(), Network()
    for source, target in ((net, checkpointed(other)), (checkpointed(net), other)):
        with torch.no_grad():
            net.head.weight += 1.0
        result = wrap(target).load_state_dict(wrap(source).state_dict())
        assert not result.missing_keys
        assert not result.unexpected_keys
        assert all(map(same_bits, net.state_dict().values(), other.state_dict().values()))
    with pytest.raises(RuntimeError, match="Missing key"):
        wrap(checkpointed(other)).load_state_dict({})


def test_modes_copies_and_pickles(net):
    ours = checkpointed(net)
    ours.eval()
    assert not net.training
    assert not checkpointed(net).training
    ours.train()
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert twin.eval_fn is not net
        outputs = []
        for each in (ours, twin):
            torch.manual_seed(7)
            outputs.append(each(EMBED))
        assert same_bits(*outputs)
    function = pickle.loads(pickle.dumps(checkpointed(F.relu)))
    assert same_bits(function(EMBED), EMBED.relu())


# Memory and work


def test_the_perturbed_branch_is_gone_when_the_clean_pass_is_repeated(net):
    class Box:
        def __init__(self, tensor):
            self.tensor = tensor

    boxes, alive = [], []

    def pack(tensor):
        boxes.append(weakref.ref(box := Box(tensor)))
        return box

    def clean(embed):
        alive.append(sum(each() is not None for each in boxes))
        return net(embed)

    embed = EMBED.clone().requires_grad_()
    state = checkpointed(clean)(embed)
    task_loss = F.cross_entropy(state, LABELS)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda box: box.tensor):
        smart = SMARTLoss(net, kl_loss, sym_kl_loss)(embed, state)
    assert sum(each() is not None for each in boxes) > 5  # the last pass; the ascent's is gone
    (task_loss + smart).backward()
    assert alive == [0, 0]


class Step:
    """Forward and backward pass of a training step of a small BERT, with gradients accumulated in place."""

    def __init__(self, regularizer=None, wrap=lambda eval_fn: eval_fn):
        from transformers import BertConfig, BertForSequenceClassification

        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=1000, hidden_size=128, num_hidden_layers=4, num_attention_heads=2, intermediate_size=512,
            num_labels=3,
        )  # fmt: skip
        self.model = BertForSequenceClassification(config)
        self.regularizer = regularizer(self.logits) if regularizer else None
        self.clean = wrap(self.logits)
        self.batch = torch.randint(1000, (8, 64)), torch.randint(3, (8,))
        for each in self.model.parameters():  # so that what is counted are activations
            each.grad = torch.zeros_like(each)

    def logits(self, embed):
        return self.model(inputs_embeds=embed).logits

    def __call__(self, ids, labels):
        torch.manual_seed(1)
        embed = self.model.get_input_embeddings()(ids)
        logits = self.clean(embed)
        loss = F.cross_entropy(logits, labels)
        if self.regularizer is not None:
            loss = loss + self.regularizer(embed, logits)
        loss.backward()
        return loss.detach()

    def peak(self):
        return peak_memory(self, self.batch, torch.device("cpu"))

    def flops(self):
        with FlopCounterMode(display=False) as counter:
            self(*self.batch)
        return counter.get_total_flops()

    def gradients(self):
        self(*self.batch)
        return [each.grad for each in self.model.parameters()]


def smart_fast_loss(eval_fn):
    return SMARTLoss(eval_fn, kl_loss, sym_kl_loss)


def smart_pytorch_loss(eval_fn):
    return smart_pytorch.SMARTLoss(eval_fn, smart_pytorch.kl_loss, smart_pytorch.sym_kl_loss)


STEPS = {
    "plain": (),
    "smart-pytorch": (smart_pytorch_loss,),
    "smart-fast": (smart_fast_loss,),
    "smart-fast, checkpointed": (smart_fast_loss, checkpointed),
}


def shares(measure, unit):
    """What each step takes of what plain fine-tuning takes; printed."""
    pytest.importorskip("transformers")
    found = {}
    for name, options in STEPS.items():
        Step(*options)(*Step().batch)  # what a first call allocates for good
        found[name] = measure(Step(*options))
    for name, value in found.items():
        print(f"{name:>25}: {value / unit[0]:6.2f} {unit[1]}, {value / found['plain']:.3f} x plain")
    return {name: value / found["plain"] for name, value in found.items()}


@pytest.mark.exhaustive
def test_peak_memory():
    found = shares(Step.peak, (2**20, "MiB"))
    assert found["smart-pytorch"] >= 1.9
    assert found["smart-fast, checkpointed"] <= 1.35


@pytest.mark.exhaustive
def test_flops():
    """8 F and 9 F of 3 F, and a little: attention is a product of activations, whose gradients cost the ascent 2 F."""
    found = shares(Step.flops, (1e9, "GFLOP"))
    assert 8 / 3 <= found["smart-fast"] == found["smart-pytorch"] <= 2.75
    assert found["smart-fast, checkpointed"] == pytest.approx(found["smart-fast"] + 1 / 3, abs=1e-3)


def test_gradients_of_the_whole_step():
    """With dropout."""
    pytest.importorskip("transformers")
    plain, ours = (Step(*STEPS[name]).gradients() for name in ("smart-fast", "smart-fast, checkpointed"))
    assert sum(float(each.norm()) for each in plain) > 1.0
    assert all(map(same_bits, plain, ours))
