"""How fast smart-fast is, against whom: ``python -m bench``, or ``pytest bench --benchmark-only``."""
