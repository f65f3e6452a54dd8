"""What SMARTLoss does beyond smart-pytorch: states, masks, checkpoints, generators, update rules."""

from collections import OrderedDict, namedtuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import smart_fast
from smart_fast import SMARTLoss, inf_norm, js_loss, kl_loss, l1_norm, l2_norm, sentence_norm, sym_kl_loss
from tests.helpers import Counting, same_bits

reference = pytest.importorskip("smart_pytorch", reason="the oracle of the drop-in promise is not installed")

pytestmark = pytest.mark.usefixtures("pytorch_by_default")

BATCH, TOKENS, WIDTH = 3, 4, 5
Pair = namedtuple("Pair", ["logits", "hidden"])


class TwoStates(nn.Module):
    """Logits and a hidden state, in any kind of container."""

    def __init__(self, pack):
        super().__init__()
        self.body, self.head, self.pack = nn.Linear(WIDTH, 6), nn.Linear(6, 3), pack

    def forward(self, x):
        hidden = self.body(x).tanh()
        return self.pack(self.head(hidden), hidden)


def as_list(logits, hidden):
    return [logits, hidden]


def as_tuple(logits, hidden):
    return logits, hidden


def as_dict(logits, hidden):
    return {"logits": logits, "hidden": hidden}


def as_ordered(logits, hidden):
    return OrderedDict(logits=logits, hidden=hidden)


def embedding(seed=0, tokens=TOKENS, **options):
    return torch.randn(BATCH, tokens, WIDTH, generator=torch.Generator().manual_seed(seed)).requires_grad_(
        options.get("requires_grad", True)
    )


def seeded(smart, *args, seed=1, **kwargs):
    torch.manual_seed(seed)
    return smart(*args, **kwargs)


# Several states


@pytest.mark.parametrize("pack", [as_list, as_tuple, as_dict, as_ordered, Pair])
@pytest.mark.parametrize("several_losses", [False, True])
def test_several_states(pack, several_losses):
    """The loss, and the ascent through it, are those of one loss of both states, given to smart-pytorch."""
    net, embed = TwoStates(pack), embedding()

    def one_loss(perturbed, state):
        assert type(perturbed) is type(state)
        perturbed, state = (tuple(each.values()) if isinstance(each, dict) else each for each in (perturbed, state))
        return reference.kl_loss(perturbed[0], state[0]) + F.mse_loss(perturbed[1], state[1])

    losses = pack(reference.kl_loss, F.mse_loss) if several_losses else one_loss
    found = seeded(SMARTLoss(net, losses, step_size=100.0, num_steps=2), embed, net(embed))

    def stacked(x):
        return torch.cat((net.head(net.body(x).tanh()), net.body(x).tanh()), dim=-1)

    def stacked_loss(perturbed, state):
        return reference.kl_loss(perturbed[..., :3], state[..., :3]) + F.mse_loss(perturbed[..., 3:], state[..., 3:])

    expected = seeded(reference.SMARTLoss(stacked, stacked_loss, step_size=100.0, num_steps=2), embed, stacked(embed))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(
        torch.autograd.grad(found, net.body.weight), torch.autograd.grad(expected, net.body.weight)
    )


@pytest.mark.parametrize(
    "losses",
    [
        nn.ModuleList([nn.MSELoss(), nn.L1Loss()]),
        [nn.MSELoss(), nn.L1Loss()],
        (nn.MSELoss(), F.l1_loss),
    ],
)
def test_loss_containers_need_not_be_of_the_states_type(losses):
    net, embed = TwoStates(as_tuple), embedding()
    expected = seeded(SMARTLoss(net, lambda p, s: F.mse_loss(p[0], s[0]) + F.l1_loss(p[1], s[1])), embed, net(embed))
    assert same_bits(seeded(SMARTLoss(net, losses), embed, net(embed)), expected)


def test_a_state_of_a_transformers_output_keeps_its_attributes():
    outputs = pytest.importorskip("transformers.modeling_outputs")
    net = TwoStates(lambda logits, hidden: outputs.SequenceClassifierOutput(logits=logits, hidden_states=(hidden,)))
    embed = embedding()
    loss = seeded(SMARTLoss(net, lambda p, s: kl_loss(p.logits, s.logits)), embed, net(embed))
    expected = seeded(SMARTLoss(lambda x: net(x).logits, kl_loss), embed, net(embed).logits)
    assert same_bits(loss, expected)


