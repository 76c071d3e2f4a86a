"""The effect of clamps on the weights, the settings, and the forward pass of training."""
