"""The divergences: of logits, of projected hidden states, of vocabularies that are sharded."""
