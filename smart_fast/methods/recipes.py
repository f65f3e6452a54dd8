"""Settings of published methods as keyword arguments: ``SMARTLoss(eval_fn, kl_loss, sym_kl_loss, **recipes.SIFT)``.

What differs beyond these numbers, which embedding is perturbed and how the loss is weighted, is said beside each.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

from ..norms import inf_norm, l2_norm, sentence_norm

__all__ = ["ALUM", "R3F", "RECOMMENDED", "SIFT", "SMART_PAPER", "VAT"]


def _recipe(**settings: Any) -> MappingProxyType[str, Any]:
    return MappingProxyType(settings)


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