def test_last_loss_may_be_several_too():
    net, embed = TwoStates(as_dict), embedding()
    losses, last = {"logits": kl_loss, "hidden": F.mse_loss}, {"hidden": F.l1_loss, "logits": js_loss}
    found = seeded(SMARTLoss(net, losses, last), embed, net(embed))
    torch.manual_seed(1)
    captured = Counting(net)
    SMARTLoss(captured, losses)(embed, net(embed))
    perturbed, clean = net(captured.seen[-1][0]), net(embed)
    expected = js_loss(perturbed["logits"], clean["logits"]) + F.l1_loss(perturbed["hidden"], clean["hidden"])
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("losses", "pack", "state", "says"),
    [
        ([kl_loss], as_list, None, ("loss_fn", "list of 1", "list of 2")),
        ([kl_loss, kl_loss], lambda a, b: a, None, ("loss_fn", "list of 2", "one Tensor")),
        ({"logits": kl_loss}, as_dict, None, ("loss_fn", "['logits']", "['logits', 'hidden']")),
        ([kl_loss, kl_loss], as_dict, None, ("loss_fn", "list of 2", "dict")),
        (kl_loss, as_list, torch.zeros(2), ("eval_fn", "list of 2", "one Tensor")),
        (F.mse_loss, as_dict, torch.zeros(2), ("eval_fn", "['logits', 'hidden']", "one Tensor")),
        (lambda p, s: p[0].sum(), as_tuple, (torch.zeros(1),) * 3, ("eval_fn", "tuple of 2", "tuple of 3")),
        (lambda p, s: p.sum(), lambda a, b: a, [torch.zeros(1)], ("eval_fn", "one Tensor", "list of 1")),
    ],
)
def test_a_mismatch_names_both_structures(losses, pack, state, says):
    net, embed = TwoStates(pack), embedding()
    with pytest.raises(ValueError, match=says[0]) as error:
        SMARTLoss(net, losses)(embed, net(embed) if state is None else state)
    assert all(part in str(error.value) for part in says)


def test_one_loss_may_pick_from_what_eval_fn_returns():
    """smart-pytorch lets it, where the state is one tensor."""
    net, embed = TwoStates(as_tuple), embedding()
    found = [
        seeded(smart_loss(net, lambda p, s: reference.kl_loss(p[0], s)), embed, net(embed)[0])
        for smart_loss in (reference.SMARTLoss, SMARTLoss)
    ]
    assert same_bits(*found)


# The arguments of eval_fn


def test_further_arguments_go_to_eval_fn():
    eval_fn = Counting(lambda x, scale, *, shift: (x * scale + shift).sum(-1))
    embed = embedding()
    SMARTLoss(eval_fn, F.mse_loss, num_steps=2)(embed, eval_fn.function(embed, 2, shift=1), 2, shift=1)
    assert eval_fn.calls == 3
    assert all(args[1] == 2 for args in eval_fn.seen)


@pytest.mark.parametrize("num_steps", [0, 1, 3])
@pytest.mark.parametrize("norm", [inf_norm, l2_norm, l1_norm, sentence_norm(l2_norm), lambda x: x.abs().amax()])
def test_masked_positions_are_passed_on_unchanged(num_steps, norm):
    net, embed = nn.Linear(WIDTH, 3), embedding()
    mask = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1], [0, 0, 0, 0]], dtype=torch.bool)
    eval_fn = Counting(net)
    SMARTLoss(eval_fn, kl_loss, norm_fn=norm, num_steps=num_steps)(embed, net(embed).detach(), mask=mask).backward()
    for (seen,) in eval_fn.seen:
        assert torch.equal(seen[~mask], embed[~mask])
        assert (seen[mask] != embed[mask]).any(-1).all()
    assert torch.equal(embed.grad[~mask], torch.zeros_like(embed.grad[~mask]))
    assert embed.grad[mask].abs().max() > 0


def test_a_full_mask_changes_nothing():
    net, embed = nn.Linear(WIDTH, 3), embedding()
    smart = SMARTLoss(net, kl_loss, step_size=10.0, num_steps=2)
    everything = torch.ones(BATCH, TOKENS, dtype=torch.bool)
    assert same_bits(seeded(smart, embed, net(embed)), seeded(smart, embed, net(embed), mask=everything))


