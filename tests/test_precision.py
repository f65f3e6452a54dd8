"""Half precision: autocast, pure half models, scaled ascents, and noise that rounding takes away."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from smart_fast import SMARTLoss, kl_loss, l2_norm, sym_kl_loss
from smart_fast.backends import select
from tests.helpers import same_bits

HALF = [torch.bfloat16, torch.float16]


@pytest.fixture(params=["torch", "native", "triton"])
def backend(request):
    if (
        request.param != "torch"
        and select("auto" if request.param == "native" else "triton", torch.zeros(1, 1)).name == "torch"
    ):
        pytest.skip(f"{request.param} does not run on CPU tensors here")
    return request.param


class Recording(nn.Module):
    """A small network that notes what it was given and what it gave."""

    def __init__(self):
        super().__init__()
        self.body, self.head, self.seen = nn.Linear(8, 6), nn.Linear(6, 3), []

    def forward(self, x):
        out = self.head(self.body(x).tanh())
        self.seen.append((x.detach().clone(), out.dtype))
        return out


def seeded(smart, *args):
    torch.manual_seed(1)
    return smart(*args)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("num_steps", [0, 1, 2])
def test_under_autocast(dtype, num_steps, backend):
    net, embed = Recording(), torch.randn(4, 8, requires_grad=True)
    smart = SMARTLoss(net, kl_loss, sym_kl_loss, num_steps=num_steps, step_size=10.0, noise_var=0.1, backend=backend)
    with torch.autocast("cpu", dtype):
        loss = seeded(smart, embed, net(embed))
    loss.backward()
    assert all(out == dtype for _, out in net.seen)
    assert all(each.dtype == torch.float32 for each, _ in net.seen)
    assert all(each.grad.isfinite().all() for each in (embed, *net.parameters()))
    assert embed.grad.abs().max() > 0


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("loss_scale", [None, 1024.0])
def test_pure_half_models(dtype, loss_scale, backend):
    net, embed = Recording().to(dtype), torch.randn(4, 8, dtype=dtype, requires_grad=True)
    smart = SMARTLoss(
        net, kl_loss, sym_kl_loss, num_steps=2, noise_var=0.1, step_size=1.0, backend=backend, loss_scale=loss_scale
    )
    loss = smart(embed, net(embed))
    loss.backward()
    assert all(each.dtype == out == dtype for each, out in net.seen)
    assert all(each.grad.dtype == dtype and each.grad.isfinite().all() for each in (embed, *net.parameters()))
    moved = (net.seen[-1][0] - embed.detach()).float().abs().amax(-1)
    torch.testing.assert_close(moved, torch.ones(4), rtol=0.05, atol=0)


# Scaled ascents


@pytest.mark.exhaustive
@pytest.mark.parametrize("update", ["smart-pytorch", "sift"])
@pytest.mark.parametrize("num_steps", [1, 3])
def test_a_power_of_two_changes_nothing_where_nothing_underflows(update, num_steps, backend):
    net, embed = Recording(), torch.randn(4, 8)
    losses = []
    for loss_scale in (None, 2.0**10, 2.0**-3):
        smart = SMARTLoss(
            net, kl_loss, sym_kl_loss, num_steps=num_steps, update=update, step_size=3.0, noise_var=0.1,
            backend=backend, loss_scale=loss_scale,
        )  # fmt: skip
        losses.append(seeded(smart, embed, net(embed)))
    assert same_bits(losses[0], losses[1])
    assert same_bits(losses[0], losses[2])


@pytest.mark.parametrize("kind", ["number", "GradScaler"])
def test_gradients_that_float16_would_lose(kind, backend):
    """A gradient of 1e-9 is zero in float16, whose smallest number is 6e-8; SiFT's step shows whether it arrived."""
    embed = torch.zeros(4, 8, dtype=torch.float16)
    direction = torch.zeros(8, dtype=torch.float16)
    direction[3] = 1.0
    seen = []

    def eval_fn(x):
        seen.append(x.detach().clone())
        return x @ direction

    def last_step(loss_scale, update="sift"):
        smart = SMARTLoss(
            eval_fn, lambda p, s: p.float().sum() * 1e-9, norm_fn=l2_norm, update=update, epsilon=1e-12,
            step_size=0.5 if update == "sift" else 1e12, noise_var=1e-3, backend=backend, loss_scale=loss_scale,
        )  # fmt: skip
        seeded(smart, embed, embed[..., 0])
        return (seen[-1] - seen[-2]).float()

    moved = 0.5 * direction.float().expand(4, 8)
    torch.testing.assert_close(last_step(None), moved, rtol=5e-3, atol=1e-6)  # by a scale of each sample's own
    # smart-pytorch's own rule stays as it is there.
    assert not (last_step(None, "smart-pytorch")[:, 3] > 0.9).all()
    scale = 2.0**16 if kind == "number" else torch.amp.GradScaler("cpu", init_scale=2.0**16)
    for _ in range(2):  # of a GradScaler before and after its first use
        torch.testing.assert_close(last_step(scale), moved, rtol=5e-3, atol=1e-6)
        assert (last_step(scale, "smart-pytorch")[:, 3] > 0.9).all()
        if kind == "GradScaler":
            scale.scale(torch.ones(()))


