"""Clamps at work: what they do to the weights, to the settings, and to the forward pass of a training."""
