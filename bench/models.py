"""Models with random weights in the shapes of those that SMART fine-tunes, in the parts that it needs."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

LABELS = 3


class Model(nn.Module):
    """A transformers model: `words` embeds ids ``[B, S]``; the call makes logits of embedded words ``[B, S, D]``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model

    def words(self, ids: Tensor) -> Tensor:
        embed: Tensor = self.model.get_input_embeddings()(ids)
        return embed

    def forward(self, embed: Tensor) -> Tensor:
        logits: Tensor = self.model(inputs_embeds=embed).logits
        return logits

    @property
    def vocabulary(self) -> int:
        return int(self.model.config.vocab_size)


class LanguageModel(Model):
    """One with logits for every token, ``[B, S, V]``: `head` of the hidden states ``[B, S, H]``."""

    def hidden(self, embed: Tensor) -> Tensor:
        states: Tensor = self.model.model(inputs_embeds=embed).last_hidden_state
        return states

    @property
    def head(self) -> nn.Linear:
        found: nn.Linear = self.model.get_output_embeddings()
        return found


def _sizes(layers: int, width: int, vocabulary: int) -> dict[str, int]:
    return {
        "num_hidden_layers": layers,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_attention_heads": max(1, width // 64),
        "vocab_size": vocabulary,
    }


# A classifier whose input is embedded already never reads its vocabulary: its size matters to the optimizer alone.


def bert(layers: int, width: int, vocabulary: int = 1000) -> Model:
    """BERT-base is 12 x 768."""
    from transformers import BertConfig, BertForSequenceClassification

    return Model(BertForSequenceClassification(BertConfig(num_labels=LABELS, **_sizes(layers, width, vocabulary))))


def roberta(layers: int, width: int, vocabulary: int = 1000) -> Model:
    """RoBERTa-large is 24 x 1024."""
    from transformers import RobertaConfig, RobertaForSequenceClassification

    config = RobertaConfig(num_labels=LABELS, max_position_embeddings=514, **_sizes(layers, width, vocabulary))
    return Model(RobertaForSequenceClassification(config))


def deberta(layers: int, width: int, vocabulary: int = 1000) -> Model:
    """DeBERTa-v3-base is 12 x 768: disentangled attention to relative positions, no absolute ones."""
    from transformers import DebertaV2Config, DebertaV2ForSequenceClassification

    config = DebertaV2Config(
        num_labels=LABELS,
        relative_attention=True,
        position_buckets=256,
        pos_att_type=["p2c", "c2p"],
        share_att_key=True,
        norm_rel_ebd="layer_norm",
        position_biased_input=False,
        type_vocab_size=0,
        **_sizes(layers, width, vocabulary),
    )
    return Model(DebertaV2ForSequenceClassification(config))


def bert_masked_lm(layers: int, width: int, vocabulary: int = 30522) -> Model:
    """BERT's masked language model, with logits over the vocabulary for every token."""
    from transformers import BertConfig, BertForMaskedLM

    return Model(BertForMaskedLM(BertConfig(**_sizes(layers, width, vocabulary))))


def qwen2(layers: int, width: int, vocabulary: int = 151936) -> LanguageModel:
    """Qwen2.5-0.5B is 24 x 896: two heads of keys and values, word embeddings and head tied."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    sizes = _sizes(layers, width, vocabulary) | {"intermediate_size": width * 38 // 7}
    heads = min(2, sizes["num_attention_heads"])
    return LanguageModel(Qwen2ForCausalLM(Qwen2Config(num_key_value_heads=heads, tie_word_embeddings=True, **sizes)))


def pooled_head(width: int, classes: int) -> nn.Module:
    """RoBERTa's classification head on pooled features ``[B, D]``."""
    return nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, classes))