@pytest.mark.parametrize("update", ["smart-pytorch", "sift"])
@pytest.mark.parametrize("norm", [sentence_norm(inf_norm), sentence_norm(l2_norm), sentence_norm(l1_norm)])
def test_masked_positions_do_not_count_in_sentence_norms(norm, update):
    """A padded sentence is perturbed as the sentence without padding is, given the same noise."""
    net, embed, normal = nn.Linear(WIDTH, 3), embedding(), torch.randn(BATCH, TOKENS, WIDTH)
    mask = torch.ones(BATCH, TOKENS, dtype=torch.bool)
    mask[:, 3:] = False

    def last_seen(embed, normal, **kwargs):
        eval_fn = Counting(net)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("smart_fast.backends.pytorch.draw_noise", lambda *_: normal)
            # The loss reaches into masked positions: their gradient must not count either.
            smart = SMARTLoss(eval_fn, lambda p, s: (p - s).exp().sum(), norm_fn=norm, step_size=0.1, update=update)
            smart(embed, net(embed), **kwargs)
        return eval_fn.seen[-1][0]

    padded = last_seen(embed, normal, mask=mask)
    torch.testing.assert_close(padded[:, :3], last_seen(embed[:, :3], normal[:, :3]))


@pytest.mark.parametrize("update", ["smart-pytorch", "sift"])
@pytest.mark.parametrize("garbage", [float("nan"), float("inf")])
def test_garbage_in_masked_positions_is_harmless(update, garbage):
    """eval_fn works by position here, so that garbage can only travel through the regularizer."""
    net, embed = nn.Linear(WIDTH, 3), embedding(requires_grad=False)
    mask = torch.tensor([[True, True, False, True]] * BATCH)
    found = []
    for fill in (garbage, 0.0):
        filled = torch.where(mask.unsqueeze(-1), embed, fill).requires_grad_()
        smart = SMARTLoss(net, lambda p, s: kl_loss(p, s, mask=mask), None, sentence_norm(l2_norm), 2, update=update)
        loss = seeded(smart, filled, net(filled), mask=mask)
        found.append((loss, torch.autograd.grad(loss, filled)[0]))
    assert all(map(same_bits, *found))
    assert found[0][0].isfinite()
    assert found[0][1].isfinite().all()


@pytest.mark.parametrize("masks", ["both", "second", "none"])
def test_tuple_embeddings(masks):
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = nn.Linear(WIDTH, 3), nn.Linear(WIDTH, 3)

        def forward(self, left, right, scale=1.0):
            return scale * self.left(left).mean(1) + self.right(right).mean(1)

    net, embeds = Encoder(), (embedding(0), embedding(1, tokens=2))
    each_mask = (torch.rand(BATCH, TOKENS) < 0.5, torch.rand(BATCH, 2) < 0.5)
    mask = {"both": each_mask, "second": (None, each_mask[1]), "none": None}[masks]
    eval_fn = Counting(net)
    loss = SMARTLoss(eval_fn, kl_loss, num_steps=2)(embeds, net(*embeds, 2.0).detach(), scale=2.0, mask=mask)
    loss.backward()
    assert eval_fn.calls == 3
    for index, embed in enumerate(embeds):
        here = torch.ones(embed.shape[:2], dtype=torch.bool) if mask is None or mask[index] is None else mask[index]
        seen = eval_fn.seen[-1][index]
        assert torch.equal((seen != embed).any(-1), here)
        assert torch.equal((embed.grad != 0).any(-1), here)
        torch.testing.assert_close((seen - embed).abs().amax(-1)[here], torch.ones(int(here.sum())), rtol=0.2, atol=0)


def test_embeddings_of_a_pair_get_different_noise():
    eval_fn = Counting(lambda a, b: a.sin() + b)
    embed = embedding(requires_grad=False)
    SMARTLoss(eval_fn, F.mse_loss, num_steps=0, noise_var=1.0)((embed, embed), embed)
    assert not torch.equal(*eval_fn.seen[0])


