"""smart-fast: SMART regularization (Jiang et al., ACL 2020) for PyTorch, in fused kernels."""

from pathlib import Path as _Path

_here = _Path(__file__).resolve().parent
if not (_here / "kernels").is_dir() and (_here.parent / "kernels" / "philox.py").is_file():
    # A source checkout: the kernels, installed as smart_fast.kernels, still lie beside this package.
    __path__.append(str(_here.parent))

from . import linear as linear  # noqa: E402
from . import loss as loss  # noqa: E402
from . import recipes  # noqa: E402
from .backends import BackendFallbackWarning, available_backends, empty_cache, set_default_backend  # noqa: E402
from .diagnostics import ascent_ratio  # noqa: E402
from .layers import at_layer  # noqa: E402
from .losses.linear import LinearDivergence, linear_js_loss, linear_jsd_loss, linear_kl_loss, linear_sym_kl_loss  # noqa: E402
from .losses.logits import hellinger_loss, js_loss, jsd_loss, kl_loss, stable_sym_kl_loss, sym_kl_loss  # noqa: E402
from .methods.alice import AliceLoss  # noqa: E402
from .methods.bregman import BregmanProximal, paper_beta  # noqa: E402
from .norms import inf_norm, l1_norm, l2_norm, sentence_norm  # noqa: E402
from .perturbing import Perturbation, perturbation  # noqa: E402
from .smart import SMARTLoss  # noqa: E402
from .training.checkpointing import checkpointed  # noqa: E402

__version__ = "0.1.0"

__all__ = [
    "AliceLoss",
    "BackendFallbackWarning",
    "BregmanProximal",
    "LinearDivergence",
    "Perturbation",
    "SMARTLoss",
    "ascent_ratio",
    "at_layer",
    "available_backends",
    "checkpointed",
    "empty_cache",
    "hellinger_loss",
    "inf_norm",
    "js_loss",
    "jsd_loss",
    "kl_loss",
    "l1_norm",
    "l2_norm",
    "linear_js_loss",
    "linear_jsd_loss",
    "linear_kl_loss",
    "linear_sym_kl_loss",
    "paper_beta",
    "perturbation",
    "recipes",
    "sentence_norm",
    "set_default_backend",
    "stable_sym_kl_loss",
    "sym_kl_loss",
]
