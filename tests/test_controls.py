"""What runs when: dropout and BatchNorm in the perturbed passes, skipped steps, evaluation."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from smart_fast import SMARTLoss, kl_loss, sym_kl_loss
from tests.helpers import same_bits

pytestmark = pytest.mark.usefixtures("pytorch_by_default")


class Network(nn.Module):
    """Dropout of both kinds and BatchNorm; notes the mode of each pass."""

    def __init__(self):
        super().__init__()
        self.body, self.norm, self.dropout, self.head = (
            nn.Linear(8, 6),
            nn.BatchNorm1d(6),
            nn.Dropout(),
            nn.Linear(6, 3),
        )
        self.passes = []

    def forward(self, x):
        self.passes.append((self.training, self.dropout.training, self.norm.training))
        return self.head(F.dropout(self.dropout(self.norm(self.body(x))), 0.5, self.training))


@pytest.fixture
def net():
    return Network()


EMBED = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


# Dropout


def test_dropout_off_in_the_ascent_only(net):
    net.head.eval()  # not to be put into training mode afterwards
    state = net(EMBED).detach()
    net.passes.clear()
    SMARTLoss(net, kl_loss, num_steps=2, ascent_dropout=False)(EMBED, state)
    assert net.passes == [(False, False, True), (False, False, True), (True, True, True)]
    assert [name for name, each in net.named_modules() if not each.training] == ["head"]


def test_dropout_comes_back_after_an_error(net):
    def fail(*_):
        raise KeyError("of the user")

    hook = net.head.register_forward_hook(fail)
    with pytest.raises(KeyError):
        SMARTLoss(net, kl_loss, ascent_dropout=False)(EMBED, torch.zeros(4, 3))
    assert all(each.training for each in net.modules())
    hook.remove()


def test_without_dropout_the_ascent_is_that_of_a_network_that_has_none():
    net = nn.Sequential(nn.Linear(8, 6), nn.Dropout(0.5), nn.Linear(6, 3))
    seen, options = [], {"num_steps": 2, "step_size": 10.0, "noise_var": 0.1}
    net.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().clone()))
    for module, ascent_dropout in ((net.eval(), True), (net.train(), False)):
        module.train(ascent_dropout is False)
        torch.manual_seed(1)
        SMARTLoss(module, kl_loss, ascent_dropout=ascent_dropout, **options)(EMBED, torch.zeros(4, 3))
    assert len(seen) == 6
    assert all(map(torch.equal, seen[:3], seen[3:]))


# BatchNorm


@pytest.mark.parametrize("frozen", [False, True])
def test_batch_norm_statistics(net, frozen):
    net(EMBED)
    before = copy.deepcopy(net.norm.state_dict())
    smart = SMARTLoss(net, kl_loss, num_steps=2, freeze_batch_norm=frozen)
    smart(EMBED, torch.zeros(4, 3)).backward()
    assert net.norm.num_batches_tracked == before["num_batches_tracked"] + (0 if frozen else 3)
    assert torch.equal(net.norm.running_mean, before["running_mean"]) == frozen
    assert net.norm.track_running_stats


def test_frozen_statistics_change_no_loss():
    net = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))
    losses = []
    for frozen in (False, True):
        torch.manual_seed(1)
        losses.append(SMARTLoss(net, kl_loss, num_steps=2, freeze_batch_norm=frozen)(EMBED, torch.zeros(4, 3)))
    assert same_bits(*losses)


def test_batch_norm_in_eval_mode_uses_its_statistics(net):
    net.eval()
    losses = []
    for frozen in (False, True):
        torch.manual_seed(1)
        losses.append(SMARTLoss(net, kl_loss, freeze_batch_norm=frozen)(EMBED, torch.zeros(4, 3)))
    assert same_bits(*losses)


# Skipped calls


@pytest.mark.parametrize(
    ("every_n_steps", "start_step", "computed"),
    [
        (1, 0, range(8)),
        (3, 0, [0, 3, 6]),
        (1, 5, [5, 6, 7]),
        (2, 3, [3, 5, 7]),
    ],
)
def test_which_calls_compute(net, every_n_steps, start_step, computed):
    smart = SMARTLoss(net, kl_loss, every_n_steps=every_n_steps, start_step=start_step)
    found = []
    for call in range(8):
        net.passes.clear()
        loss = smart(EMBED, torch.zeros(4, 3))
        assert smart.steps == call + 1
        assert bool(net.passes) == (loss != 0)
        found += [call] * bool(net.passes)
    assert found == list(computed)


def test_a_skipped_call_takes_part_in_a_backward_pass(net):
    smart = SMARTLoss(net, kl_loss, start_step=1)
    embed = EMBED.clone().requires_grad_()
    zero = smart(embed, net(embed))
    assert zero.shape == ()
    assert zero == 0
    zero.backward()  # alone
    assert embed.grad is None
    assert all(each.grad is None for each in net.parameters())
    state = net(embed)
    (state.square().sum() + 0.5 * SMARTLoss(net, kl_loss, start_step=1)(embed, state)).backward()
    assert embed.grad.abs().max() > 0
    with torch.no_grad():
        assert not SMARTLoss(net, kl_loss, start_step=1)(embed, state).requires_grad


def test_skipped_calls_draw_no_noise(net):
    before = torch.get_rng_state()
    SMARTLoss(net, kl_loss, start_step=1)((EMBED, EMBED), torch.zeros(4, 3))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("skip", [False, True])
def test_evaluation(net, skip):
    smart = SMARTLoss(net, kl_loss, skip_in_eval=skip, start_step=1).eval()
    for _ in range(3):  # not counted, and computed unless told otherwise
        with torch.no_grad():
            assert (smart(EMBED, torch.zeros(4, 3)) == 0) == skip
    assert bool(net.passes) != skip
    assert smart.steps == 0


def test_inference_mode_counts_once(net):
    smart = SMARTLoss(net, kl_loss)
    with torch.inference_mode():
        smart(EMBED, torch.zeros(4, 3))
    assert smart.steps == 1


def test_the_count_travels_with_copies_but_in_no_state_dict():
    smart = SMARTLoss(nn.Linear(8, 3), kl_loss, every_n_steps=2)
    smart(EMBED, torch.zeros(4, 3))
    assert list(smart.state_dict()) == ["eval_fn.weight", "eval_fn.bias"]
    for twin in (copy.deepcopy(smart), pickle.loads(pickle.dumps(smart))):
        assert twin.steps == 1
        assert twin(EMBED, torch.zeros(4, 3)) == 0
    smart.steps = 100  # when training resumes
    assert smart(EMBED, torch.zeros(4, 3)) != 0


def test_controls_may_change_between_calls(net):
    smart = SMARTLoss(net, kl_loss)
    state = net(EMBED).detach()
    smart.ascent_dropout = False
    net.passes.clear()
    smart(EMBED, state)
    assert net.passes[0][1] is False
    smart.every_n_steps = 0
    with pytest.raises(ValueError, match="every_n_steps must be at least 1, got 0"):
        smart(EMBED, state)


def dropping():
    return nn.Sequential(nn.Linear(8, 64), nn.Dropout(0.5), nn.Linear(64, 4))


@pytest.mark.parametrize("num_steps", [0, 1, 2])
def test_shared_dropout_draws_the_clean_masks(num_steps):
    net, embed = dropping(), torch.randn(5, 8)
    settings = {"num_steps": num_steps, "noise_var": 0.0, "update": "sift", "step_size": 0.0}
    assert SMARTLoss(net, kl_loss, sym_kl_loss, **settings)(embed, net(embed)) > 0.1
    smart = SMARTLoss(net, kl_loss, sym_kl_loss, shared_dropout=True, **settings)
    state = net(embed)
    torch.rand(7)  # whatever is drawn in between
    assert smart(embed, state) < 1e-6


def test_shared_dropout_leaves_the_generator_where_noise_left_it():
    net, embed = dropping(), torch.randn(5, 8)
    smart = SMARTLoss(net, kl_loss, noise_var=1e-2, update="sift", shared_dropout=True)
    smart(embed, net(embed))  # a first call makes a second attempt where there are reentrant checkpoints
    torch.manual_seed(3)
    net(embed)
    torch.randn(embed.shape)  # the noise
    expected = torch.rand(4)
    torch.manual_seed(3)
    smart(embed, net(embed))
    assert torch.equal(torch.rand(4), expected)


def test_shared_dropout_inside_a_checkpoint():
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = dropping()

        def forward(self, x):
            return checkpoint(self.inner, x, use_reentrant=False)

    net, embed = Checkpointed(), torch.randn(5, 8, requires_grad=True)
    smart = SMARTLoss(net, kl_loss, sym_kl_loss, shared_dropout=True, noise_var=0.0, update="sift", step_size=0.0)
    loss = smart(embed, net(embed))
    assert loss < 1e-6
    loss.backward()


def test_shared_dropout_of_copies():
    smart = SMARTLoss(dropping(), kl_loss, shared_dropout=True, num_steps=0, noise_var=0.0)
    embed = torch.randn(5, 8)
    smart.eval_fn(embed)
    for other in (copy.deepcopy(smart), pickle.loads(pickle.dumps(smart))):
        assert other(embed, other.eval_fn(embed)) < 1e-6
    fresh = pickle.loads(pickle.dumps(smart))
    with pytest.raises(RuntimeError, match="no dropout masks to share"):
        fresh(embed, torch.randn(5, 4))


def test_shared_dropout_needs_a_module():
    with pytest.raises(ValueError, match="shared_dropout=True needs an eval_fn that is a Module"):
        SMARTLoss(lambda x: x, kl_loss, shared_dropout=True)