# Modes of autograd


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_without_gradients(mode, requires_grad):
    net, embed = nn.Sequential(nn.Linear(WIDTH, 6), nn.ReLU(inplace=True), nn.Linear(6, 3)), embedding()
    smart = SMARTLoss(net, kl_loss, num_steps=2, step_size=10.0)
    expected = seeded(smart, embed, net(embed)).detach()
    with mode():
        inner = embed.detach().clone().requires_grad_(requires_grad)
        found = seeded(smart, inner, net(inner), mask=torch.ones(BATCH, TOKENS, dtype=torch.bool))
        assert not torch.is_grad_enabled()
    assert same_bits(found, expected)
    assert not found.requires_grad
    assert all(parameter.grad is None and parameter.requires_grad for parameter in net.parameters())


def test_inference_mode_with_several_states_and_arguments():
    net, embed = TwoStates(as_dict), embedding(requires_grad=False)
    smart = SMARTLoss(lambda x, scale: net(x * scale), {"logits": kl_loss, "hidden": F.mse_loss})
    expected = seeded(smart, embed, net(embed), torch.ones(WIDTH))
    with torch.inference_mode():
        found = seeded(smart, embed * 1, net(embed * 1), scale=torch.ones(WIDTH))
    assert same_bits(found, expected.detach())


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_eval_fn_may_modify_its_input_in_place(in_place, requires_grad):
    head, embed = nn.Linear(WIDTH, 3), embedding(requires_grad=requires_grad)
    net = nn.Sequential(nn.ReLU(inplace=True), head)
    before = embed.detach().clone()
    with torch.set_grad_enabled(in_place):
        loss = seeded(SMARTLoss(net, kl_loss, num_steps=2, step_size=10.0), embed, head(embed.relu()))
        expected = seeded(
            SMARTLoss(lambda x: head(x.relu()), kl_loss, num_steps=2, step_size=10.0), embed, head(embed.relu())
        )
    assert same_bits(loss, expected)
    assert torch.equal(embed, before)


class Checkpointed(nn.Module):
    """A small network with dropout whose blocks are checkpointed one by one, or not at all."""

    def __init__(self, kind):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.Dropout(0.3)) for _ in range(2)
        )
        self.head, self.kind = nn.Linear(WIDTH, 3), kind

    def forward(self, x):
        for block in self.blocks:
            if self.kind is None:
                x = block(x).tanh()
            else:
                x = checkpoint(lambda x, block=block: block(x).tanh(), x, use_reentrant=self.kind == "reentrant")
        return self.head(x)


@pytest.mark.parametrize("as_module", [True, False])
@pytest.mark.parametrize("kind", ["reentrant", "non-reentrant"])
def test_checkpoints_inside_eval_fn(kind, as_module):
    plain = Checkpointed(None)
    net = Checkpointed(kind)
    net.load_state_dict(plain.state_dict())
    net.head.bias.requires_grad_(False)
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    embed, found = embedding(), []
    for each in (plain, net):
        state = seeded(each, embed)
        loss = seeded(SMARTLoss(each if as_module else lambda x, f=each: f(x), kl_loss, step_size=1e3), embed, state)
        if each is net:
            assert all(torch.equal(p.grad, torch.ones_like(p)) for p in net.parameters() if p.requires_grad)
            assert [name for name, p in net.named_parameters() if not p.requires_grad] == ["head.bias"]
            net.zero_grad()
        loss.backward()
        found.append([loss, embed.grad, *(p.grad for n, p in each.named_parameters() if n != "head.bias")])
        embed.grad = None
    torch.testing.assert_close(*found)


def test_the_ascent_leaves_no_trace_on_parameters():
    net, embed = nn.Linear(WIDTH, 3), embedding()
    net.weight.register_hook(lambda grad: pytest.fail("a gradient of a parameter was computed"))
    SMARTLoss(net, kl_loss, num_steps=3)(embed, net(embed).detach())
    assert net.weight.grad is None
    assert embed.grad is None


# Where noise comes from


def test_a_generator_reproduces_and_spares_the_global_one():
    net, embed = nn.Linear(WIDTH, 3), embedding()
    smart = SMARTLoss(net, kl_loss, generator=torch.Generator().manual_seed(7))
    before = torch.get_rng_state()
    first, second = smart(embed, net(embed)), smart(embed, net(embed))
    assert torch.equal(torch.get_rng_state(), before)
    assert not same_bits(first, second)
    smart.generator.manual_seed(7)
    assert same_bits(smart(embed, net(embed)), first)


