"""What causes it? Ablate heads, patch activations, edges and weights, and measure what changes."""
