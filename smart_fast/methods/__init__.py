"""Methods beside SMARTLoss, and settings of published ones."""
