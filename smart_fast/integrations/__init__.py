"""SMART in the training loops of other packages. Nothing here is imported by ``import smart_fast``."""
