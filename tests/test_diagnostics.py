"""Figures of the ascent, the ascent ratio, and ALICE."""

from __future__ import annotations

import copy
import math
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from smart_fast import AliceLoss, SMARTLoss, ascent_ratio, inf_norm, kl_loss, recipes, sym_kl_loss


def model(width=32, classes=5):
    return nn.Sequential(nn.Linear(width, 64), nn.Tanh(), nn.Linear(64, classes))


def smart_of(net, **settings):
    return SMARTLoss(net, kl_loss, sym_kl_loss, diagnose=True, **settings)


def test_figures_by_hand():
    """A step of 0.3 along the largest entries of a known gradient."""
    embed, slope = torch.randn(6, 8), torch.randn(8, 3)
    seen = []

    def eval_fn(x):
        seen.append(x.detach())
        return x @ slope

    settings = {"update": "sift", "noise_var": 0.1, "step_size": 0.3, "epsilon": 0.0}
    smart = smart_of(eval_fn, backend="torch", **settings)
    smart(embed, eval_fn(embed))
    before, after = seen[1] - embed, seen[2] - embed
    found = smart.diagnostics
    assert found["noise_to_embed"] == pytest.approx((after.norm() / embed.norm()).item(), rel=1e-4)
    assert found["step_to_noise"] == pytest.approx(((after - before).norm() / before.norm()).item(), rel=1e-4)
    assert found["cosine"] == pytest.approx(F.cosine_similarity(before.flatten(), after.flatten(), 0).item(), rel=1e-4)
    assert found["changed"] == 1.0
    assert found["dead_rows"] == 0.0


@pytest.mark.parametrize("backend", ["torch", "native", "triton"])
def test_same_figures_on_every_backend(backend):
    torch.manual_seed(0)
    net, embed = model(), torch.randn(40, 32)
    mask = torch.arange(40) < 30
    settings = {"update": "paper", "scale": "relative", "noise_var": 0.05, "step_size": 0.2, "epsilon": 0.1}
    smart = smart_of(net, backend=backend, **settings)
    smart(embed, net(embed), mask=mask)
    found = smart.diagnostics
    assert found["changed"] == pytest.approx(1.0, abs=0.01)
    assert found["step_to_noise"] == pytest.approx(1.6, rel=0.15)
    assert found["noise_to_embed"] == pytest.approx(0.072, rel=0.1)


def test_dead_rows_and_masked_ones():
    embed = torch.randn(10, 8)
    weight = torch.randn(8, 3)

    def eval_fn(x):
        return torch.where(torch.arange(10)[:, None] < 4, x.detach(), x) @ weight

    smart = smart_of(eval_fn, backend="torch", update="paper")
    smart(embed, eval_fn(embed), mask=torch.arange(10) < 8)
    assert smart.diagnostics["dead_rows"] == 0.5


def test_off_by_default():
    net, embed = model(), torch.randn(4, 32)
    smart = SMARTLoss(net, kl_loss)
    smart(embed, net(embed))
    assert smart.diagnostics == {}
    smart.diagnose = True
    smart.num_steps = 0
    smart(embed, net(embed))
    assert set(smart.diagnostics) == {"noise_to_embed", "changed"}
    assert copy.deepcopy(smart)(embed, net(embed)) > 0
    assert pickle.loads(pickle.dumps(smart)).diagnose


def test_what_does_not_work_is_told_once():
    net, embed = model(), torch.randn(4, 32)
    smart = smart_of(net)
    smart(embed, net(embed))
    with pytest.warns(UserWarning, match="no-op.*update='paper'"):
        smart.diagnostics  # noqa: B018
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        smart.diagnostics  # noqa: B018

    lost = smart_of(net, num_steps=0, noise_var=1e-10)
    lost(embed, net(embed))
    with pytest.warns(UserWarning, match="lost in rounding.*scale='relative'"):
        lost.diagnostics  # noqa: B018

    works = smart_of(net, **recipes.RECOMMENDED)
    works(embed, net(embed))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        works.diagnostics  # noqa: B018


def trained():
    """Classes are signs of few directions of many: random noise seldom finds them."""
    torch.manual_seed(0)
    net, truth = model(64), torch.randn(64, 5)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    for _ in range(150):
        x = torch.randn(128, 64)
        loss = F.cross_entropy(net(x), (x @ truth).argmax(-1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net, torch.randn(64, 64)


def test_ascent_ratio():
    net, embed = trained()
    ratio = ascent_ratio(SMARTLoss(net, kl_loss, sym_kl_loss, diagnose=False), embed)
    assert ratio == pytest.approx(1.0, abs=0.25)
    assert ascent_ratio(SMARTLoss(net, kl_loss, sym_kl_loss, **recipes.RECOMMENDED), embed) > 5
    torch.manual_seed(1)
    x = torch.randn(8, 64)
    smart = SMARTLoss(net, kl_loss, **{**recipes.RECOMMENDED, "noise_var": 1.0, "step_size": 0.0})
    assert ascent_ratio(smart, x.expand(64, 8, 64)) == pytest.approx(1.0, abs=0.2)  # noise that nobody has moved


def test_ascent_ratio_is_of_a_smart_loss():
    with pytest.raises(TypeError, match="smart must be a SMARTLoss, got Sequential"):
        ascent_ratio(model(), torch.randn(2, 32))


def test_ascent_ratio_leaves_things_as_they_were():
    net, embed = model().train(), torch.randn(8, 32)
    smart = SMARTLoss(net, kl_loss, skip_in_eval=True, **recipes.RECOMMENDED)
    assert math.isfinite(ascent_ratio(smart, embed, mask=torch.arange(8) < 5))
    assert net.training
    assert smart.training
    assert smart.skip_in_eval
    assert not smart.diagnose
    assert all(each.grad is None for each in net.parameters())
    function = SMARTLoss(lambda x: net(x), kl_loss, **recipes.RECOMMENDED)
    assert math.isfinite(ascent_ratio(function, embed))


def test_alice_is_two_regularizers():
    net, embed, labels = model(), torch.randn(6, 32, requires_grad=True), torch.randint(5, (6,))
    settings = {"backend": "torch", **recipes.RECOMMENDED}
    alice = AliceLoss(net, kl_loss, sym_kl_loss, gold_weight=0.5, **settings)
    torch.manual_seed(0)
    found = alice(embed, net(embed), labels)
    torch.manual_seed(0)
    gold = SMARTLoss(net, F.cross_entropy, **settings)(embed, labels)
    virtual = SMARTLoss(net, kl_loss, sym_kl_loss, **settings)(embed, net(embed))
    torch.testing.assert_close(found, 0.5 * gold + virtual)
    assert gold > F.cross_entropy(net(embed), labels)  # its ascent climbs the loss of the labels
    found.backward()
    assert all(each.grad is not None for each in net.parameters())
    with pytest.raises(TypeError, match="gold_weight"):
        AliceLoss(net, kl_loss, gold_weight="1")
    assert inf_norm is alice.gold.norm_fn
