"""The recipes of `smart_fast.methods.recipes`."""

from .methods.recipes import ALUM, R3F, RECOMMENDED, SIFT, SMART_PAPER, VAT

__all__ = ["ALUM", "R3F", "RECOMMENDED", "SIFT", "SMART_PAPER", "VAT"]
