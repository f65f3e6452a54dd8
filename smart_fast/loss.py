"""The import path of `smart_pytorch.loss`: the losses of `smart_fast.losses.logits`."""

from .losses.logits import hellinger_loss, js_loss, jsd_loss, kl_loss, stable_sym_kl_loss, sym_kl_loss

__all__ = ["hellinger_loss", "js_loss", "jsd_loss", "kl_loss", "stable_sym_kl_loss", "sym_kl_loss"]
