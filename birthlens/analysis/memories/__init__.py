"""What does a matrix remember? Read from weights alone; no torch, no TransformerLens."""
