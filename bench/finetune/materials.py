"""The real `Materials`: MiniLM and the sentences, from the cache."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Sequence

import torch
from torch import nn

from . import data
from .train import LENGTH, Materials


def load(device: torch.device, cache: pathlib.Path = data.CACHE) -> Materials:
    """Raises RuntimeError where a package is missing."""
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()  # that the head is new, each time
    logging.disable_progress_bar()
    folder, found = data.encoder_folder(cache), data.sentences(cache)
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def model(start: str, outputs: int) -> nn.Module:
        if start == "random":
            config = AutoConfig.from_pretrained(folder, num_labels=outputs)
            made = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
        else:
            made = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=outputs, dtype=torch.float32)
        return made  # type: ignore[no-any-return]

    def encode(texts: Sequence[str]) -> list[list[int]]:
        return tokenizer(list(texts), truncation=True, max_length=LENGTH)["input_ids"]  # type: ignore[no-any-return]

    return Materials(model, encode, functools.cache(lambda neutral: data.split(found, neutral=neutral)), device)
