"""`LinearDivergence` of heads that PEFT has adapted, against the model's own logits. Importing PEFT takes its time."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from smart_fast import LinearDivergence, SMARTLoss, linear_sym_kl_loss, sym_kl_loss
from smart_fast.losses import heads
from tests import oracle
from tests.test_linear_modules import Body, check, gradients, sides, whole

HIDDEN, VOCABULARY = 12, 40

pytestmark = [pytest.mark.exhaustive, pytest.mark.usefixtures("pytorch_by_default")]

LORA: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "lora with a bias": {"lora_bias": True},
    "lora with dropout": {"lora_dropout": 0.5},
    "dora with dropout": {"lora_dropout": 0.5, "use_dora": True},
}


@pytest.fixture
def peft() -> Any:
    return pytest.importorskip("peft")


def shaken(model: nn.Module) -> nn.Module:
    """Adapters start as nothing."""
    with torch.no_grad():
        for each in model.parameters():
            if each.requires_grad:
                each += 0.3 * torch.randn_like(each)
    return model


def adapted(peft: Any, bias: bool = True, **options: Any) -> nn.Module:
    """The head of a model with adapters around body and head."""
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["head", "body"], **options)
    return shaken(peft.get_peft_model(Body(nn.Linear(HIDDEN, VOCABULARY, bias=bias)), config)).head


@pytest.mark.parametrize("name", LORA)
@pytest.mark.parametrize("kind", ["kl", "sym_kl"])
def test_adapters_are_part_of_it(kind: str, name: str, peft: Any) -> None:
    head, given = adapted(peft, **LORA[name]).double(), sides(9)
    assert isinstance(head, peft.tuners.lora.Linear)
    assert heads.is_affine(head) == ("dropout" not in name)
    found = []
    for loss in (lambda: LinearDivergence(head, kind=kind, reduction="sum")(*given),
                 lambda: whole(kind, given, head, head).sum()):  # fmt: skip
        torch.manual_seed(0)
        found.append(gradients(loss(), given, head))
    assert len(found[0]) >= 5
    check(*found, 1e-9)
    head.eval()
    assert heads.is_affine(head)
    weights = {"lora_A", "lora_B"} | ({"lora_magnitude_vector"} if "dora" in name else set())
    assert {each.split(".")[0] for each, p in head.named_parameters() if p.requires_grad} == weights
    plain = linear_sym_kl_loss(*given, head.weight, head.bias)
    assert oracle.relative_error(LinearDivergence(head)(*given), plain) > 0.01  # what the weight alone leaves out


def test_adapters_that_are_off_or_merged(peft: Any) -> None:
    head, given = adapted(peft).double(), sides(9)
    module = LinearDivergence(head)
    on = module(*given)
    head.enable_adapters(False)
    torch.testing.assert_close(module(*given), linear_sym_kl_loss(*given, head.weight, head.bias))
    head.enable_adapters(True)
    head.merge()
    torch.testing.assert_close(module(*given), on)


@pytest.mark.parametrize("name", ["lora", "dora"])
def test_nearly_equal_sides_keep_their_digits(name: str, peft: Any) -> None:
    """The difference of logits is the module's product with that of the hidden states."""
    head, given = adapted(peft, **LORA[name]), sides(64, apart=1e-5, dtype=torch.float32)
    exact = copy.deepcopy(head).double()
    want = whole("sym_kl", [each.double() for each in given], exact, exact).sum()
    assert oracle.relative_error(LinearDivergence(head)(*given), want) < 1e-4
    assert oracle.relative_error(whole("sym_kl", given, head, head).sum(), want) > 1e-3
    half, states = adapted(peft, bias=False, **LORA[name]).bfloat16(), [each.detach().bfloat16() for each in sides(64)]
    states[0] = states[1] * (1 + 2**-7)
    exact = copy.deepcopy(half).double()
    want = whole("sym_kl", [each.double() for each in states], exact, exact).sum()
    assert oracle.relative_error(LinearDivergence(half)(*states), want) < 0.05


