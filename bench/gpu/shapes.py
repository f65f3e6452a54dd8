"""What the stages measure: in full on a GPU, tiny in the dry run. Vocabularies of Llama 2, Llama 3 and BERT, widths of
base and large encoders; rows so many that every tensor is several times the L2 cache."""

from __future__ import annotations

from typing import NamedTuple

import torch

from . import lines

FP32, BF16 = torch.float32, torch.bfloat16


class Shapes(NamedTuple):
    embeds: tuple[tuple[int, ...], ...]
    logits: tuple[tuple[int, int], ...]
    dtypes: tuple[torch.dtype, ...]
    #: `SMARTLoss` of a head on pooled features: batch, width, classes.
    heads: tuple[tuple[int, int, int], ...]
    #: Logits against torch.compile: rows, V, dtype.
    rivals: tuple[tuple[int, int, torch.dtype], ...]
    #: Projected hidden states against torch.compile: rows, H, V, dtype.
    linear: tuple[int, int, int, torch.dtype]
    #: A training step: layers, width, batch, tokens.
    bert: tuple[int, int, int, int]


FULL = Shapes(
    embeds=((64, 1024, 768), (64, 1024, 1024)),
    logits=((8192, 32000), (4096, 128256), (8192, 30522)),
    dtypes=(BF16, FP32),
    heads=((32, 768, 3), (1, 8, 2)),
    rivals=((8192, 32000, BF16), (4096, 30522, FP32)),
    linear=(4096, 2048, 32000, BF16),
    bert=(12, 768, 16, 128),
)
TINY = Shapes(
    embeds=((4, 32),),
    logits=((4, 30),),
    dtypes=(FP32,),
    heads=((2, 8, 3),),
    rivals=((4, 50, FP32),),
    linear=(8, 6, 50, FP32),
    bert=(1, 64, 2, 8),
)


def shapes() -> Shapes:
    return TINY if lines.dry_run() else FULL