def test_manual_seed_reproduces_and_consecutive_calls_differ():
    net, embed = nn.Linear(WIDTH, 3), embedding()
    smart = SMARTLoss(net, kl_loss)
    first, second = seeded(smart, embed, net(embed)), smart(embed, net(embed))
    assert not same_bits(first, second)
    assert same_bits(seeded(smart, embed, net(embed)), first)


# The ascent


def ascend_in_float64(noise, grad, norm, step_size, epsilon, update):
    if update == "sift":
        return noise + step_size * grad / (norm(grad) + epsilon)
    moved = noise + step_size * grad
    return moved / (norm(moved) + epsilon)


@pytest.mark.parametrize("update", ["smart-pytorch", "sift"])
@pytest.mark.parametrize(
    ("ours", "plain"),
    [
        (inf_norm, lambda x: x.abs().amax(-1, keepdim=True)),
        (l2_norm, lambda x: x.square().sum(-1, keepdim=True).sqrt()),
        (l1_norm, lambda x: x.abs().sum(-1, keepdim=True)),
        (sentence_norm(inf_norm), lambda x: x.abs().amax((1, 2), keepdim=True)),
        (sentence_norm(l2_norm), lambda x: x.square().sum((1, 2), keepdim=True).sqrt()),
        (sentence_norm(l1_norm), lambda x: x.abs().sum((1, 2), keepdim=True)),
    ],
)
def test_update_rules(ours, plain, update):
    weight, target = torch.randn(WIDTH, dtype=torch.float64), torch.randn(BATCH, TOKENS, dtype=torch.float64)
    embed = embedding().double().detach()

    def half_squares(p, s):
        return 0.5 * (p - s).square().sum()

    settings = {"num_steps": 3, "step_size": 0.3, "epsilon": 0.05, "noise_var": 0.2}
    eval_fn = Counting(lambda x: (x * weight).sum(-1))
    seeded(SMARTLoss(eval_fn, half_squares, norm_fn=ours, **settings, update=update), embed, target)

    torch.manual_seed(1)
    noise = 0.2 * torch.randn_like(embed)
    for (seen,) in eval_fn.seen:
        torch.testing.assert_close(seen, embed + noise)
        grad = ((((embed + noise) * weight).sum(-1) - target).unsqueeze(-1)) * weight
        noise = ascend_in_float64(noise, grad, plain, 0.3, 0.05, update)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("norm", [inf_norm, sentence_norm(l2_norm)])