def test_a_grad_scaler_is_never_read(monkeypatch):
    net, embed = Recording(), torch.randn(4, 8)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    monkeypatch.setattr(scaler, "get_scale", lambda: pytest.fail("get_scale synchronizes"))
    options = {"num_steps": 2, "backend": "torch"}
    losses = [seeded(SMARTLoss(net, kl_loss, loss_scale=each, **options), embed, net(embed)) for each in (scaler, None)]
    assert same_bits(*losses)
    disabled = torch.amp.GradScaler("cpu", enabled=False)
    assert same_bits(seeded(SMARTLoss(net, kl_loss, loss_scale=disabled, **options), embed, net(embed)), losses[1])


def test_an_overflow_leaves_the_noise_where_it_was(backend):
    net, embed = Recording().half(), torch.randn(4, 8, dtype=torch.float16)
    smart = SMARTLoss(
        net, sym_kl_loss, update="sift", step_size=0.5, noise_var=0.1, backend=backend, loss_scale=2.0**60
    )
    smart(embed, net(embed) + 1)
    assert torch.equal(net.seen[-1][0], net.seen[-2][0])


# The ascent in its own precision


@pytest.mark.parametrize("outer", [None, *HALF])
@pytest.mark.parametrize("ascent_dtype", HALF)
def test_ascent_dtype(ascent_dtype, outer, backend):
    net, embed = Recording(), torch.randn(4, 8, requires_grad=True)
    smart = SMARTLoss(
        net,
        kl_loss,
        sym_kl_loss,
        num_steps=2,
        step_size=10.0,
        noise_var=0.1,
        backend=backend,
        ascent_dtype=ascent_dtype,
    )
    with torch.autocast("cpu", outer or torch.bfloat16, enabled=outer is not None):
        state = net(embed)
        net.seen.clear()
        smart(embed, state).backward()
    assert [out for _, out in net.seen] == [ascent_dtype] * 2 + [outer or torch.float32]
    assert all(each.grad.isfinite().all() for each in (embed, *net.parameters()))


def test_ascent_dtype_is_close_to_float32():
    net, embed = Recording(), torch.randn(64, 8)
    options = {"num_steps": 1, "update": "sift", "step_size": 0.5, "noise_var": 0.3, "norm_fn": l2_norm}
    ends = []
    for ascent_dtype in (None, torch.bfloat16):
        seeded(SMARTLoss(net, kl_loss, ascent_dtype=ascent_dtype, **options), embed, net(embed))
        ends.append(net.seen[-1][0] - net.seen[-2][0])
    assert F.cosine_similarity(*ends, dim=-1).median() > 0.95


# Noise that is lost


def share_of_entries_that_change(dtype, noise_var, rms):
    embed = (rms * torch.randn(256, 64)).to(dtype)
    return (embed + (noise_var * torch.randn(256, 64)).to(dtype) != embed).float().mean()


