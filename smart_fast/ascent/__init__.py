"""What finds the direction of the ascent, and how `eval_fn` runs meanwhile. Knows nothing of SMARTLoss."""
