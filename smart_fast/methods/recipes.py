"""Settings of published methods as keyword arguments, for one of the two tools that share the loop:

    SMARTLoss(eval_fn, kl_loss, sym_kl_loss, **recipes.SIFT)           SMART_PAPER SIFT R3F ALUM VAT R_DROP RECOMMENDED
    perturbation(loss_of, embed, mask=mask, **recipes.CAT)             FREELB TRADES NEFTUNE LAT CAT

What differs beyond these numbers, which embedding is perturbed and how the loss is weighted, is said beside each.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ..losses.logits import kl_loss
from ..norms import inf_norm, l2_norm, sentence_norm

__all__ = [
    "ALUM", "CAT", "FREELB", "LAT", "NEFTUNE", "R3F", "R3F_UNIFORM", "RECOMMENDED", "R_DROP", "SIFT", "SMART_PAPER",
    "TRADES", "VAT", "half_sym_kl", "uniform_within",
]  # fmt: skip


def _recipe(**settings: Any) -> MappingProxyType[str, Any]:
    return MappingProxyType(settings)


def uniform_within(magnitude: float, embed: Tensor) -> float:
    """The ``noise_var`` of uniform noise on +-magnitude / sqrt(S D), of an embedding ``[..., S, D]``: NEFTune's alpha,
    FreeLB's adv_init_mag. S counts padding too, as NEFTune's code does."""
    return float(magnitude / (3 * embed.shape[-1] * embed.shape[-2]) ** 0.5)


def half_sym_kl(input: Tensor, target: Tensor, reduction: str = "batchmean", **options: Any) -> Tensor:
    """R-Drop's loss of two passes' logits ``[..., V]``: (KL(p || q) + KL(q || p)) / 2, with gradients to both sides.
    ``options``: those of `kl_loss`, which raises what that raises."""
    both = kl_loss(input, target, reduction, **options), kl_loss(target, input, reduction, **options)
    return (both[0] + both[1]) / 2


# ---- SMARTLoss -------------------------------------------------------------------------------------------------------

#: Jiang et al., "SMART", ACL 2020, Algorithm 1 and section 4.1: word embeddings; weight 1, 3 or 5. The ball is so small
#: that it takes fp32 embeddings.
SMART_PAPER = _recipe(
    update="paper", norm_fn=inf_norm, num_steps=1, step_size=1e-3, epsilon=1e-5, noise_var=1e-5
)  # fmt: skip

#: He et al., "DeBERTa", ICLR 2021, and its code (SiFT): word embeddings are layer-normalized first, which the relative
#: scale stands for; a symmetric KL in the ascent too.
SIFT = _recipe(
    update="sift", norm_fn=inf_norm, num_steps=1, step_size=1e-4, epsilon=1e-6, noise_var=1e-2, scale="relative"
)  # fmt: skip

#: Aghajanyan et al., "Better fine-tuning by reducing representational collapse", ICLR 2021: noise, no ascent; weight
#: 0.1 to 5.
R3F = _recipe(num_steps=0, noise_var=1e-5)

#: The same with its other noise, uniform on +-1e-5.
R3F_UNIFORM = _recipe(num_steps=0, noise_var=1e-5 / 3**0.5, noise="uniform")

#: Liu et al., "Adversarial training for large neural language models", 2020: word embeddings; weight 10 in
#: pretraining, 1 in fine-tuning.
ALUM = _recipe(update="smart-pytorch", norm_fn=inf_norm, num_steps=1, step_size=1e-3, epsilon=1e-5, noise_var=1e-5)

#: Miyato et al., "Adversarial training methods for semi-supervised text classification", ICLR 2017: normalized word
#: embeddings, all words of a sentence as one vector moved by 5; KL, to the clean output as a constant.
VAT = _recipe(
    update="paper", norm_fn=sentence_norm(l2_norm), num_steps=1, step_size=5.0, epsilon=5.0, noise_var=1e-3
)  # fmt: skip

#: Ours, chosen by ``python -m bench quality``: a step so long that nearly every entry reaches the edge of its ball, of
#: 0.3 of each token's root mean square. It suits word embeddings and normalized ones, in every precision.
RECOMMENDED = _recipe(
    update="paper", norm_fn=inf_norm, num_steps=1, step_size=30.0, epsilon=0.3, noise_var=0.03, scale="relative"
)  # fmt: skip

#: Liang et al., "R-Drop: regularized dropout for neural networks", NeurIPS 2021, equation 2: no noise, a second pass
#: with other dropout masks; loss_last_fn=`half_sym_kl`, weight 0.5 to 5, and cross-entropies of both passes.
R_DROP = _recipe(num_steps=0, noise_var=0.0)


# ---- perturbation ----------------------------------------------------------------------------------------------------

#: Zhu et al., "FreeLB: enhanced adversarial training for natural language understanding", ICLR 2020, Algorithm 1, with
#: its code's settings for QQP: word embeddings, the loss of the task, the l2 ball of a whole sentence. Give
#: noise_var=`uniform_within`(0.32, embed) (the code counts real tokens alone), and finish as `perturbation` says. Its
#: three points are the first one and what two steps lead to. The code draws one dropout mask for all points, our model
#: one for each.
FREELB = _recipe(
    update="paper", norm=sentence_norm(l2_norm), num_steps=2, step_size=0.2, epsilon=0.7, noise="uniform",
    scale="absolute", accumulate=True,
)  # fmt: skip

#: Zhang et al., "Theoretically principled trade-off between robustness and accuracy", ICML 2019, Algorithm 1, with its
#: code's settings for CIFAR-10 (images in [0, 1]): loss_of is the KL divergence from the clean output, detached, and
#: beta = 6 times that divergence at the end is added to the clean cross-entropy. The code runs the ascent in eval mode,
#: and clamps after each step; here the first point is clamped, too.
TRADES = _recipe(
    update="sign", num_steps=10, step_size=0.003, epsilon=0.031, noise_var=1e-3, scale="absolute", bounds=(0.0, 1.0)
)  # fmt: skip

#: Jain et al., "NEFTune: noisy embeddings improve instruction finetuning", ICLR 2024, Algorithm 1: noise on the word
#: embeddings, no ascent. Give noise_var=`uniform_within`(alpha, embed) with alpha 5, 10 or 15.
NEFTUNE = _recipe(num_steps=0, step_size=0.0, epsilon=0.0, noise="uniform", scale="absolute")


def _adamw(noise: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(noise, lr=1e-2)


#: Sheshadri et al., "Latent adversarial training improves robustness to persistent harmful behaviors in LLMs", 2024
#: (and Casper et al., 2024, untargeted): hidden states of an inner layer (`smart_fast.at_layer`), AdamW from no noise,
#: the l2 ball of each token, toward a harmful completion, mask=prompt. The code attacks several layers at once, each
#: with an attack of its own; the radius is one for Llama's hidden states.
LAT = _recipe(
    update="paper", norm=l2_norm, num_steps=16, step_size=0.0, epsilon=6.0, noise_var=0.0, scale="absolute",
    targeted=True, optimizer=_adamw,
)  # fmt: skip

#: Xhonneux et al., "Efficient adversarial training in LLMs with continuous attacks", NeurIPS 2024: word embeddings of
#: the prompt (mask=prompt), sign steps toward a harmful completion, a ball of 0.05 of an embedding's norm. Ours is the
#: box inside of that l2 ball, in units of each token's own root mean square, where the code takes the mean norm of the
#: vocabulary and a length of 1e-4 a step.
CAT = _recipe(
    update="sign", num_steps=10, step_size=0.01, epsilon=0.05, noise_var=0.0, scale="relative", targeted=True
)  # fmt: skip