def warned(dtype, **options):
    net = Recording().to(dtype)
    smart = SMARTLoss(net, kl_loss, backend="torch", **options)
    embed = torch.randn(4, 8, dtype=dtype)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            smart(embed, net(embed))
    return [str(each.message) for each in caught]


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.bfloat16, {"num_steps": 0}),
        (torch.bfloat16, {"num_steps": 1, "update": "sift", "step_size": 1e-5}),
        (torch.float16, {"num_steps": 0, "noise_var": 1e-6}),
        (torch.bfloat16, {"update": "paper", "step_size": 1e-2}),
        (torch.bfloat16, {"update": "sift", "scale": "relative", "noise_var": 5e-4, "step_size": 5e-4}),
    ],
)
def test_lost_noise_is_told_once(dtype, options):
    (message,) = warned(dtype, **options)
    assert str(dtype).removeprefix("torch.") in message
    name, value = ("epsilon", 1e-6) if options.get("update") == "paper" else ("noise_var", 1e-5)
    assert f"{name}={options.get(name, value):g}" in message


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {"num_steps": 0}),
        (torch.bfloat16, {}),  # smart-pytorch's update: noise of norm one
        (torch.bfloat16, {"num_steps": 3}),
        (torch.bfloat16, {"num_steps": 0, "noise_var": 1e-2}),
        (torch.bfloat16, {"num_steps": 0, "noise_var": 0.0}),  # asked for
        (torch.bfloat16, {"num_steps": 1, "update": "sift", "step_size": 1e-2}),
        (torch.bfloat16, {"num_steps": 1, "update": "paper", "epsilon": 1e-2, "step_size": 1e-2}),
        (torch.bfloat16, {"num_steps": 0, "scale": "relative", "noise_var": 1e-2}),
        (torch.float16, {"num_steps": 0}),
    ],
)
def test_what_is_not_lost_is_not_told(dtype, options):
    assert warned(dtype, **options) == []


def test_compiled_lost_noise_is_told_once():
    net, embed = Recording().bfloat16(), torch.randn(4, 8, dtype=torch.bfloat16)
    smart = SMARTLoss(nn.Linear(8, 3).bfloat16(), kl_loss, num_steps=0, backend="torch")
    smart.epsilon = 1e-5  # settings are checked when traced
    torch.compiler.reset()
    compiled = torch.compile(smart, fullgraph=True, backend="eager")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            compiled(embed, net(embed))
    assert len([each for each in caught if "is mostly lost" in str(each.message)]) == 1


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("rms", [0.02, 1.0])
def test_the_warning_is_true(dtype, rms):
    """The value that it names changes nearly every entry; below the threshold most of the noise is gone."""
    epsilon = torch.finfo(dtype).eps
    assert share_of_entries_that_change(dtype, 4 * epsilon * rms, rms) > 0.9
    assert share_of_entries_that_change(dtype, epsilon * 0.02 / 8, rms) < 0.25


class Opaque:
    """A state that only its own loss looks into."""

    def __init__(self, logits):
        self.logits = logits

    def detach(self):
        return Opaque(self.logits.detach())


@pytest.mark.parametrize("kind", ["object", "with None", "with integers"])
def test_float16_states_that_are_not_all_tensors(kind, backend):
    net, embed = torch.nn.Linear(8, 3).half(), torch.randn(4, 8).half()
    wrap, logits_of = {
        "object": (Opaque, lambda state: state.logits),
        "with None": (lambda x: (x, None), lambda state: state[0]),
        "with integers": (lambda x: {"x": x, "n": torch.arange(4)}, lambda state: state["x"]),
    }[kind]
    smart = SMARTLoss(
        lambda x: wrap(net(x)), lambda p, s: kl_loss(logits_of(p), logits_of(s)), update="sift", step_size=0.5,
        noise_var=0.01, epsilon=0.0, backend=backend,
    )  # fmt: skip
    assert smart(embed, wrap(net(embed))) > 1e-3  # the step was taken