def test_modules_to_save(peft: Any) -> None:
    """The active copy is read as any Linear; the original while adapters are off."""
    base = Body(nn.Linear(HIDDEN, VOCABULARY))
    model = peft.get_peft_model(base, peft.LoraConfig(r=3, target_modules=["body"], modules_to_save=["head"]))
    model = shaken(model).double()
    head, given = model.base_model.model.head, sides(9)
    module = LinearDivergence(head, reduction="sum")
    assert heads.of_module(head)[0] is head.modules_to_save["default"].weight
    check(gradients(module(*given), given, head), gradients(whole("sym_kl", given, head, head).sum(), given, head))
    with model.disable_adapter():
        assert heads.of_module(head)[0] is head.original_module.weight
        torch.testing.assert_close(module(*given), whole("sym_kl", given, head, head).sum())


OTHERS: dict[str, dict[str, Any]] = {
    "IA3Config": {"feedforward_modules": []},
    "LoHaConfig": {},
    "VeraConfig": {},
    "OFTConfig": {"oft_block_size": 4, "r": 0},
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_adapters(name: str, peft: Any) -> None:
    """Whatever their forward pass is: it is called for both sides."""
    options = (
        {"feedforward_modules": []} if name == "IA3Config" else {"oft_block_size": 4, "r": 0} if "OFT" in name else {}
    )
    config = getattr(peft, name)(target_modules=["head"], **options)
    head, given = shaken(peft.get_peft_model(Body(nn.Linear(HIDDEN, VOCABULARY)), config)).double().head, sides(9)
    assert not heads.is_affine(head)
    want = gradients(whole("jsd", given, head, head).sum(), given, head)
    assert len(want) > 3
    check(gradients(LinearDivergence(head, kind="jsd", reduction="sum")(*given), given, head), want, 1e-9)


def test_a_causal_language_model(peft: Any) -> None:
    """Adapters on body and head of a Gemma 2, whose softcap is part of its logits: SMART by hidden states is SMART by
    the model's own logits."""
    transformers = pytest.importorskip("transformers")
    config = transformers.Gemma2Config(
        vocab_size=97, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, final_logit_softcapping=2.0, tie_word_embeddings=False,
        attn_implementation="eager",
    )  # fmt: skip
    lora = peft.LoraConfig(r=3, target_modules=["q_proj", "down_proj", "lm_head"])
    model = shaken(peft.get_peft_model(transformers.Gemma2ForCausalLM(config), lora)).double()
    causal = model.get_base_model()
    ids = torch.randint(0, 97, (2, 7))
    embed = model.get_input_embeddings()(ids).detach().requires_grad_()

    def states(embed: Tensor) -> Tensor:
        return causal.model(inputs_embeds=embed, use_cache=False).last_hidden_state

    def logits(embed: Tensor) -> Tensor:
        return model(inputs_embeds=embed, use_cache=False).logits

    head = model.get_output_embeddings()
    assert head is causal.lm_head
    linear = LinearDivergence(head, reduction="batchmean", logit_softcap=config.final_logit_softcapping)
    found = []
    for eval_fn, loss_fn in ((states, linear), (logits, lambda x, t: sym_kl_loss(x, t, "batchmean"))):
        torch.manual_seed(0)
        smart = SMARTLoss(eval_fn, loss_fn, step_size=1.0, noise_var=0.1, backend="torch")
        found.append(gradients(smart(embed, eval_fn(embed)), [embed], model))
    assert len(found[0]) == 2 + 2 * (2 * 2 + 1)
    check(*found, 1e-7)


def test_four_bits(peft: Any) -> None:
    """A frozen weight of bytes, by itself and with an adapter."""
    bnb = pytest.importorskip("bitsandbytes")
    base = bnb.nn.Linear4bit(64, 96, bias=False, compute_dtype=torch.float32)
    base.weight = bnb.nn.Params4bit(torch.randn(96, 64) / 8, requires_grad=False)
    base = base.to("cpu")
    assert base.weight.dtype == torch.uint8
    given = [torch.randn(20, 64, requires_grad=True) for _ in range(2)]
    want = gradients(whole("kl", given, base, base).sum(), given)
    check(gradients(LinearDivergence(base, kind="kl", reduction="sum")(*given), given), want, 1e-5)
    model = nn.Module()
    model.head = base
    config = peft.LoraConfig(r=3, target_modules=["head"])
    head = shaken(peft.get_peft_model(model, config)).head
    want = gradients(whole("kl", given, head, head).sum(), given, head)
    assert len(want) == 5
    check(gradients(LinearDivergence(head, kind="kl", reduction="sum")(*given), given, head), want, 1e-5)
