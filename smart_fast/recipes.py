"""The recipes of `smart_fast.methods.recipes`."""

from .methods.recipes import (
    ALUM,
    CAT,
    FREELB,
    LAT,
    NEFTUNE,
    R3F,
    R3F_UNIFORM,
    R_DROP,
    RECOMMENDED,
    SIFT,
    SMART_PAPER,
    TRADES,
    VAT,
    half_sym_kl,
    uniform_within,
)

__all__ = [
    "ALUM",
    "CAT",
    "FREELB",
    "LAT",
    "NEFTUNE",
    "R3F",
    "R3F_UNIFORM",
    "RECOMMENDED",
    "R_DROP",
    "SIFT",
    "SMART_PAPER",
    "TRADES",
    "VAT",
    "half_sym_kl",
    "uniform_within",
]
