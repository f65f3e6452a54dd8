"""Wrong arguments: the right exception, a message that names the argument, and nothing run before it."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import smart_fast
from smart_fast import SMARTLoss, hellinger_loss, js_loss, kl_loss, sentence_norm, stable_sym_kl_loss, sym_kl_loss
from tests.helpers import Counting

NAN, INF = float("nan"), float("inf")
LOSSES = [kl_loss, sym_kl_loss, js_loss, hellinger_loss, stable_sym_kl_loss]
every_loss = pytest.mark.parametrize("loss_fn", LOSSES, ids=lambda loss_fn: loss_fn.__name__)

SETTINGS = [
    ("eval_fn", None, TypeError),
    ("loss_fn", "kl", TypeError),
    ("loss_fn", [], ValueError),
    ("loss_fn", [kl_loss, 3], TypeError),
    ("loss_fn", {"a": None}, TypeError),
    ("loss_last_fn", 3, TypeError),
    ("norm_fn", "inf", TypeError),
    ("norm_fn", None, TypeError),
    ("num_steps", -1, ValueError),
    ("num_steps", 1.0, TypeError),
    ("num_steps", "1", TypeError),
    ("num_steps", None, TypeError),
    *((name, value, ValueError) for name in ("step_size", "epsilon", "noise_var") for value in (NAN, INF, -INF)),
    *((name, value, TypeError) for name in ("step_size", "epsilon", "noise_var") for value in ("1", None, 1j, [1.0])),
    ("backend", "cuda", ValueError),
    ("backend", "", ValueError),
    ("backend", None, TypeError),
    ("update", "newton", ValueError),
    ("update", None, TypeError),
    ("ascent", "sideways", ValueError),
    ("ascent", 1, TypeError),
    ("scale", "metric", ValueError),
    ("scale", 2.0, TypeError),
    ("ascent_dtype", torch.float32, ValueError),
    ("ascent_dtype", "bfloat16", TypeError),
    ("loss_scale", "65536", TypeError),
    ("loss_scale", 0.0, ValueError),
    ("loss_scale", float("inf"), ValueError),
    ("freeze_parameters", 1, TypeError),
    ("freeze_parameters", True, ValueError),  # eval_fn is no Module here
    ("ascent_dropout", None, TypeError),
    ("ascent_dropout", False, ValueError),
    ("freeze_batch_norm", "yes", TypeError),
    ("freeze_batch_norm", True, ValueError),
    ("every_n_steps", 0, ValueError),
    ("every_n_steps", 1.5, TypeError),
    ("start_step", -1, ValueError),
    ("skip_in_eval", 0, TypeError),
    ("generator", 42, TypeError),
]


def counting():
    return Counting(nn.Linear(5, 3))


@pytest.mark.parametrize(("name", "value", "error"), SETTINGS)
def test_settings(name, value, error):
    """At construction, and when an attribute is changed later."""
    settings = {"eval_fn": counting(), "loss_fn": kl_loss}
    with pytest.raises(error, match=name):
        SMARTLoss(**{**settings, name: value})
    smart = SMARTLoss(**settings)
    setattr(smart, name, value)
    with pytest.raises(error, match=name):
        smart(torch.randn(2, 5), torch.randn(2, 3))
    assert settings["eval_fn"].calls == 0


@pytest.mark.parametrize(
    ("name", "says"),
    [("update", "smart-pytorch.*sift.*paper"), ("ascent", "perturbed.*fisher"), ("scale", "absolute.*relative")],
)
def test_unknown_choices_are_told_the_known_ones(name, says):
    with pytest.raises(ValueError, match=rf"{name}.*{says}.*newton"):
        SMARTLoss(counting(), kl_loss, **{name: "newton"})


def test_a_ball_has_a_radius():
    with pytest.raises(ValueError, match="epsilon, the radius of a ball, must not be negative, got -1"):
        SMARTLoss(counting(), kl_loss, update="paper", epsilon=-1.0)


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, value, _ in SETTINGS if value in ("newton", -1)])
def test_messages_tell_what_was_given(name, value):
    with pytest.raises(ValueError, match=str(value)):
        SMARTLoss(counting(), kl_loss, **{name: value})


def test_new_parameters_are_keyword_only():
    with pytest.raises(TypeError, match="at most 8 arguments without their names, got 9"):
        SMARTLoss(counting(), kl_loss, None, smart_fast.inf_norm, 1, 1e-3, 1e-6, 1e-5, "torch")


E25 = torch.randn(2, 5)
PAIR = (E25, E25)
META = torch.zeros(2, 5, device="meta")
INPUTS = {
    "integers": (torch.zeros(2, 5, dtype=torch.long), {}, TypeError, "embed.*int64"),
    "booleans": (torch.zeros(2, 5, dtype=torch.bool), {}, TypeError, "embed.*bool"),
    "no tensor": ([[1.0]], {}, TypeError, "embed.*list"),
    "None": (None, {}, TypeError, "embed.*NoneType"),
    "no width": (torch.zeros(2, 0), {}, ValueError, r"embed.*last dimension.*\(2, 0\)"),
    "no width, no rows": (torch.zeros(0, 0), {}, ValueError, "embed.*last dimension"),
    "empty tuple": ((), {}, ValueError, "embed"),
    "integers in a tuple": ((E25, torch.zeros(2, 5).int()), {}, TypeError, r"embed\[1\].*int32"),
    "no width in a tuple": ((E25, torch.zeros(2, 0)), {}, ValueError, r"embed\[1\].*last dimension"),
    "mask of numbers": (E25, {"mask": torch.ones(2)}, TypeError, "mask.*float32"),
    "mask of integers": (E25, {"mask": torch.ones(2).long()}, TypeError, "mask.*int64"),
    "mask with a last dimension": (E25, {"mask": torch.ones(2, 5) > 0}, ValueError, r"mask.*\(2,\).*\(2, 5\)"),
    "mask that broadcasts": (E25, {"mask": torch.ones(1) > 0}, ValueError, r"mask.*\(2,\).*\(1,\)"),
    "mask elsewhere": (E25, {"mask": (META > 0)[:, 0]}, ValueError, "mask.*device.*meta"),
    "mask as a list": (E25, {"mask": [True, False]}, (TypeError, ValueError), "mask"),
    "mask of a string": (E25, {"mask": "all"}, TypeError, "mask.*str"),
    "too few masks": (PAIR, {"mask": (torch.ones(2) > 0,)}, ValueError, "mask.*2.*1"),
    "second mask too large": (PAIR, {"mask": (None, torch.ones(3) > 0)}, ValueError, r"mask.*embed\[1\].*\(3,\)"),
}


@pytest.mark.parametrize("backend", ["torch", "auto"])
@pytest.mark.parametrize(("embed", "kwargs", "error", "says"), INPUTS.values(), ids=INPUTS)
def test_embeddings_and_masks(embed, kwargs, error, says, backend):
    eval_fn = counting()
    with pytest.raises(error, match=says):
        SMARTLoss(eval_fn, kl_loss, backend=backend)(embed, torch.randn(2, 3), **kwargs)
    assert eval_fn.calls == 0


def test_a_generator_of_another_device():
    eval_fn = counting()
    with pytest.raises(ValueError, match=r"generator.*meta.*cpu"):
        SMARTLoss(eval_fn, kl_loss, generator=torch.Generator())(META, torch.randn(2, 3))
    assert eval_fn.calls == 0


@pytest.mark.parametrize("state", [3.0, "state", [torch.zeros(2, 3), 1]])
def test_states_of_the_wrong_type(state):
    eval_fn = counting()
    with pytest.raises(TypeError, match="state"):
        SMARTLoss(eval_fn, F.mse_loss)(E25, state)
    assert eval_fn.calls == 0


def test_losses_that_do_not_match_the_state_are_found_before_eval_fn_runs():
    eval_fn = counting()
    for losses in ({"loss_fn": [kl_loss] * 3}, {"loss_fn": kl_loss, "loss_last_fn": [kl_loss] * 3}):
        with pytest.raises(ValueError, match=r"list of 3.*list of 2"):
            SMARTLoss(eval_fn, **losses)(E25, [torch.zeros(2, 3)] * 2)
    assert eval_fn.calls == 0


def test_what_loss_fn_and_eval_fn_return():
    net = nn.Linear(5, 3)
    with pytest.raises(ValueError, match=r"loss_fn.*scalar.*\(2, 3\)"):
        SMARTLoss(net, lambda p, s: p - s)(E25, net(E25))
    with pytest.raises(TypeError, match=r"loss_fn.*float"):
        SMARTLoss(net, lambda p, s: 0.0)(E25, net(E25))
    with pytest.raises(RuntimeError, match="eval_fn"):
        SMARTLoss(lambda x: torch.zeros(2, 3), F.mse_loss)(E25, net(E25))
    with pytest.raises(RuntimeError, match="eval_fn"):
        SMARTLoss(lambda x: net(E25), F.mse_loss)(E25, net(E25))
    with pytest.raises(RuntimeError, match=r"perturbed embeddings \[1\]"):
        SMARTLoss(lambda a, b: net(a), F.mse_loss)(PAIR, net(E25))


def test_sentence_norm():
    with pytest.raises(TypeError, match="norm_fn"):
        sentence_norm("l2")
    with pytest.raises(ValueError, match=r"sentence_norm.*\(5,\)"):
        SMARTLoss(nn.Linear(5, 3), kl_loss, norm_fn=sentence_norm(smart_fast.l2_norm))(E25[0], torch.zeros(3))


LOGITS = {
    "no tensor": (([1.0], E25), {}, TypeError, "input.*list"),
    "no target": ((E25, None), {}, TypeError, "target.*NoneType"),
    "integers": ((E25.long(), E25), {}, TypeError, "input.*int64"),
    "integer target": ((E25, E25.long()), {}, TypeError, "target.*int64"),
    "no classes": ((E25[:, :0], E25[:, :0]), {}, ValueError, "input.*last dimension"),
    "classes": ((E25, E25[:, :4]), {}, ValueError, r"input.*target.*\(2, 5\).*\(2, 4\)"),
    "rows": ((E25, torch.randn(3, 5)), {}, ValueError, r"input.*target.*\(2, 5\).*\(3, 5\)"),
    "one class against five": ((E25, E25[:, :1]), {}, ValueError, r"input.*target"),
    "devices": ((E25, META), {}, ValueError, "input.*target.*cpu.*meta"),
    "reduction": (PAIR, {"reduction": "median"}, ValueError, "reduction.*batchmean.*median"),
    "reduction type": (PAIR, {"reduction": None}, TypeError, "reduction.*NoneType"),
    "mask dtype": (PAIR, {"mask": torch.ones(2)}, TypeError, "mask.*float32"),
    "mask type": (PAIR, {"mask": [True, True]}, TypeError, "mask.*list"),
    "mask shape": (PAIR, {"mask": torch.ones(2, 5) > 0}, ValueError, r"mask.*\(2,\).*\(2, 5\)"),
    "mask device": (PAIR, {"mask": (META > 0)[:, 0]}, ValueError, "mask.*meta"),
    "mask of a broadcast": ((E25, E25[0]), {"mask": torch.ones(2) > 0}, ValueError, "same shape"),
    "backend": (PAIR, {"backend": "tritn"}, ValueError, "backend.*tritn.*torch.*triton.*native"),
    "backend type": (PAIR, {"backend": 1}, TypeError, "backend.*int"),
}


@pytest.mark.parametrize(("pair", "kwargs", "error", "says"), LOGITS.values(), ids=LOGITS)
@every_loss
def test_losses(loss_fn, pair, kwargs, error, says):
    with pytest.raises(error, match=says):
        loss_fn(*pair, **kwargs)


@pytest.mark.parametrize(
    ("alpha", "error"), [(NAN, ValueError), (-INF, ValueError), ("1", TypeError), (None, TypeError)]
)
@pytest.mark.parametrize("loss_fn", LOSSES[1:])
def test_alpha(loss_fn, alpha, error):
    with pytest.raises(error, match="alpha"):
        loss_fn(E25, E25, alpha=alpha)


@pytest.mark.parametrize(
    ("temperature", "error"),
    [
        *((value, ValueError) for value in (0.0, -1.0, NAN, INF)),
        *((value, TypeError) for value in ("1", None, True, torch.tensor(2.0))),
    ],
)
@pytest.mark.parametrize("loss_fn", [kl_loss, sym_kl_loss, js_loss])
def test_temperature(loss_fn, temperature, error):
    with pytest.raises(error, match="temperature"):
        loss_fn(E25, E25, temperature=temperature)


def test_epsilon_of_the_stable_loss():
    with pytest.raises(ValueError, match="epsilon"):
        stable_sym_kl_loss(E25, E25, epsilon=NAN)
    with pytest.raises(TypeError, match="epsilon"):
        stable_sym_kl_loss(E25, E25, epsilon="small")


@every_loss
def test_additions_to_the_losses_are_keyword_only(loss_fn):
    with pytest.raises(TypeError, match="positional"):
        loss_fn(E25, E25, "sum", 1.0, None)


@pytest.mark.parametrize("name", ["input", "target"])
def test_complex_logits(name):
    pair = {"input": torch.randn(2, 3), "target": torch.randn(2, 3)}
    pair[name] = pair[name].to(torch.complex64)
    with pytest.raises(TypeError, match=name):
        smart_fast.sym_kl_loss(**pair)