@pytest.mark.parametrize("epsilon", [1e-6, 0.0])
@pytest.mark.parametrize("update", ["smart-pytorch", "sift"])
def test_gradients_that_are_not_finite_do_not_move_their_row(update, epsilon, norm, bad):
    class Explode(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.sin()

        @staticmethod
        def backward(ctx, grad):
            grad = grad.clone()
            grad[1, 2, 0] = bad
            return grad

    eval_fn, embed = Counting(Explode.apply), embedding()
    smart = SMARTLoss(eval_fn, F.mse_loss, norm_fn=norm, update=update, step_size=0.3, epsilon=epsilon, noise_var=0.1)
    seeded(smart, embed, embed.sin())
    (start,), (end,) = eval_fn.seen
    torch.manual_seed(1)
    noise = 0.1 * torch.randn_like(embed)
    torch.testing.assert_close(start, embed + noise)
    moved = (end - embed).detach()
    assert moved.isfinite().all()
    assert not torch.isclose(moved[0], noise[0]).all()
    # "smart-pytorch" still scales it: the direction is what stays.
    torch.testing.assert_close(F.normalize(moved[1, 2], dim=0), F.normalize(noise[1, 2], dim=0))
    if update == "sift":
        torch.testing.assert_close(moved[1, 2], noise[1, 2])


def test_a_row_without_any_finite_gradient_survives_without_epsilon():
    """Nothing to divide by: noise and gradient of the row are zero."""
    eval_fn, embed = Counting(lambda x: x * torch.tensor([[torch.inf], [1.0]])), torch.ones(2, WIDTH)
    for update in ("smart-pytorch", "sift"):
        smart = SMARTLoss(eval_fn, lambda p, s: p.sum(), update=update, epsilon=0.0, noise_var=0.0)
        smart(embed, embed)
        assert eval_fn.seen[-1][0].isfinite().all()
        assert (eval_fn.seen[-1][0][1] != embed[1]).any()


def test_sift_without_epsilon_leaves_rows_without_gradient():
    eval_fn, embed = Counting(lambda x: x * torch.tensor([[0.0], [1.0]])), torch.ones(2, WIDTH)
    seeded(SMARTLoss(eval_fn, lambda p, s: p.sum(), update="sift", step_size=0.5, epsilon=0.0), embed, embed)
    (start,), (end,) = eval_fn.seen
    torch.testing.assert_close(end - start, torch.tensor([[0.0], [0.5]]).expand(2, WIDTH))


@pytest.mark.parametrize("shape", [(0, WIDTH), (0, TOKENS, WIDTH), (BATCH, 0, WIDTH)])
@pytest.mark.parametrize("loss_fn", [kl_loss, F.mse_loss, sym_kl_loss])
@pytest.mark.parametrize("pooled", [False, True])
def test_zero_size_batches(shape, loss_fn, pooled):
    head = nn.Linear(WIDTH, 3)
    net = (lambda x: head(x).mean(-2)) if pooled else head
    embed = torch.randn(shape, requires_grad=True)
    loss = SMARTLoss(net, loss_fn, num_steps=2)(embed, net(embed))
    loss.backward()
    assert loss.shape == ()
    assert loss == 0
    assert embed.grad.shape == shape
    assert torch.equal(head.weight.grad, torch.zeros_like(head.weight))


def test_one_empty_embedding_of_a_pair():
    embeds = (embedding(), torch.randn(BATCH, 0, WIDTH, requires_grad=True))
    loss = SMARTLoss(lambda a, b: a.sum(1) + b.sum(1), F.mse_loss)(embeds, torch.zeros(BATCH, WIDTH))
    loss.backward()
    assert loss == 0
    assert all(torch.equal(each.grad, torch.zeros_like(each)) for each in embeds)


# Backends


@pytest.mark.filterwarnings("ignore::smart_fast.BackendFallbackWarning")
def test_the_backend_reaches_losses_inside_a_lambda(monkeypatch):
    asked = []
    select = smart_fast.losses.logits.select
    monkeypatch.setattr(
        "smart_fast.losses.logits.select", lambda backend, *a, **k: asked.append(backend) or select("torch", *a)
    )
    for short in ("plain_divergence", "loaded"):
        monkeypatch.setattr(f"smart_fast.losses.logits.{short}", lambda *_: None)
    net, embed = nn.Linear(WIDTH, 3), embedding()
    SMARTLoss(net, lambda p, s: kl_loss(p, s) + js_loss(p, s, backend="torch"), backend="native")(embed, net(embed))
    assert asked == ["native", "torch"] * 2
    asked.clear()
    kl_loss(net(embed), net(embed))
    assert asked == ["auto"]


@pytest.mark.filterwarnings("ignore::smart_fast.BackendFallbackWarning")
def test_two_smart_losses_inside_each_other_keep_their_backends(monkeypatch):
    asked = []
    select = smart_fast.losses.logits.select
    monkeypatch.setattr(
        "smart_fast.losses.logits.select", lambda backend, *a, **k: asked.append(backend) or select("torch", *a)
    )
    for short in ("plain_divergence", "loaded"):
        monkeypatch.setattr(f"smart_fast.losses.logits.{short}", lambda *_: None)
    net, embed = nn.Linear(WIDTH, 3), embedding()
    inner = SMARTLoss(net, kl_loss, backend="torch", num_steps=0)
    outer = SMARTLoss(net, lambda p, s: inner(embed, s) + kl_loss(p, s), backend="native", num_steps=0)
    outer(embed, net(embed))
    assert asked == ["torch", "native"]


@pytest.mark.exhaustive
@pytest.mark.parametrize("requires_grad", [False, True])
def test_torch_compile_with_its_default_settings(requires_grad):
    net, embed = nn.Sequential(nn.Linear(WIDTH, 6), nn.Tanh(), nn.Linear(6, 3)), embedding(requires_grad=requires_grad)
    smart = SMARTLoss(net, kl_loss, num_steps=2, step_size=10.0, backend="torch")
    torch._dynamo.reset()
    compiled = torch.compile(lambda embed: smart(embed, net(embed)), backend="eager")
    found = []
    for run in (compiled, lambda embed: smart(embed, net(embed))):
        loss = seeded(run, embed)
        found.append((loss, *torch.autograd.grad(loss, [net[0].weight] + [embed] * requires_grad)))
    torch.testing.assert_close(*found)
