"""A tiny model, with random weights, of every architecture that transformers lists for text."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.models.auto import modeling_auto

KINDS, WORDS, ROWS, LENGTH = 3, 64, 2, 32
TASKS = {
    "sequence classification": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    "token classification": modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    "masked words": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING,
    "next words": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING,
    "sequence to sequence": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
}
MOST_PARAMETERS = 5_000_000

#: Sizes by the ends of the names that configurations have for them, the first that fits.
SIZES: tuple[tuple[tuple[str, ...], int], ...] = (
    (("vocab_size", "vocab_size_per_layer_input"), WORDS),
    (("type_vocab_size", "num_experts_per_tok", "moe_topk", "moe_k", "num_shared_experts", "n_shared_experts"), 1),
    (("first_k_dense_replace", "n_group", "topk_group", "moe_num_shared_experts", "n_groups"), 1),
    (("max_position_embeddings", "n_positions", "n_ctx", "max_source_positions", "max_target_positions"), 128),
    (("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers"), 2),
    (("num_decoder_layers", "num_encoder_layers"), 2),
    (("num_key_value_heads", "num_kv_heads", "multi_query_group_num", "n_kv_heads"), 2),
    (("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads", "encoder_attention_heads"), 4),
    (("decoder_attention_heads",), 4),
    (("hidden_size", "d_model", "n_embd", "dim", "emb_dim", "embedding_size", "embed_dim", "model_dim"), 32),
    (("intermediate_size", "ffn_dim", "d_ff", "n_inner", "encoder_ffn_dim", "decoder_ffn_dim", "hidden_dim"), 32),
    (("shared_expert_intermediate_size", "moe_intermediate_size", "ffn_hidden_size"), 32),
    (("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    (("head_dim", "d_kv", "d_head", "qk_nope_head_dim", "v_head_dim", "qk_rope_head_dim"), 8),
    (("q_lora_rank", "kv_lora_rank"), 8),
    (("hidden_size_per_layer_input", "rotary_dim"), 8),
    (("entity_vocab_size", "shape_vocab_size", "pronunciation_vocab_size", "num_latents"), 64),
    (("d_latents",), 32),
)
_MAY_BE_NONE = ("head_dim", "num_key_value_heads", "vocab_size")
#: What the sizes of a few models are beside their names.
SPECIAL: dict[str, dict[str, Any]] = {
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "xmod": {"languages": ("en_XX",), "default_language": "en_XX"},
    "lilt": {"channel_shrink_ratio": 1},
}
_BY_NAME = {name: size for names, size in SIZES for name in names}


def tiny(config_class: type[PretrainedConfig]) -> PretrainedConfig:
    """A configuration of few parameters: the defaults, with `SIZES` in place of theirs."""
    usual = config_class()
    given = {name: size for name, size in _BY_NAME.items() if _takes(usual, name)}
    if "kv_lora_rank" in given:  # latent attention, of as many heads
        given["num_key_value_heads"] = given.get("num_attention_heads", 4)
    given |= {"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 2, "decoder_start_token_id": 2}
    for name in getattr(config_class, "sub_configs", {}):
        if isinstance(part := getattr(usual, name, None), PretrainedConfig):
            given[name] = tiny(type(part))
    if isinstance(getattr(usual, "layer_types", None), list) and not isinstance(
        getattr(config_class, "layer_types", None), property
    ):
        given["layer_types"] = usual.layer_types[:2]
    return config_class(**given, **SPECIAL.get(usual.model_type, {}))


def _takes(config: Any, name: str) -> bool:
    """Whether a configuration has a size of that name, which it lets one set."""
    try:
        value = getattr(config, name, "")
        if isinstance(value, bool) or not (isinstance(value, int) or (value is None and name in _MAY_BE_NONE)):
            return False
        setattr(config, name, _BY_NAME[name])
    except (AttributeError, NotImplementedError):  # sizes that a configuration derives from others
        return False
    return True


def inputs_of(task: str, config: PretrainedConfig) -> dict[str, Tensor]:
    """A batch without padding, which ends with the token that some models take the class from."""
    ids = torch.randint(3, WORDS, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    ids[:, -1] = 2
    labels = {"sequence classification": ids[:, 0] % KINDS, "token classification": ids % KINDS}.get(task, ids.clone())
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def models_of(task: str) -> dict[str, tuple[type[PretrainedConfig], Any]]:
    """The classes that are listed for a task, by name, with their configurations'."""
    found = {}
    for config_class, listed in TASKS[task].items():
        for each in listed if isinstance(listed, (list, tuple)) else (listed,):
            found[each.__name__] = (config_class, each)
    return found


def build(config_class: type[PretrainedConfig], model_class: Any) -> nn.Module:
    """
    Raises:
        ValueError: the model is not tiny: `SIZES` do not know the names of its sizes.
    """
    torch.manual_seed(0)
    config = tiny(config_class)
    if config.model_type == "encoder-decoder":
        config.decoder.is_decoder = config.decoder.add_cross_attention = True
    config.num_labels = KINDS
    with torch.device("meta"):
        count = sum(each.numel() for each in model_class(config).parameters())
    if count > MOST_PARAMETERS:
        raise ValueError(f"{count} parameters")
    return model_class(config)
