"""The proximal term and its teacher, against float64 by hand."""

import copy
import pickle
import warnings
import weakref
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from smart_fast import BregmanProximal, SMARTLoss, checkpointed, kl_loss, paper_beta, sym_kl_loss
from tests.helpers import same_bits

INPUTS = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))


def network(dtype=torch.float32):
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


@torch.no_grad()
def disturb(model, step=0):
    generator = torch.Generator().manual_seed(step)
    for each in model.parameters():
        each += 0.1 * torch.randn(each.shape, generator=generator).to(each)


def symmetric_kl(x, t):
    """In float64, from the definition."""
    log_p, log_q = x.double().log_softmax(-1), t.double().log_softmax(-1)
    return ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum()


def train(model, proximal, steps, *, seed=0):
    """Losses of a few steps with dropout, SMART and the proximal term."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    smart, losses = SMARTLoss(model, kl_loss, sym_kl_loss, noise_var=0.1), []
    for step in steps:
        torch.manual_seed(seed + step)
        logits = model(INPUTS)
        loss = F.cross_entropy(logits, torch.arange(6) % 3) + smart(INPUTS, logits) + proximal(logits, INPUTS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        proximal.update()
        losses.append(loss.detach())
    return losses


# The teacher


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_teacher_is_the_closed_form(dtype):
    def beta(step):
        return (0.5, 0.9, 0.0, 1.0, 0.75)[step]

    model = network(dtype)
    proximal = BregmanProximal(model, beta)
    proximal(model(INPUTS.to(dtype)), INPUTS.to(dtype))
    past = [[each.detach().double().clone() for each in model.parameters()]]
    for step in range(5):
        disturb(model, step)
        proximal.update()
        past.append([each.detach().double().clone() for each in model.parameters()])
        assert proximal.steps == step + 1
        # teacher_n = (product of all betas) past_0 + sum over k of (1 - beta_k) (product of the later betas) past_k
        weights = [1.0] + [1.0 - beta(k) for k in range(step + 1)]
        for k in range(step + 1):
            for earlier in range(k + 1):
                weights[earlier] *= beta(k)
        for index, found in enumerate(proximal.teacher.parameters()):
            expected = sum(weight * each[index] for weight, each in zip(weights, past, strict=True))
            assert (found.double() - expected).abs().max() <= 1e-7
            assert found.dtype == dtype


def test_beta_of_the_paper():
    beta = paper_beta(50)
    assert [beta(step) for step in range(50)] == [0.99] * 5 + [0.999] * 45
    assert [paper_beta(15)(step) for step in range(3)] == [0.99, 0.999, 0.999]
    assert paper_beta(30)(2) == 0.99
    assert pickle.loads(pickle.dumps(beta))(5) == 0.999


def test_without_momentum_the_teacher_is_the_last_update():
    model = network()
    proximal = BregmanProximal(model, beta=0.0)
    for step in range(2):
        disturb(model, step)
        proximal.update()
        assert all(map(same_bits, proximal.teacher.parameters(), model.parameters()))
        output = model(INPUTS)
        loss = proximal(output, INPUTS)
        (gradient,) = torch.autograd.grad(loss, output)
        assert loss == 0
        assert not gradient.any()
    disturb(model, 2)
    assert proximal(model(INPUTS), INPUTS) > 1e-3


@pytest.mark.parametrize("first", ["forward", "update", "teacher"])
def test_the_teacher_starts_when_it_is_first_needed(first):
    model = network()
    proximal = BregmanProximal(model, 0.5)
    assert proximal.steps == 0
    disturb(model)
    if first == "forward":
        assert proximal(model(INPUTS), INPUTS) == 0
    elif first == "update":
        proximal.update()
    assert all(map(same_bits, proximal.teacher.parameters(), model.parameters()))
    assert proximal.steps == (first == "update")
    disturb(model)
    assert not torch.equal(proximal.teacher[0].weight, model[0].weight)


def test_the_teacher_is_nobodys_parameter():
    model = nn.Sequential(network(), nn.Dropout())
    task = nn.ModuleDict({"model": model, "proximal": BregmanProximal(model)})
    proximal, count = task["proximal"], len(list(model.parameters()))
    model.train()
    model(INPUTS).sum().backward()
    teacher = proximal.teacher
    task.train()
    assert len(list(task.parameters())) == count
    assert [name for name, _ in proximal.named_parameters()] == []
    assert not any(each.training for each in teacher.modules())
    assert model[1].training
    assert not any(each.requires_grad for each in teacher.parameters())
    assert all(each.grad is None for each in teacher.parameters())
    assert {each.data_ptr() for each in teacher.parameters()}.isdisjoint(each.data_ptr() for each in model.parameters())


def test_buffers_are_the_models_own():
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8))
    model.register_buffer("positions", torch.arange(512))  # which an average in floating point would change
    proximal = BregmanProximal(model, 0.999)
    for _ in range(3):
        output = model(INPUTS)
        before = copy.deepcopy(dict(proximal.teacher.named_buffers()))
        proximal(output, INPUTS)  # in eval mode
        assert all(map(torch.equal, before.values(), proximal.teacher.buffers()))
        proximal.update()
        assert all(map(torch.equal, model.buffers(), proximal.teacher.buffers()))
    assert proximal.teacher[1].num_batches_tracked == 3


def test_the_teacher_moves_along():
    model = network()
    task = nn.ModuleDict({"model": model, "proximal": BregmanProximal(model)})
    task["proximal"].update()
    task.to(torch.float64)
    assert {each.dtype for each in task["proximal"].teacher.parameters()} == {torch.float64}
    disturb(model)
    task["proximal"].update()
    assert task["proximal"](model(INPUTS.double()), INPUTS.double()).dtype == torch.float64


def test_the_students_generator_is_left_alone():
    model = nn.Sequential(network(), nn.Dropout())
    proximal = BregmanProximal(model)
    output = model(INPUTS)
    before = torch.get_rng_state()
    proximal(output, INPUTS)
    proximal.update()
    assert torch.equal(torch.get_rng_state(), before)


# The term


@pytest.mark.parametrize("backend", ["torch", "auto"])
@pytest.mark.parametrize(("reduction", "count"), [("batchmean", 6), ("sum", 1), ("mean", 18)])
def test_value_and_gradient_are_those_of_the_definition(backend, reduction, count):
    model = network()
    proximal = BregmanProximal(model, 0.9, 3.0, reduction=reduction, backend=backend)
    proximal.update()
    for size in (1.0, 1e-3):  # of the way between the two
        for student, teacher in zip(model.parameters(), proximal.teacher.parameters(), strict=True):
            student.data.copy_(teacher + size * torch.randn(teacher.shape))
        exact, fixed = copy.deepcopy(model).double(), copy.deepcopy(proximal.teacher).double()
        # The gradient of the exact divergence at the very logits that the models have in float32.
        x, t = model(INPUTS), proximal.teacher(INPUTS)
        logits = x.detach().double().requires_grad_()
        expected = 3.0 * symmetric_kl(logits, t) / count
        (upstream,) = torch.autograd.grad(expected, logits)
        exact(INPUTS.double()).backward(upstream)
        model.zero_grad()
        loss = proximal(x, INPUTS)
        loss.backward()
        assert abs(loss.double() - expected) <= 1e-5 * expected
        for found, want in zip(model.parameters(), exact.parameters(), strict=True):
            assert (found.grad.double() - want.grad).norm() <= 1e-5 * want.grad.norm()
        assert all(each.grad is None for each in fixed.parameters())


def test_float64_to_the_last_digits():
    model = network(torch.float64)
    proximal = BregmanProximal(model, 0.5)
    proximal.update()
    disturb(model)
    exact = copy.deepcopy(model)
    loss = proximal(model(INPUTS.double()), INPUTS.double())
    loss.backward()
    expected = symmetric_kl(exact(INPUTS.double()), proximal.teacher(INPUTS.double())) / 6
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    for found, want in zip(model.parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(found.grad, want.grad, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_classes_that_are_out_of_the_question(dtype):
    """Probabilities that underflow, logits of minus infinity on both sides: as if they were not there."""
    bias = nn.Parameter(torch.tensor([0.0, 1.0, 0.0, -1e4, -torch.inf], dtype=dtype))
    model = nn.Sequential(nn.Linear(5, 5).to(dtype))
    model[0].bias = bias
    proximal = BregmanProximal(model, 0.9, backend="torch")
    assert not proximal.teacher.training
    with torch.no_grad():
        model[0].weight += 0.1
        model[0].weight[0] -= 0.3
    output = model(INPUTS.to(dtype))
    loss = proximal(output, INPUTS.to(dtype))
    (gradient,) = torch.autograd.grad(loss, output)
    target = proximal.teacher(INPUTS.to(dtype))
    torch.testing.assert_close(loss.double(), symmetric_kl(output[:, :3], target[:, :3]) / 6, rtol=1e-5, atol=0)
    assert gradient[:, :3].any()
    assert not gradient[:, 3:].any()


def test_the_gradient_is_that_of_both_terms():
    """`sym_kl_loss`, which detaches what it compares with, gives the value and one of two nearly equal gradients."""
    model = network()
    kinds = (None, sym_kl_loss)
    both = [BregmanProximal(model, loss_fn=each, reduction="sum") for each in kinds]
    for each in both:
        each.update()
    with torch.no_grad():
        model[2].bias += torch.tensor([1e-2, 0.0, 0.0])
    output = model(INPUTS)
    losses = [each(output, INPUTS) for each in both]
    torch.testing.assert_close(*losses, rtol=5e-3, atol=0)  # smart-pytorch's formula cancels
    whole, half = (torch.autograd.grad(loss, output, retain_graph=True)[0] for loss in losses)
    torch.testing.assert_close(whole, 2 * half, rtol=2e-2, atol=1e-5)


def test_regression():
    model = network()
    proximal = BregmanProximal(model, 0.5, 2.0, loss_fn=F.mse_loss)
    proximal.update()
    disturb(model)
    output = model(INPUTS)
    loss = proximal(output, INPUTS)
    (gradient,) = torch.autograd.grad(loss, output)
    gap = output.detach() - proximal.teacher(INPUTS)
    torch.testing.assert_close(loss.detach(), 2.0 * gap.square().mean())
    torch.testing.assert_close(gradient, 4.0 * gap / gap.numel())


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(5, 3), nn.Linear(5, 1)

    def forward(self, x, *, wrap=lambda left, right: (left, right)):
        return wrap(self.left(x), self.right(x))


def test_several_outputs():
    model = TwoHeads()
    proximal = BregmanProximal(model, loss_fn=[sym_kl_loss, F.mse_loss])
    proximal.update()
    disturb(model)
    output, target = model(INPUTS), proximal.teacher(INPUTS)
    expected = sym_kl_loss(output[0], target[0]) + F.mse_loss(output[1], target[1])
    torch.testing.assert_close(proximal(output, INPUTS), expected)
    with pytest.raises(ValueError, match="structure"):
        proximal(output[0], INPUTS)
    with pytest.raises(ValueError, match="one to one"):
        BregmanProximal(model, loss_fn=[sym_kl_loss])(output, INPUTS)


def test_objects_with_logits_and_other_objects():
    model = TwoHeads()
    wrap = {"wrap": lambda left, right: SimpleNamespace(logits=left, value=right)}
    proximal = BregmanProximal(model)
    proximal.update()
    disturb(model)
    output = model(INPUTS, **wrap)
    whole = proximal(output, INPUTS, **wrap)
    assert whole > 0
    assert same_bits(whole, proximal(output.logits, INPUTS, **wrap))
    of_value = BregmanProximal(model, loss_fn=F.mse_loss, output_fn=lambda output: output.value)
    of_value.update()
    disturb(model)
    value = model(INPUTS)[1]
    expected = F.mse_loss(value, of_value.teacher(INPUTS)[1])
    torch.testing.assert_close(of_value(model(INPUTS, **wrap), INPUTS, **wrap), expected)


def test_hugging_face():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        num_hidden_layers=1, hidden_size=16, num_attention_heads=2, intermediate_size=16, vocab_size=50
    )
    model = transformers.BertForSequenceClassification(config)
    proximal = BregmanProximal(model, beta=0.5)
    batch = {"input_ids": torch.randint(50, (2, 7)), "attention_mask": torch.ones(2, 7, dtype=torch.long)}
    proximal.update()
    disturb(model.eval())
    output = model(**batch)
    expected = symmetric_kl(output.logits, proximal.teacher(**batch).logits) / 2
    torch.testing.assert_close(proximal(output, **batch).double(), expected, rtol=1e-4, atol=0)
    proximal.update()
    assert torch.equal(proximal.teacher.bert.embeddings.position_ids, model.bert.embeddings.position_ids)


def test_mu_and_beta_may_change():
    model = network()
    proximal = BregmanProximal(model, 0.5)
    proximal.update()
    disturb(model)
    output = model(INPUTS)
    once = proximal(output, INPUTS)
    proximal.mu, proximal.beta = 4.0, 0.0
    torch.testing.assert_close(proximal(output, INPUTS), 4 * once)
    proximal.update()
    assert proximal(output, INPUTS) == 0


def test_no_batch():
    model = network()
    output = model(INPUTS[:0])
    loss = BregmanProximal(model)(output, INPUTS[:0])
    assert loss == 0
    loss.backward()
    assert not model[0].weight.grad.any()


def test_the_teacher_keeps_no_graph_and_no_activations():
    model = network()
    proximal, alive, saved = BregmanProximal(model), [], []
    proximal.teacher[1].register_forward_hook(lambda *args: alive.append(weakref.ref(args[2])))
    output = model(INPUTS)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        loss = proximal(output, INPUTS.clone().requires_grad_())
    assert len(alive) == 1
    assert alive[0]() is None
    ours = {each.data_ptr() for each in proximal.teacher.parameters()}
    assert not any(each.data_ptr() in ours for each in saved)
    leaves, nodes = set(), [loss.grad_fn]
    for node in nodes:
        leaves |= {node.variable} if hasattr(node, "variable") else set()
        nodes += [each for each, _ in node.next_functions if each is not None]
    assert leaves == set(model.parameters())


def test_with_no_grad_and_inference_mode():
    model = network()
    proximal = BregmanProximal(model, 0.5)
    with torch.inference_mode():
        assert proximal(model(INPUTS), INPUTS) == 0  # the teacher starts here
    disturb(model)
    proximal.update()
    with torch.no_grad():
        assert proximal(model(INPUTS), INPUTS) > 0
    proximal(model(INPUTS), INPUTS).backward()
    assert model[0].weight.grad.any()


def test_autocast():
    model = network()
    proximal = BregmanProximal(model)
    proximal.update()
    disturb(model)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(INPUTS)
        loss = proximal(output, INPUTS)
        target = proximal.teacher(INPUTS)
    assert output.dtype == target.dtype == torch.bfloat16
    torch.testing.assert_close(loss.double(), symmetric_kl(output, target) / 6, rtol=1e-3, atol=0)


def test_compiled_models():
    model = network()
    proximal = BregmanProximal(torch.compile(model, backend="eager"))
    assert list(proximal.teacher.state_dict()) == list(model.state_dict())
    disturb(model)
    step = torch.compile(lambda x: proximal(model(x), x), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(step(INPUTS), proximal(model(INPUTS), INPUTS))
    fresh = BregmanProximal(model)
    with pytest.raises(Exception, match=r"use proximal\.teacher before"):
        torch.compile(lambda x: fresh(model(x), x), backend="eager", fullgraph=True)(INPUTS)


def test_beside_a_checkpointed_clean_pass():
    gradients = []
    for wrap in (lambda model: model, checkpointed):
        torch.manual_seed(3)
        model = nn.Sequential(network(), nn.Dropout())
        train(model, proximal := BregmanProximal(model, 0.5), range(1))
        logits = wrap(model)(INPUTS)
        (logits.square().sum() + proximal(logits, INPUTS)).backward()
        gradients.append([each.grad for each in model.parameters()])
    assert all(map(same_bits, *gradients))


# Saving, copying


def dropping():
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 3))


def test_training_resumes_bit_for_bit():
    torch.manual_seed(0)
    model = dropping()
    proximal = BregmanProximal(model, paper_beta(50))
    train(model, proximal, range(4))
    saved = pickle.loads(pickle.dumps((model.state_dict(), proximal.state_dict())))
    straight = train(model, proximal, range(4, 9))  # and beta changes on the way
    again = dropping()
    resumed = BregmanProximal(again, paper_beta(50))
    again.load_state_dict(saved[0])
    assert str(resumed.load_state_dict(saved[1])) == "<All keys matched successfully>"
    assert resumed.steps == 4
    assert all(map(same_bits, train(again, resumed, range(4, 9)), straight))
    assert all(map(same_bits, resumed.state_dict().values(), proximal.state_dict().values()))


def test_a_state_that_is_loaded_in_place_and_within_others():
    model = network()
    task = nn.ModuleDict({"model": model, "proximal": BregmanProximal(model, 0.5)})
    empty = copy.deepcopy(task.state_dict())
    train(model, task["proximal"], range(2))
    saved = copy.deepcopy(task.state_dict())
    assert [key for key in saved if key.startswith("proximal.")][:2] == [
        "proximal.n_averaged",
        "proximal.module.0.weight",
    ]
    train(model, task["proximal"], range(2, 4))
    task.load_state_dict(saved)
    assert task["proximal"].steps == 2
    assert all(map(same_bits, task.state_dict().values(), saved.values()))
    task.load_state_dict(empty)  # of a teacher that had not been made
    assert task["proximal"].steps == 0
    assert task.state_dict().keys() == empty.keys()


def test_states_that_do_not_fit():
    model = network()
    proximal = BregmanProximal(model)
    proximal.update()
    state = proximal.state_dict()
    missing = {key: value for key, value in state.items() if key != "module.0.bias"}
    with pytest.raises(RuntimeError, match=r'Missing key.*"module\.0\.bias"'):
        proximal.load_state_dict(missing)
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"module\.9\.bias"'):
        proximal.load_state_dict({**state, "module.9.bias": torch.zeros(1)})
    with pytest.raises(RuntimeError, match=r"size mismatch for module\.0\.bias"):
        proximal.load_state_dict({**state, "module.0.bias": torch.zeros(1)})


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))])
@pytest.mark.parametrize("started", [False, True])
def test_copies_of_both(clone, started):
    model = dropping()
    proximal = BregmanProximal(model, paper_beta(5))
    train(model, proximal, range(2 * started))
    twin, copied = clone((model, proximal))
    assert copied.model is twin
    assert copied.steps == proximal.steps
    assert all(map(same_bits, train(model, proximal, range(2, 4)), train(twin, copied, range(2, 4))))
    assert all(map(same_bits, proximal.state_dict().values(), copied.state_dict().values()))


# Errors


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"beta": 1.5}, ValueError, r"beta must be in \[0, 1\], got 1.5"),
        ({"beta": -0.1}, ValueError, r"beta must be in \[0, 1\], got -0.1"),
        ({"beta": "0.9"}, TypeError, "beta must be a real number, got str"),
        ({"beta": float("nan")}, ValueError, "beta must be finite"),
        ({"mu": -1.0}, ValueError, "mu must not be negative, got -1.0"),
        ({"mu": None}, TypeError, "mu must be a real number, got NoneType"),
        ({"loss_fn": 3}, TypeError, "loss_fn must be callable"),
        ({"output_fn": "logits"}, TypeError, "output_fn must be callable, got str"),
        ({"reduction": "none"}, ValueError, "reduction must be one of .*, got 'none'"),
        ({"backend": "cuda"}, ValueError, "backend 'cuda' does not exist"),
        ({"model": F.relu}, TypeError, "model must be a Module, got function"),
    ],
)
def test_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        BregmanProximal(**{"model": network(), **arguments})


def test_what_a_schedule_gives():
    model = network()
    proximal = BregmanProximal(model, lambda step: 2.0 if step else 1.0)
    proximal.update()
    with pytest.raises(ValueError, match=r"beta must be in \[0, 1\], got 2.0"):
        proximal.update()
    assert proximal.steps == 1
    with pytest.raises(ValueError, match="total_steps must be at least 1, got 0"):
        paper_beta(0)


def test_what_is_compared():
    model = network()
    proximal = BregmanProximal(model)
    with pytest.raises(TypeError, match="the teacher needs inputs"):
        proximal(model(INPUTS))
    with pytest.raises(ValueError, match=r"the teacher's shape \(6, 3\), got \(4, 3\)"):
        proximal(model(INPUTS[:4]), INPUTS)
    with pytest.raises(TypeError, match=r"output must be a torch\.Tensor, got list"):
        BregmanProximal(model, output_fn=list)(model(INPUTS), INPUTS)
    proximal.mu = -1.0
    with pytest.raises(ValueError, match="mu must not be negative"):
        proximal(model(INPUTS), INPUTS)


def test_a_model_that_has_changed():
    model = network()
    proximal = BregmanProximal(model)
    proximal.update()
    model[2] = nn.Linear(8, 4)
    with pytest.raises(
        ValueError, match=r"got \('2.weight', \(4, 8\), torch.float32\) in place of \('2.weight', \(3, 8\)"
    ):
        proximal.update()
    model[2] = nn.Linear(8, 3, bias=False)
    with pytest.raises(ValueError, match=r"got None in place of \('2.bias'"):
        proximal.update()
    assert proximal.steps == 1


def test_half_precision_parameters_are_told():
    proximal = BregmanProximal(network(torch.bfloat16), 0.999)
    with pytest.warns(UserWarning, match="half precision parameters"):
        proximal.update()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        BregmanProximal(network(torch.bfloat16), 0.0).update()  # a copy loses nothing
