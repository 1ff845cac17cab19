"""Training loops, averaging, metrics and cost measures."""
