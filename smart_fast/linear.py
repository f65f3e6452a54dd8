"""The losses of `smart_fast.losses.linear`."""

from .losses.linear import LinearDivergence, linear_js_loss, linear_jsd_loss, linear_kl_loss, linear_sym_kl_loss

__all__ = ["LinearDivergence", "linear_js_loss", "linear_jsd_loss", "linear_kl_loss", "linear_sym_kl_loss"]
